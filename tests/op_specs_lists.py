"""Rows of the inventory: all weights of a model at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import op_draws_lists
import torch
from op_sample import Run, Sample, make_x
from op_spec import OPS, Bad, OpSpec, int32, scale_shape
from torch import Tensor

from quantkern import Backend
from quantkern import functional as F

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
        scales = [torch.zeros(scale_shape(x, axis), device=x.device) for x, axis in zip(xs, axes, strict=True)]
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
    shapes = [() if axis is None else (channels,), *(scale_shape(x, rule[-1]) for x, rule in NEIGHBOURS)]
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
            lambda: F.fake_quantize_weights([torch.ones(3)], [], [int32(0)], [0], [7], [True]),
            ValueError,
            "scales must have one entry for each of the 1 tensors in xs, got 0",
        ),
        Bad(
            "lengths_below",
            lambda: torch.ops.quantkern.fake_quantize_weights(
                [torch.ones(3)], [torch.ones(1)], [int32(0)], [0], [7], [True], [-1, -1], [None], [0]
            ),
            ValueError,
            "axes must have one entry for each of the 1 tensors in xs, got 2",
        ),
        Bad(
            "two_devices",
            lambda: torch.ops.quantkern.fake_quantize_weights(
                [torch.ones(3), torch.ones(3, device="meta")],
                [torch.ones(1), torch.ones(1, device="meta")],
                [int32(0), int32(0).to("meta")],
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
            lambda: F.fake_quantize_weights([torch.arange(3)], [torch.ones(1)], [int32(0)], [0], [7], [True]),
            TypeError,
            "floating-point",
        ),
        Bad(
            "empty_range",
            lambda: F.fake_quantize_weights([torch.ones(3)], [torch.ones(1)], [int32(0)], [7], [7], [True]),
            ValueError,
            "quant_min=7",
        ),
        Bad(
            "axis",
            lambda: F.fake_quantize_weights([torch.ones(3)], [torch.ones(3)], [int32(0)], [0], [7], [True], [1]),
            IndexError,
            "axis must lie in",
        ),
        Bad(
            "scale_shape",
            lambda: F.fake_quantize_weights([torch.ones(3)], [torch.ones(2)], [int32(0)], [0], [7], [True]),
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


def _weights_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    xs = [torch.randn(4, 6, requires_grad=True), torch.randn(5), torch.randn(3, 2, requires_grad=True)]
    state = ([torch.zeros(6), torch.zeros(()), torch.zeros(1)], [int32(*[0] * 6), int32(0)[0], int32(0)])
    rules = ([-8, 0, -7], [7, 255, 7], [False, True, True], [1, -1, -1], [None, torch.tensor(3), None], [0, 5, 0])
    yield OPS.fake_quantize_weights.default, (xs, *state, *rules)
    yield OPS.fake_quantize_weights.default, (xs, *state, *rules, torch.bfloat16)
    plain = [x.detach() for x in xs]
    yield OPS.fake_quantize_weights_kept.default, (plain, *state, *rules)
    for size in (0, 1):
        masks = [torch.empty(size * ((x.numel() + 7) // 8), dtype=torch.uint8) for x in xs]
        ys = [torch.empty_like(x) for x in plain]
        yield OPS.fake_quantize_weights_forward.default, (plain, ys, masks, *state, *rules)
        yield OPS.fake_quantize_weights_forward.default, (plain, [y.half() for y in ys], masks, *state, *rules)
    yield OPS.fake_quantize_again.default, (xs[0], torch.randn(4, 6), torch.full((3,), 5, dtype=torch.uint8))
    yield OPS.fake_quantize_again.default, (xs[0], torch.randn(4, 6), torch.empty(0, dtype=torch.uint8))


def _lsq_weights_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    xs = [torch.randn(4, 6, requires_grad=True), torch.randn(5)]
    scales = [torch.full((6,), 0.3, requires_grad=True), torch.tensor(0.2, requires_grad=True)]
    rules = ([-8, -2], [7, 1])
    yield OPS.lsq_weights.default, (xs, scales, *rules, [0.1, 1.0], [1, -1])
    yield OPS.lsq_weights.default, (xs, scales, *rules, [0.1, 1.0], [1, -1], torch.float16)
    plain = [x.detach() for x in xs]
    plain_scales = [scale.detach() for scale in scales]
    ys = [torch.empty_like(x) for x in plain]
    yield OPS.lsq_weights_forward.default, (plain, ys, plain_scales, *rules, [1, -1])
    yield OPS.lsq_weights_forward.default, (plain, [y.bfloat16() for y in ys], plain_scales, *rules, [1, -1])
    yield OPS.lsq_again.default, (xs[0], torch.randn(4, 6), scales[0], -8, 7, 0.1, 1)
