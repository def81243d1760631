"""pack_signs: the signs of x, 32 of them a word, packed along one axis; and unpack_signs, the way back.

The file is not named after its operation alone, since a module hides a function of its own name in the package.

Layout: the rows to pack are seen as outer x inner rows with a stride each, and their elements K apart by a third
stride; most tensors (contiguous, channels_last, sliced, expanded) are read as they lie, others are copied first. A
program takes a tile of rows x words, wide along whichever of them lies closer together in memory.
Who owns what: the host functions own the packed rows, the counts and the unpacked signs.
Bytes an element: x is read once, 1/8 is written. The number of ones comes of the same pass; where a row takes more
than one program they add theirs to it, whole numbers in any order.
Numerics: ``numerics.sign_bit``; padding bits are 0.
"""

# triton ships no types, so triton.jit is untyped.
# mypy: disallow-untyped-decorators=False

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkern.triton.layout import BLOCK, DTYPES, LAUNCH, blocks, index_type, on_device
from quantkern.triton.numerics import narrow, pack_bits, sign_bit, widen

WORD = 32
"""Signs in a word."""

TILE = 4096
"""Signs a program packs."""


class Rows(NamedTuple):
    """Rows outer * inner in number: row o * inner + i begins at o * outer_stride + i * inner_stride."""

    outer: int
    inner: int
    outer_stride: int
    inner_stride: int


@triton.jit
def pack_signs_kernel(
    x_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    ones_ptr: tl.tensor,
    rows: tl.tensor,
    k: tl.tensor,
    words: tl.tensor,
    inner: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    stride: tl.tensor,
    ONE_GROUP: tl.constexpr,
    COUNTS: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """One tile; ONE_GROUP: all rows are inner ones. COUNTS: 0 none, 1 this tile holds whole rows, 2 it adds to them."""
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    row = (tile % row_tiles).to(INDEX) * ROWS + tl.arange(0, ROWS)
    word = (tile // row_tiles) * WORDS + tl.arange(0, WORDS)
    column = (tile // row_tiles) * (WORDS * 32) + tl.arange(0, WORDS * 32)
    if ONE_GROUP:
        begin = row * inner_stride
    else:
        outer = row // inner
        begin = outer * outer_stride + (row - outer * inner) * inner_stride
    at = begin[:, None] + column.to(INDEX)[None, :] * stride
    inside = (row < rows)[:, None] & (column < k)[None, :]
    x = widen(tl.load(x_ptr + at, mask=inside, other=0.0))
    flags = inside & sign_bit(x)
    inside_words = (row < rows)[:, None] & (word < words)[None, :]
    tl.store(packed_ptr + row[:, None] * words + word[None, :], pack_bits(flags, ROWS, WORDS), mask=inside_words)
    if COUNTS > 0:
        ones = tl.sum(flags.to(tl.int32), axis=1).to(tl.int32)
        if COUNTS == 1:
            tl.store(ones_ptr + row, ones, mask=row < rows)
        else:
            tl.atomic_add(ones_ptr + row, ones, mask=row < rows)


@triton.jit
def unpack_signs_kernel(
    packed_ptr: tl.tensor,
    y_ptr: tl.tensor,
    numel: tl.tensor,
    k: tl.tensor,
    words: tl.tensor,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of signs."""
    start = tl.program_id(0).to(INDEX) * BLOCK
    first = start // k
    place = start - first * k + tl.arange(0, BLOCK)
    row = first + place // k
    i = place % k
    inside = start + tl.arange(0, BLOCK) < numel
    word = tl.load(packed_ptr + row * words + (i >> 5), mask=inside, other=0)
    y = tl.where(((word >> (i & 31).to(tl.int32)) & 1) != 0, 1.0, -1.0)
    tl.store(y_ptr + start + tl.arange(0, BLOCK), narrow(y, y_ptr.dtype.element_ty), mask=inside)


def rows_of(x: Tensor) -> Rows | None:
    """The rows along the last dimension, in the order of the others; None if they are not of that form."""
    groups: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        else:
            groups.append((size, stride))
    if len(groups) > 2:
        return None
    (outer, outer_stride), (inner, inner_stride) = [(1, 0)] * (2 - len(groups)) + groups
    return Rows(outer, inner, outer_stride, inner_stride)


def tile_of(rows: int, words: int, along_rows: bool) -> tuple[int, int]:
    """Rows and words of a tile, its wider side along the rows' elements or across them."""
    most_rows, most_words = triton.next_power_of_2(rows), triton.next_power_of_2(words)
    if along_rows:
        words_taken = min(8, most_words)
        return min(TILE // WORD // words_taken, most_rows), words_taken
    rows_taken = min(TILE // WORD, most_rows)
    return rows_taken, min(TILE // WORD // rows_taken, most_words)


def check_dtype(dtype: torch.dtype, name: str) -> None:
    """One of the formats that kernels read and write."""
    if dtype not in DTYPES:
        expected = ", ".join(str(known) for known in DTYPES)
        raise TypeError(f"the Triton kernels take {expected}, got {name} {dtype}; convert or use another backend")


def pack_signs_forward(x: Tensor, axis: int, counts: bool) -> tuple[Tensor, Tensor]:
    """(packed, ones): int32 [..., words] with the axis moved to the end, and int32 [...], empty without counts."""
    check_dtype(x.dtype, "x of")
    moved = x.detach().movedim(axis, -1)
    shape, k = moved.shape[:-1], moved.shape[-1]
    words = triton.cdiv(k, WORD)
    packed = x.new_empty((*shape, words), dtype=torch.int32)
    ones = x.new_empty(shape if counts else 0, dtype=torch.int32)
    if packed.numel() == 0:
        return packed, ones.zero_()
    lies = rows_of(moved)
    if lies is None:
        moved = x.detach().contiguous().movedim(axis, -1)
        lies = rows_of(moved)
        assert lies is not None
    rows, stride = lies.outer * lies.inner, moved.stride(-1)
    extent = sum((size - 1) * step for size, step in zip(moved.shape, moved.stride(), strict=True))
    tile_rows, tile_words = tile_of(rows, words, k > 1 and (rows == 1 or stride <= lies.inner_stride))
    splits = triton.cdiv(words, tile_words)
    counting = 0 if not counts else 1 if splits == 1 else 2
    if counting == 2:
        ones.zero_()
    with on_device(x):
        pack_signs_kernel[(triton.cdiv(rows, tile_rows) * splits,)](
            moved, packed, ones, rows, k, words, lies.inner, lies.outer_stride, lies.inner_stride, stride,
            lies.outer == 1, counting, index_type(max(extent, rows * k)), tile_rows, tile_words, **LAUNCH,
        )  # fmt: skip
    return packed, ones


def unpack_signs_forward(packed: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """The first k signs of every contiguous packed row as +1 and -1, [..., k]."""
    check_dtype(dtype, "dtype")
    y = packed.new_empty((*packed.shape[:-1], k), dtype=dtype)
    if y.numel() > 0:
        with on_device(packed):
            unpack_signs_kernel[blocks(y.numel())](
                packed, y, y.numel(), k, packed.shape[-1], index_type(y.numel()), BLOCK, **LAUNCH
            )
    return y
