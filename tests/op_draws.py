"""How every public function is called at random: the arguments of one trial, drawn one kind at a time."""

from __future__ import annotations

import math
from typing import Any

import oracles
import strategies as st
import torch
from op_sample import DTYPES, LOW_PRECISION, Sample
from strategies import Draw, Grid, chance, pick
from torch import Tensor
from trials import Outcome, Trial

from quantkern import Backend, reference
from quantkern import functional as F

SPREAD = (1.0, 1.25, 0.5, 2.0, 3.0, 0.3)


def dtype_of(draw: Draw, dtypes: tuple[torch.dtype, ...] = DTYPES) -> torch.dtype:
    """float64 only on the CPU."""
    return pick(draw, dtypes if draw.device.type == "cpu" else LOW_PRECISION)


def nothing(outcome: Outcome) -> None:
    """For results whose exact equality with the reference says everything."""


def channel_count(shape: tuple[int, ...], axis: int | None) -> int:
    return 1 if axis is None else shape[axis]


def fake_quantize(draw: Draw) -> Trial:
    dtype, shape = dtype_of(draw), st.shapes(draw)
    axis, (low, high) = st.axes(draw, shape), st.ranges(draw)
    step, start = st.steps(draw)
    # An operation that does not quantize yet need not look at its scale.
    one, zero = st.scales(draw, usable=step is not None), st.zero_points(draw, low, high)
    between = pick(draw, (0.0, 0.0, 0.5, 0.125)) if max(-low, high) <= 1 << 16 else 0.0
    count = channel_count(shape, axis)
    scale: Any = one
    zero_point: Any = min(zero + between, high) if between else zero
    if axis is not None or chance(draw, 60):
        spread = SPREAD if step is None else SPREAD[:1]
        scale = st.form(draw, st.channel_values(draw, count, one, spread), axis is not None)
        zeros = [st.zero_points(draw, low, high) for _ in range(min(count, 3))]
        values = [min(zeros[i % 3] + between, high) if between else zeros[i % 3] for i in range(count)]
        if chance(draw, 2) and values and step is None:
            values[-1] = high + 1
        zero_point = st.form(draw, values, axis is not None)
    x = st.laid_out(draw, shape, dtype, Grid(one, low - zero, high - zero))

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        return (F.fake_quantize(x, scale, zero_point, low, high, axis, step=step, start_step=start, backend=backend),)

    def oracle(outcome: Outcome) -> None:
        if step is not None and int(step) < start:
            assert_identity(x, outcome)
            return
        s, z = (torch.as_tensor(value, dtype=torch.float32, device=x.device) for value in (scale, zero_point))
        inside, unsure = oracles.affine(x, outcome.results[0], s, z, low, high, axis)
        if outcome.above is not None:
            oracles.assert_selected(outcome.gradients[0], outcome.above, inside, unsure)

    return Trial(Sample("fake_quantize", shape, run), x, oracle)


def assert_identity(x: Tensor, outcome: Outcome) -> None:
    assert torch.equal(outcome.results[0].nan_to_num(7.0), x.nan_to_num(7.0))
    if outcome.above is not None:
        assert torch.equal(outcome.gradients[0].nan_to_num(7.0), outcome.above.nan_to_num(7.0))


def fake_quantize_weight(draw: Draw) -> Trial:
    dtype, shape = dtype_of(draw), st.shapes(draw)
    axis, (low, high), symmetric = st.axes(draw, shape), st.ranges(draw), chance(draw, 50)
    step, start = st.steps(draw)
    x = st.laid_out(draw, shape, dtype, Grid(st.scales(draw, usable=True), low, high), finite=chance(draw, 70))
    vector = () if axis is None else (shape[axis],)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        scale, zero_point = x.new_full(vector, 0.5, dtype=torch.float32), x.new_full(vector, 3, dtype=torch.int32)
        y = F.fake_quantize_weight(
            x, scale, zero_point, low, high, symmetric, axis, step=step, start_step=start, backend=backend
        )
        return y, scale, zero_point

    def oracle(outcome: Outcome) -> None:
        if not x.numel():
            return
        y, scale, zero_point = outcome.results
        oracles.scale_of_range(*oracles.batch_range(x, axis), scale, zero_point, (low, high, symmetric))
        if step is not None and int(step) < start:
            assert_identity(x, outcome)
            return
        inside, unsure = oracles.affine(x, y, scale, zero_point, low, high, axis)
        if outcome.above is not None:
            whole = symmetric and low == -high
            oracles.assert_selected(outcome.gradients[0], outcome.above, inside | whole, unsure & (not whole))

    return Trial(Sample("fake_quantize_weight", shape, run), x, oracle)


