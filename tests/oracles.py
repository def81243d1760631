"""What the kernels' results may be, by ``quantkern.reference`` in float64 and the error that float32 allows.

Only a decision that float32 cannot take for sure (which side of a tie, inside or at the end of a range) may fall
otherwise than in float64, and only where the float64 value lies within the error of the float32 one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkern import reference

EPS = 2.0**-22
"""Of a float32 quotient made of a reciprocal and a product, twice over."""

SMALLEST = 2.0**-149
LARGEST = torch.finfo(torch.float32).max


def assert_near(got: Tensor, want: Tensor, allowed: Tensor | float, what: str) -> None:
    """got is want to within ``allowed`` and the rounding to got's dtype; NaN where want is NaN, and overflow to inf.

    allowed: infinity where float32 says nothing.
    """
    info = torch.finfo(got.dtype)
    found, size = got.detach().double(), want.abs()
    free = torch.as_tensor(allowed) == math.inf
    allowed = allowed + size * info.eps + 2 * info.smallest_normal * info.eps
    most = min(info.max, LARGEST)  # a float64 y is a float32 product
    right = (found == want) | (found.isnan() & want.isnan()) | ((found - want).abs() <= allowed) | free
    if bool(right.all()):
        return
    over = (size + allowed >= most * (1 - info.eps)) & found.isinf() & ((found > 0) == (want > 0))
    wrong = ~(right | over).reshape(-1)
    if bool(wrong.any()):
        at = int(wrong.int().argmax())
        one, other, slack = (torch.as_tensor(v).expand_as(found).reshape(-1)[at].item() for v in (found, want, allowed))
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} off; element {at} is {one!r}, in float64 {other!r}, "
            f"allowed {slack!r}"
        )


def assert_selected(dx: Tensor, above: Tensor, inside: Tensor, unsure: Tensor) -> None:
    """dx is the gradient above where inside, 0 elsewhere; either of them where unsure."""
    passed = (dx == above) | (dx.isnan() & above.isnan())
    stopped = dx == 0
    wrong = ~torch.where(inside, passed | (unsure & stopped), stopped | (unsure & passed))
    assert not bool(wrong.any()), f"gradient of x: {int(wrong.sum())} of {wrong.numel()} pass or stop wrongly"


def in_steps(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x / scale in float64 and how far the float32 number may be from it."""
    v = x / scale
    return v, v.abs() * EPS + x.abs() * SMALLEST + 2 * SMALLEST


def near_tie(v: Tensor, error: Tensor) -> Tensor:
    """Where v and a number within error of it may be rounded to different integers."""
    return ((v - v.floor() - 0.5).abs() <= error) | (error >= 0.5)


def affine(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    low: int,
    high: int,
    axis: int | None,
) -> tuple[Tensor, Tensor]:
    """Checks y; returns where the gradient passes and where that cannot be said for sure."""
    x64, scale64 = x.detach().double(), scale.detach().double()
    zero64 = zero_point.detach().double()
    usable = (scale > 0) & torch.isfinite(scale) & torch.isfinite(1 / scale)
    want, inside = reference.quantize(x64, torch.where(usable, scale64, torch.nan), zero64, low, high, axis)
    s, z = reference.along_axis(scale64, x, axis), reference.along_axis(zero64, x, axis)
    v, error = in_steps(x64, s)
    tie = near_tie(v, error)
    # Integers are exact up to the limit of quantized ranges; a zero point between them costs roundings.
    between = (z != z.round()) * EPS * (z.abs() + max(abs(low), abs(high)))
    assert_near(y, want, tie * s + (want.abs() * EPS + between * s), "y")
    position = v.round() + z
    at_end = torch.minimum((position - low).abs(), (position - high).abs()) <= between
    return inside & ~v.isnan(), tie | at_end


def scale_of_range(
    low: Tensor, high: Tensor, scale: Tensor, zero_point: Tensor, settings: tuple[int, int, bool]
) -> None:
    """Checks scale and zero point of ranges that are float32 numbers."""
    quant_min, quant_max, symmetric = settings
    low, high, scale, zero_point = (t.detach().double().reshape(-1) for t in (low, high, scale, zero_point))
    want, zero = reference.choose_scale(low, high, quant_min, quant_max, symmetric)
    assert_near(scale, want, want * 2 * EPS + 2 * SMALLEST, "scale")
    v = low.clamp(max=0) / want
    unsure = near_tie(v, v.abs() * 4 * EPS + SMALLEST) & (not symmetric)
    off = torch.where(want < LARGEST, (zero_point - zero.double()).abs(), 0.0)  # no zero point without a scale
    assert bool(((off == 0) | (unsure & (off <= 1))).all()), (
        f"zero point {zero_point.tolist()}, in float64 {zero.tolist()}"
    )


