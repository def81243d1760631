"""One way of calling an operation, and the values it is called with: what the inventory and the fuzzer share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkern import Backend

Run = Callable[[Tensor, Backend], tuple[Tensor, ...]]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)

EDGES = (0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -2.5, 1e-45, -1e-40, 3e38, -3e38, math.inf, -math.inf, math.nan, 7.5, -8.5)
"""Zeros, ties, denormals, huge values, infinities, NaN, and ties at the ends of a 4-bit range."""


@dataclass(frozen=True)
class Sample:
    """One way of calling an operation on tensors of ``shape``."""

    name: str
    shape: tuple[int, ...]
    run: Run
    edges: bool = True
    """Whether x may hold infinities: where they are part of the statistics, there is nothing left to compare."""

    step: float | None = None
    """None: results equal the reference's to the last bit. Else the size of a quantization step: at most one element in
    a thousand (and one in all) may be off by one step, and gradients by a few units in the last place, because tanh is
    a function of our own."""

    like_x: bool = True
    """Whether the result has x's shape, strides and dtype."""

    differentiable: bool = True


def make_x(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, seed: int = 0, edges: bool = True) -> Tensor:
    """Random values of about +-3 with the edge values first, as far as they fit."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5
    if edges and x.numel():
        count = min(len(EDGES), x.numel())
        x.view(-1)[:count] = torch.tensor(EDGES[:count], dtype=torch.float64)
    return x.to(dtype)
