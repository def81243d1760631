"""The one inventory of operations. A row buys forward, backward, opcheck, strides, empties, compile, parity, errors.

A ``Sample`` is one way of calling an operation: ``run(x, backend)`` calls it with fresh state and returns the result
followed by every tensor the operation wrote, so that comparing two runs compares all that there is to compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import op_draws_lists
import op_draws_observers
import torch
from op_spec import int32
from op_specs_affine import CLIP_ACTIVATION, FAKE_QUANTIZE
from op_specs_binary import BINARIZE, BINARY_CONV2D, BINARY_MATMUL, PACK_SIGNS, PACKED_MAX_POOL2D
from op_specs_learned import DOREFA_ACTIVATION, DOREFA_GRADIENT, DOREFA_WEIGHT, LSQ
from op_specs_lists import FAKE_QUANTIZE_WEIGHTS, LSQ_WEIGHTS
from op_specs_ranges import FAKE_QUANTIZE_ACTIVATION, FAKE_QUANTIZE_WEIGHT
from strategies import Draw
from torch import Tensor
from trials import Trial

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


def histogram_state(rows: int) -> list[Tensor]:
    shape = (rows,) if rows > 1 else ()
    return [
        *(torch.full(shape, end) for end in (math.inf, -math.inf)),
        torch.zeros(rows, 16, dtype=torch.int64),
        *(torch.full((rows,), first, dtype=torch.int64) for first in (-124, 0)),
        *(torch.zeros((), dtype=torch.int64) for _ in range(2)),
    ]


def range_state(shape: tuple[int, ...]) -> list[Tensor]:
    """Of an observer that has seen nothing: low, high, batches, spoiled."""
    ends = [torch.full(shape, end) for end in (torch.inf, -torch.inf)]
    return [*ends, *(torch.zeros((), dtype=torch.int64) for _ in range(2))]


def _range_arguments() -> tuple[Any, ...]:
    edges = torch.arange(17).double().repeat(2, 1)
    return torch.arange(16).double().repeat(2, 1), edges, edges[:, 0].clone(), edges[:, -1].clone(), 0, 7, False


WITHOUT_TWIN: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    "observe_range": lambda: [
        (torch.randn(4, 5), None, None, *range_state(())),
        (torch.randn(4, 5), 1, 0.9, *range_state((5,))),
    ],
    "observe_histogram": lambda: [
        (torch.randn(4, 5), None, *histogram_state(1)),
        (torch.randn(4, 5), 1, *histogram_state(5)),
    ],
    "histogram_range": lambda: [_range_arguments()],
    "to_codes": lambda: [
        (torch.arange(-4.0, 8.0).view(3, 4) * 0.5, torch.tensor(0.5), None, -8, 7, None),
        (torch.arange(-4.0, 8.0).view(3, 4) * 0.5, torch.full((4,), 0.5), int32(0, 1, 0, 2), -8, 9, 1),
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
    draws += [
        op_draws_observers.observe_range,
        op_draws_observers.observe_histogram,
        op_draws_observers.histogram_range,
    ]
    draws += [op_draws_lists.to_codes, op_draws_lists.from_codes]
    return {draw.__name__: draw for draw in draws}