def batch_range(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """The exact range as float32 keeps it, in float64."""
    low, high = reference.min_max(x.detach().double(), axis)
    return low.float().double(), high.float().double()


def running_range(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], batches: list[Tensor], decay: float, axis: int | None
) -> None:
    """Checks a running range after some batches."""
    low, high = (t.double().reshape(-1) for t in before)
    size = torch.zeros_like(low)
    for batch in batches:
        bounds = batch_range(batch, axis)
        low, high = reference.update_running(low, high, *bounds, decay)
        size = torch.maximum(size, torch.maximum(*(b.nan_to_num(0, 0, 0).abs() for b in (*bounds,))))
        size = torch.maximum(size, torch.maximum(low.nan_to_num(0, 0, 0).abs(), high.nan_to_num(0, 0, 0).abs()))
    for name, got, want in (("running_min", after[0], low), ("running_max", after[1], high)):
        assert_near(got.reshape(-1), want, size * EPS * len(batches) + 4 * SMALLEST, name)


def lsq_gradients(
    x: Tensor,
    above: Tensor,
    gradients: tuple[Tensor, ...],
    scale: Tensor,
    zero_point: Tensor | None,
    settings: tuple[int, int, int | None, float],
) -> None:
    """Checks the gradients of x, scale and zero point: terms in float64, their sum within float32's roundings."""
    low, high, axis, grad_scale = settings
    v, p, step, offset = reference.lsq_positions(
        x.detach().double(), scale.detach().double(), None if zero_point is None else zero_point.detach().double(), axis
    )
    error = in_steps(x.detach().double(), step)[1] + (v.abs() + offset.abs()) * EPS * (zero_point is not None)
    below, over = ~(p > low), p >= high
    inside = ~(below | over)
    at_end = torch.minimum((p - low).abs(), (p - high).abs()) <= error
    assert_selected(gradients[0], above, inside, at_end)
    g = above.double()
    tie = near_tie(v, error)
    rounding = torch.round(v) - v
    ends = torch.where((p - low).abs() < (p - high).abs(), low - offset, high - offset)  # the nearer one
    ends = torch.where(below, low - offset, torch.where(over, high - offset, ends))
    by_scale = torch.where(inside, rounding, ends) * g
    weight = torch.where(at_end, ends.abs() + 1, torch.where(tie, 1.0, torch.where(inside, error, 0.0)))
    doubt = torch.where(weight > 0, weight * g.abs(), 0.0)
    _assert_sum(gradients[1], by_scale, doubt, axis, grad_scale, "gradient of scale")
    if zero_point is not None:
        by_zero = torch.where(inside, 0.0, -step * g)
        _assert_sum(
            gradients[2],
            by_zero,
            torch.where(at_end, (step * g).abs(), 0.0),
            axis,
            grad_scale,
            "gradient of zero point",
        )


def _assert_sum(got: Tensor, terms: Tensor, doubt: Tensor, axis: int | None, factor: float, what: str) -> None:
    want, size, slack = (reference.channel_sums(t, axis).reshape(-1) * factor for t in (terms, terms.abs(), doubt))
    known = (size / factor < LARGEST / 4) & torch.isfinite(slack)  # beyond it float32 overflows somewhere on the way
    # What is in doubt is rounded as the rest is, and every term may lose what float32 cannot hold.
    lost = terms.numel() / max(1, want.numel()) * SMALLEST * max(1.0, factor)
    unsure = torch.where(known, slack + (size + slack) * 256 * EPS + lost + 2 * SMALLEST, torch.inf)
    assert_near(got.reshape(-1), want, unsure, what)


def dorefa_weight(w: Tensor, y: Tensor, bits: int) -> None:
    """Checks y."""
    w64 = w.detach().double()
    want = reference.dorefa_weight(w64, bits)
    if bits == 1:
        assert_near(y, want, want.abs() * 64 * EPS + SMALLEST, "y")
        return
    steps = float(2**bits - 1)
    t = torch.tanh(w64)
    largest = t.abs().nan_to_num(0.0).amax().clamp(min=reference.SMALLEST_SCALE) if t.numel() else t.new_ones(())
    z = (t / (2 * largest) + 0.5) * steps
    assert_near(y, want, near_tie(z, torch.full_like(z, 4 * EPS * steps)) * (2 / steps) + EPS, "y")


