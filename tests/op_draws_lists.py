"""How the operations on all weights of a model, on clipping activations and on codes are called at random."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import oracles
import strategies as st
import torch
from op_draws import SPREAD, assert_identity, channel_count, dtype_of, nothing
from op_sample import Sample
from strategies import Draw, Grid, chance, pick
from torch import Tensor
from trials import Outcome, Trial, same_bits

from quantkern import Backend, reference
from quantkern import functional as F


@dataclass(frozen=True)
class Weight:
    """One weight of a model and its rule. step: its scale where it is learned."""

    x: Tensor
    low: int
    high: int
    symmetric: bool
    axis: int | None
    step: Tensor | None
    start: int


def weights_of_a_model(draw: Draw) -> tuple[list[Weight], int]:
    """Some weights, and which of them is looked at."""
    found = []
    for _ in range(draw.integer(1, 4)):
        shape = st.shapes(draw)
        low, high = st.ranges(draw)
        step, start = st.steps(draw)
        grid = Grid(st.scales(draw, usable=True), low, high)
        x = st.laid_out(draw, shape, dtype_of(draw), grid, finite=chance(draw, 70))
        found.append(Weight(x, low, high, chance(draw, 50), st.axes(draw, shape), step, start))
    return found, draw.integer(0, len(found) - 1)


def narrowing(draw: Draw) -> torch.dtype | None:
    """The type that float32 results become in the same pass."""
    return pick(draw, (None, None, torch.float16, torch.bfloat16))


def check_narrowed(ys: list[Tensor], narrow: list[Tensor], dtype: torch.dtype | None) -> None:
    """A result that was narrowed in the same pass has the bits of one that was narrowed later."""
    for y, other in zip(ys, narrow, strict=True):
        assert same_bits(other, reference.narrowed(y, dtype)), (other, y)


def first(values: list[Tensor], at: int) -> list[Tensor]:
    """The one that is looked at in front."""
    return [values[at], *values[:at], *values[at + 1 :]]


def fake_quantize_weights(draw: Draw) -> Trial:
    weights, at = weights_of_a_model(draw)
    own, dtype = weights[at], narrowing(draw)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        xs = [x if w is own else w.x for w in weights]
        shapes = [() if w.axis is None else (w.x.shape[w.axis],) for w in weights]
        scales = [torch.full(shape, 0.5, device=x.device) for shape in shapes]
        zeros = [torch.full_like(scale, 3, dtype=torch.int32) for scale in scales]
        lists: list[Any] = [[getattr(w, name) for w in weights] for name in ("low", "high", "symmetric", "axis")]
        steps, starts = [w.step for w in weights], [w.start for w in weights]
        gate: Any = {"steps": steps, "start_steps": starts, "backend": backend}
        ys = F.fake_quantize_weights(xs, scales, zeros, *lists, **gate)
        check_narrowed(ys, F.fake_quantize_weights(xs, scales, zeros, *lists, dtype=dtype, **gate), dtype)
        return (*first(ys, at), *first(scales, at), *first(zeros, at))

    def oracle(outcome: Outcome) -> None:
        x, low, high = own.x, own.low, own.high
        if not x.numel():
            return
        y, scale, zero_point = (outcome.results[i * len(weights)] for i in range(3))
        oracles.scale_of_range(*oracles.batch_range(x, own.axis), scale, zero_point, (low, high, own.symmetric))
        if own.step is not None and int(own.step) < own.start:
            assert_identity(x, outcome)
            return
        inside, unsure = oracles.affine(x, y, scale, zero_point, low, high, own.axis)
        if outcome.above is not None:
            whole = own.symmetric and low == -high
            oracles.assert_selected(outcome.gradients[0], outcome.above, inside | whole, unsure & (not whole))

    return Trial(Sample("fake_quantize_weights", tuple(own.x.shape), run), own.x, oracle)


def lsq_weights(draw: Draw) -> Trial:
    weights, at = weights_of_a_model(draw)
    own = weights[at]
    scales = []
    for w in weights:
        values = st.channel_values(draw, channel_count(tuple(w.x.shape), w.axis), st.scales(draw), SPREAD)
        scales.append(st.vectors(draw, values, axis=w.axis is not None).requires_grad_())
    factors = [pick(draw, (None, 1.0, 0.25)) for _ in weights]
    dtype = narrowing(draw)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        xs = [x if w is own else w.x for w in weights]
        lists: list[Any] = [[getattr(w, name) for w in weights] for name in ("low", "high", "axis")]
        ys = F.lsq_weights(xs, scales, *lists, factors, backend=backend)
        check_narrowed(ys, F.lsq_weights(xs, scales, *lists, factors, dtype=dtype, backend=backend), dtype)
        return tuple(first(ys, at))

    def oracle(outcome: Outcome) -> None:
        scale, factor = scales[at], factors[at]
        oracles.affine(own.x, outcome.results[0], scale, torch.zeros_like(scale), own.low, own.high, own.axis)
        if outcome.above is not None:
            grad_scale = reference.lsq_grad_scale(own.x, own.high, own.axis) if factor is None else factor
            settings = (own.low, own.high, own.axis, grad_scale)
            oracles.lsq_gradients(own.x, outcome.above, outcome.gradients, scale, None, settings)

    return Trial(Sample("lsq_weights", tuple(own.x.shape), run), own.x, oracle, (scales[at],))


def clip_bounds(draw: Draw) -> tuple[float, float]:
    """Of ReLU, ReLU6, Hardtanh, and others; now and then an empty interval."""
    if chance(draw, 3):
        return pick(draw, ((1.0, 1.0), (2.0, -1.0), (math.nan, 1.0)))
    known = ((0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, 0.25), (-math.inf, math.inf), (0.25, 96.0))
    return pick(draw, known)


def clip_activation(draw: Draw) -> Trial:
    dtype, shape, (lower, upper) = dtype_of(draw), st.shapes(draw), clip_bounds(draw)
    x = st.laid_out(draw, shape, dtype, Grid(pick(draw, (1.0, 0.25, 1e-3))))

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        return (F.clip_activation(x, lower, upper, backend=backend),)

    def oracle(outcome: Outcome) -> None:
        x64 = x.detach().double()
        oracles.assert_near(outcome.results[0], x64.clamp(lower, upper), 0.0, "y")
        if outcome.above is not None:
            inside = (x64 > lower) & (x64 < upper)
            oracles.assert_selected(outcome.gradients[0], outcome.above, inside, torch.zeros_like(inside))

    return Trial(Sample("clip_activation", shape, run), x, oracle)


def code_ranges(draw: Draw) -> tuple[int, int]:
    """Of one byte; one in ten is wider."""
    low, high = st.ranges(draw)
    return (low, high) if high - low <= 255 or chance(draw, 10) else (0, 255)


def to_codes(draw: Draw) -> Trial:
    shape, (low, high) = st.shapes(draw), code_ranges(draw)
    axis, one = st.axes(draw, shape), st.scales(draw, usable=True)
    axis = None if axis is None else axis % len(shape)
    count = channel_count(shape, axis)
    values = st.channel_values(draw, count, one, (1.0, 1.25, 0.5))
    scale = torch.tensor(values, device=draw.device).clamp(min=2.95e-39)
    zero_point = None
    if chance(draw, 60) or low > 0 or high < 0:
        zeros = [st.zero_points(draw, low, high) for _ in range(count)]
        zero_point = torch.tensor(zeros, dtype=torch.int32, device=draw.device)
    x = st.laid_out(draw, shape, torch.float32, Grid(one, low, high))
    if not chance(draw, 20):  # on the grid, with the strides of x
        zero = torch.zeros(count, device=draw.device) if zero_point is None else zero_point
        x = F.fake_quantize(x.detach(), scale, zero, low, high, axis, backend=Backend.REFERENCE)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        if backend is Backend.REFERENCE and high - low > 255:
            raise ValueError("a byte has 256 values")
        zeros = torch.zeros_like(scale) if zero_point is None else zero_point.float()
        parameters = torch.cat([scale, zeros, scale.new_zeros(1)])
        if backend is Backend.REFERENCE:
            codes = reference.to_codes(x, scale, zero_point, low, high, axis)
            decoded = reference.from_codes(codes, parameters, low, axis)
        else:
            codes, found = torch.ops.quantkern.to_codes.default(x, scale, zero_point, low, high, axis)
            if x.numel() and not codes.numel():  # not on the grid
                return (codes.new_zeros(()),)
            assert codes.stride() == torch.empty_like(x).stride() and torch.equal(found, parameters)
            decoded = torch.ops.quantkern.from_codes.default(codes, found, low, axis)
        return (codes, decoded) if same_bits(decoded, x) else (codes.new_zeros(()),)

    sample = Sample("to_codes", shape, run, like_x=False, differentiable=False)
    return Trial(sample, x, nothing)


def from_codes(draw: Draw) -> Trial:
    shape, (low, high) = st.shapes(draw), code_ranges(draw)
    axis = st.axes(draw, shape)
    axis = None if axis is None else axis % len(shape)
    count = channel_count(shape, axis)
    values = st.channel_values(draw, count, st.scales(draw, usable=True), SPREAD)
    zeros = [st.zero_points(draw, low, high) for _ in range(count)]
    parameters = torch.tensor([*values, *zeros, 0.0], device=draw.device)
    codes = st.packed(draw, shape, 8, spoil=False).to(torch.uint8).squeeze(-1)
    x = st.place(draw, codes, pick(draw, ("contiguous", "permuted")))

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        if backend is Backend.REFERENCE:
            return (reference.from_codes(x, parameters, low, axis),)
        return (torch.ops.quantkern.from_codes.default(x, parameters, low, axis),)

    sample = Sample("from_codes", shape, run, differentiable=False, like_x=False)
    return Trial(sample, x, nothing)
