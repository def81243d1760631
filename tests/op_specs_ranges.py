"""Rows of the inventory: fake-quantization with scales that follow from ranges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import op_draws
import torch
from op_sample import Run, Sample
from op_spec import OPS, Bad, OpSpec, int32
from torch import Tensor

from quantkern import Backend
from quantkern import functional as F


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
            lambda: F.fake_quantize_weight(torch.arange(3), torch.ones(1), int32(0), -8, 7, True),
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
            lambda: F.fake_quantize_weight(torch.ones(3, 2), torch.ones(2), int32(0, 0, 0), -8, 7, True, 0),
            ValueError,
            "scale must be a vector of 3",
        ),
        Bad(
            "strided_state",
            lambda: F.fake_quantize_weight(torch.ones(3, 2), torch.ones(6)[::2], int32(0, 0, 0), -8, 7, True, 0),
            ValueError,
            "scale must be contiguous",
        ),
        Bad(
            "empty_range",
            lambda: F.fake_quantize_weight(torch.ones(3), torch.ones(1), int32(0), 3, -3, True),
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


def _weight_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    for symmetric, low in ((True, -127), (False, -127), (True, 0)):
        yield OPS.fake_quantize_weight.default, (x, torch.zeros(4), int32(*[0] * 4), low, 127, symmetric, 0, None, 0)
    narrow = (-127, 127, False, 0, None, 0, torch.float16)
    yield OPS.fake_quantize_weight.default, (x, torch.zeros(4), int32(*[0] * 4), *narrow)
    arguments = (x.detach(), torch.zeros(()), torch.zeros((), dtype=torch.int32), 0, 255, False, None, None, 0)
    for with_mask in (False, True):
        yield OPS.fake_quantize_weight_forward.default, (*arguments, with_mask)


def _activation_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    settings = (torch.tensor(True), 0, 255, False, 0.9)
    yield OPS.fake_quantize_activation.default, (x, *activation_state(x, ()), *settings, None, None, 0)
    yield OPS.fake_quantize_activation.default, (x, *activation_state(x, (6,)), *settings, 1, torch.tensor(2), 7)
    narrow = (None, None, 0, None, None, torch.bfloat16)
    yield OPS.fake_quantize_activation.default, (x, *activation_state(x, ()), *settings, *narrow)
    for with_mask in (False, True):
        arguments = (x.detach(), *activation_state(x, ()), *settings, None, None, 0, with_mask)
        yield OPS.fake_quantize_activation_forward.default, arguments
