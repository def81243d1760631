"""binary_matmul: the exact dot products of packed rows, times scale, plus bias, or their packed signs at a threshold.

The same kernels compute binary_conv2d, which is a matrix product whose first operand is gathered from images: its
rows are output pixels, and its columns the words of all taps in order, as they lie in the weights. The file is not
named after its operation alone, since a module hides a function of its own name in the package.

    popcount   fewer than 16 rows: dot = (signs that count) - 2 * popcount(a ^ b)
    tensor     more rows: bits are spread to int8, a as +-1 (0 outside of an image), b as 0 and 1 (0 where no sign
               counts), and multiplied with int32 sums; sum(a * (2 b - 1)) = 2 * sum(a * b) - sum(a)

Which signs count is a word of bits beside every word of a: padding bits and taps outside of an image do not, whatever
the tensors hold there.

Layout: a program takes a tile of rows x columns of the result and walks through the words of both operands. Results
go to [images, columns, pixels], which for a matrix product is images of one pixel: [rows, columns].
Who owns what: the host functions own the result.
Bytes: operands are read once a tile, 1/8 byte a sign; results are written once, 4 bytes or 1/8 byte a dot product.
Numerics: sums of up to 2^24 signs are exact in int32 and in float32; scale and bias are each rounded once.
"""

# triton ships no types, so triton.jit is untyped.
# mypy: disallow-untyped-decorators=False

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkern.triton.layout import LAUNCH, index_type, on_device
from quantkern.triton.numerics import as_words, bits_in_use, pack_bits, popcount, spread_bits
from quantkern.triton.pack_signs import WORD

TENSOR_ROWS = 16
"""From this many rows on the tensor cores are worth spreading the bits: the least that they take at a time."""

POPCOUNT_TILE = 2048
"""Pairs of words a program of the popcount kernel holds at a time."""


class Geometry(NamedTuple):
    """How rows of the first operand are gathered from packed images [N, height, width, words]."""

    height: int
    width: int
    out_height: int
    out_width: int
    kernel_width: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


class Epilogue(NamedTuple):
    """What becomes of the dot products, a value a column each: scale and bias, or the signs at threshold and flip."""

    scale: Tensor | None = None
    bias: Tensor | None = None
    threshold: Tensor | None = None
    flip: Tensor | None = None


