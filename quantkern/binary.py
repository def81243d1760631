"""The functions of binary networks: one bit is one bit. ``quantkern.functional`` has them all by name.

A sign is 1 bit: 1 for x >= 0 (so +1 for 0.0 and -0.0), 0 for anything else (so -1 for NaN). Packed tensors are int32;
element i is bit i % 32 of word i // 32 of the last dimension, and padding bits are 0. Images are packed along their
channels, [N, H, W, words], and so are the weights of convolutions, [O, kh, kw, words].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantkern import ops, reference
from quantkern import triton as triton_twins
from quantkern.backend import Backend, resolve
from quantkern.reference import words_of
from quantkern.triton_autograd import run_triton

_OPS = torch.ops.quantkern
WORD = reference.WORD
Pair = int | Sequence[int]


def pair(value: Pair, name: str, least: int) -> tuple[int, int]:
    """Two integers, both at least ``least``, from one or from two."""
    found = (value, value) if isinstance(value, int) else tuple(value)
    if len(found) != 2 or not all(isinstance(v, int) and v >= least for v in found):
        raise ValueError(f"{name} must be one or two integers of at least {least}, got {value!r}")
    return found[0], found[1]


def check_real(x: Tensor, name: str) -> None:
    """A tensor whose signs are taken."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}; convert it with {name}.float()")


def check_packed(packed: Tensor, k: int, name: str, dims: int | None = None) -> None:
    """A packed tensor that holds k signs a row, the checks that need not read it."""
    if packed.dtype is not torch.int32:
        raise TypeError(f"{name} must hold packed signs, int32 from pack_signs, got {packed.dtype}")
    if dims is not None and packed.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, the packed one last, got shape {list(packed.shape)}")
    if not 0 <= k <= reference.LONGEST_SUM:
        raise ValueError(f"k must lie in [0, {reference.LONGEST_SUM}], got {k}")
    if packed.shape[-1] != words_of(k):
        raise ValueError(
            f"{name} must have rows of {words_of(k)} words for k={k} signs, 32 a word, got shape {list(packed.shape)}"
        )
    if not packed.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {packed.stride()}; call {name}.contiguous()")


def check_padding_bits(packed: Tensor, k: int, name: str) -> None:
    """Padding bits are 0; read only where that does not wait for a device."""
    if k % WORD == 0 or packed.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool((packed[..., -1] >> (k % WORD)).any()):
        raise ValueError(f"{name} has padding bits that are not 0 behind its {k} signs; pack it with pack_signs")


def _check_vector(value: Tensor | None, like: Tensor, count: int, dtype: torch.dtype, name: str) -> None:
    if value is None:
        return
    if value.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
    if tuple(value.shape) != (count,):
        raise ValueError(f"{name} must be a vector of {count} values, got shape {list(value.shape)}")
    ops.check_device(value, like, name)


def binarize(x: Tensor, clip_gradient: bool = True, *, backend: Backend = Backend.AUTO) -> Tensor:
    """The sign of x as +1 or -1, with the straight-through gradient of binary networks.

    y = 1 where x >= 0, else -1; dy/dx = 1 where |x| <= 1, else 0, for one saved bit an element. Source: Courbariaux
    et al., "Binarized Neural Networks", 2016, eq. 1 and 4.

    Args:
        x: floating-point tensor of any shape and strides: float32, float16 or bfloat16, on the CPU also float64.
        clip_gradient: False lets the whole gradient pass and saves nothing, as the paper does for weights, which
            are themselves kept in [-1, 1].
        backend: which kernels run, see ``Backend``.

    Raises:
        TypeError: x is not floating point.

    >>> x = torch.tensor([-1.5, -0.2, 0.0, 0.9], requires_grad=True)
    >>> y = binarize(x)
    >>> y.tolist()
    [-1.0, -1.0, 1.0, 1.0]
    >>> y.sum().backward()
    >>> x.grad.tolist()
    [0.0, 1.0, 1.0, 1.0]
    """
    chosen = resolve(x, backend)
    if chosen is Backend.NATIVE:
        return _OPS.binarize.default(x, clip_gradient)  # type: ignore[no-any-return]
    check_real(x, "x")
    if chosen is Backend.TRITON:
        return run_triton(triton_twins.binarize_forward, x, needs_mask=clip_gradient)
    return reference.binarize(x, clip_gradient)


