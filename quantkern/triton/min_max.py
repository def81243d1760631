"""Smallest and largest value per tensor or per channel, and how every pass with a result a channel cuts its tensor.

A pass over x leaves partial ranges (or sums) in a workspace; the operation's own finalising kernel, one program for
up to 32 channels, merges them with ``merge_partials`` (or ``sum_partials``, in float64). Which elements a partial
result covers and the order in which they are merged are fixed by the shape, never by timing.

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
from quantkern.triton.numerics import largest_magnitude, merge, widen

TILE = 2048
"""Elements a program holds at a time."""

PROGRAMS = 1024
"""Enough programs to fill the largest GPU, few enough for one program to merge their ranges."""

MERGE_TILE = 1024
"""Partial ranges a finalising program takes at a time: ``merge_shape`` spreads them over its channels."""


class Tiles(NamedTuple):
    """How a pass cuts a tensor: a program takes every splits-th tile of rows x columns of its channel or strip."""

    by_rows: bool
    strips: int
    splits: int
    rows: int
    columns: int


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


@triton.jit
def sum_partials(
    sums_ptr: tl.tensor,
    channel: tl.tensor,
    channels: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The float64 sums of the vector ``channel``, by one program."""
    total = tl.zeros((CHANNELS, BLOCK), tl.float64)
    for start in range(0, rows * width, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        inside = (k < rows * width) & (channel < channels)[:, None]
        partial = (tl.cast(k // width, tl.int64) * channels + channel[:, None]) * width + k % width
        total += tl.load(sums_ptr + partial, mask=inside, other=0.0).to(tl.float64)
    return tl.sum(total, axis=1)


@triton.jit
def largest_magnitudes_kernel(
    low_ptr: tl.tensor,
    high_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    channels: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """CHANNELS channels a program: partial ranges in, max|x| out."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    low, high = merge_partials(low_ptr, high_ptr, channel, channels, rows, width, CHANNELS, BLOCK)
    tl.store(largest_ptr + channel, largest_magnitude(low, high), mask=channel < channels)


def merge_shape(channels: int) -> tuple[int, int]:
    """Channels a finalising program takes, and partial ranges of each at a time."""
    together = min(32, triton.next_power_of_2(channels))
    return together, MERGE_TILE // together


def new_partials(x: Tensor, rows: int, channels: int, width: int) -> Partials:
    """Room for partial ranges."""
    low, high = x.new_empty((2, rows, channels, width), dtype=torch.float32)
    return Partials(low, high, rows, width)


def tiles_of(layout: Layout) -> Tiles:
    """The cut of a tensor that is not empty."""
    outer, channels, inner = layout
    # A program should have some tiles to itself before their number is split further.
    if inner >= 32 or outer == 1:
        columns = min(TILE, triton.next_power_of_2(inner))
        rows = min(TILE // columns, triton.next_power_of_2(outer))
        tiles = triton.cdiv(outer, rows) * triton.cdiv(inner, columns)
        return Tiles(True, channels, min(triton.cdiv(tiles, 4), max(1, PROGRAMS // channels)), rows, columns)
    width = channels * inner
    columns = min(128, triton.next_power_of_2(width))
    rows = min(TILE // columns, triton.next_power_of_2(outer))
    strips = triton.cdiv(width, columns)
    splits = min(triton.cdiv(triton.cdiv(outer, rows), 4), max(1, PROGRAMS // strips))
    return Tiles(False, strips, splits, rows, columns)


def partials_shape(tiles: Tiles, layout: Layout) -> tuple[int, int]:
    """Rows and width of a pass's partial results, which are rows x channels x width."""
    return (1, tiles.splits) if tiles.by_rows else (tiles.splits, layout.inner)


def partial_ranges(x: Tensor, layout: Layout, observing: Tensor | None) -> Partials:
    """Launch the pass over a dense x, which stays unread while ``observing`` (one byte; None: always) is 0."""
    outer, channels, inner = layout
    if x.numel() == 0:
        return new_partials(x, 0, channels, 1)
    index, tiles = index_type(x.numel()), tiles_of(layout)
    rows, width = partials_shape(tiles, layout)
    partials = new_partials(x, rows, channels, width)
    grid = (tiles.strips, tiles.splits)
    if tiles.by_rows:
        row_ranges_kernel[grid](
            x, partials.low, partials.high, observing, outer, channels, inner, tiles.rows, tiles.columns, index,
            **LAUNCH,
        )  # fmt: skip
    else:
        column_ranges_kernel[grid](
            x, partials.low, partials.high, observing, outer, channels * inner, tiles.rows, tiles.columns, index,
            **LAUNCH,
        )  # fmt: skip
    return partials


def largest_magnitudes(x: Tensor, layout: Layout) -> Tensor:
    """max|x| of every channel of a dense x, NaN left out; 0 where there is nothing else."""
    largest = x.new_empty(layout.channels, dtype=torch.float32)
    partials = partial_ranges(x, layout, None)
    together, at_once = merge_shape(layout.channels)
    largest_magnitudes_kernel[(triton.cdiv(layout.channels, together),)](
        partials.low, partials.high, largest, layout.channels, partials.rows, partials.width, together, at_once,
        **LAUNCH,
    )  # fmt: skip
    return largest