def dorefa_weight_gradient(w: Tensor, dx: Tensor, above: Tensor, bits: int) -> None:
    """Checks the gradient of w, whose part through the maximum may go to any of several equal weights."""
    if bits == 1:
        assert_selected(dx, above, torch.ones_like(dx, dtype=torch.bool), torch.zeros_like(dx, dtype=torch.bool))
        return
    leaf = w.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(reference.dorefa_weight(leaf, bits), leaf, above.double())
    t, g = torch.tanh(leaf.detach()), above.double()
    magnitude = t.abs().nan_to_num(0.0)
    if not magnitude.numel() or magnitude.amax() == 0:
        assert_near(dx, torch.zeros_like(want), 0.0, "gradient of x")
        return
    largest = magnitude.amax()
    through = torch.where(magnitude > 0, g * t, 0.0).abs().sum() / largest**2
    lost = t.numel() * SMALLEST / largest**2  # products of tiny gradients and weights underflow
    attains = magnitude >= largest * (1 - 8 * EPS)
    alone = int(attains.sum()) == 1
    # In float32 1 - t * t loses digits as t nears 1.
    direct = (g / largest).abs()
    slope = 1 - t * t
    known = torch.where(attains, (direct + through) < LARGEST / 4, direct < LARGEST / 4)
    if bool(t.isnan().any()):
        known = known & ~attains  # NaN goes through the maximum to those that attain it
    share = torch.where(attains, through, 0.0)
    allowed = (direct + share) * 64 * EPS * (1 + slope) + (0.0 if alone else share * slope)
    allowed = allowed + torch.where(attains, lost, 0.0)
    allowed = torch.where(known, allowed, torch.where(g.isfinite() & ~attains, direct * EPS, torch.inf))
    assert_near(dx, want, allowed, "gradient of x")


def dorefa_activation(x: Tensor, y: Tensor, bits: int) -> None:
    """Checks y."""
    x64, steps = x.detach().double(), float(2**bits - 1)
    z = x64.clamp(0, 1) * steps
    tie = near_tie(z, z * EPS)
    assert_near(y, reference.dorefa_activation(x64, bits), tie / steps, "y")


def quantized_gradient(grad: Tensor, y: Tensor, bits: int, seed: int) -> None:
    """Checks a gradient that was quantized with the random numbers of a seed."""
    wide, steps = grad.detach().double(), float(2**bits - 1)
    rows = wide.flatten(1) if wide.dim() > 1 else wide.reshape(1, -1)
    if not rows.numel():
        return
    largest = torch.where(rows.isnan(), 0, rows.abs()).amax(1)
    width = 2 * largest.reshape([-1] + [1] * (grad.dim() - 1) if grad.dim() > 1 else [1] * grad.dim())
    width = torch.where(width > LARGEST, torch.inf, width)  # twice the largest overflows in float32: no quantization
    want = reference.dorefa_gradient(wide, bits, seed)
    noise = reference.gradient_noise(grad, seed).double()
    z = (wide / width + 0.5) * steps + noise
    tie = near_tie(z, torch.full_like(z, 4 * EPS * steps))
    # A width below the normal numbers has few digits.
    allowed = torch.where(width > 0, (tie / steps + 4 * EPS) * width + 4 * SMALLEST, 0.0)
    finite = torch.isfinite(width).expand_as(wide)
    assert_near(y, torch.where(finite, want, wide), torch.where(finite, allowed, 0.0), "quantized gradient")


def linear_gradients(
    want: tuple[Tensor, ...], sizes: tuple[Tensor, ...], got: tuple[Tensor, ...], dtype: torch.dtype
) -> None:
    """Checks sums of products: want in float64, and the same of magnitudes, which bounds the rounding."""
    eps = torch.finfo(dtype).eps
    for one, size, found in zip(want, sizes, got, strict=True):
        known = torch.isfinite(size) & (size < torch.finfo(dtype).max / 4)
        allowed = torch.where(known, size * 64 * eps + 1e-44, math.inf)
        assert_near(found, one, allowed, "gradient")
