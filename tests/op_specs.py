"""The one inventory of operations. A row buys forward, backward, opcheck, strides, empties, compile, parity, errors.

A ``Sample`` is one way of calling an operation: ``run(x, backend)`` calls it with fresh state and returns the result
followed by every tensor the operation wrote, so that comparing two runs compares all that there is to compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import op_draws
import op_draws_binary as binary
import op_draws_lists
import op_draws_observers
import torch
from op_sample import DTYPES, LOW_PRECISION, Run, Sample, make_x
from strategies import Draw
from torch import Tensor
from trials import Trial

from quantkern import Backend
from quantkern import functional as F


@dataclass(frozen=True)
class Bad:
    """A call that must fail with this error and a message that says what was given."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    message: str


@dataclass(frozen=True)
class OpSpec:
    """An operation, the operators it is made of, how to call it rightly and wrongly, and opcheck's arguments."""

    name: str
    schemas: tuple[str, ...]
    samples: tuple[Sample, ...]
    bad: tuple[Bad, ...]
    op_calls: Callable[[], Iterator[tuple[Any, tuple[Any, ...]]]]
    draws: tuple[Callable[[Draw], Trial], ...]
    """One for each public function, which it is named after: how tests/fuzz.py calls it at random."""

    dtypes: tuple[torch.dtype, ...] = field(default=DTYPES)

    looped: bool = False
    """Whether Triton runs it as a loop over another operation's twin."""


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _to(x: Tensor, *values: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if value is None else value.to(x.device) for value in values)


def _fake_quantize(
    scale: Any,
    zero_point: Any,
    low: int,
    high: int,
    axis: int | None = None,
    step: int | None = None,
    start: int = 0,
    dtype: torch.dtype | None = None,
) -> Run:
    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        s = scale.to(x.device) if isinstance(scale, Tensor) else scale
        z = zero_point.to(x.device) if isinstance(zero_point, Tensor) else zero_point
        counter = None if step is None else torch.tensor(step, device=x.device)
        gate: Any = {"step": counter, "start_step": start, "dtype": dtype, "backend": backend}
        return (F.fake_quantize(x, s, z, low, high, axis, **gate),)

    return run


def _weight(
    low: int,
    high: int,
    symmetric: bool,
    axis: int | None = None,
    channels: int = 1,
    step: int | None = None,
    start: int = 0,
    dtype: torch.dtype | None = None,
) -> Run:
    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        shape = () if axis is None else (channels,)
        scale = torch.zeros(shape, device=x.device)
        zero_point = torch.zeros(shape, dtype=torch.int32, device=x.device)
        counter = None if step is None else torch.tensor(step, device=x.device)
        gate: Any = {"step": counter, "start_step": start, "dtype": dtype, "backend": backend}
        y = F.fake_quantize_weight(x, scale, zero_point, low, high, symmetric, axis, **gate)
        return y, scale, zero_point

    return run


def activation_state(x: Tensor, shape: tuple[int, ...], *, seen: bool = False) -> tuple[Tensor, ...]:
    """running_min, running_max, scale, zero_point."""
    bound = 1.25 if seen else -math.inf
    return (
        torch.full(shape, -bound, device=x.device),
        torch.full(shape, bound, device=x.device),
        torch.full(shape, 0.05, device=x.device),
        torch.full(shape, 3, dtype=torch.int32, device=x.device),
    )


def _activation(
    low: int,
    high: int,
    symmetric: bool,
    axis: int | None = None,
    channels: int = 1,
    *,
    batches: int = 2,
    observing: bool = True,
    seen: bool = False,
    step: int | None = None,
    start: int = 0,
    clip: tuple[float, float] | None = None,
    dtype: torch.dtype | None = None,
) -> Run:
    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        state = activation_state(x, () if axis is None else (channels,), seen=seen)
        flag = torch.tensor(observing, device=x.device)
        counter = None if step is None else torch.tensor(step, device=x.device)
        settings = (low, high, symmetric, 0.9, axis)
        gate: Any = {"step": counter, "start_step": start, "clip": clip, "dtype": dtype, "backend": backend}
        ys = [F.fake_quantize_activation(x * (1 + k), *state, flag, *settings, **gate) for k in range(batches)]
        return (*ys, *state)

    return run


def _vector(channels: int, low: float, high: float) -> Tensor:
    return torch.linspace(low, high, channels)


FAKE_QUANTIZE = OpSpec(
    name="fake_quantize",
    schemas=(
        "fake_quantize",
        "fake_quantize.number",
        "fake_quantize_forward",
        "fake_quantize_forward.number",
        "fake_quantize_backward",
        "fake_quantize_backward_",
    ),
    samples=(
        Sample("number", (37,), _fake_quantize(0.25, 0, -8, 7)),
        Sample("number_zero_point", (3, 5, 7), _fake_quantize(0.1, 9, 0, 15)),
        Sample("tensor", (4, 65), _fake_quantize(torch.tensor(0.05), _int32(-3), -128, 127)),
        Sample("tensor_float_zero_point", (130,), _fake_quantize(torch.tensor([0.3]), torch.tensor([1.5]), 0, 15)),
        Sample("wide_range", (64,), _fake_quantize(1e-4, 0, -32767, 32767)),
        Sample("tiny_scale", (64,), _fake_quantize(1e-30, 0, -127, 127)),
        Sample("channels_first", (6, 70), _fake_quantize(_vector(6, 0.01, 0.3), _int32(*range(-3, 3)), -8, 7, 0)),
        Sample("channels_middle", (2, 5, 33), _fake_quantize(_vector(5, 0.1, 0.5), _int32(*[0] * 5), -8, 7, 1)),
        Sample("channels_short_rows", (3, 5, 9), _fake_quantize(_vector(5, 0.1, 0.5), _int32(*[2] * 5), 0, 15, 1)),
        Sample("channels_last_axis", (9, 19), _fake_quantize(_vector(19, 0.1, 0.5), torch.ones(19), -8, 7, -1)),
        Sample("one_channel", (1, 50), _fake_quantize(torch.tensor([0.2]), _int32(1), -8, 7, 0)),
        Sample("three_channels_last", (50, 3), _fake_quantize(_vector(3, 0.1, 0.5), _int32(0, 1, 2), 0, 3, 1)),
        Sample("delayed", (41,), _fake_quantize(torch.tensor(0.25), _int32(0), -8, 7, step=4, start=5)),
        Sample("delay_over", (41,), _fake_quantize(torch.tensor(0.25), _int32(0), -8, 7, step=5, start=5)),
        Sample("as_float16", (4, 65), _fake_quantize(0.3, -3, -128, 127, dtype=torch.float16)),
        Sample(
            "as_bfloat16",
            (2, 5, 33),
            _fake_quantize(_vector(5, 0.1, 0.5), _int32(*[0] * 5), -8, 7, 1, dtype=torch.bfloat16),
        ),
    ),
    bad=(
        Bad("integer_tensor", lambda: F.fake_quantize(torch.arange(3), 0.1, 0, -8, 7), TypeError, "floating-point"),
        Bad("zero_scale", lambda: F.fake_quantize(torch.ones(3), 0.0, 0, -8, 7), ValueError, "scale .* got 0"),
        Bad("nan_scale", lambda: F.fake_quantize(torch.ones(3), math.nan, 0, -8, 7), ValueError, "scale .* got nan"),
        Bad(
            "negative_scale_tensor",
            lambda: F.fake_quantize(torch.ones(2, 3), torch.tensor([0.1, -0.5]), _int32(0, 0), -8, 7, 0),
            ValueError,
            "scale .* got -0.5",
        ),
        Bad(
            "scale_without_reciprocal",
            lambda: F.fake_quantize(torch.ones(3), 1e-40, 0, -8, 7),
            ValueError,
            "scale must be positive and finite",
        ),
        Bad("empty_range", lambda: F.fake_quantize(torch.ones(3), 0.1, 0, 7, 7), ValueError, "quant_min=7"),
        Bad("range_too_wide", lambda: F.fake_quantize(torch.ones(3), 0.1, 0, 0, 1 << 21), ValueError, "quant_max="),
        Bad("zero_point_outside", lambda: F.fake_quantize(torch.ones(3), 0.1, 8, -8, 7), ValueError, "zero_point"),
        Bad(
            "axis_out_of_range",
            lambda: F.fake_quantize(torch.ones(3, 2), torch.ones(2), _int32(0, 0), -8, 7, 2),
            IndexError,
            "axis must lie in",
        ),
        Bad(
            "wrong_channel_count",
            lambda: F.fake_quantize(torch.ones(3, 2), torch.ones(3), _int32(0, 0), -8, 7, 1),
            ValueError,
            "scale must be a vector of 2",
        ),
        Bad(
            "vector_without_axis",
            lambda: F.fake_quantize(torch.ones(3, 2), torch.ones(3), _int32(0, 0, 0), -8, 7),
            ValueError,
            "give axis",
        ),
        Bad(
            "other_device",
            lambda: F.fake_quantize(torch.ones(3), torch.ones(1, device="meta"), _int32(0), -8, 7),
            ValueError,
            r"scale is on meta, x on cpu; move it with scale.to\(x.device\)",
        ),
        Bad(
            "number_with_axis",
            lambda: F.fake_quantize(torch.ones(3), 0.1, 0, -8, 7, 0),
            TypeError,
            "scale must be a vector",
        ),
        Bad(
            "dtype",
            lambda: F.fake_quantize(torch.ones(3), 0.1, 0, -8, 7, dtype=torch.float32),
            ValueError,
            "dtype must be float16, bfloat16 or None",
        ),
        Bad("string_scale", lambda: F.fake_quantize(torch.ones(3), "0.1", 0, -8, 7), TypeError, "scale must be"),
        Bad(
            "string_backend",
            lambda: F.fake_quantize(torch.ones(3), 0.1, 0, -8, 7, backend="native"),  # type: ignore[arg-type]
            TypeError,
            "backend must be a member",
        ),
    ),
    op_calls=lambda: _fake_quantize_op_calls(),
    draws=(op_draws.fake_quantize,),
)

