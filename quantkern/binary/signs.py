"""Signs, packed and unpacked."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkern import reference
from quantkern import triton as triton_twins
from quantkern.backend import Backend, resolve
from quantkern.binary.checks import check_packed, check_real
from quantkern.triton_autograd import run_triton


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
        return torch.ops.quantkern.binarize.default(x, clip_gradient)  # type: ignore[no-any-return]
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
        return (torch.ops.quantkern.pack_signs_counted if counts else torch.ops.quantkern.pack_signs).default(x, axis)  # type: ignore[no-any-return]
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
        return torch.ops.quantkern.unpack_signs.default(packed, k, dtype)  # type: ignore[no-any-return]
    check_packed(packed, k, "packed")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type, got {dtype}")
    if chosen is Backend.TRITON:
        return triton_twins.unpack_signs_forward(packed, k, dtype)
    return reference.unpack_signs(packed, k, dtype)


def packed_of(x: Tensor, axis: int, backend: Backend) -> Tensor:
    """The signs of x alone, without their count."""
    packed = pack_signs(x, axis, backend=backend)
    assert isinstance(packed, Tensor)
    return packed


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
    return torch.ops.quantkern.arrange_signs.default(packed)  # type: ignore[no-any-return]
