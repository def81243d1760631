"""Smallest and largest value per tensor or per channel: the statistics pass of the two observing operations.

A pass over x leaves partial ranges in a workspace; the operation's own finalising kernel, one program for up to 32
channels, merges them with ``merge_partials``. Which elements a partial range covers is fixed by the shape, never by
timing.

    rows      channels with 32 or more neighbouring elements: a program reduces tiles of one channel to one range;
              the partials lie as [1, channels, splits]
    columns   channels that lie interleaved (channels_last): a program keeps the range of every column of the
              outer x (channels * inner) view; the partials lie as [splits, channels, inner]

Read: 4 bytes an element (2 for the 16-bit formats), nothing at all while the observing flag is 0. Written: 8 bytes a
partial range, at most a few thousand ranges, or one a column. NaN is left out; with nothing seen: (+inf, -inf).
"""

# triton ships no types, so triton.jit is untyped.
# mypy: disallow-untyped-decorators=False

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkern.triton.layout import LAUNCH, Layout, index_type
from quantkern.triton.numerics import merge, widen

TILE = 2048
"""Elements a program holds at a time."""

PROGRAMS = 1024
"""Enough programs to fill the largest GPU, few enough for one program to merge their ranges."""

MERGE_TILE = 1024
"""Partial ranges a finalising program takes at a time: ``merge_shape`` spreads them over its channels."""


class Partials(NamedTuple):
    """Partial ranges as [rows, channels, width]."""

    low: Tensor
    high: Tensor
    rows: int
    width: int


@triton.jit
def tiles_to_read(tiles: tl.tensor, observing_ptr: tl.tensor) -> tl.tensor:
    """All tiles, or none while the flag is 0."""
    return tiles if observing_ptr is None else tl.where(tl.load(observing_ptr) != 0, tiles, 0)


@triton.jit
def row_ranges_kernel(
    x_ptr: tl.tensor,
    low_ptr: tl.tensor,
    high_ptr: tl.tensor,
    observing_ptr: tl.tensor,
    outer: tl.tensor,
    channels: tl.tensor,
    inner: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
) -> None:
    """One range a channel and split."""
    channel = tl.program_id(0)
    split = tl.program_id(1)
    low = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
    high = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    across = tl.cdiv(inner, COLUMNS)
    tiles = tiles_to_read(tl.cdiv(outer, ROWS) * across, observing_ptr)
    for tile in range(split, tiles, tl.num_programs(1)):
        row = tl.cast(tile // across, INDEX) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.cast(tile % across, INDEX) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = (row < outer) & (column < inner)
        x = widen(tl.load(x_ptr + (row * channels + channel) * inner + column, mask=inside, other=0.0))
        low, high = merge(low, high, x, inside)
    partial = channel * tl.num_programs(1) + split
    tl.store(low_ptr + partial, tl.min(tl.min(low, axis=1), axis=0))
    tl.store(high_ptr + partial, tl.max(tl.max(high, axis=1), axis=0))


@triton.jit
def column_ranges_kernel(
    x_ptr: tl.tensor,
    low_ptr: tl.tensor,
    high_ptr: tl.tensor,
    observing_ptr: tl.tensor,
    outer: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
) -> None:
    """One range a column and split; width = channels * inner."""
    column = tl.program_id(0).to(INDEX) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    low = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
    high = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    tiles = tiles_to_read(tl.cdiv(outer, ROWS), observing_ptr)
    for tile in range(split, tiles, tl.num_programs(1)):
        row = tl.cast(tile, INDEX) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < outer) & (column < width)[None, :]
        x = widen(tl.load(x_ptr + row * width + column[None, :], mask=inside, other=0.0))
        low, high = merge(low, high, x, inside)
    partial = split.to(INDEX) * width + column
    tl.store(low_ptr + partial, tl.min(low, axis=0), mask=column < width)
    tl.store(high_ptr + partial, tl.max(high, axis=0), mask=column < width)


@triton.jit
def merge_partials(
    low_ptr: tl.tensor,
    high_ptr: tl.tensor,
    channel: tl.tensor,
    channels: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The ranges of the vector ``channel``, by one program."""
    low = tl.full((CHANNELS, BLOCK), float("inf"), tl.float32)
    high = tl.full((CHANNELS, BLOCK), float("-inf"), tl.float32)
    for start in range(0, rows * width, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        inside = (k < rows * width) & (channel < channels)[:, None]
        partial = (tl.cast(k // width, tl.int64) * channels + channel[:, None]) * width + k % width
        low, unused = merge(low, high, tl.load(low_ptr + partial, mask=inside, other=0.0), inside)
        unused, high = merge(low, high, tl.load(high_ptr + partial, mask=inside, other=0.0), inside)
    return tl.min(low, axis=1), tl.max(high, axis=1)


def merge_shape(channels: int) -> tuple[int, int]:
    """Channels a finalising program takes, and partial ranges of each at a time."""
    together = min(32, triton.next_power_of_2(channels))
    return together, MERGE_TILE // together


def new_partials(x: Tensor, rows: int, channels: int, width: int) -> Partials:
    """Room for partial ranges."""
    low, high = x.new_empty((2, rows, channels, width), dtype=torch.float32)
    return Partials(low, high, rows, width)


def partial_ranges(x: Tensor, layout: Layout, observing: Tensor | None) -> Partials:
    """Launch the pass over a dense x, which stays unread while ``observing`` (one byte; None: always) is 0."""
    outer, channels, inner = layout
    index = index_type(x.numel())
    if x.numel() == 0:
        return new_partials(x, 0, channels, 1)
    # A program should have some tiles to itself before their number is split further.
    if inner >= 32 or outer == 1:
        columns = min(TILE, triton.next_power_of_2(inner))
        rows = min(TILE // columns, triton.next_power_of_2(outer))
        tiles = triton.cdiv(outer, rows) * triton.cdiv(inner, columns)
        splits = min(triton.cdiv(tiles, 4), max(1, PROGRAMS // channels))
        partials = new_partials(x, 1, channels, splits)
        row_ranges_kernel[(channels, splits)](
            x, partials.low, partials.high, observing, outer, channels, inner, rows, columns, index, **LAUNCH
        )
        return partials
    width = channels * inner
    columns = min(128, triton.next_power_of_2(width))
    rows = min(TILE // columns, triton.next_power_of_2(outer))
    strips = triton.cdiv(width, columns)
    splits = min(triton.cdiv(triton.cdiv(outer, rows), 4), max(1, PROGRAMS // strips))
    partials = new_partials(x, splits, channels, inner)
    column_ranges_kernel[(strips, splits)](
        x, partials.low, partials.high, observing, outer, width, rows, columns, index, **LAUNCH
    )
    return partials