FAKE_QUANTIZE_WEIGHT = OpSpec(
    name="fake_quantize_weight",
    schemas=("fake_quantize_weight", "fake_quantize_weight_forward"),
    samples=(
        Sample("symmetric", (6, 5, 3, 3), _weight(-127, 127, True), edges=False),
        Sample("symmetric_unsigned", (6, 45), _weight(0, 255, True), edges=False),
        Sample("affine", (6, 45), _weight(0, 255, False), edges=False),
        Sample("affine_signed", (7, 9), _weight(-7, 7, False), edges=False),
        Sample("rows", (12, 5, 3, 3), _weight(-127, 127, True, 0, 12), edges=False),
        Sample("rows_affine", (70, 40), _weight(0, 15, False, 0, 70), edges=False),
        Sample("rows_aligned", (5, 64), _weight(-7, 7, False, 0, 5), edges=False),
        Sample("rows_short", (40, 1, 3, 3), _weight(0, 255, False, 0, 40), edges=False),
        Sample("columns", (9, 21), _weight(0, 255, True, 1, 21), edges=False),
        Sample("middle", (4, 6, 50), _weight(-127, 127, True, 1, 6), edges=False),
        Sample("sixteen_bits", (300,), _weight(-32767, 32767, True), edges=False),
        Sample("delayed", (6, 45), _weight(0, 255, False, step=1, start=2), edges=False),
        Sample("delayed_rows", (6, 45), _weight(-127, 127, True, 0, 6, step=1, start=2), edges=False),
        Sample("infinite_weight", (40,), _weight(-127, 127, True), edges=True),
        Sample("as_float16", (70, 40), _weight(0, 15, False, 0, 70, dtype=torch.float16), edges=False),
        Sample("as_bfloat16", (9, 21), _weight(0, 255, True, 1, 21, dtype=torch.bfloat16), edges=False),
        Sample("infinite_weight_affine", (40,), _weight(0, 255, False), edges=True),
    ),
    bad=(
        Bad(
            "integer_tensor",
            lambda: F.fake_quantize_weight(torch.arange(3), torch.ones(1), _int32(0), -8, 7, True),
            TypeError,
            "floating-point",
        ),
        Bad(
            "zero_point_dtype",
            lambda: F.fake_quantize_weight(torch.ones(3), torch.ones(1), torch.ones(1), -8, 7, True),
            TypeError,
            "zero_point must be",
        ),
        Bad(
            "scale_shape",
            lambda: F.fake_quantize_weight(torch.ones(3, 2), torch.ones(2), _int32(0, 0, 0), -8, 7, True, 0),
            ValueError,
            "scale must be a vector of 3",
        ),
        Bad(
            "strided_state",
            lambda: F.fake_quantize_weight(torch.ones(3, 2), torch.ones(6)[::2], _int32(0, 0, 0), -8, 7, True, 0),
            ValueError,
            "scale must be contiguous",
        ),
        Bad(
            "empty_range",
            lambda: F.fake_quantize_weight(torch.ones(3), torch.ones(1), _int32(0), 3, -3, True),
            ValueError,
            "quant_min=3",
        ),
    ),
    op_calls=lambda: _weight_op_calls(),
    draws=(op_draws.fake_quantize_weight,),
)

FAKE_QUANTIZE_ACTIVATION = OpSpec(
    name="fake_quantize_activation",
    schemas=("fake_quantize_activation", "fake_quantize_activation_forward"),
    samples=(
        Sample("affine", (4, 5, 6, 7), _activation(0, 255, False), edges=False),
        Sample("symmetric", (4, 55), _activation(-127, 127, True), edges=False),
        Sample("symmetric_unsigned", (4, 55), _activation(0, 255, True), edges=False),
        Sample("channels", (3, 6, 40), _activation(0, 255, False, 1, 6), edges=False),
        Sample("channels_last_axis", (30, 11), _activation(-7, 7, True, 1, 11), edges=False),
        Sample("seen_before", (50,), _activation(0, 255, False, seen=True), edges=False),
        Sample("not_observing", (50,), _activation(0, 15, False, observing=False, seen=True)),
        Sample("not_observing_unseen", (50,), _activation(0, 15, False, observing=False)),
        Sample("delayed", (50,), _activation(0, 255, False, step=0, start=1), edges=False),
        Sample("infinite_batch", (50,), _activation(0, 255, False, seen=True)),
        Sample("infinite_first_batch", (50,), _activation(0, 255, False)),
        Sample("relu", (4, 5, 6, 7), _activation(0, 255, False, clip=(0.0, math.inf)), edges=False),
        Sample("relu6", (133,), _activation(0, 15, False, clip=(0.0, 6.0))),
        Sample("relu_symmetric", (133,), _activation(-127, 127, True, clip=(0.0, math.inf)), edges=False),
        Sample("relu_channels", (3, 6, 40), _activation(0, 255, False, 1, 6, clip=(0.0, math.inf)), edges=False),
        Sample("hardtanh_last_axis", (30, 11), _activation(-7, 7, True, 1, 11, clip=(-1.0, 1.0))),
        Sample("relu_delayed", (50,), _activation(0, 255, False, step=0, start=1, clip=(0.0, math.inf))),
        Sample("as_float16", (3, 6, 40), _activation(0, 255, False, 1, 6, dtype=torch.float16), edges=False),
        Sample("as_bfloat16_later", (50,), _activation(0, 255, False, step=0, start=1, dtype=torch.bfloat16)),
        Sample(
            "relu_as_bfloat16_later",
            (133,),
            _activation(0, 255, False, step=0, start=1, clip=(0.0, 6.0), dtype=torch.bfloat16),
        ),
        Sample("relu_as_float16", (133,), _activation(0, 255, False, clip=(0.0, 6.0), dtype=torch.float16)),
        Sample("hardtanh_not_observing", (50,), _activation(0, 15, False, observing=False, clip=(-0.5, 0.5))),
    ),
    bad=(
        Bad(
            "decay_of_one",
            lambda: F.fake_quantize_activation(
                torch.ones(3), *activation_state(torch.ones(1), ()), torch.tensor(True), 0, 255, False, 1.0
            ),
            ValueError,
            "ema_decay must lie in",
        ),
        Bad(
            "observing_dtype",
            lambda: F.fake_quantize_activation(
                torch.ones(3), *activation_state(torch.ones(1), ()), torch.tensor(1), 0, 255, False
            ),
            TypeError,
            "observing must be",
        ),
        Bad(
            "state_shape",
            lambda: F.fake_quantize_activation(
                torch.ones(3, 4), *activation_state(torch.ones(1), (3,)), torch.tensor(True), 0, 255, False, 0.9, 1
            ),
            ValueError,
            "running_min must be a vector of 4",
        ),
        Bad(
            "step_dtype",
            lambda: F.fake_quantize_activation(
                torch.ones(3),
                *activation_state(torch.ones(1), ()),
                torch.tensor(True),
                0,
                255,
                False,
                step=torch.tensor(1.0),
            ),
            TypeError,
            "step must be",
        ),
    ),
    op_calls=lambda: _activation_op_calls(),
    draws=(op_draws.fake_quantize_activation,),
)