def fake_quantize_activation(draw: Draw) -> Trial:
    dtype, shape = dtype_of(draw), st.shapes(draw)
    axis, (low, high), symmetric = st.axes(draw, shape), st.ranges(draw), chance(draw, 50)
    step, start = st.steps(draw)
    decay = pick(draw, (0.9, 0.99, 0.5, 1e-3, 0.9999999))
    clip = pick(draw, ((0.0, math.inf), (0.0, 6.0), (-1.0, 1.0))) if chance(draw, 30) else None
    observing, seen, times = not chance(draw, 25), chance(draw, 50), draw.integer(1, 2)
    one = st.scales(draw, usable=True)
    x = st.laid_out(draw, shape, dtype, Grid(one, low, high), finite=chance(draw, 70))
    count = channel_count(shape, axis)
    bound = one * pick(draw, (1.0, 20.0, 0.0))
    ends = torch.tensor([-bound, bound] if seen else [math.inf, -math.inf], device=draw.device)
    # The state that a batch leaves behind: scale and zero point are those of the running range.
    chosen = (
        reference.choose_scale(ends[0], ends[1], low, high, symmetric) if seen else (torch.tensor(0.05), ends[0] * 0)
    )
    vector = () if axis is None else (count,)

    def state() -> tuple[Tensor, ...]:
        dtypes = (torch.float32, torch.float32, torch.float32, torch.int32)
        found = (ends[0], ends[1], chosen[0], chosen[1].nan_to_num(low))
        return tuple(v.to(x.device, t).expand(vector).clone() for v, t in zip(found, dtypes, strict=True))

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        running, flag = state(), torch.tensor(observing, device=x.device)
        settings = (low, high, symmetric, decay, axis)
        ys = []
        for k in range(times):
            ys.append(
                F.fake_quantize_activation(
                    x * (1 + k), *running, flag, *settings, clip=clip, step=step, start_step=start, backend=backend
                )
            )
        return (ys[-1], *running)

    def oracle(outcome: Outcome) -> None:
        y, *after = outcome.results
        batches = [x.detach() * (1 + k) for k in range(times)]
        passes = torch.ones_like(batches[-1], dtype=torch.bool)
        if clip is not None:
            passes = (batches[-1] > clip[0]) & (batches[-1] < clip[1])
            batches = [torch.where(b.isnan(), b, b.clamp(*clip)) for b in batches]
        if observing:
            oracles.running_range(state()[:2], (after[0], after[1]), batches, decay, axis)
        else:
            assert all(torch.equal(one, other) for one, other in zip(after, state(), strict=True))
        known = after[0] <= after[1]
        if observing and bool(known.any()):
            chosen = [value.reshape(-1)[known.reshape(-1)] for value in after]
            oracles.scale_of_range(chosen[0], chosen[1], chosen[2], chosen[3], (low, high, symmetric))
        quantizes = bool(known.all()) and (step is None or int(step) >= start)
        if not quantizes:
            assert torch.equal(y.nan_to_num(7.0), batches[-1].nan_to_num(7.0))
            return
        inside, unsure = oracles.affine(batches[-1], y, after[2], after[3], low, high, axis)
        if outcome.above is not None and times == 1:
            oracles.assert_selected(outcome.gradients[0], outcome.above, inside & passes, unsure & passes)

    # The second batch is a product, which has strides of its own.
    return Trial(Sample("fake_quantize_activation", shape, run, like_x=False), x, oracle)


def lsq(draw: Draw) -> Trial:
    dtype, shape = dtype_of(draw), st.shapes(draw)
    axis, (low, high) = st.axes(draw, shape), st.ranges(draw)
    one, count = st.scales(draw), channel_count(shape, axis)
    scale = st.vectors(draw, st.channel_values(draw, count, one, SPREAD), axis=axis is not None)
    zero_point, zero = None, 0
    if chance(draw, 40) and max(-low, high) <= 1 << 16:
        zero = st.zero_points(draw, low, high)
        zeros = st.channel_values(draw, count, zero + pick(draw, (0.0, 0.25, 0.5)), (1.0, 0.5, 0.25))
        zero_point = st.vectors(draw, zeros, axis=axis is not None)
    grad_scale = pick(draw, (None, 1.0, 0.25))
    x = st.laid_out(draw, shape, dtype, Grid(one, low - zero, high - zero))
    parameters = tuple(value.requires_grad_() for value in (scale, zero_point) if value is not None)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        return (F.lsq(x, scale, low, high, axis, grad_scale, zero_point, backend=backend),)

    def oracle(outcome: Outcome) -> None:
        z = torch.zeros_like(scale) if zero_point is None else zero_point
        oracles.affine(x, outcome.results[0], scale, z, low, high, axis)
        if outcome.above is not None:
            # numel / channels with no elements is no number of elements.
            factor = reference.lsq_grad_scale(x, high, axis) if grad_scale is None else grad_scale
            settings = (low, high, axis, factor)
            oracles.lsq_gradients(x, outcome.above, outcome.gradients, scale, zero_point, settings)

    return Trial(Sample("lsq", shape, run), x, oracle, parameters)