def pack_signs(
    x: Tensor, axis: int = -1, *, counts: bool = False, backend: Backend = Backend.AUTO
) -> Tensor | tuple[Tensor, Tensor]:
    """The signs of x, 32 of them a word, packed along one dimension.

    Args:
        x: floating-point tensor of any shape and strides, as in ``binarize``.
        axis: the dimension to pack; it moves to the end. Images [N, C, H, W] with axis 1 give [N, H, W, words].
        counts: also return how many of each row's signs are +1, int32.
        backend: which kernels run, see ``Backend``.

    Returns:
        int32 [..., ceil(size / 32)], without a gradient; with ``counts`` a pair.

    Raises:
        TypeError: x is not floating point. IndexError: axis out of range.

    >>> pack_signs(torch.tensor([[0.5, -1.0, 0.0], [-1.0, 2.0, -3.0]])).tolist()
    [[5], [2]]
    """
    chosen = resolve(x, backend)
    if chosen is Backend.NATIVE:
        return (_OPS.pack_signs_counted if counts else _OPS.pack_signs).default(x, axis)  # type: ignore[no-any-return]
    check_real(x, "x")
    if not -x.dim() <= axis < x.dim():
        raise IndexError(f"axis must lie in [{-x.dim()}, {x.dim() - 1}] for a {x.dim()}-dimensional x, got {axis}")
    if chosen is Backend.TRITON:
        packed, ones = triton_twins.pack_signs_forward(x.detach(), axis, counts)
        return (packed, ones) if counts else packed
    return reference.pack_signs_counted(x, axis) if counts else reference.pack_signs(x, axis)


def unpack_signs(
    packed: Tensor, k: int, dtype: torch.dtype = torch.float32, *, backend: Backend = Backend.AUTO
) -> Tensor:
    """The first k signs of every packed row as +1 and -1.

    Args:
        packed: int32 [..., ceil(k / 32)], contiguous.
        k: how many signs a row holds.
        dtype: float32, float16, bfloat16, or on the CPU float64.

    Raises:
        TypeError: packed is not int32, dtype not floating point. ValueError: another width than k asks for.

    >>> unpack_signs(torch.tensor([[5]], dtype=torch.int32), 3).tolist()
    [[1.0, -1.0, 1.0]]
    """
    chosen = resolve(packed, backend)
    if chosen is Backend.NATIVE:
        return _OPS.unpack_signs.default(packed, k, dtype)  # type: ignore[no-any-return]
    check_packed(packed, k, "packed")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type, got {dtype}")
    if chosen is Backend.TRITON:
        return triton_twins.unpack_signs_forward(packed, k, dtype)
    return reference.unpack_signs(packed, k, dtype)


def arrange_signs(packed: Tensor) -> Tensor:
    """Packed weights in the order this device's kernels read them: give it as ``arranged`` beside the weights.

    Optional and derived: results are the same without it, and it is never saved. Packed weights that are multiplied
    more than once are worth arranging, above all with few rows on the other side.

    Args:
        packed: int32 [N, ...words], contiguous: the weights of ``binary_matmul`` or ``binary_conv2d``.

    Returns:
        uint8, of a length that depends on the device: empty where it has no compiled kernels, which alone read it.

    Raises:
        TypeError: packed is not int32. ValueError: not contiguous, or a vector.

    >>> arrange_signs(pack_signs(torch.randn(8, 64))).dtype
    torch.uint8
    """
    if resolve(packed, Backend.AUTO) is not Backend.NATIVE:
        return packed.new_empty(0, dtype=torch.uint8)
    return _OPS.arrange_signs.default(packed)  # type: ignore[no-any-return]