def _lsq(
    low: int,
    high: int,
    scale: Any,
    axis: int | None = None,
    zero_point: Any = None,
    dtype: torch.dtype | None = None,
) -> Run:
    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        z = None if zero_point is None else zero_point.to(x.device)
        return (F.lsq(x, scale.to(x.device), low, high, axis, zero_point=z, dtype=dtype, backend=backend),)

    return run


LSQ = OpSpec(
    name="lsq",
    schemas=("lsq", "lsq_forward", "lsq_backward", "lsq_backward_"),
    samples=(
        Sample("tensor", (4, 65), _lsq(-8, 7, torch.tensor(0.3))),
        Sample("unsigned", (130,), _lsq(0, 15, torch.tensor([0.2]))),
        Sample("sixteen_bits", (64,), _lsq(-32768, 32767, torch.tensor(1e-4))),
        Sample("zero_point", (3, 50), _lsq(0, 15, torch.tensor(0.2), None, torch.tensor(6.25))),
        Sample("channels_first", (6, 70), _lsq(-8, 7, _vector(6, 0.1, 0.5), 0)),
        Sample("channels_middle", (2, 5, 6, 7), _lsq(-2, 1, _vector(5, 0.1, 0.9), 1)),
        Sample("channels_short_rows", (3, 5, 9), _lsq(-8, 7, _vector(5, 0.1, 0.5), 1, _vector(5, -2.0, 2.0))),
        Sample("channels_last_axis", (40, 19), _lsq(-8, 7, _vector(19, 0.1, 0.5), -1)),
        Sample("channels_depthwise", (40, 1, 3, 3), _lsq(-8, 7, _vector(40, 0.1, 0.5), 0)),
        Sample("as_float16", (4, 65), _lsq(-8, 7, torch.tensor(0.3), dtype=torch.float16)),
        Sample(
            "as_bfloat16",
            (3, 5, 9),
            _lsq(-8, 7, _vector(5, 0.1, 0.5), 1, _vector(5, -2.0, 2.0), dtype=torch.bfloat16),
        ),
    ),
    bad=(
        Bad("integer_tensor", lambda: F.lsq(torch.arange(3), torch.ones(1), -8, 7), TypeError, "floating-point"),
        Bad("negative_scale", lambda: F.lsq(torch.ones(3), -torch.ones(1), -8, 7), ValueError, "scale .* got -1"),
        Bad("empty_range", lambda: F.lsq(torch.ones(3), torch.ones(1), 7, 7), ValueError, "quant_min=7"),
        Bad("half_scale", lambda: F.lsq(torch.ones(3), torch.ones(1).half(), -8, 7), TypeError, "scale must be"),
        Bad(
            "zero_point_shape",
            lambda: F.lsq(torch.ones(3, 2), torch.ones(2), -8, 7, 1, zero_point=torch.ones(3)),
            ValueError,
            "zero_point must be a vector of 2",
        ),
        Bad("axis", lambda: F.lsq(torch.ones(3), torch.ones(3), -8, 7, 1), IndexError, "axis must lie in"),
    ),
    op_calls=lambda: _lsq_op_calls(),
    draws=(op_draws.lsq,),
)


def _scale_shape(x: Tensor, axis: int | None) -> tuple[int, ...]:
    return () if axis is None else (x.shape[axis],)


NEIGHBOURS: tuple[tuple[Tensor, tuple[Any, ...]], ...] = tuple(
    (make_x(shape, seed=9 + i, edges=False).to(dtype).requires_grad_(), rule)
    for i, (shape, dtype, rule) in enumerate(
        (
            ((), torch.float32, (0, -127, 127, True, None)),
            ((5, 7), torch.float16, (0, 0, 255, False, None)),
            ((70, 40), torch.bfloat16, (0, -7, 7, False, 0)),
            ((6, 4, 3, 3), torch.float32, (7, -8, 7, False, 1)),
            ((4, 0), torch.float32, (0, -127, 127, True, None)),
            ((40, 1, 3, 3), torch.float32, (0, 0, 15, False, 0)),
        )
    )
)
"""The other weights of the model that x is one of, with start_step, quant_min, quant_max, symmetric and axis."""


def _among_neighbours(x: Tensor, rule: tuple[Any, ...]) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
    """x in front, so that its result comes first."""
    others = [(other.to(x.device), other_rule) for other, other_rule in NEIGHBOURS]
    return [x, *(other for other, _ in others)], [rule, *(other_rule for _, other_rule in others)]


def _weights(
    low: int, high: int, symmetric: bool, axis: int | None = None, start: int = 0, dtype: torch.dtype | None = None
) -> Run:
    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        xs, rules = _among_neighbours(x, (start, low, high, symmetric, axis))
        starts, lows, highs, same, axes = zip(*rules, strict=True)
        scales = [torch.zeros(_scale_shape(x, axis), device=x.device) for x, axis in zip(xs, axes, strict=True)]
        zeros = [torch.zeros_like(scale, dtype=torch.int32) for scale in scales]
        step = torch.tensor(3, device=x.device)
        steps = [step if start else None for start in starts]
        ys = F.fake_quantize_weights(
            xs, scales, zeros, lows, highs, same, axes, steps=steps, start_steps=starts, dtype=dtype, backend=backend
        )
        return (*ys, *scales, *zeros)

    return run


def _lsq_weights(
    low: int, high: int, axis: int | None = None, channels: int = 1, dtype: torch.dtype | None = None
) -> Run:
    shapes = [() if axis is None else (channels,), *(_scale_shape(x, rule[-1]) for x, rule in NEIGHBOURS)]
    steps = [torch.full(shape, 0.21 + 0.05 * k, requires_grad=True) for k, shape in enumerate(shapes)]

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        xs, rules = _among_neighbours(x, (0, low, high, True, axis))
        _, lows, highs, _, axes = zip(*rules, strict=True)
        scales = [step.to(x.device) for step in steps]
        return tuple(F.lsq_weights(xs, scales, lows, highs, axes, dtype=dtype, backend=backend))

    return run