def dorefa_weight(draw: Draw) -> Trial:
    dtype, shape, bits = dtype_of(draw, LOW_PRECISION), st.shapes(draw), st.bits(draw)
    x = st.laid_out(draw, shape, dtype, Grid(pick(draw, (0.25, 0.01, 1.0, 1e-6, 4.0))), finite=chance(draw, 60))

    def oracle(outcome: Outcome) -> None:
        if not x.numel():
            return
        oracles.dorefa_weight(x, outcome.results[0], bits)
        if outcome.above is not None:
            oracles.dorefa_weight_gradient(x, outcome.gradients[0], outcome.above, bits)

    sample = Sample("dorefa_weight", shape, lambda x, backend: (F.dorefa_weight(x, bits, backend=backend),))
    return Trial(sample, x, oracle, exact=False, exact_gradient=bits == 1)


def dorefa_activation(draw: Draw) -> Trial:
    dtype, shape, bits = dtype_of(draw, LOW_PRECISION), st.shapes(draw), st.bits(draw)
    x = st.laid_out(draw, shape, dtype, Grid(1 / (2**bits - 1), 0, 2**bits - 1))

    def oracle(outcome: Outcome) -> None:
        oracles.dorefa_activation(x, outcome.results[0], bits)
        if outcome.above is not None:
            inside = (x.double() >= 0) & (x.double() <= 1)
            oracles.assert_selected(outcome.gradients[0], outcome.above, inside, torch.zeros_like(inside))

    sample = Sample("dorefa_activation", shape, lambda x, backend: (F.dorefa_activation(x, bits, backend=backend),))
    return Trial(sample, x, oracle)


def seeds(draw: Draw) -> int:
    return pick(draw, (0, 1, -1, (1 << 63) - 1, -(1 << 63), draw.integer(0, 1 << 62)))


def dorefa_gradient(draw: Draw) -> Trial:
    dtype, shape, bits, seed = dtype_of(draw, LOW_PRECISION), st.shapes(draw), st.bits(draw), seeds(draw)
    given = seed if chance(draw, 50) else torch.tensor(seed, device=draw.device)
    x = st.laid_out(draw, shape, dtype)

    def oracle(outcome: Outcome) -> None:
        assert outcome.results[0].data_ptr() == x.data_ptr()
        if outcome.above is not None:
            oracles.quantized_gradient(outcome.above, outcome.gradients[0], bits, seed)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        return (F.dorefa_gradient(x, bits, given, backend=backend),)

    # y is x itself, strides and all.
    return Trial(Sample("dorefa_gradient", shape, run, like_x=False), x, oracle)


def quantize_gradient(draw: Draw) -> Trial:
    dtype, shape, bits, seed = dtype_of(draw, LOW_PRECISION), st.shapes(draw), st.bits(draw), seeds(draw)
    x = st.laid_out(draw, shape, dtype, Grid(pick(draw, (1.0, 1e-6, 1e4))), finite=chance(draw, 50))
    at = torch.tensor(seed, device=draw.device)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        return (F.quantize_gradient(x, bits, at, backend=backend),)

    sample = Sample("quantize_gradient", shape, run, differentiable=False)
    return Trial(sample, x, lambda outcome: oracles.quantized_gradient(x, outcome.results[0], bits, seed))


def binarize(draw: Draw) -> Trial:
    dtype, shape, clip = dtype_of(draw), st.shapes(draw), chance(draw, 70)
    x = st.laid_out(draw, shape, dtype, Grid(0.25))

    def oracle(outcome: Outcome) -> None:
        want = reference.binarize(x.detach().double())
        assert torch.equal(outcome.results[0].double(), want)
        if outcome.above is not None:
            inside = (x.detach().double().abs() <= 1) | (not clip)
            oracles.assert_selected(outcome.gradients[0], outcome.above, inside, torch.zeros_like(inside))

    return Trial(Sample("binarize", shape, lambda x, backend: (F.binarize(x, clip, backend=backend),)), x, oracle)
