"""Products of packed signs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkern import reference
from quantkern import triton as triton_twins
from quantkern.backend import Backend, resolve
from quantkern.binary.checks import check_operands, check_signs, check_vector
from quantkern.binary.signs import packed_of


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

    >>> from quantkern.functional import pack_signs
    >>> a, b = torch.randn(3, 100), torch.randn(4, 100)
    >>> dots = binary_matmul(pack_signs(a), pack_signs(b), 100)
    >>> bool((dots == torch.where(a >= 0, 1.0, -1.0) @ torch.where(b >= 0, 1.0, -1.0).t()).all())
    True
    """
    chosen = resolve(a_packed, backend)
    if out is not None and chosen is Backend.NATIVE and a_packed.device.type == "cpu":
        torch.ops.quantkern.binary_matmul_into.default(a_packed, b_packed, k, scale, bias, arranged, out)
        return out
    if out is not None:
        return out.copy_(
            binary_matmul(a_packed, b_packed, k, scale=scale, bias=bias, arranged=arranged, backend=backend)
        )
    if chosen is Backend.NATIVE:
        return torch.ops.quantkern.binary_matmul.default(a_packed, b_packed, k, scale, bias, arranged)  # type: ignore[no-any-return]
    check_operands(a_packed, b_packed, k, 2, ("a", "b"))
    for value, name in ((scale, "scale"), (bias, "bias")):
        check_vector(value, a_packed, b_packed.shape[0], torch.float32, name)
    if chosen is Backend.TRITON:
        return triton_twins.binary_matmul_forward(a_packed, b_packed, k, scale, bias)
    return reference.binary_matmul(a_packed, b_packed, k, scale, bias)


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

    >>> from quantkern.functional import pack_signs
    >>> a = pack_signs(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    >>> no_flip = torch.zeros(1, dtype=torch.int32)
    >>> binary_matmul_sign(a, a, 2, torch.tensor([1, 0], dtype=torch.int32), no_flip).tolist()
    [[3], [2]]
    """
    chosen = resolve(a_packed, backend)
    if chosen is Backend.NATIVE:
        return torch.ops.quantkern.binary_matmul_sign.default(  # type: ignore[no-any-return]
            a_packed, b_packed, k, threshold, flip, arranged
        )
    check_operands(a_packed, b_packed, k, 2, ("a", "b"))
    check_signs(threshold, flip, a_packed, b_packed.shape[0])
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

    >>> from quantkern.functional import pack_signs
    >>> weight, x = torch.randn(5, 40), torch.randn(2, 40)
    >>> y = binary_linear(x, pack_signs(weight), 40)
    >>> bool((y == torch.where(x >= 0, 1.0, -1.0) @ torch.where(weight >= 0, 1.0, -1.0).t()).all())
    True
    """
    if x.is_floating_point():
        if x.dim() == 0 or x.shape[-1] != k:
            raise ValueError(f"x must have {k} features in its last dimension, got shape {list(x.shape)}")
        packed = packed_of(x, -1, backend)
    else:
        packed = x
    rows = packed.reshape(math.prod(packed.shape[:-1]), packed.shape[-1])
    y = binary_matmul(rows, weight_packed, k, scale=scale, bias=bias, arranged=arranged, backend=backend)
    y = y.view(*packed.shape[:-1], y.shape[-1])
    return y.to(x.dtype) if x.is_floating_point() else y