FAKE_QUANTIZE_WEIGHTS = OpSpec(
    name="fake_quantize_weights",
    schemas=(
        "fake_quantize_weights",
        "fake_quantize_weights_kept",
        "fake_quantize_weights_forward",
        "fake_quantize_again",
    ),
    samples=(
        Sample("symmetric", (6, 5, 3, 3), _weights(-127, 127, True), edges=False),
        Sample("affine", (300, 400), _weights(0, 255, False), edges=False),
        Sample("rows", (70, 3, 40), _weights(-8, 7, False, 0), edges=False),
        Sample("long_rows", (5, 30011), _weights(-8, 7, False, 0), edges=False),
        Sample("columns", (9000, 21), _weights(0, 255, True, 1), edges=False),
        Sample("delayed", (6, 45), _weights(0, 255, False, start=4), edges=False),
        Sample("infinite_weight", (40,), _weights(0, 255, False)),
        Sample("as_float16", (300, 400), _weights(-8, 7, False, 0, dtype=torch.float16), edges=False),
        Sample("as_bfloat16", (30, 21), _weights(0, 255, False, 1, dtype=torch.bfloat16), edges=False),
        Sample("as_float16_later", (6, 45), _weights(0, 255, False, start=4, dtype=torch.float16), edges=False),
    ),
    bad=(
        Bad(
            "lengths",
            lambda: F.fake_quantize_weights([torch.ones(3)], [], [_int32(0)], [0], [7], [True]),
            ValueError,
            "scales must have one entry for each of the 1 tensors in xs, got 0",
        ),
        Bad(
            "lengths_below",
            lambda: torch.ops.quantkern.fake_quantize_weights(
                [torch.ones(3)], [torch.ones(1)], [_int32(0)], [0], [7], [True], [-1, -1], [None], [0]
            ),
            ValueError,
            "axes must have one entry for each of the 1 tensors in xs, got 2",
        ),
        Bad(
            "two_devices",
            lambda: torch.ops.quantkern.fake_quantize_weights(
                [torch.ones(3), torch.ones(3, device="meta")],
                [torch.ones(1), torch.ones(1, device="meta")],
                [_int32(0), _int32(0).to("meta")],
                [0, 0],
                [7, 7],
                [True, True],
                [-1, -1],
                [None, None],
                [0, 0],
            ),
            ValueError,
            "xs must lie on one device, got cpu and meta",
        ),
        Bad(
            "integer_tensor",
            lambda: F.fake_quantize_weights([torch.arange(3)], [torch.ones(1)], [_int32(0)], [0], [7], [True]),
            TypeError,
            "floating-point",
        ),
        Bad(
            "empty_range",
            lambda: F.fake_quantize_weights([torch.ones(3)], [torch.ones(1)], [_int32(0)], [7], [7], [True]),
            ValueError,
            "quant_min=7",
        ),
        Bad(
            "axis",
            lambda: F.fake_quantize_weights([torch.ones(3)], [torch.ones(3)], [_int32(0)], [0], [7], [True], [1]),
            IndexError,
            "axis must lie in",
        ),
        Bad(
            "scale_shape",
            lambda: F.fake_quantize_weights([torch.ones(3)], [torch.ones(2)], [_int32(0)], [0], [7], [True]),
            ValueError,
            "scale must hold one value",
        ),
    ),  # fmt: skip
    op_calls=lambda: _weights_op_calls(),
    draws=(op_draws_lists.fake_quantize_weights,),
    looped=True,
)

LSQ_WEIGHTS = OpSpec(
    name="lsq_weights",
    schemas=("lsq_weights", "lsq_weights_forward", "lsq_again"),
    samples=(
        Sample("tensor", (4, 65), _lsq_weights(-8, 7)),
        Sample("large", (300, 400), _lsq_weights(-128, 127)),
        Sample("rows", (70, 3, 40), _lsq_weights(-2, 1, 0, 70)),
        Sample("columns", (9000, 21), _lsq_weights(-8, 7, 1, 21)),
        Sample("as_float16", (9000, 21), _lsq_weights(-8, 7, 1, 21, torch.float16)),
        Sample("as_bfloat16", (300, 400), _lsq_weights(-128, 127, dtype=torch.bfloat16)),
    ),
    bad=(
        Bad(
            "negative_scale",
            lambda: F.lsq_weights([torch.ones(3)], [-torch.ones(1)], [-8], [7]),
            ValueError,
            "scale .* got -1",
        ),
        Bad(
            "lengths",
            lambda: F.lsq_weights([torch.ones(3)], [torch.ones(1)], [-8], [7, 7]),
            ValueError,
            "quant_max must have one entry for each of the 1 tensors in xs, got 2",
        ),
        Bad(
            "dtype",
            lambda: F.lsq_weights([torch.ones(3)], [torch.ones(1)], [-8], [7], dtype=torch.float64),
            ValueError,
            "dtype must be torch.float16, torch.bfloat16 or None, got torch.float64",
        ),
        Bad(
            "dtype_of_a_result",
            lambda: torch.ops.quantkern.lsq_weights_forward(
                [torch.ones(3).half()], [torch.ones(3)], [torch.ones(())], [-8], [7], [-1]
            ),
            ValueError,
            "16-bit type for float32",
        ),
        Bad("axis", lambda: F.lsq_weights([torch.ones(3)], [torch.ones(3)], [-8], [7], [1]), IndexError, "axis must"),
    ),
    op_calls=lambda: _lsq_weights_op_calls(),
    draws=(op_draws_lists.lsq_weights,),
    looped=True,
)


def _dorefa(function: Callable[..., Tensor], bits: int, **options: Any) -> Run:
    return lambda x, backend: (function(x, bits, **options, backend=backend),)


DOREFA_WEIGHT = OpSpec(
    name="dorefa_weight",
    schemas=("dorefa_weight", "dorefa_weight_forward", "dorefa_weight_backward"),
    samples=(
        Sample("one_bit", (6, 45), _dorefa(F.dorefa_weight, 1), edges=False),
        Sample("two_bits", (6, 5, 3, 3), _dorefa(F.dorefa_weight, 2), edges=False, step=2 / 3),
        Sample("four_bits", (130,), _dorefa(F.dorefa_weight, 4), edges=False, step=2 / 15),
        Sample("eight_bits", (70, 70), _dorefa(F.dorefa_weight, 8), edges=False, step=2 / 255),
    ),
    bad=(
        Bad("no_bits", lambda: F.dorefa_weight(torch.ones(3), 0), ValueError, r"bits must lie in \[1, 16\], got 0"),
        Bad("double", lambda: F.dorefa_weight(torch.ones(3).double(), 2), TypeError, "float64"),
        Bad("integer_tensor", lambda: F.dorefa_weight(torch.arange(3), 2), TypeError, "floating-point"),
    ),
    op_calls=lambda: _dorefa_weight_op_calls(),
    draws=(op_draws.dorefa_weight,),
    dtypes=LOW_PRECISION,
)

DOREFA_ACTIVATION = OpSpec(
    name="dorefa_activation",
    schemas=("dorefa_activation", "dorefa_activation_forward"),
    samples=(
        Sample("one_bit", (61,), _dorefa(F.dorefa_activation, 1)),
        Sample("two_bits", (4, 5, 6, 7), _dorefa(F.dorefa_activation, 2)),
        Sample("eight_bits", (3, 50), _dorefa(F.dorefa_activation, 8)),
    ),
    bad=(
        Bad("bits", lambda: F.dorefa_activation(torch.ones(3), 17), ValueError, "got 17"),
        Bad("double", lambda: F.dorefa_activation(torch.ones(3).double(), 2), TypeError, "float64"),
    ),
    op_calls=lambda: _dorefa_activation_op_calls(),
    draws=(op_draws.dorefa_activation,),
    dtypes=LOW_PRECISION,
)

