"""Rows of the inventory: learned scales and DoReFa."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import op_draws
import torch
from op_sample import LOW_PRECISION, Run, Sample
from op_spec import OPS, Bad, OpSpec, vector
from torch import Tensor

from quantkern import Backend
from quantkern import functional as F


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
        Sample("channels_first", (6, 70), _lsq(-8, 7, vector(6, 0.1, 0.5), 0)),
        Sample("channels_middle", (2, 5, 6, 7), _lsq(-2, 1, vector(5, 0.1, 0.9), 1)),
        Sample("channels_short_rows", (3, 5, 9), _lsq(-8, 7, vector(5, 0.1, 0.5), 1, vector(5, -2.0, 2.0))),
        Sample("channels_last_axis", (40, 19), _lsq(-8, 7, vector(19, 0.1, 0.5), -1)),
        Sample("channels_depthwise", (40, 1, 3, 3), _lsq(-8, 7, vector(40, 0.1, 0.5), 0)),
        Sample("as_float16", (4, 65), _lsq(-8, 7, torch.tensor(0.3), dtype=torch.float16)),
        Sample(
            "as_bfloat16",
            (3, 5, 9),
            _lsq(-8, 7, vector(5, 0.1, 0.5), 1, vector(5, -2.0, 2.0), dtype=torch.bfloat16),
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


def _lsq_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    scale = torch.full((6,), 0.3, requires_grad=True)
    zero_point = torch.full((6,), 0.5, requires_grad=True)
    one = torch.tensor(0.3, requires_grad=True)
    yield OPS.lsq.default, (x, scale, -8, 7, 0.1, 1)
    yield OPS.lsq.default, (x, scale, -8, 7, 0.1, 1, zero_point)
    yield OPS.lsq.default, (x, one, 0, 15, 0.1)
    yield OPS.lsq.default, (x.detach(), one, 0, 15, 0.1)
    yield OPS.lsq.default, (x, one, 0, 15, 0.1, None, None, torch.float16)
    yield OPS.lsq_forward.default, (x.detach(), one.detach(), 0, 15, None, None)
    yield OPS.lsq_forward.default, (x.detach(), one.detach(), 0, 15, None, None, torch.bfloat16)
    for zero in (None, zero_point.detach()):
        arguments = (torch.randn(4, 6), x.detach(), scale.detach(), -8, 7, 0.1, 1, zero)
        yield OPS.lsq_backward.default, arguments
        yield OPS.lsq_backward_.default, arguments


def _dorefa_weight_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    for bits in (1, 3):
        yield OPS.dorefa_weight.default, (x, bits)
        yield OPS.dorefa_weight_forward.default, (x.detach(), bits)
    yield OPS.dorefa_weight_backward.default, (torch.randn(4, 6), x.detach(), x.detach().abs().max())


def _dorefa_activation_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    yield OPS.dorefa_activation.default, (x, 2)
    for with_mask in (False, True):
        yield OPS.dorefa_activation_forward.default, (x.detach(), 2, with_mask)


def _dorefa_gradient_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    yield OPS.dorefa_gradient.default, (torch.randn(4, 6), 4, torch.tensor(9))