def binary_matmul(
    a_packed: Tensor,
    b_packed: Tensor,
    k: int,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    arranged: Tensor | None = None,
    out: Tensor | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """The exact dot products of packed rows: [M, K] x [N, K] -> [M, N].

    dot[m, n] = sum over i < k of a[m, i] * b[n, i] with both +-1, then times scale[n], plus bias[n], each rounded to
    float32. Source of the bit arithmetic: Courbariaux et al. 2016, section 1.5.

    Args:
        a_packed, b_packed: int32 [M, words] and [N, words] from ``pack_signs``, contiguous, words = ceil(k / 32).
        k: how many signs a row holds, at most 2**24.
        scale, bias: float32 [N].
        arranged: ``arrange_signs(b_packed)``, which saves work where M is small.
        out: contiguous float32 [M, N] to write to; it is returned.
        backend: which kernels run, see ``Backend``.

    Returns:
        float32 [M, N].

    Raises:
        TypeError: not int32. ValueError: another width than k asks for, padding bits that are not 0 (on the CPU;
        elsewhere they are ignored), not contiguous, vectors of a wrong length, tensors on different devices.

    >>> a, b = torch.randn(3, 100), torch.randn(4, 100)
    >>> dots = binary_matmul(pack_signs(a), pack_signs(b), 100)
    >>> bool((dots == torch.where(a >= 0, 1.0, -1.0) @ torch.where(b >= 0, 1.0, -1.0).t()).all())
    True
    """
    chosen = resolve(a_packed, backend)
    if out is not None and chosen is Backend.NATIVE and a_packed.device.type == "cpu":
        _OPS.binary_matmul_into.default(a_packed, b_packed, k, scale, bias, arranged, out)
        return out
    if out is not None:
        return out.copy_(
            binary_matmul(a_packed, b_packed, k, scale=scale, bias=bias, arranged=arranged, backend=backend)
        )
    if chosen is Backend.NATIVE:
        return _OPS.binary_matmul.default(a_packed, b_packed, k, scale, bias, arranged)  # type: ignore[no-any-return]
    _check_operands(a_packed, b_packed, k, 2, ("a", "b"))
    for value, name in ((scale, "scale"), (bias, "bias")):
        _check_vector(value, a_packed, b_packed.shape[0], torch.float32, name)
    if chosen is Backend.TRITON:
        return triton_twins.binary_matmul_forward(a_packed, b_packed, k, scale, bias)
    return reference.binary_matmul(a_packed, b_packed, k, scale, bias)


def _check_operands(a: Tensor, b: Tensor, k: int, dims: int, names: tuple[str, str]) -> None:
    for value, name in zip((a, b), names, strict=True):
        check_packed(value, k, name, dims)
        check_padding_bits(value, k, name)
    ops.check_device(b, a, names[1])


def _check_signs(threshold: Tensor, flip: Tensor, like: Tensor, count: int) -> None:
    _check_vector(threshold, like, count, torch.int32, "threshold")
    _check_vector(flip, like, words_of(count), torch.int32, "flip")


def binary_matmul_sign(
    a_packed: Tensor,
    b_packed: Tensor,
    k: int,
    threshold: Tensor,
    flip: Tensor,
    *,
    arranged: Tensor | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """The packed signs of ``binary_matmul`` at a threshold: a layer, batch norm and sign in one.

    bit n = (dot[m, n] >= threshold[n]) xor bit n of flip. A batch norm with a negative weight flips. Source:
    Umuroglu et al., "FINN", 2017, batch norm and activation as a threshold.

    Args:
        a_packed, b_packed, k, arranged, backend: as in ``binary_matmul``.
        threshold: int32 [N]. flip: int32 [ceil(N / 32)], packed.

    Returns:
        int32 [M, ceil(N / 32)].

    Raises:
        TypeError, ValueError: as ``binary_matmul``; a threshold or flip of another type or length.

    >>> a = pack_signs(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    >>> no_flip = torch.zeros(1, dtype=torch.int32)
    >>> binary_matmul_sign(a, a, 2, torch.tensor([1, 0], dtype=torch.int32), no_flip).tolist()
    [[3], [2]]
    """
    chosen = resolve(a_packed, backend)
    if chosen is Backend.NATIVE:
        return _OPS.binary_matmul_sign.default(  # type: ignore[no-any-return]
            a_packed, b_packed, k, threshold, flip, arranged
        )
    _check_operands(a_packed, b_packed, k, 2, ("a", "b"))
    _check_signs(threshold, flip, a_packed, b_packed.shape[0])
    if chosen is Backend.TRITON:
        return triton_twins.binary_matmul_sign_forward(a_packed, b_packed, k, threshold, flip)
    return reference.binary_matmul_sign(a_packed, b_packed, k, threshold, flip)


def binary_linear(
    x: Tensor,
    weight_packed: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    arranged: Tensor | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """The linear layer of the signs of x with packed weights, for inference.

    y[..., n] = dot of the signs of x and of weight n, times scale[n], plus bias[n]. Source: Courbariaux et al. 2016,
    section 1.5.

    Args:
        x: floating-point [..., k], whose signs are packed here, or packed already: int32 [..., words].
        weight_packed: int32 [N, words].
        k, scale, bias, arranged, backend: as in ``binary_matmul``.

    Returns:
        [..., N] in x's dtype, float32 for packed x; no gradient (``sign_linear`` has one).

    Raises:
        ValueError: x has another size than k; else as ``binary_matmul``.

    >>> weight, x = torch.randn(5, 40), torch.randn(2, 40)
    >>> y = binary_linear(x, pack_signs(weight), 40)
    >>> bool((y == torch.where(x >= 0, 1.0, -1.0) @ torch.where(weight >= 0, 1.0, -1.0).t()).all())
    True
    """
    if x.is_floating_point():
        if x.dim() == 0 or x.shape[-1] != k:
            raise ValueError(f"x must have {k} features in its last dimension, got shape {list(x.shape)}")
        packed = _packed_of(x, -1, backend)
    else:
        packed = x
    rows = packed.reshape(math.prod(packed.shape[:-1]), packed.shape[-1])
    y = binary_matmul(rows, weight_packed, k, scale=scale, bias=bias, arranged=arranged, backend=backend)
    y = y.view(*packed.shape[:-1], y.shape[-1])
    return y.to(x.dtype) if x.is_floating_point() else y


def _packed_of(x: Tensor, axis: int, backend: Backend) -> Tensor:
    packed = pack_signs(x, axis, backend=backend)
    assert isinstance(packed, Tensor)
    return packed


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
        packed = _packed_of(x, 1, backend)
    elif channels is None:
        raise ValueError("x is packed: say how many channels it holds with channels=")
    else:
        packed = x
    chosen = resolve(x, backend)
    if chosen is Backend.NATIVE:
        y: Tensor = _OPS.binary_conv2d.default(
            packed, weight_packed, channels, stride, padding, dilation, scale, bias, arranged, last
        )
    else:
        _check_images(packed, weight_packed, channels, stride, padding, dilation)
        for value, name in ((scale, "scale"), (bias, "bias")):
            _check_vector(value, packed, weight_packed.shape[0], torch.float32, name)
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
    _check_operands(x, weight, channels, 4, ("x", "weight"))
    _check_kernel_fits(x.shape[1:3], weight.shape[1:3], stride, padding, dilation)


def _check_kernel_fits(
    image: Sequence[int],
    kernel: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
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
        return _OPS.binary_conv2d_sign.default(  # type: ignore[no-any-return]
            x_packed, weight_packed, channels, stride, padding, dilation, threshold, flip, arranged
        )
    _check_images(x_packed, weight_packed, channels, stride, padding, dilation)
    _check_signs(threshold, flip, x_packed, weight_packed.shape[0])
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
        return _OPS.packed_max_pool2d.default(x_packed, flip, kernel, step, padding)  # type: ignore[no-any-return]
    check_packed(x_packed, x_packed.shape[-1] * WORD, "x", 4)
    _check_vector(flip, x_packed, x_packed.shape[-1], torch.int32, "flip")
    sizes = ops.conv_sizes(x_packed.shape[1:3], kernel, list(step), list(padding), [1, 1])
    if any(2 * p > size for p, size in zip(padding, kernel, strict=True)) or min(sizes) < 1:
        raise ValueError(
            f"padding must be at most half of kernel_size and the window no larger than the padded image; got "
            f"kernel_size={kernel}, padding={padding}, image {list(x_packed.shape[1:3])}"
        )
    run = triton_twins.packed_max_pool2d_forward if chosen is Backend.TRITON else reference.packed_max_pool2d
    return run(x_packed, flip, kernel, step, padding)


class _TritonSignLinear(torch.autograd.Function):
    """``sign_linear`` on the Triton kernels: packed signs are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        k = weight.shape[1]
        packed, rows = (triton_twins.pack_signs_forward(t.detach(), -1, False)[0] for t in (x, weight))
        ctx.save_for_backward(packed, rows)
        ctx.k, ctx.dtype = k, x.dtype
        flat = packed.view(math.prod(x.shape[:-1]), packed.shape[-1])
        bias = None if bias is None else bias.detach().float()
        y = triton_twins.binary_matmul_forward(flat, rows, k, None, bias)
        return y.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = (triton_twins.unpack_signs_forward(t, ctx.k, ctx.dtype) for t in ctx.saved_tensors)
        rows = math.prod(grads[0].shape[:-1])
        flat = grads[0].reshape(rows, grads[0].shape[-1])
        dx, dweight, dbias = ctx.needs_input_grad
        return (
            grads[0] @ weight if dx else None,
            flat.t() @ x.view(rows, ctx.k) if dweight else None,
            flat.sum(0) if dbias else None,
        )


class _TritonSignConv2d(torch.autograd.Function):
    """``sign_conv2d`` on the Triton kernels: packed signs are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        packed, taps = (triton_twins.pack_signs_forward(t.detach(), 1, False)[0] for t in (x, weight))
        ctx.save_for_backward(packed, taps)
        ctx.channels, ctx.dtype, ctx.geometry = x.shape[1], x.dtype, geometry
        ctx.form = torch.channels_last if ops.is_channels_last(x) else torch.contiguous_format
        bias = None if bias is None else bias.detach().float()
        stride, padding, dilation = geometry
        y = triton_twins.binary_conv2d_forward(packed, taps, x.shape[1], stride, padding, dilation, None, bias)
        return y.to(x.dtype).contiguous(memory_format=ctx.form)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        signs = (triton_twins.unpack_signs_forward(t, ctx.channels, ctx.dtype) for t in ctx.saved_tensors)
        x, weight = (t.permute(0, 3, 1, 2).contiguous(memory_format=ctx.form) for t in signs)
        stride, padding, dilation = ctx.geometry
        needs = list(ctx.needs_input_grad[:3])
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            grads[0], x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], 1, needs
        )
        return dx, dweight, dbias, None, None, None


def sign_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend = Backend.AUTO) -> Tensor:
    """The linear layer of the signs of x and weight, for training: through the packed kernels, saving packed signs.

    y = sign(x) @ sign(weight)^T + bias; its gradients are those of the linear layer at those signs, so for operands
    that ``binarize`` made. Saved: one bit an element. Source: Courbariaux et al. 2016, algorithm 1.

    Args:
        x: floating-point [..., K]. weight: [N, K] in x's dtype. bias: [N].
        backend: which kernels run, see ``Backend``.

    Raises:
        TypeError: not floating point. ValueError: sizes that do not fit.

    >>> x, weight = binarize(torch.randn(4, 9)), binarize(torch.randn(3, 9))
    >>> bool((sign_linear(x, weight) == torch.nn.functional.linear(x, weight)).all())
    True
    """
    chosen = resolve(x, backend)
    if chosen is Backend.NATIVE:
        return _OPS.sign_linear.default(x, weight, bias)  # type: ignore[no-any-return]
    check_real(x, "x")
    check_real(weight, "weight")
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., K] and weight [N, K], got shapes {list(x.shape)} and {list(weight.shape)}")
    if chosen is Backend.TRITON:
        y: Tensor = _TritonSignLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return reference.sign_linear(x, weight, bias)


