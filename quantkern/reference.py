"""The specification of every operation, in plain PyTorch.

Nothing here is fast. The kernels are tested against this page, the benchmarks compile it as a baseline, and
``backend=Backend.REFERENCE`` runs it. Arithmetic is float32 for float16, bfloat16 and float32 tensors. With a
float64 ``scale`` everything is float64, which makes these functions the oracle of the kernels.

Sources: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", 2018 (eq. 1, sections 3 and 3.1); NNI 2.10's QAT_Quantizer for the scale and zero point conventions; Esser
et al., "Learned Step Size Quantization", 2020; Zhou et al., "DoReFa-Net", 2016.
"""

from __future__ import annotations

import math
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


class DorefaWeight(torch.autograd.Function):
    """Zhou et al. 2016, eq. 9: straight through the rounding only; tanh and the maximum have their true gradients."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, bits: int) -> Tensor:  # noqa: D102
        ctx.save_for_backward(w)
        ctx.bits = bits
        wide = w if w.dtype is torch.float64 else w.float()
        if bits == 1:
            mean = wide.abs().double().mean().to(wide.dtype)
            return torch.where(wide >= 0, mean, torch.where(wide < 0, -mean, wide)).to(w.dtype)
        t, steps = torch.tanh(wide), float(2**bits - 1)
        if not t.numel():
            return w.clone()
        largest = t.abs().nan_to_num(0.0).amax().clamp(min=SMALLEST_SCALE)
        return (2 * (torch.round((t / (2 * largest) + 0.5) * steps) / steps) - 1).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        (w,) = ctx.saved_tensors
        if ctx.bits == 1 or not w.numel():
            return grads[0], None
        grad, wide = (v if v.dtype is torch.float64 else v.float() for v in (grads[0], w))
        t = torch.tanh(wide)
        magnitude = t.abs().nan_to_num(0.0)
        largest = magnitude.amax()
        if largest == 0:
            return torch.zeros_like(grads[0]), None
        at_largest = magnitude == largest
        # Not largest * largest, which underflows where every weight is tiny.
        through_largest = (grad * t).double().sum().to(t.dtype) / largest / largest / at_largest.sum()
        dt = grad / largest - torch.where(at_largest, torch.sign(t) * through_largest, torch.zeros_like(t))
        return (dt * (1 - t * t)).to(grads[0].dtype), None


def dorefa_weight(w: Tensor, bits: int) -> Tensor:
    """DoReFa-Net's weights, in [-1, 1] (Zhou et al. 2016, section 2.3).

    bits > 1: 2 * q(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1 with q(z) = rint(z * n) / n, n = 2^bits - 1; the gradient
    passes the rounding and goes truly through tanh and the maximum (shared equally where several weights attain it;
    none for an all-zero tensor). bits = 1: sign(w) * mean|w| with sign(0) = +1, and the gradient passes.
    """
    y: Tensor = DorefaWeight.apply(w, bits)  # type: ignore[no-untyped-call]
    return y


def dorefa_activation(x: Tensor, bits: int) -> Tensor:
    """q(clip(x, 0, 1)) with q as in ``dorefa_weight``; the gradient passes where 0 <= x <= 1 (section 2.4)."""
    wide, steps = (x.detach() if x.dtype is torch.float64 else x.detach().float()), float(2**bits - 1)
    y = torch.round((wide.clamp(0, 1) + 0.0) * steps) / steps  # + 0.0: the grid has one zero, +0
    return straight_through(x, y.to(x.dtype), (wide >= 0) & (wide <= 1))


def philox(seed: int, count: int) -> Tensor:
    """``count`` 32-bit words of Philox4x32-10 (Salmon et al. 2011) as int64: word i of block i // 4 under ``seed``."""
    low32 = 0xFFFFFFFF
    block = torch.arange((count + 3) // 4, dtype=torch.int64)
    words = [block & low32, block >> 32, torch.zeros_like(block), torch.zeros_like(block)]
    keys = [seed & low32, (seed >> 32) & low32]
    for _ in range(10):
        halves = []
        for word, factor in ((words[0], 0xD2511F53), (words[2], 0xCD9E8D57)):
            # A 64-bit product in two parts, since int64 has no room for its sign bit.
            part = (word & 0xFFFF) * factor
            upper = (word >> 16) * factor + (part >> 16)
            halves += [upper >> 16, ((upper & 0xFFFF) << 16) | (part & 0xFFFF)]
        words = [halves[2] ^ words[1] ^ keys[0], halves[3], halves[0] ^ words[3] ^ keys[1], halves[1]]
        keys = [(keys[0] + 0x9E3779B9) & low32, (keys[1] + 0xBB67AE85) & low32]
    return torch.stack(words, 1).reshape(-1)[:count]


def gradient_noise(grad: Tensor, seed: int) -> Tensor:
    """Uniform in [-1/2, 1/2), float32: word i of ``philox(seed)`` for element i of grad in memory order."""
    noise = torch.empty_like(grad, dtype=torch.float32)
    uniform = (philox(seed, grad.numel()) >> 8).to(torch.float32) * 2.0**-24 - 0.5
    noise.as_strided((noise.numel(),), (1,)).copy_(uniform)
    return noise


def dorefa_gradient(grad: Tensor, bits: int, seed: int) -> Tensor:
    """2 M (q(g / (2 M) + 1/2 + noise) - 1/2), M the largest |g| of each sample (first axis), 0 where M is 0.

    noise is ``gradient_noise`` / n; q is clamped to [0, 1]. A sample whose M is not finite comes back unchanged, so
    that loss scaling sees it (section 2.5, eq. 12).
    """
    steps = float(2**bits - 1)
    wide = grad if grad.dtype is torch.float64 else grad.float()
    rows = wide.flatten(1) if wide.dim() > 1 else wide.reshape(1, -1)
    largest = torch.where(rows.isnan(), 0, rows.abs()).amax(1) if rows.numel() else rows.new_zeros(rows.shape[0])
    shape = [-1] + [1] * (grad.dim() - 1) if grad.dim() > 1 else [1] * grad.dim()
    width = (2 * largest).reshape(shape)
    q = torch.round((wide / width + 0.5) * steps + gradient_noise(grad, seed).to(wide.dtype)).clamp(0, steps)
    y = torch.where(width > 0, (q / steps - 0.5) * width, torch.zeros_like(wide))
    return torch.where(torch.isfinite(width), y, wide).to(grad.dtype)


WORD = 32
"""Signs in a packed word: element i is bit i % 32 of word i // 32, 1 for x >= 0; padding bits are 0."""

LONGEST_SUM = 1 << 24
"""Most signs in a dot product: every sum of that many +-1 is exact in float32."""


def words_of(k: int) -> int:
    """How many words hold k signs.

    >>> words_of(33)
    2
    """
    return -(-k // WORD)


def clip_activation(x: Tensor, lower: float, upper: float) -> Tensor:
    """x within [lower, upper], NaN as it is; the gradient passes where lower < x < upper. ReLU, ReLU6, Hardtanh."""
    detached = x.detach()
    y = torch.where(detached < lower, lower, torch.where(detached > upper, upper, detached)).to(x.dtype)
    return straight_through(x, y, (lower < detached) & (detached < upper))


def binarize(x: Tensor, clip_gradient: bool = True) -> Tensor:
    """+1 where x >= 0, else -1 (so NaN too); the gradient passes where |x| <= 1, or everywhere.

    Courbariaux et al., "Binarized Neural Networks", 2016, eq. 1 and 4: activations clip the gradient; for weights it
    passes whole.
    """
    detached = x.detach()
    y = torch.where(detached >= 0, 1.0, -1.0).to(x.dtype)
    return straight_through(x, y, detached.abs() <= 1 if clip_gradient else torch.ones_like(x, dtype=torch.bool))


def pack_signs(x: Tensor, axis: int = -1) -> Tensor:
    """The signs of x, packed along ``axis``, which moves to the end: int32 [..., ceil(size / 32)]."""
    bits = (x.detach() >= 0).movedim(axis, -1).to(torch.int64)
    words = words_of(bits.shape[-1])
    bits = torch.nn.functional.pad(bits, (0, words * WORD - bits.shape[-1])).reshape(*bits.shape[:-1], words, WORD)
    packed = (bits << torch.arange(WORD, device=x.device)).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def pack_signs_counted(x: Tensor, axis: int = -1) -> tuple[Tensor, Tensor]:
    """``pack_signs`` and the number of ones in every packed row, int32."""
    return pack_signs(x, axis), (x.detach() >= 0).sum(axis, dtype=torch.int32)


def unpack_signs(packed: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first k signs of every row as +-1."""
    bits = (packed.unsqueeze(-1) >> torch.arange(WORD, device=packed.device, dtype=torch.int32)) & 1
    return (2 * bits.flatten(-2)[..., :k] - 1).to(dtype)


def scaled(dot: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """dot * scale + bias along the last axis, rounded after each step."""
    dot = dot if scale is None else dot * scale
    return dot if bias is None else dot + bias


def binary_matmul(a: Tensor, b: Tensor, k: int, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The dot products of the packed rows of a [M, words] with those of b [N, words]: float32 [M, N]."""
    return scaled(unpack_signs(a, k) @ unpack_signs(b, k).t(), scale, bias)


def binary_matmul_sign(a: Tensor, b: Tensor, k: int, threshold: Tensor, flip: Tensor) -> Tensor:
    """Packed [M, ceil(N / 32)]: bit n is (dot >= threshold[n]) xor bit n of flip."""
    return signs_at(binary_matmul(a, b, k), threshold, flip)


def signs_at(dot: Tensor, threshold: Tensor, flip: Tensor) -> Tensor:
    """The packed signs of sums along the last axis."""
    turned = unpack_signs(flip, dot.shape[-1]) > 0
    return pack_signs(torch.where((dot.double() >= threshold.double()) ^ turned, 1.0, -1.0))


def binary_conv2d(
    x: Tensor,
    weight: Tensor,
    channels: int,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Convolution of packed images [N, H, W, words] with packed weights [O, kh, kw, words]: float32 [N, O, oh, ow].

    Exactly the float convolution of the +-1 tensors: padding adds nothing.
    """
    images, kernels = (unpack_signs(t, channels).permute(0, 3, 1, 2) for t in (x, weight))
    dot = torch.nn.functional.conv2d(images, kernels, None, stride, padding, dilation)
    return scaled(torch.round(dot).movedim(1, -1), scale, bias).movedim(-1, 1).contiguous()


def binary_conv2d_sign(
    x: Tensor,
    weight: Tensor,
    channels: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    threshold: Tensor,
    flip: Tensor,
) -> Tensor:
    """The packed signs of ``binary_conv2d``, [N, oh, ow, ceil(O / 32)], as in ``binary_matmul_sign``."""
    dot = binary_conv2d(x, weight, channels, stride, padding, dilation)
    return signs_at(dot.movedim(1, -1), threshold, flip)


def packed_max_pool2d(
    x: Tensor, flip: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Max pooling of packed images before their sign was taken: OR over the window, AND for flipped channels."""
    channels = x.shape[-1] * WORD
    turned = unpack_signs(flip, channels)
    signs = (unpack_signs(x, channels) * -turned).permute(0, 3, 1, 2)  # -1 where flipped: the least becomes the most
    pooled = torch.nn.functional.max_pool2d(signs, kernel_size, stride, padding).permute(0, 2, 3, 1)
    return pack_signs(pooled * -turned)


def sign_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear of the signs of x and weight, with the gradients of linear at those signs (section 1.2 and 1.3)."""
    x, weight = binarize(x, clip_gradient=False), binarize(weight, clip_gradient=False)
    return torch.nn.functional.linear(x, weight, bias)


def sign_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """conv2d of the signs of x and weight, with the gradients of conv2d at those signs."""
    x, weight = binarize(x, clip_gradient=False), binarize(weight, clip_gradient=False)
    return torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation)
