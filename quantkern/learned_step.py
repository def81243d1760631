"""Fake-quantization with a scale that learns: LSQ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkern import reference
from quantkern import triton as triton_twins
from quantkern.arguments import check_arguments, check_axis, check_parameter, check_scale_on_host
from quantkern.backend import Backend, resolve

_LSQ = torch.ops.quantkern.lsq.default


class _TritonLsq(torch.autograd.Function):
    """The learned step size on the Triton kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, *settings: Any) -> Tensor:
        *ctx.settings, dtype = settings
        quant_min, quant_max, _, axis = ctx.settings
        ctx.save_for_backward(x, scale, zero_point)
        y: Tensor = triton_twins.lsq_forward(x, scale, quant_min, quant_max, axis, zero_point, dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        quant_min, quant_max, grad_scale, axis = ctx.settings
        dx, dscale, dzero = triton_twins.lsq_backward(
            grads[0], x, scale, quant_min, quant_max, grad_scale, axis, zero_point
        )
        return dx, dscale, None if zero_point is None else dzero, None, None, None, None, None


def lsq(
    x: Tensor,
    scale: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    grad_scale: float | None = None,
    zero_point: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """Fake-quantize x with a step size that is learned by gradient descent.

    With v = x / scale, p = v + zero_point and inside meaning quant_min < p < quant_max::

        y = (clamp(rint(v) + zero_point, quant_min, quant_max) - zero_point) * scale
        dy/dx = 1 inside, else 0
        dy/dscale = rint(v) - v inside, quant_min - zero_point below, quant_max - zero_point above
        dy/dzero_point = 0 inside, else -scale

    The last two are summed over all elements of a channel, in one pass with dy/dx, and multiplied by grad_scale.
    Source: Esser et al., "Learned Step Size Quantization", 2020, eq. 1 to 3 and 5; the learned zero point after
    Bhalgat et al., "LSQ+", 2020, with the offset counted in steps, so that 0 stays exact.

    Args:
        x: floating-point tensor, as in ``fake_quantize``. Only x itself is saved for the backward.
        scale: positive float32 tensor, 1 element, or [channels] with ``axis``; receives a gradient.
        quant_min, quant_max, axis, dtype, backend: as in ``fake_quantize``.
        grad_scale: factor of the gradients of scale and zero point; None: 1 / sqrt(N * quant_max), N the number of
            elements that share a scale (section 2.2).
        zero_point: float32 tensor shaped like scale that is learned too; None: 0.

    Returns:
        A tensor like x. The sums are added in a fixed order: the same bits whatever the number of threads.

    Raises:
        TypeError, ValueError, IndexError: as ``fake_quantize``.

    >>> x = torch.tensor([-0.9, 0.3, 0.8, 9.0], requires_grad=True)
    >>> scale = torch.tensor(0.5, requires_grad=True)
    >>> y = lsq(x, scale, quant_min=-2, quant_max=1, grad_scale=1.0)
    >>> y.tolist()
    [-1.0, 0.5, 0.5, 0.5]
    >>> y.sum().backward()
    >>> x.grad.tolist(), round(scale.grad.item(), 4)
    ([1.0, 1.0, 0.0, 0.0], 2.2)
    """
    chosen = resolve(x, backend)
    if grad_scale is None:
        grad_scale = reference.lsq_grad_scale(x, quant_max, check_axis(x, axis))
    if chosen is Backend.NATIVE:
        return _LSQ(x, scale, quant_min, quant_max, grad_scale, axis, zero_point, dtype)  # type: ignore[no-any-return]
    axis = check_arguments(x, quant_min, quant_max, axis, dtype)
    for value, name in ((scale, "scale"), (zero_point, "zero_point")):
        if value is not None:
            check_parameter(value, x, axis, name)
    check_scale_on_host(scale)
    if chosen is Backend.TRITON:
        y: Tensor = _TritonLsq.apply(x, scale, zero_point, quant_min, quant_max, grad_scale, axis, dtype)  # type: ignore[no-untyped-call]
        return y
    return reference.narrowed(reference.lsq(x, scale, quant_min, quant_max, axis, grad_scale, zero_point), dtype)
