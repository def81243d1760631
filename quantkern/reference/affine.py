"""Grids, ranges, and what is quantized with them; clipping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""The scale of an all-zero tensor: the smallest float32 whose reciprocal is finite and normal."""

QUANT_LIMIT = 1 << 20
"""Largest magnitude of quant_min and quant_max: every q and q - zero_point is then exact in float32."""


def along_axis(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Shape a parameter so that it broadcasts over x: a vector along ``axis``, anything else as one number."""
    if axis is None:
        return parameter.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """The fake-quantized x (without a gradient) and where a gradient passes.

    q = clamp(rint(x * (1 / scale)) + zero_point, quant_min, quant_max), y = (q - zero_point) * scale; the gradient
    passes where the rounded value lies in [quant_min, quant_max]. An unusable scale (not positive, not finite, or
    with an infinite reciprocal) makes y NaN.
    """
    x = x.detach()
    inverse = 1.0 / scale
    usable = (scale > 0) & torch.isfinite(scale) & torch.isfinite(inverse)
    inverse = along_axis(torch.where(usable, inverse, torch.nan), x, axis)
    scale, zero_point = along_axis(scale, x, axis), along_axis(zero_point, x, axis).to(scale.dtype)
    rounded = torch.round(x.to(torch.promote_types(x.dtype, scale.dtype)) * inverse) + zero_point
    clamped = rounded.clamp(quant_min, quant_max)
    y = (clamped - zero_point).to(scale.dtype) * scale
    return y.to(x.dtype), rounded == clamped


class StraightThrough(torch.autograd.Function):
    """y, with the gradient of x where ``in_range`` and none elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, in_range: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(in_range)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        (in_range,) = ctx.saved_tensors
        return torch.where(in_range, grads[0], torch.zeros_like(grads[0])), None, None


def straight_through(x: Tensor, y: Tensor, in_range: Tensor) -> Tensor:
    """``StraightThrough`` as a typed function."""
    result: Tensor = StraightThrough.apply(x, y, in_range)  # type: ignore[no-untyped-call]
    return result


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None = None
) -> Tensor:
    """``quantize`` with its straight-through gradient."""
    y, in_range = quantize(x, scale, zero_point, quant_min, quant_max, axis)
    return straight_through(x, y, in_range)


def to_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, axis: int | None = None
) -> Tensor:
    """A fake-quantized x as uint8: the distance of its integers from quant_min."""
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    scale, zero = along_axis(scale, x, axis), along_axis(zero_point, x, axis)
    return ((x * (1 / scale)).round() + zero - quant_min).clamp(0, quant_max - quant_min).to(torch.uint8)


def from_codes(codes: Tensor, parameters: Tensor, quant_min: int, axis: int | None = None) -> Tensor:
    """What ``to_codes`` was given; parameters: every scale, every zero point, and 0."""
    scale, zero = (along_axis(value, codes, axis) for value in parameters[:-1].view(2, -1).unbind(0))
    return (codes.float() + quant_min - zero) * scale