DOREFA_GRADIENT = OpSpec(
    name="dorefa_gradient",
    schemas=("dorefa_gradient",),
    samples=(
        Sample("vector", (67,), _dorefa(F.dorefa_gradient, 4, seed=5)),
        Sample("samples", (5, 70), _dorefa(F.dorefa_gradient, 4, seed=-7)),
        Sample("images", (4, 5, 6, 7), _dorefa(F.dorefa_gradient, 8, seed=1 << 40)),
        Sample("one_bit", (9, 3), _dorefa(F.dorefa_gradient, 1, seed=0)),
    ),
    bad=(
        Bad("bits", lambda: F.dorefa_gradient(torch.ones(3), 0), ValueError, "got 0"),
        Bad("double", lambda: F.dorefa_gradient(torch.ones(3).double(), 2), TypeError, "float64"),
        Bad(
            "seed_dtype",
            lambda: torch.ops.quantkern.dorefa_gradient(torch.ones(3), 4, torch.tensor(1.0)),
            TypeError,
            "seed must be",
        ),
    ),
    op_calls=lambda: _dorefa_gradient_op_calls(),
    draws=(op_draws.dorefa_gradient, op_draws.quantize_gradient),
    dtypes=LOW_PRECISION,
)

BINARIZE = OpSpec(
    name="binarize",
    schemas=("binarize", "binarize_forward"),
    samples=(
        Sample("vector", (67,), lambda x, backend: (F.binarize(x, backend=backend),)),
        Sample("whole_gradient", (3, 50), lambda x, backend: (F.binarize(x, clip_gradient=False, backend=backend),)),
        Sample("images", (4, 5, 6, 7), lambda x, backend: (F.binarize(x, backend=backend),)),
    ),
    bad=(
        Bad("integer_tensor", lambda: F.binarize(torch.arange(3)), TypeError, "floating-point"),
        Bad(
            "integer_tensor_reference",
            lambda: F.binarize(torch.arange(3), backend=Backend.REFERENCE),
            TypeError,
            "floating-point",
        ),
    ),
    op_calls=lambda: _binarize_op_calls(),
    draws=(op_draws.binarize,),
)


def _clip(lower: float, upper: float) -> Run:
    return lambda x, backend: (F.clip_activation(x, lower, upper, backend=backend),)


CLIP_ACTIVATION = OpSpec(
    name="clip_activation",
    schemas=("clip_activation", "clip_activation_", "clip_activation_forward"),
    samples=(
        Sample("relu", (67,), _clip(0.0, math.inf)),
        Sample("relu6", (3, 50), _clip(0.0, 6.0)),
        Sample("hardtanh", (4, 5, 6, 7), _clip(-1.0, 1.0)),
        Sample("above", (33,), _clip(-math.inf, 0.3)),
    ),
    bad=(
        Bad("integer_tensor", lambda: F.clip_activation(torch.arange(3), 0.0, 1.0), TypeError, "floating-point"),
        Bad("empty_interval", lambda: F.clip_activation(torch.ones(3), 1.0, 0.0), ValueError, "lower=1.*upper=0"),
        Bad("nan", lambda: F.clip_activation(torch.ones(3), math.nan, 0.0), ValueError, "lower=nan"),
        Bad(
            "empty_interval_reference",
            lambda: F.clip_activation(torch.ones(3), 1.0, 0.0, backend=Backend.REFERENCE),
            ValueError,
            "lower=1.0, upper=0.0",
        ),
    ),
    op_calls=lambda: _clip_op_calls(),
    draws=(op_draws_lists.clip_activation,),
)


def _fixed(run: Run) -> dict[str, Any]:
    """A sample whose result is not like x and has no gradient."""
    return {"run": run, "like_x": False, "differentiable": False}


def _pack(axis: int = -1, counts: bool = False) -> dict[str, Any]:
    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        packed = F.pack_signs(x, axis, counts=counts, backend=backend)
        return packed if isinstance(packed, tuple) else (packed,)

    return _fixed(run)


