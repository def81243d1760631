"""Rows of the inventory: fake-quantization with scales that are given, and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import op_draws
import op_draws_lists
import torch
from op_sample import Run, Sample
from op_spec import OPS, Bad, OpSpec, int32, vector
from torch import Tensor

from quantkern import Backend
from quantkern import functional as F


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
        Sample("tensor", (4, 65), _fake_quantize(torch.tensor(0.05), int32(-3), -128, 127)),
        Sample("tensor_float_zero_point", (130,), _fake_quantize(torch.tensor([0.3]), torch.tensor([1.5]), 0, 15)),
        Sample("wide_range", (64,), _fake_quantize(1e-4, 0, -32767, 32767)),
        Sample("tiny_scale", (64,), _fake_quantize(1e-30, 0, -127, 127)),
        Sample("channels_first", (6, 70), _fake_quantize(vector(6, 0.01, 0.3), int32(*range(-3, 3)), -8, 7, 0)),
        Sample("channels_middle", (2, 5, 33), _fake_quantize(vector(5, 0.1, 0.5), int32(*[0] * 5), -8, 7, 1)),
        Sample("channels_short_rows", (3, 5, 9), _fake_quantize(vector(5, 0.1, 0.5), int32(*[2] * 5), 0, 15, 1)),
        Sample("channels_last_axis", (9, 19), _fake_quantize(vector(19, 0.1, 0.5), torch.ones(19), -8, 7, -1)),
        Sample("one_channel", (1, 50), _fake_quantize(torch.tensor([0.2]), int32(1), -8, 7, 0)),
        Sample("three_channels_last", (50, 3), _fake_quantize(vector(3, 0.1, 0.5), int32(0, 1, 2), 0, 3, 1)),
        Sample("delayed", (41,), _fake_quantize(torch.tensor(0.25), int32(0), -8, 7, step=4, start=5)),
        Sample("delay_over", (41,), _fake_quantize(torch.tensor(0.25), int32(0), -8, 7, step=5, start=5)),
        Sample("as_float16", (4, 65), _fake_quantize(0.3, -3, -128, 127, dtype=torch.float16)),
        Sample(
            "as_bfloat16",
            (2, 5, 33),
            _fake_quantize(vector(5, 0.1, 0.5), int32(*[0] * 5), -8, 7, 1, dtype=torch.bfloat16),
        ),
    ),
    bad=(
        Bad("integer_tensor", lambda: F.fake_quantize(torch.arange(3), 0.1, 0, -8, 7), TypeError, "floating-point"),
        Bad("zero_scale", lambda: F.fake_quantize(torch.ones(3), 0.0, 0, -8, 7), ValueError, "scale .* got 0"),
        Bad("nan_scale", lambda: F.fake_quantize(torch.ones(3), math.nan, 0, -8, 7), ValueError, "scale .* got nan"),
        Bad(
            "negative_scale_tensor",
            lambda: F.fake_quantize(torch.ones(2, 3), torch.tensor([0.1, -0.5]), int32(0, 0), -8, 7, 0),
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
            lambda: F.fake_quantize(torch.ones(3, 2), torch.ones(2), int32(0, 0), -8, 7, 2),
            IndexError,
            "axis must lie in",
        ),
        Bad(
            "wrong_channel_count",
            lambda: F.fake_quantize(torch.ones(3, 2), torch.ones(3), int32(0, 0), -8, 7, 1),
            ValueError,
            "scale must be a vector of 2",
        ),
        Bad(
            "vector_without_axis",
            lambda: F.fake_quantize(torch.ones(3, 2), torch.ones(3), int32(0, 0, 0), -8, 7),
            ValueError,
            "give axis",
        ),
        Bad(
            "other_device",
            lambda: F.fake_quantize(torch.ones(3), torch.ones(1, device="meta"), int32(0), -8, 7),
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


def _fake_quantize_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    scale, zero_point = torch.full((6,), 0.2), int32(*[1] * 6)
    one, zero, step = torch.tensor(0.2), int32(0), torch.tensor(3)
    yield OPS.fake_quantize.default, (x, scale, zero_point, -8, 7, 1)
    yield OPS.fake_quantize.default, (x, one, zero, -8, 7, None, step, 5)
    yield OPS.fake_quantize.default, (x, one, zero, -8, 7, None, step, 2, torch.bfloat16)
    yield OPS.fake_quantize.number, (x, 0.2, 0.0, -8, 7)
    for with_mask in (False, True):
        yield OPS.fake_quantize_forward.default, (x.detach(), scale, zero_point, -8, 7, 1, None, 0, with_mask)
        yield OPS.fake_quantize_forward.number, (x.detach(), 0.2, 0.0, -8, 7, with_mask)
    mask = torch.tensor([0b10110, 0xFF, 0b1], dtype=torch.uint8)
    yield OPS.fake_quantize_backward.default, (torch.randn(4, 6, requires_grad=True), mask, (6, 1))
    yield OPS.fake_quantize_backward.default, (torch.randn(4, 6), mask, (1, 4))
    yield OPS.fake_quantize_backward_.default, (torch.randn(4, 6), mask)


def _clip_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    yield OPS.clip_activation.default, (x, 0.0, math.inf)
    yield OPS.clip_activation_forward.default, (x.detach(), -1.0, 1.0, True)
