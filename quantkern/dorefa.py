"""DoReFa-Net's weights, activations and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkern import ops, reference
from quantkern import triton as triton_twins
from quantkern.backend import Backend, resolve
from quantkern.triton_autograd import run_triton

_DOREFA_WEIGHT = torch.ops.quantkern.dorefa_weight.default
_DOREFA_ACTIVATION = torch.ops.quantkern.dorefa_activation.default
_DOREFA_GRADIENT = torch.ops.quantkern.dorefa_gradient.default


def check_bits(x: Tensor, bits: int) -> None:
    """The checks of the DoReFa operators for the backends that have none of their own."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"DoReFa takes float32, float16 and bfloat16 tensors, got {x.dtype}; convert it with x.float()")
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must lie in [1, 16], got {bits}")


class _TritonDorefaWeight(torch.autograd.Function):
    """DoReFa's weight transform on the Triton kernels."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, bits: int) -> Tensor:
        y: Tensor
        y, largest = triton_twins.dorefa_weight_forward(w, bits)
        ctx.bits = bits
        ctx.save_for_backward(w, largest)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        w, largest = ctx.saved_tensors
        return grads[0] if ctx.bits == 1 else triton_twins.dorefa_weight_backward(grads[0], w, largest), None


def dorefa_weight(w: Tensor, bits: int, *, backend: Backend = Backend.AUTO) -> Tensor:
    """DoReFa-Net's weights: tanh, scaled to [0, 1] by its maximum, rounded to bits, back to [-1, 1].

    ::

        bits > 1   y = 2 * q(tanh(w) / (2 * max|tanh(w)|) + 1/2) - 1,  q(z) = rint(z * n) / n,  n = 2^bits - 1
        bits = 1   y = sign(w) * mean|w|, sign(0) = +1

    The gradient passes the rounding and goes truly through tanh and the maximum, shared equally where several weights
    attain it; with one bit it passes whole. Source: Zhou et al., "DoReFa-Net", 2016, section 2.3, eq. 9 and 7.

    Args:
        w: float32, float16 or bfloat16 tensor of any shape and strides. Only w itself is saved.
        bits: 1 to 16.
        backend: which kernels run, see ``Backend``.

    Returns:
        A tensor like w; its values are quantized in float32. An all-zero w has no gradient.

    Raises:
        TypeError: w has another dtype. ValueError: bits out of range.

    >>> [round(v, 3) for v in dorefa_weight(torch.tensor([-1.0, -0.1, 0.4]), bits=2).tolist()]
    [-1.0, -0.333, 0.333]
    >>> dorefa_weight(torch.tensor([-1.0, 0.0, 0.5]), bits=1).tolist()
    [-0.5, 0.5, 0.5]
    """
    chosen = resolve(w, backend)
    if chosen is Backend.NATIVE:
        return _DOREFA_WEIGHT(w, bits)  # type: ignore[no-any-return]
    check_bits(w, bits)
    if chosen is Backend.TRITON:
        y: Tensor = _TritonDorefaWeight.apply(w, bits)  # type: ignore[no-untyped-call]
        return y
    return reference.dorefa_weight(w, bits)


def dorefa_activation(x: Tensor, bits: int, *, backend: Backend = Backend.AUTO) -> Tensor:
    """DoReFa-Net's activations: clip to [0, 1] and round to bits.

    y = rint(clip(x, 0, 1) * n) / n with n = 2^bits - 1; the gradient passes where 0 <= x <= 1 and costs one saved bit
    an element. Source: Zhou et al. 2016, section 2.4.

    Args:
        x: float32, float16 or bfloat16 tensor of any shape and strides.
        bits, backend: as in ``dorefa_weight``.

    Raises:
        TypeError: x has another dtype. ValueError: bits out of range.

    >>> dorefa_activation(torch.tensor([-0.5, 0.3, 0.6, 2.0]), bits=1).tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    chosen = resolve(x, backend)
    if chosen is Backend.NATIVE:
        return _DOREFA_ACTIVATION(x, bits)  # type: ignore[no-any-return]
    check_bits(x, bits)
    if chosen is Backend.TRITON:
        return run_triton(triton_twins.dorefa_activation_forward, x, bits)
    return reference.dorefa_activation(x, bits)


class _DorefaGradient(torch.autograd.Function):
    """The identity whose backward quantizes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, seed: Tensor, backend: Backend) -> Tensor:
        ctx.bits, ctx.backend = bits, backend
        ctx.save_for_backward(seed)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (seed,) = ctx.saved_tensors
        return quantize_gradient(grads[0], ctx.bits, seed, backend=ctx.backend), None, None, None


def quantize_gradient(grad: Tensor, bits: int, seed: Tensor, *, backend: Backend = Backend.AUTO) -> Tensor:
    """What the backward of ``dorefa_gradient`` does to a gradient; seed is a 1-element int64 tensor beside it.

    >>> quantize_gradient(torch.tensor([-1.0, 0.0, 1.0]), 8, torch.tensor(3)).abs().max().item() <= 1.0
    True
    """
    chosen = resolve(grad, backend)
    if chosen is Backend.NATIVE:
        return _DOREFA_GRADIENT(grad, bits, seed)  # type: ignore[no-any-return]
    check_bits(grad, bits)
    ops.check_device(seed, grad, "seed")
    if chosen is Backend.TRITON:
        quantized: Tensor = triton_twins.quantize_gradient(grad, bits, seed)
        return quantized
    return reference.dorefa_gradient(grad, bits, int(seed.item()))


def dorefa_gradient(
    x: Tensor, bits: int, seed: Tensor | int | None = None, *, backend: Backend = Backend.AUTO
) -> Tensor:
    """x itself; its gradient comes back quantized to bits, with random rounding.

    For every sample (first axis) with M = max|g| over its other axes::

        g' = 2 M (q(g / (2 M) + 1/2 + noise) - 1/2),   noise uniform in [-1/2, 1/2) / n,   n = 2^bits - 1

    g' is 0 where M is 0; a sample whose M is not finite passes unchanged, so that loss scaling can see it. The noise
    is word i of the stream Philox4x32-10(seed) for element i in memory order: the same bits on every backend. Source:
    Zhou et al. 2016, section 2.5, eq. 12; Salmon et al. 2011 for Philox.

    Args:
        x: float32, float16 or bfloat16 tensor of any shape and strides.
        bits: 1 to 16.
        seed: an integer, or a 1-element int64 tensor on x's device; None draws one from torch's generator.
        backend: as in ``dorefa_weight``.

    Raises:
        TypeError: x has another dtype. ValueError: bits out of range, seed on another device.

    >>> x = torch.tensor([0.2, 0.7], requires_grad=True)
    >>> dorefa_gradient(x, bits=8, seed=1).sum().backward()
    >>> bool(((x.grad - 1).abs() <= 2 / 255).all())
    True
    """
    check_bits(x, bits)
    if seed is None:
        seed = torch.randint(1 << 62, (), device=x.device)
    elif isinstance(seed, int):
        seed = torch.tensor(seed, device=x.device)
    y: Tensor = _DorefaGradient.apply(x, bits, seed, backend)  # type: ignore[no-untyped-call]
    return y