def _pack_unpack(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
    packed = F.pack_signs(x, backend=backend)
    assert isinstance(packed, Tensor)
    return (F.unpack_signs(packed, x.shape[-1], x.dtype, backend=backend),)


def packed_weights(*shape: int, axis: int = -1) -> Tensor:
    """The same packed weights for every backend."""
    packed = F.pack_signs(make_x(shape, seed=2), axis, backend=Backend.REFERENCE)
    assert isinstance(packed, Tensor)
    return packed


def _pack_x(x: Tensor, backend: Backend, axis: int = -1) -> Tensor:
    packed = F.pack_signs(x, axis, backend=backend)
    assert isinstance(packed, Tensor)
    return packed


def _matmul(rows: int, k: int, *, epilogue: bool = False, arranged: bool = False) -> dict[str, Any]:
    fixed = packed_weights(rows, k)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        weights = fixed.to(x.device)
        order = F.arrange_signs(weights) if arranged and backend in (Backend.AUTO, Backend.NATIVE) else None
        scale, bias = _to(x, _vector(rows, -1.3, 0.7), _vector(rows, 0.1, 9.0)) if epilogue else (None, None)
        a = _pack_x(x, backend)
        return (F.binary_matmul(a, weights, k, scale=scale, bias=bias, arranged=order, backend=backend),)

    return _fixed(run)


def _thresholds(count: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Thresholds about the middle of the sums, every third channel flipped."""
    threshold = torch.linspace(low, high, count).round().to(torch.int32)
    flip = F.pack_signs(torch.where(torch.arange(count) % 3 == 1, 1.0, -1.0), backend=Backend.REFERENCE)
    assert isinstance(flip, Tensor)
    return threshold, flip


def _matmul_sign(rows: int, k: int) -> dict[str, Any]:
    weights, at = packed_weights(rows, k), _thresholds(rows, -9, 9)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        a, b = _pack_x(x, backend), weights.to(x.device)
        return (F.binary_matmul_sign(a, b, k, at[0].to(x.device), at[1].to(x.device), backend=backend),)

    return _fixed(run)


def _sign_linear(rows: int, k: int, bias: bool = False) -> dict[str, Any]:
    weight = make_x((rows, k), seed=2, edges=False)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        added = _vector(rows, -2, 2).to(x) if bias else None
        return (F.sign_linear(x, weight.to(x), added, backend=backend),)

    return {"run": run, "like_x": False}


def _conv(outputs: int, channels: int, kernel: tuple[int, int], *geometry: int | tuple[int, int]) -> dict[str, Any]:
    weights = packed_weights(outputs, channels, *kernel, axis=1)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        return (F.binary_conv2d(x, weights.to(x.device), None, *geometry, backend=backend),)

    return _fixed(run)


def _conv_scaled() -> dict[str, Any]:
    weights = packed_weights(5, 33, 3, 3, axis=1)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        scale, bias, taps = _to(x, _vector(5, -1.3, 0.7), _vector(5, 0.1, 9.0), weights)
        packed = _pack_x(x, backend, 1)
        assert taps is not None
        return (F.binary_conv2d(packed, taps, bias, padding=1, channels=33, scale=scale, backend=backend),)

    return _fixed(run)


def _conv_sign() -> dict[str, Any]:
    weights, at = packed_weights(40, 33, 3, 3, axis=1), _thresholds(40, -9, 9)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        packed, threshold, flip = _pack_x(x, backend, 1), at[0].to(x.device), at[1].to(x.device)
        return (F.binary_conv2d_sign(packed, weights.to(x.device), 33, threshold, flip, 1, 1, backend=backend),)

    return _fixed(run)


def _sign_conv2d(outputs: int, channels: int, kernel: int, *geometry: int, bias: bool = False) -> dict[str, Any]:
    weight = make_x((outputs, channels, kernel, kernel), seed=2, edges=False)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        added = _vector(outputs, -2, 2).to(x) if bias else None
        return (F.sign_conv2d(x, weight.to(x), added, *geometry, backend=backend),)

    return {"run": run, "like_x": False}


def _pool(channels: int, *window: int) -> dict[str, Any]:
    _, flip = _thresholds(channels, 0, 0)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        return (F.packed_max_pool2d(_pack_x(x, backend, 1), flip.to(x.device), *window, backend=backend),)

    return _fixed(run)


PACK_SIGNS = OpSpec(
    name="pack_signs",
    schemas=("pack_signs", "pack_signs_counted", "unpack_signs"),
    samples=(
        Sample("rows", (5, 70), **_pack()),
        Sample("whole_words", (6, 128), **_pack()),
        Sample("one_word", (9, 3), **_pack()),
        Sample("counted", (7, 100), **_pack(counts=True)),
        Sample("first_axis", (45, 70), **_pack(0)),
        Sample("images", (2, 35, 9, 5), **_pack(1)),
        Sample("images_counted", (2, 64, 5, 7), **_pack(1, counts=True)),
        Sample("unpacked", (6, 75), run=_pack_unpack, like_x=False, differentiable=False),
    ),
    bad=(
        Bad("integer_tensor", lambda: F.pack_signs(torch.arange(3)), TypeError, "floating-point"),
        Bad("axis", lambda: F.pack_signs(torch.ones(3), 1), IndexError, "axis must lie in"),
        Bad("no_dimension", lambda: F.pack_signs(torch.tensor(1.0)), IndexError, "dimension|axis"),
        Bad("unpack_float", lambda: F.unpack_signs(torch.ones(2, 1), 3), TypeError, "int32"),
        Bad("unpack_int64", lambda: F.unpack_signs(torch.ones(2, 1).long(), 3), TypeError, "int32"),
        Bad("unpack_width", lambda: F.unpack_signs(_int32(1, 2)[None], 3), ValueError, "1 words for k=3"),
        Bad("unpack_to_int", lambda: F.unpack_signs(_int32(1)[None], 3, torch.int8), TypeError, "floating-point"),
    ),
    op_calls=lambda: _pack_op_calls(),
    draws=(binary.pack_signs, binary.unpack_signs),
)

BINARY_MATMUL = OpSpec(
    name="binary_matmul",
    schemas=("binary_matmul", "binary_matmul_into", "binary_matmul_sign", "arrange_signs", "sign_linear"),
    samples=(
        Sample("ragged", (5, 70), **_matmul(33, 70)),
        Sample("one_row", (1, 100), **_matmul(40, 100)),
        Sample("one_column", (9, 33), **_matmul(1, 33)),
        Sample("long", (17, 1100), **_matmul(97, 1100)),
        Sample("scaled", (70, 64), **_matmul(12, 64, epilogue=True)),
        Sample("arranged", (12, 130), **_matmul(100, 130, arranged=True)),
        Sample("signs", (10, 75), **_matmul_sign(41, 75)),
        Sample("layer", (7, 40), **_sign_linear(6, 40)),
        Sample("layer_bias", (2, 3, 33), **_sign_linear(5, 33, bias=True)),
    ),
    bad=(
        Bad("k", lambda: F.binary_matmul(_signs(2, 40), _signs(3, 70), 40), ValueError, "b must have rows of 2 words"),
        Bad("float", lambda: F.binary_matmul(torch.ones(2, 2), _signs(3, 40), 40), TypeError, "a must hold packed"),
        Bad("int64", lambda: F.binary_matmul(_signs(2, 40).long(), _signs(3, 40), 40), TypeError, "int32"),
        Bad("vector", lambda: F.binary_matmul(_signs(40), _signs(3, 40), 40), ValueError, "2 dimensions"),
        Bad("stepped", lambda: F.binary_matmul(_signs(4, 40)[::2], _signs(3, 40), 40), ValueError, r"\.contiguous\(\)"),
        Bad("padding", lambda: F.binary_matmul(_signs(2, 64), _signs(3, 40), 40), ValueError, "a has padding bits"),
        Bad(
            "padding_reference",
            lambda: F.binary_matmul(_signs(2, 40), _signs(2, 64), 40, backend=Backend.REFERENCE),
            ValueError,
            "b has padding bits",
        ),
        Bad("negative_k", lambda: F.binary_matmul(_signs(2, 40), _signs(3, 40), -1), ValueError, "k must lie in"),
        Bad(
            "scale",
            lambda: F.binary_matmul(_signs(2, 40), _signs(3, 40), 40, scale=torch.ones(2)),
            ValueError,
            "scale must be .* of 3 values",
        ),
        Bad(
            "arranged",
            lambda: F.binary_matmul(_signs(2, 40), _signs(3, 40), 40, arranged=F.arrange_signs(_signs(33, 40))),
            ValueError,
            "arranged must be",
        ),
        Bad(
            "threshold",
            lambda: F.binary_matmul_sign(_signs(2, 40), _signs(3, 40), 40, torch.zeros(3), _int32(0)),
            TypeError,
            "threshold must be",
        ),
        Bad(
            "out",
            lambda: F.binary_matmul(_signs(2, 40), _signs(3, 40), 40, out=torch.empty(3, 2)),
            ValueError,
            r"out must be .* \[2, 3\], got shape \[3, 2\]",
        ),
        Bad("features", lambda: F.binary_linear(torch.ones(2, 41), _signs(3, 40), 40), ValueError, "40 features"),
        Bad("layer", lambda: F.sign_linear(torch.ones(2, 5), torch.ones(3, 4)), ValueError, r"\[2, 5\] and \[3, 4\]"),
        Bad("device", lambda: F.binary_matmul(_signs(2, 40), _signs(3, 40).to("meta"), 40), ValueError, "b is on meta"),
    ),
    op_calls=lambda: _matmul_op_calls(),
    draws=(binary.binary_matmul, binary.binary_matmul_sign, binary.binary_linear, binary.sign_linear),
)

BINARY_CONV2D = OpSpec(
    name="binary_conv2d",
    schemas=("binary_conv2d", "binary_conv2d_sign", "sign_conv2d"),
    samples=(
        Sample("padded", (2, 35, 7, 6), **_conv(9, 35, (3, 3), 1, 1)),
        Sample("strided", (1, 64, 9, 9), **_conv(40, 64, (3, 3), 2, 1)),
        Sample("dilated", (2, 3, 9, 8), **_conv(4, 3, (3, 2), (2, 1), (2, 1), (2, 3))),
        Sample("pointwise", (2, 33, 5, 4), **_conv(34, 33, (1, 1))),
        Sample("one_pixel", (1, 20, 1, 1), **_conv(3, 20, (3, 3), 1, 1)),
        Sample("wide_padding", (1, 8, 3, 3), **_conv(5, 8, (5, 5), 1, 4)),
        Sample("scaled", (2, 33, 6, 6), **_conv_scaled()),
        Sample("signs", (2, 33, 6, 5), **_conv_sign()),
        Sample("layer", (2, 5, 6, 6), **_sign_conv2d(4, 5, 3, 1, 1)),
        Sample("layer_bias", (2, 33, 6, 7), **_sign_conv2d(3, 33, 3, 2, 1, bias=True)),
    ),
    bad=(
        Bad("groups", lambda: F.binary_conv2d(torch.ones(1, 4, 5, 5), _taps(2, 4), groups=2), ValueError, "groups=2"),
        Bad("dims", lambda: F.binary_conv2d(torch.ones(4, 5, 5), _taps(2, 4)), ValueError, r"got shape \[4, 5, 5\]"),
        Bad("channels", lambda: F.binary_conv2d(torch.ones(1, 40, 5, 5), _taps(2, 4)), ValueError, "2 words for k=40"),
        Bad("packed", lambda: F.binary_conv2d(_signs(1, 5, 5, 4), _taps(2, 4)), ValueError, "channels="),
        Bad("small", lambda: F.binary_conv2d(torch.ones(1, 4, 2, 2), _taps(2, 4)), ValueError, "larger than the image"),
        Bad("stride", lambda: F.binary_conv2d(torch.ones(1, 4, 5, 5), _taps(2, 4), None, 0), ValueError, "stride must"),
        Bad(
            "layer",
            lambda: F.sign_conv2d(torch.ones(1, 4, 5, 5), torch.ones(2, 3, 3, 3)),
            ValueError,
            r"\[1, 4, 5, 5\] and \[2, 3, 3, 3\]",
        ),
    ),
    op_calls=lambda: _conv_op_calls(),
    draws=(binary.binary_conv2d, binary.binary_conv2d_sign, binary.sign_conv2d),
)

PACKED_MAX_POOL2D = OpSpec(
    name="packed_max_pool2d",
    schemas=("packed_max_pool2d",),
    samples=(
        Sample("halved", (2, 35, 6, 8), **_pool(35, 2)),
        Sample("overlapping", (1, 70, 7, 7), **_pool(70, 3, 2, 1)),
        Sample("ragged", (3, 5, 5, 7), **_pool(5, 2, 2)),
    ),
    bad=(
        Bad("padding", lambda: F.packed_max_pool2d(_signs(1, 5, 5, 4), _int32(0), 2, 2, 2), ValueError, "half"),
        Bad("flip", lambda: F.packed_max_pool2d(_signs(1, 5, 5, 4), _int32(0, 0), 2), ValueError, "flip must be"),
        Bad("float", lambda: F.packed_max_pool2d(torch.ones(1, 5, 5, 1), _int32(0), 2), TypeError, "packed signs"),
        Bad("large", lambda: F.packed_max_pool2d(_signs(1, 5, 5, 4), _int32(0), 7), ValueError, "larger than"),
    ),
    op_calls=lambda: _pool_op_calls(),
    draws=(binary.packed_max_pool2d,),
)


def _signs(*shape: int) -> Tensor:
    packed = F.pack_signs(torch.ones(shape))
    assert isinstance(packed, Tensor)
    return packed


def _taps(outputs: int, channels: int) -> Tensor:
    return _signs(outputs, 3, 3, channels)


SPECS = (
    FAKE_QUANTIZE,
    FAKE_QUANTIZE_WEIGHT,
    FAKE_QUANTIZE_WEIGHTS,
    FAKE_QUANTIZE_ACTIVATION,
    LSQ,
    LSQ_WEIGHTS,
    DOREFA_WEIGHT,
    DOREFA_ACTIVATION,
    DOREFA_GRADIENT,
    CLIP_ACTIVATION,
    BINARIZE,
    PACK_SIGNS,
    BINARY_MATMUL,
    BINARY_CONV2D,
    PACKED_MAX_POOL2D,
)

_OPS = torch.ops.quantkern


def _fake_quantize_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    scale, zero_point = torch.full((6,), 0.2), _int32(*[1] * 6)
    one, zero, step = torch.tensor(0.2), _int32(0), torch.tensor(3)
    yield _OPS.fake_quantize.default, (x, scale, zero_point, -8, 7, 1)
    yield _OPS.fake_quantize.default, (x, one, zero, -8, 7, None, step, 5)
    yield _OPS.fake_quantize.default, (x, one, zero, -8, 7, None, step, 2, torch.bfloat16)
    yield _OPS.fake_quantize.number, (x, 0.2, 0.0, -8, 7)
    for with_mask in (False, True):
        yield _OPS.fake_quantize_forward.default, (x.detach(), scale, zero_point, -8, 7, 1, None, 0, with_mask)
        yield _OPS.fake_quantize_forward.number, (x.detach(), 0.2, 0.0, -8, 7, with_mask)
    mask = torch.tensor([0b10110, 0xFF, 0b1], dtype=torch.uint8)
    yield _OPS.fake_quantize_backward.default, (torch.randn(4, 6, requires_grad=True), mask, (6, 1))
    yield _OPS.fake_quantize_backward.default, (torch.randn(4, 6), mask, (1, 4))
    yield _OPS.fake_quantize_backward_.default, (torch.randn(4, 6), mask)


def _weight_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    for symmetric, low in ((True, -127), (False, -127), (True, 0)):
        yield _OPS.fake_quantize_weight.default, (x, torch.zeros(4), _int32(*[0] * 4), low, 127, symmetric, 0, None, 0)
    narrow = (-127, 127, False, 0, None, 0, torch.float16)
    yield _OPS.fake_quantize_weight.default, (x, torch.zeros(4), _int32(*[0] * 4), *narrow)
    arguments = (x.detach(), torch.zeros(()), torch.zeros((), dtype=torch.int32), 0, 255, False, None, None, 0)
    for with_mask in (False, True):
        yield _OPS.fake_quantize_weight_forward.default, (*arguments, with_mask)


def _activation_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    settings = (torch.tensor(True), 0, 255, False, 0.9)
    yield _OPS.fake_quantize_activation.default, (x, *activation_state(x, ()), *settings, None, None, 0)
    yield _OPS.fake_quantize_activation.default, (x, *activation_state(x, (6,)), *settings, 1, torch.tensor(2), 7)
    narrow = (None, None, 0, None, None, torch.bfloat16)
    yield _OPS.fake_quantize_activation.default, (x, *activation_state(x, ()), *settings, *narrow)
    for with_mask in (False, True):
        arguments = (x.detach(), *activation_state(x, ()), *settings, None, None, 0, with_mask)
        yield _OPS.fake_quantize_activation_forward.default, arguments


def _weights_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    xs = [torch.randn(4, 6, requires_grad=True), torch.randn(5), torch.randn(3, 2, requires_grad=True)]
    state = ([torch.zeros(6), torch.zeros(()), torch.zeros(1)], [_int32(*[0] * 6), _int32(0)[0], _int32(0)])
    rules = ([-8, 0, -7], [7, 255, 7], [False, True, True], [1, -1, -1], [None, torch.tensor(3), None], [0, 5, 0])
    yield _OPS.fake_quantize_weights.default, (xs, *state, *rules)
    yield _OPS.fake_quantize_weights.default, (xs, *state, *rules, torch.bfloat16)
    plain = [x.detach() for x in xs]
    yield _OPS.fake_quantize_weights_kept.default, (plain, *state, *rules)
    for size in (0, 1):
        masks = [torch.empty(size * ((x.numel() + 7) // 8), dtype=torch.uint8) for x in xs]
        ys = [torch.empty_like(x) for x in plain]
        yield _OPS.fake_quantize_weights_forward.default, (plain, ys, masks, *state, *rules)
        yield _OPS.fake_quantize_weights_forward.default, (plain, [y.half() for y in ys], masks, *state, *rules)
    yield _OPS.fake_quantize_again.default, (xs[0], torch.randn(4, 6), torch.full((3,), 5, dtype=torch.uint8))
    yield _OPS.fake_quantize_again.default, (xs[0], torch.randn(4, 6), torch.empty(0, dtype=torch.uint8))


def _lsq_weights_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    xs = [torch.randn(4, 6, requires_grad=True), torch.randn(5)]
    scales = [torch.full((6,), 0.3, requires_grad=True), torch.tensor(0.2, requires_grad=True)]
    rules = ([-8, -2], [7, 1])
    yield _OPS.lsq_weights.default, (xs, scales, *rules, [0.1, 1.0], [1, -1])
    yield _OPS.lsq_weights.default, (xs, scales, *rules, [0.1, 1.0], [1, -1], torch.float16)
    plain = [x.detach() for x in xs]
    plain_scales = [scale.detach() for scale in scales]
    ys = [torch.empty_like(x) for x in plain]
    yield _OPS.lsq_weights_forward.default, (plain, ys, plain_scales, *rules, [1, -1])
    yield _OPS.lsq_weights_forward.default, (plain, [y.bfloat16() for y in ys], plain_scales, *rules, [1, -1])
    yield _OPS.lsq_again.default, (xs[0], torch.randn(4, 6), scales[0], -8, 7, 0.1, 1)


def _lsq_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    scale = torch.full((6,), 0.3, requires_grad=True)
    zero_point = torch.full((6,), 0.5, requires_grad=True)
    one = torch.tensor(0.3, requires_grad=True)
    yield _OPS.lsq.default, (x, scale, -8, 7, 0.1, 1)
    yield _OPS.lsq.default, (x, scale, -8, 7, 0.1, 1, zero_point)
    yield _OPS.lsq.default, (x, one, 0, 15, 0.1)
    yield _OPS.lsq.default, (x.detach(), one, 0, 15, 0.1)
    yield _OPS.lsq.default, (x, one, 0, 15, 0.1, None, None, torch.float16)
    yield _OPS.lsq_forward.default, (x.detach(), one.detach(), 0, 15, None, None)
    yield _OPS.lsq_forward.default, (x.detach(), one.detach(), 0, 15, None, None, torch.bfloat16)
    for zero in (None, zero_point.detach()):
        arguments = (torch.randn(4, 6), x.detach(), scale.detach(), -8, 7, 0.1, 1, zero)
        yield _OPS.lsq_backward.default, arguments
        yield _OPS.lsq_backward_.default, arguments


def _dorefa_weight_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    for bits in (1, 3):
        yield _OPS.dorefa_weight.default, (x, bits)
        yield _OPS.dorefa_weight_forward.default, (x.detach(), bits)
    yield _OPS.dorefa_weight_backward.default, (torch.randn(4, 6), x.detach(), x.detach().abs().max())


def _dorefa_activation_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    yield _OPS.dorefa_activation.default, (x, 2)
    for with_mask in (False, True):
        yield _OPS.dorefa_activation_forward.default, (x.detach(), 2, with_mask)


def _dorefa_gradient_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    yield _OPS.dorefa_gradient.default, (torch.randn(4, 6), 4, torch.tensor(9))


def _clip_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    yield _OPS.clip_activation.default, (x, 0.0, math.inf)
    yield _OPS.clip_activation_forward.default, (x.detach(), -1.0, 1.0, True)


def _binarize_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    for clip in (False, True):
        yield _OPS.binarize.default, (x, clip)
        yield _OPS.binarize_forward.default, (x.detach(), clip)


def _pack_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(3, 40, 5)
    for axis in (-1, 1):
        yield _OPS.pack_signs.default, (x, axis)
        yield _OPS.pack_signs_counted.default, (x, axis)
    yield _OPS.unpack_signs.default, (_signs(3, 40), 40, torch.float16)


def _matmul_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    a, b = _signs(3, 40), _signs(5, 40)
    yield _OPS.arrange_signs.default, (b,)
    yield _OPS.binary_matmul.default, (a, b, 40, torch.ones(5), torch.ones(5), F.arrange_signs(b))
    yield _OPS.binary_matmul_into.default, (a, b, 40, torch.ones(5), None, None, torch.empty(3, 5))
    yield _OPS.binary_matmul_sign.default, (a, b, 40, _int32(*range(5)), _int32(3))
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 7), (4, 7), (4,)))
    yield _OPS.sign_linear.default, (x, weight, bias)
    yield _OPS.sign_linear.default, (x.detach(), weight)


def _conv_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    geometry: tuple[Any, ...] = ([2, 1], [1, 1], [1, 1])
    x, weight = _signs(2, 6, 5, 40), _taps(5, 40)
    yield _OPS.binary_conv2d.default, (x, weight, 40, *geometry, torch.ones(5), torch.ones(5))
    yield _OPS.binary_conv2d.default, (x, weight, 40, *geometry, None, None, F.arrange_signs(weight), True)
    yield _OPS.binary_conv2d_sign.default, (x, weight, 40, *geometry, _int32(*range(5)), _int32(3))
    images, kernels, bias = (torch.randn(s, requires_grad=True) for s in ((2, 3, 6, 5), (4, 3, 3, 3), (4,)))
    yield _OPS.sign_conv2d.default, (images, kernels, bias, *geometry)
    last = images.detach().to(memory_format=torch.channels_last).requires_grad_()
    yield _OPS.sign_conv2d.default, (last, kernels, None, *geometry)


def _pool_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    yield _OPS.packed_max_pool2d.default, (_signs(2, 6, 5, 40), _int32(3, 0), [3, 3], [2, 1], [1, 0])


def histogram_state(rows: int) -> list[Tensor]:
    shape = (rows,) if rows > 1 else ()
    return [
        *(torch.full(shape, end) for end in (math.inf, -math.inf)),
        torch.zeros(rows, 16, dtype=torch.int64),
        *(torch.full((rows,), first, dtype=torch.int64) for first in (-124, 0)),
        *(torch.zeros((), dtype=torch.int64) for _ in range(2)),
    ]


def _range_arguments() -> tuple[Any, ...]:
    edges = torch.arange(17).double().repeat(2, 1)
    return torch.arange(16).double().repeat(2, 1), edges, edges[:, 0].clone(), edges[:, -1].clone(), 0, 7, False


WITHOUT_TWIN: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    "observe_histogram": lambda: [
        (torch.randn(4, 5), None, *histogram_state(1)),
        (torch.randn(4, 5), 1, *histogram_state(5)),
    ],
    "histogram_range": lambda: [_range_arguments()],
    "to_codes": lambda: [
        (torch.arange(-4.0, 8.0).view(3, 4) * 0.5, torch.tensor(0.5), None, -8, 7, None),
        (torch.arange(-4.0, 8.0).view(3, 4) * 0.5, torch.full((4,), 0.5), _int32(0, 1, 0, 2), -8, 9, 1),
    ],
    "from_codes": lambda: [
        (torch.arange(12, dtype=torch.uint8).view(3, 4), torch.tensor([0.5, 1.0, 0.0]), -8, None),
        (torch.arange(12, dtype=torch.uint8).view(3, 4), torch.tensor([0.5] * 4 + [1.0] * 4 + [0.0]), -8, 1),
    ],
}
"""Operations that only compiled kernels have, with arguments for opcheck. Without them quantkern.observers takes
operations of torch (tests/test_observers.py compares both), and quantkern.lean_backward changes nothing."""


def every_draw() -> dict[str, Callable[[Draw], Trial]]:
    """By the name of the function that it calls."""
    draws = [draw for spec in SPECS for draw in spec.draws]
    draws += [op_draws_observers.observe_histogram, op_draws_observers.histogram_range]
    draws += [op_draws_lists.to_codes, op_draws_lists.from_codes]
    return {draw.__name__: draw for draw in draws}
