"""The learned step size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantkern.reference.affine import along_axis, narrowed, quantize


def channel_sums(x: Tensor, axis: int | None) -> Tensor:
    """The sum of x, or of each of its channels."""
    return x.sum() if axis is None else x.movedim(axis, 0).unsqueeze(-1).flatten(1).sum(1)


def lsq_positions(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x in steps, the same on the quantized axis before rounding, and scale and zero point shaped like x."""
    step = along_axis(scale, x, axis)
    offset = torch.zeros_like(step) if zero_point is None else along_axis(zero_point, x, axis).to(step.dtype)
    inverse = 1.0 / step
    usable = (step > 0) & torch.isfinite(step) & torch.isfinite(inverse)
    v = x.to(torch.promote_types(x.dtype, step.dtype)) * torch.where(usable, inverse, torch.nan)
    return v, v + offset, step, offset


class Lsq(torch.autograd.Function):
    """Esser et al. 2020, eq. 1 to 3 and 5, with a zero point that is learned too where it is given."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        quant_min: int,
        quant_max: int,
        axis: int | None,
        grad_scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.settings = (quant_min, quant_max, axis, grad_scale)
        zeros = torch.zeros_like(scale) if zero_point is None else zero_point
        return quantize(x, scale, zeros, quant_min, quant_max, axis)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, scale, zero_point = ctx.saved_tensors
        low, high, axis, grad_scale = ctx.settings
        v, position, step, offset = lsq_positions(x, scale, zero_point, axis)
        grad = grads[0].to(v.dtype)
        below, above = ~(position > low), position >= high
        inside = ~(below | above)
        by_scale = torch.where(inside, torch.round(v) - v, torch.where(below, low - offset, high - offset)) * grad
        by_zero_point = torch.where(inside, 0.0, -step) * grad
        sums = [channel_sums(part.double(), axis) * grad_scale for part in (by_scale, by_zero_point)]
        dx = torch.where(inside, grads[0], torch.zeros_like(grads[0]))
        dscale = sums[0].reshape(scale.shape).to(scale.dtype)
        dzero = None if zero_point is None else sums[1].reshape(zero_point.shape).to(zero_point.dtype)
        return dx, dscale, dzero, None, None, None, None


def lsq_grad_scale(x: Tensor, quant_max: int, axis: int | None = None) -> float:
    """1 / sqrt(N * quant_max), N the number of elements that share a scale (Esser et al. 2020, section 2.2)."""
    count = x.numel() if axis is None else x.numel() // max(1, x.shape[axis])
    return 1.0 / math.sqrt(max(1, count) * max(1, quant_max))


def lsq(
    x: Tensor,
    scale: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    grad_scale: float | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Fake-quantize x with a scale (and a zero point) that are learned.

    With v = x / scale and p = v + zero_point, inside means quant_min < p < quant_max. The gradient of x passes
    inside; that of the scale is rint(v) - v inside, quant_min - zero_point below, quant_max - zero_point above; that
    of the zero point is -scale outside. Both sums are multiplied by grad_scale. NaN counts as below.
    """
    if grad_scale is None:
        grad_scale = lsq_grad_scale(x, quant_max, axis)
    y: Tensor = Lsq.apply(x, scale, zero_point, quant_min, quant_max, axis, grad_scale)  # type: ignore[no-untyped-call]
    return y


def lsq_weights(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    quant_min: Sequence[int],
    quant_max: Sequence[int],
    axes: Sequence[int | None],
    grad_scales: Sequence[float | None],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """``lsq`` of every tensor in a list, float32 ones made ``dtype``."""
    settings = zip(xs, scales, quant_min, quant_max, axes, grad_scales, strict=True)
    return [narrowed(lsq(x, scale, low, high, axis, factor), dtype) for x, scale, low, high, axis, factor in settings]
