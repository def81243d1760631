"""Convolutions and pooling of packed images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkern import ops, reference
from quantkern import triton as triton_twins
from quantkern.backend import Backend, resolve
from quantkern.binary.checks import WORD, Pair, check_operands, check_packed, check_signs, check_vector, pair
from quantkern.binary.signs import packed_of


def binary_conv2d(
    x: Tensor,
    weight_packed: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    channels: int | None = None,
    scale: Tensor | None = None,
    arranged: Tensor | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """The convolution of the signs of x with packed weights, for inference.

    Equal to ``conv2d`` of the two +-1 tensors to the last bit, zero padding included, then times scale[o], plus
    bias[o]. Source of the bit arithmetic: Courbariaux et al. 2016, section 1.5.

    Args:
        x: floating-point [N, C, H, W], whose signs are packed here, or packed already: int32 [N, H, W, words].
        weight_packed: int32 [O, kh, kw, words], ``pack_signs(weight, axis=1)``.
        bias, scale: float32 [O].
        stride, padding, dilation: as in ``torch.nn.functional.conv2d``.
        groups: 1; other values are an error.
        channels: C, needed where x is packed.
        arranged: ``arrange_signs(weight_packed)``. backend: see ``Backend``.

    Returns:
        [N, O, oh, ow] in x's dtype (float32 for packed x), channels last where x is.

    Raises:
        TypeError, ValueError: as ``binary_matmul``; groups other than 1; a kernel larger than the padded image.

    >>> from quantkern.functional import pack_signs
    >>> x, weight = torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3)
    >>> y = binary_conv2d(x, pack_signs(weight, axis=1), padding=1)
    >>> signs = [torch.where(t >= 0, 1.0, -1.0) for t in (x, weight)]
    >>> bool((y == torch.nn.functional.conv2d(*signs, padding=1)).all())
    True
    """
    if groups != 1:
        raise ValueError(f"binary_conv2d has no groups, got groups={groups}; use a layer a group")
    stride, padding = pair(stride, "stride", 1), pair(padding, "padding", 0)
    dilation = pair(dilation, "dilation", 1)
    if x.dim() != 4:
        raise ValueError(f"x must be images [N, C, H, W], or packed [N, H, W, words], got shape {list(x.shape)}")
    last = x.is_floating_point() and ops.is_channels_last(x)
    if x.is_floating_point():
        channels = x.shape[1]
        packed = packed_of(x, 1, backend)
    elif channels is None:
        raise ValueError("x is packed: say how many channels it holds with channels=")
    else:
        packed = x
    chosen = resolve(x, backend)
    if chosen is Backend.NATIVE:
        y: Tensor = torch.ops.quantkern.binary_conv2d.default(
            packed, weight_packed, channels, stride, padding, dilation, scale, bias, arranged, last
        )
    else:
        _check_images(packed, weight_packed, channels, stride, padding, dilation)
        for value, name in ((scale, "scale"), (bias, "bias")):
            check_vector(value, packed, weight_packed.shape[0], torch.float32, name)
        run = triton_twins.binary_conv2d_forward if chosen is Backend.TRITON else reference.binary_conv2d
        y = run(packed, weight_packed, channels, stride, padding, dilation, scale, bias)
        y = y.contiguous(memory_format=torch.channels_last) if last else y
    return y.to(x.dtype) if x.is_floating_point() else y


def _check_images(
    x: Tensor,
    weight: Tensor,
    channels: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    check_operands(x, weight, channels, 4, ("x", "weight"))
    check_kernel_fits(x.shape[1:3], weight.shape[1:3], stride, padding, dilation)


def check_kernel_fits(
    image: Sequence[int],
    kernel: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    """A kernel that has at least one place in the padded image."""
    if min(ops.conv_sizes(image, kernel, list(stride), list(padding), list(dilation))) < 1:
        raise ValueError(
            f"the kernel {list(kernel)} with dilation {list(dilation)} is larger than the image {list(image)} "
            f"with padding {list(padding)}"
        )


def binary_conv2d_sign(
    x_packed: Tensor,
    weight_packed: Tensor,
    channels: int,
    threshold: Tensor,
    flip: Tensor,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    *,
    arranged: Tensor | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """The packed signs of ``binary_conv2d`` at a threshold, as in ``binary_matmul_sign``.

    Args:
        x_packed: int32 [N, H, W, words]. weight_packed: int32 [O, kh, kw, words]. channels: C.
        threshold: int32 [O]. flip: int32 [ceil(O / 32)], packed.
        stride, padding, dilation, arranged, backend: as in ``binary_conv2d``.

    Returns:
        int32 [N, oh, ow, ceil(O / 32)].

    Raises:
        TypeError, ValueError: as ``binary_conv2d``; a threshold or flip of another type or length.

    >>> from quantkern.functional import pack_signs
    >>> x, weight = torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3)
    >>> at = torch.tensor([18], dtype=torch.int32)
    >>> packed = pack_signs(x, axis=1), pack_signs(weight, axis=1)
    >>> binary_conv2d_sign(*packed, 2, at, torch.zeros(1, dtype=torch.int32), padding=1).flatten().tolist()
    [0, 0, 0, 0, 1, 0, 0, 0, 0]
    """
    stride, padding = pair(stride, "stride", 1), pair(padding, "padding", 0)
    dilation = pair(dilation, "dilation", 1)
    chosen = resolve(x_packed, backend)
    if chosen is Backend.NATIVE:
        return torch.ops.quantkern.binary_conv2d_sign.default(  # type: ignore[no-any-return]
            x_packed, weight_packed, channels, stride, padding, dilation, threshold, flip, arranged
        )
    _check_images(x_packed, weight_packed, channels, stride, padding, dilation)
    check_signs(threshold, flip, x_packed, weight_packed.shape[0])
    run = triton_twins.binary_conv2d_sign_forward if chosen is Backend.TRITON else reference.binary_conv2d_sign
    return run(x_packed, weight_packed, channels, stride, padding, dilation, threshold, flip)


def packed_max_pool2d(
    x_packed: Tensor,
    flip: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    *,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """Max pooling that came before batch norm and sign, done after them on packed signs.

    The maximum of what a sign was taken of is the OR of the signs over the window; where flip has a 1 (a batch norm
    with a negative weight, which turns the maximum into a minimum) it is their AND. Padding takes no part.

    Args:
        x_packed: int32 [N, H, W, words]. flip: int32 [words].
        kernel_size, stride, padding: as in ``torch.nn.functional.max_pool2d``; stride None: kernel_size.

    Returns:
        int32 [N, oh, ow, words].

    Raises:
        TypeError: not int32. ValueError: padding beyond half the window, a window larger than the padded image, a flip
            of another length.

    >>> x = torch.tensor([1, 2, 4, 3], dtype=torch.int32).view(1, 2, 2, 1)
    >>> packed_max_pool2d(x, torch.tensor([2], dtype=torch.int32), 2).flatten().tolist()
    [5]
    """
    kernel = pair(kernel_size, "kernel_size", 1)
    step = kernel if stride is None else pair(stride, "stride", 1)
    padding = pair(padding, "padding", 0)
    chosen = resolve(x_packed, backend)
    if chosen is Backend.NATIVE:
        return torch.ops.quantkern.packed_max_pool2d.default(x_packed, flip, kernel, step, padding)  # type: ignore[no-any-return]
    check_packed(x_packed, x_packed.shape[-1] * WORD, "x", 4)
    check_vector(flip, x_packed, x_packed.shape[-1], torch.int32, "flip")
    sizes = ops.conv_sizes(x_packed.shape[1:3], kernel, list(step), list(padding), [1, 1])
    if any(2 * p > size for p, size in zip(padding, kernel, strict=True)) or min(sizes) < 1:
        raise ValueError(
            f"padding must be at most half of kernel_size and the window no larger than the padded image; got "
            f"kernel_size={kernel}, padding={padding}, image {list(x_packed.shape[1:3])}"
        )
    run = triton_twins.packed_max_pool2d_forward if chosen is Backend.TRITON else reference.packed_max_pool2d
    return run(x_packed, flip, kernel, step, padding)