@triton.jit
def load_patches(
    a_ptr: tl.tensor,
    m: tl.tensor,
    q: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    words: tl.tensor,
    last_bits: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    kernel_width: tl.tensor,
    stride_y: tl.tensor,
    stride_x: tl.tensor,
    padding_y: tl.tensor,
    padding_x: tl.tensor,
    dilation_y: tl.tensor,
    dilation_x: tl.tensor,
    GATHERED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Words q of the rows m, [rows, words], and which of their bits count; those that do not are 0."""
    inside = (m < rows)[:, None] & (q < length)[None, :]
    if GATHERED:
        line = m // out_width
        image = line // out_height
        top = ((line - image * out_height) * stride_y).to(tl.int32) - padding_y
        left = ((m - line * out_width) * stride_x).to(tl.int32) - padding_x
        tap = q // words
        word = q - tap * words
        tap_y = tap // kernel_width
        tap_x = tap - tap_y * kernel_width
        y = top[:, None] + (tap_y * dilation_y)[None, :]
        x = left[:, None] + (tap_x * dilation_x)[None, :]
        inside = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        at = ((image * height)[:, None] + y) * width + x
        at = at * words + word[None, :]
    else:
        word = q
        at = m[:, None] * words + q[None, :]
    counting = tl.where(inside, bits_in_use(word, words, last_bits)[None, :], 0).to(tl.uint32)
    return as_words(tl.load(a_ptr + at, mask=inside, other=0)) & counting, counting


@triton.jit
def store_dots(
    out_ptr: tl.tensor,
    dot: tl.tensor,
    m: tl.tensor,
    first_column: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    pixels: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    flip_ptr: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The epilogue; out is float32 [images, columns, pixels], or packed along the columns with a threshold."""
    n = first_column + tl.arange(0, COLUMNS)
    if threshold_ptr is None:
        y = dot.to(tl.float32)
        if scale_ptr is not None:
            y = y * tl.load(scale_ptr + n, mask=n < columns, other=0.0)[None, :]
        if bias_ptr is not None:
            y = y + tl.load(bias_ptr + n, mask=n < columns, other=0.0)[None, :]
        image = m // pixels
        at = (image * columns)[:, None] + n[None, :]
        at = at * pixels + (m - image * pixels)[:, None]
        tl.store(out_ptr + at, y, mask=(m < rows)[:, None] & (n < columns)[None, :])
    else:
        threshold = tl.load(threshold_ptr + n, mask=n < columns, other=0)
        turned = (tl.load(flip_ptr + (n >> 5), mask=n < columns, other=0) >> (n & 31)) & 1
        flags = ((dot >= threshold[None, :]) != (turned != 0)[None, :]) & (n < columns)[None, :]
        word = first_column // 32 + tl.arange(0, COLUMNS // 32)
        words_out = tl.cdiv(columns, 32)
        at = m[:, None] * words_out + word[None, :]
        mask = (m < rows)[:, None] & (word < words_out)[None, :]
        tl.store(out_ptr + at, pack_bits(flags, ROWS, COLUMNS // 32), mask=mask)


@triton.jit
def tensor_products_kernel(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    flip_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    pixels: tl.tensor,
    length: tl.tensor,
    words: tl.tensor,
    last_bits: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    kernel_width: tl.tensor,
    stride_y: tl.tensor,
    stride_x: tl.tensor,
    padding_y: tl.tensor,
    padding_x: tl.tensor,
    dilation_y: tl.tensor,
    dilation_x: tl.tensor,
    GATHERED: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """One tile of dot products, on the tensor cores; length: words of a row of either operand, all taps."""
    column_tiles = tl.cdiv(columns, COLUMNS)
    first_column = (tl.program_id(0) % column_tiles) * COLUMNS
    m = (tl.program_id(0) // column_tiles).to(INDEX) * ROWS + tl.arange(0, ROWS)
    n = first_column + tl.arange(0, COLUMNS)
    products = tl.zeros((ROWS, COLUMNS), tl.int32)
    sums = tl.zeros((ROWS, WORDS), tl.int32)
    for first in range(0, length, WORDS):
        q = first + tl.arange(0, WORDS)
        a, counting = load_patches(
            a_ptr, m, q, rows, length, words, last_bits, height, width, out_height, out_width, kernel_width,
            stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, GATHERED,
        )  # fmt: skip
        inside = (n < columns)[:, None] & (q < length)[None, :]
        b = as_words(tl.load(b_ptr + n.to(INDEX)[:, None] * length + q[None, :], mask=inside, other=0))
        # Padding bits of a become -1: they meet zeros of b.
        b = b & bits_in_use(q % words, words, last_bits)[None, :]
        signs = spread_bits(a, 2, (counting != 0).to(tl.int32), ROWS, WORDS)
        products = tl.dot(signs, tl.trans(spread_bits(b, 1, 0, COLUMNS, WORDS)), products, out_dtype=tl.int32)
        sums += 2 * popcount(a) - popcount(counting)
    dot = 2 * products - tl.sum(sums, axis=1).to(tl.int32)[:, None]
    store_dots(
        out_ptr, dot, m, first_column, rows, columns, pixels, scale_ptr, bias_ptr, threshold_ptr, flip_ptr,
        ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def popcount_products_kernel(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    flip_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    pixels: tl.tensor,
    length: tl.tensor,
    words: tl.tensor,
    last_bits: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    kernel_width: tl.tensor,
    stride_y: tl.tensor,
    stride_x: tl.tensor,
    padding_y: tl.tensor,
    padding_x: tl.tensor,
    dilation_y: tl.tensor,
    dilation_x: tl.tensor,
    GATHERED: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """One tile of dot products, by popcount; length: words of a row of either operand, all taps."""
    column_tiles = tl.cdiv(columns, COLUMNS)
    first_column = (tl.program_id(0) % column_tiles) * COLUMNS
    m = (tl.program_id(0) // column_tiles).to(INDEX) * ROWS + tl.arange(0, ROWS)
    n = first_column + tl.arange(0, COLUMNS)
    different = tl.zeros((ROWS, COLUMNS, WORDS), tl.int32)
    counted = tl.zeros((ROWS, WORDS), tl.int32)
    for first in range(0, length, WORDS):
        q = first + tl.arange(0, WORDS)
        a, counting = load_patches(
            a_ptr, m, q, rows, length, words, last_bits, height, width, out_height, out_width, kernel_width,
            stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, GATHERED,
        )  # fmt: skip
        inside = (n < columns)[:, None] & (q < length)[None, :]
        b = as_words(tl.load(b_ptr + n.to(INDEX)[:, None] * length + q[None, :], mask=inside, other=0))
        different += popcount((a[:, None, :] ^ b[None, :, :]) & counting[:, None, :])
        counted += popcount(counting)
    dot = tl.sum(counted, axis=1).to(tl.int32)[:, None] - 2 * tl.sum(different, axis=2).to(tl.int32)
    store_dots(
        out_ptr, dot, m, first_column, rows, columns, pixels, scale_ptr, bias_ptr, threshold_ptr, flip_ptr,
        ROWS, COLUMNS,
    )  # fmt: skip


def tensor_tile(rows: int, columns: int, length: int) -> tuple[int, int, int]:
    """Rows, columns and words of a tile of the tensor kernel."""
    taken = min(128, max(16, triton.next_power_of_2(rows))), min(128, max(32, triton.next_power_of_2(columns)))
    # Two words at a time: spread out, more of them do not stay in registers.
    return *taken, max(1, min(2, triton.next_power_of_2(length)))


def popcount_tile(rows: int, columns: int, length: int) -> tuple[int, int, int]:
    """Rows, columns (a word of signs at least) and words of a tile of the popcount kernel."""
    taken = triton.next_power_of_2(rows)
    words = max(1, min(64 // taken, triton.next_power_of_2(length)))
    return taken, max(32, min(POPCOUNT_TILE // (taken * words), triton.next_power_of_2(columns))), words


def launch_products(
    a: Tensor, b: Tensor, k: int, out: Tensor, rows: int, pixels: int, geometry: Geometry | None, epilogue: Epilogue
) -> None:
    """Fill ``out`` with the products of the rows of a, gathered by a geometry, and of b [columns, ...words].

    Here and nowhere else the kernel is chosen. k: signs in every ``a.shape[-1]`` words. pixels: rows an image, which
    lie innermost in a float32 result.
    """
    columns, words = b.shape[0], a.shape[-1]
    if out.numel() == 0:
        return
    length = b.numel() // columns
    epilogue = Epilogue(*(None if value is None else value.detach().contiguous() for value in epilogue))
    tensor = rows >= TENSOR_ROWS
    tile = tensor_tile(rows, columns, length) if tensor else popcount_tile(rows, columns, length)
    kernel = tensor_products_kernel if tensor else popcount_products_kernel
    lies = geometry or Geometry(1, 1, 1, 1, 1, (1, 1), (0, 0), (1, 1))
    grid = (triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1]),)
    with on_device(a):
        kernel[grid](
            a, b, out, *epilogue, rows, columns, pixels, length, words, k - WORD * (words - 1),
            *lies[:5], *lies.stride, *lies.padding, *lies.dilation,
            geometry is not None, index_type(max(a.numel(), b.numel(), out.numel())), *tile, **LAUNCH,
            num_warps=8 if tile[0] * tile[1] > 64 * 64 else 4,
        )  # fmt: skip


def binary_matmul_forward(a: Tensor, b: Tensor, k: int, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """float32 [M, N] from int32 [M, words] and [N, words], contiguous."""
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=torch.float32)
    launch_products(a, b, k, out, a.shape[0], 1, None, Epilogue(scale, bias))
    return out


def binary_matmul_sign_forward(a: Tensor, b: Tensor, k: int, threshold: Tensor, flip: Tensor) -> Tensor:
    """int32 [M, ceil(N / 32)]: bit n is (dot >= threshold[n]) xor bit n of flip."""
    out = a.new_empty((a.shape[0], triton.cdiv(b.shape[0], WORD)))
    launch_products(a, b, k, out, a.shape[0], 1, None, Epilogue(threshold=threshold, flip=flip))
    return out
