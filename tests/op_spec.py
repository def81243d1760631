"""What a row of the inventory of operations holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from op_sample import DTYPES, Sample
from strategies import Draw
from torch import Tensor
from trials import Trial


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


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def to(x: Tensor, *values: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if value is None else value.to(x.device) for value in values)


def vector(channels: int, low: float, high: float) -> Tensor:
    return torch.linspace(low, high, channels)


def scale_shape(x: Tensor, axis: int | None) -> tuple[int, ...]:
    return () if axis is None else (x.shape[axis],)


OPS = torch.ops.quantkern