def min_max(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value per tensor or per channel. NaN is left out; with nothing seen: (+inf, -inf)."""
    rows = x.detach().reshape(1, -1) if axis is None else x.detach().movedim(axis, 0).unsqueeze(-1).flatten(1)
    if rows.dtype is not torch.float64:
        rows = rows.float()
    high = torch.where(rows.isnan(), -torch.inf, rows)
    low = torch.where(rows.isnan(), torch.inf, rows)
    if rows.shape[1] == 0:
        return low.new_full((rows.shape[0],), torch.inf), low.new_full((rows.shape[0],), -torch.inf)
    return low.amin(1), high.amax(1)


def choose_scale(low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale (dtype of ``low``) and zero point (int32) of ranges [low, high], which are first extended to hold 0.

    symmetric: scale = max|x| / ((quant_max - quant_min) / 2), zero point 0, or the middle of an unsigned range.
    affine: scale = (high - low) / (quant_max - quant_min), zero point quant_min - rint(low / scale), clamped.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    steps = float(quant_max - quant_min)
    if symmetric:
        scale = (torch.maximum(-low, high) / (steps / 2)).clamp(min=SMALLEST_SCALE)
        middle = 0 if quant_min < 0 else (quant_min + quant_max) // 2
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    width = high - low
    scale = torch.where(torch.isfinite(width), width / steps, high / steps - low / steps).clamp(min=SMALLEST_SCALE)
    zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    return scale, zero_point.nan_to_num(quant_min).to(torch.int32)


def update_running(
    running_min: Tensor, running_max: Tensor, low: Tensor, high: Tensor, ema_decay: float
) -> tuple[Tensor, Tensor]:
    """The running range after a batch: running * ema_decay + batch * (1 - ema_decay).

    The first batch (running_min > running_max: nothing seen) stands for the running range too. A batch without a
    finite range changes nothing.
    """
    usable = torch.isfinite(low) & torch.isfinite(high)
    first = ~(running_min <= running_max)
    keep, take = (torch.tensor(f, dtype=running_min.dtype) for f in (ema_decay, 1.0 - ema_decay))
    new_min = torch.where(first, low, running_min) * keep + low * take
    new_max = torch.where(first, high, running_max) * keep + high * take
    return torch.where(usable, new_min, running_min), torch.where(usable, new_max, running_max)


def fake_quantize_weight(
    x: Tensor, quant_min: int, quant_max: int, symmetric: bool, axis: int | None = None, *, quantizing: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, scale, zero_point): fake-quantize x with its own current range; the identity unless ``quantizing``.

    With symmetric statistics and quant_min = -quant_max nothing is ever clipped: every gradient passes.
    """
    low, high = min_max(x, axis)
    scale, zero_point = choose_scale(low.float(), high.float(), quant_min, quant_max, symmetric)
    if not quantizing:
        return x.clone(), scale, zero_point
    y, in_range = quantize(x, scale, zero_point, quant_min, quant_max, axis)
    if symmetric and quant_min == -quant_max:
        in_range = torch.ones_like(in_range)
    return straight_through(x, y, in_range), scale, zero_point


def narrowed(y: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A result as its user needs it: a float32 one rounded to ``dtype``, any other as it is."""
    return y.to(dtype) if dtype is not None and y.dtype is torch.float32 else y


def fake_quantize_weights(
    xs: Sequence[Tensor],
    quant_min: Sequence[int],
    quant_max: Sequence[int],
    symmetric: Sequence[bool],
    axes: Sequence[int | None],
    dtype: torch.dtype | None = None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """``fake_quantize_weight`` of every tensor in a list, float32 ones made ``dtype``."""
    settings = zip(xs, quant_min, quant_max, symmetric, axes, strict=True)
    results = [fake_quantize_weight(x, low, high, same, axis) for x, low, high, same, axis in settings]
    return [(narrowed(y, dtype), scale, zero_point) for y, scale, zero_point in results]


def fake_quantize_activation(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    ema_decay: float,
    axis: int | None = None,
    *,
    observing: bool = True,
    quantizing: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, running_min, running_max, scale, zero_point) after one batch.

    Observing first takes the batch into the running range and renews scale and zero point of every channel that
    has seen a value. y is x unless ``quantizing``, and as long as any channel has seen none.
    """
    if observing:
        low, high = (bound.to(running_min.dtype).reshape(running_min.shape) for bound in min_max(x, axis))
        running_min, running_max = update_running(running_min, running_max, low, high, ema_decay)
        seen = running_min <= running_max
        new_scale, new_zero_point = choose_scale(running_min, running_max, quant_min, quant_max, symmetric)
        scale = torch.where(seen, new_scale, scale)
        zero_point = torch.where(seen, new_zero_point, zero_point)
    y, in_range = quantize(x, scale, zero_point, quant_min, quant_max, axis)
    active = (running_min <= running_max).all() & quantizing
    y, in_range = torch.where(active, y, x), in_range | ~active
    return straight_through(x, y, in_range), running_min, running_max, scale, zero_point


def clip_activation(x: Tensor, lower: float, upper: float) -> Tensor:
    """x within [lower, upper], NaN as it is; the gradient passes where lower < x < upper. ReLU, ReLU6, Hardtanh."""
    detached = x.detach()
    y = torch.where(detached < lower, lower, torch.where(detached > upper, upper, detached)).to(x.dtype)
    return straight_through(x, y, (lower < detached) & (detached < upper))