def sign_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    *,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """The convolution of the signs of x and weight, for training, as ``sign_linear`` is for linear layers.

    Args:
        x: floating-point [N, C, H, W]. weight: [O, C, kh, kw] in x's dtype. bias: [O].
        stride, padding, dilation: as in ``torch.nn.functional.conv2d``. backend: see ``Backend``.

    Raises:
        TypeError: not floating point. ValueError: sizes that do not fit.

    >>> x, weight = binarize(torch.randn(1, 3, 5, 5)), binarize(torch.randn(2, 3, 3, 3))
    >>> bool((sign_conv2d(x, weight, padding=1) == torch.nn.functional.conv2d(x, weight, padding=1)).all())
    True
    """
    geometry = pair(stride, "stride", 1), pair(padding, "padding", 0), pair(dilation, "dilation", 1)
    chosen = resolve(x, backend)
    if chosen is Backend.NATIVE:
        return _OPS.sign_conv2d.default(x, weight, bias, *geometry)  # type: ignore[no-any-return]
    check_real(x, "x")
    check_real(weight, "weight")
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x must be [N, C, H, W] and weight [O, C, kh, kw], got shapes {list(x.shape)} and {list(weight.shape)}"
        )
    _check_kernel_fits(x.shape[2:], weight.shape[2:], *geometry)
    if chosen is Backend.TRITON:
        y: Tensor = _TritonSignConv2d.apply(x, weight, bias, *geometry)  # type: ignore[no-untyped-call]
        return y
    return reference.sign_conv2d(x, weight, bias, *geometry)
