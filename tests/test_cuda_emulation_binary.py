"""The CUDA kernels of binary networks, run on the processor as in ``test_cuda_emulation``: all results bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from test_cuda_emulation import (
    DTYPES,
    INPUTS,
    Output,
    emulated_kernels,  # noqa: F401
    emulated_library,  # noqa: F401
    ints,
    pointer,
    pytestmark,  # noqa: F401
    unpack,
)
from torch import Tensor

from quantkern import reference

WORD = reference.WORD
Pair = tuple[int, int]

# (outer, k, inner): rows of whole words, rows of any length, columns.
PACK_VIEWS = [(1, 1, 1), (1, 32, 1), (7, 64, 1), (70, 96, 1), (1, 31, 1), (5, 33, 1), (40, 7, 1), (3, 1000, 1),
              (1, 1, 2), (2, 32, 5), (3, 65, 49), (2, 3, 300), (1, 96, 64)]  # fmt: skip
# (m, n, k): one row; few rows; the sizes of tiles and around them; words that fill no chunk.
MATMULS = [(1, 1, 1), (1, 70, 100), (1, 33, 4096), (5, 33, 90), (2, 34, 1074), (2, 5, 0), (3, 33, 1000), (8, 40, 1300),
           (9, 5, 32), (9, 9, 0), (17, 65, 515), (64, 64, 512), (65, 130, 2100), (130, 40, 640), (129, 257, 1150),
           (200, 129, 2176), (70, 31, 128), (300, 1, 250), (9, 200, 3100)]  # fmt: skip
# images, height, width, channels, columns, taps, stride, padding, dilation
CONVOLUTIONS = [
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 5, 7, 3, 5, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 6, 9, 128, 70, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 9, 8, 256, 33, (3, 3), (2, 2), (1, 1), (1, 1)),
    (2, 11, 10, 100, 40, (3, 2), (2, 1), (2, 1), (2, 3)),
    (1, 12, 12, 127, 129, (3, 3), (1, 1), (0, 0), (1, 1)),
    (1, 1, 1, 40, 9, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 4, 4, 64, 32, (5, 5), (3, 3), (4, 3), (1, 1)),
    (1, 3, 3, 32, 3, (2, 2), (1, 1), (5, 5), (3, 3)),
    (1, 3, 2, 64, 5, (2, 2), (2, 2), (9, 7), (1, 1)),
    (2, 8, 8, 384, 64, (1, 1), (2, 2), (0, 0), (1, 1)),
    (5, 17, 16, 128, 200, (2, 2), (1, 1), (1, 0), (1, 1)),
]
Convolution = tuple[int, int, int, int, int, Pair, Pair, Pair, Pair]


@pytest.fixture(params=[(True, 0), (True, 1), (False, 0)], ids=["bits", "bits-misaligned", "bytes"], name="offset")
def products_and_offset(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Iterator[int]:
    """By how many words the operands miss their alignment; whether the tensor cores multiply bits, or bytes."""
    products, offset = request.param
    library.set_bit_products(int(products))
    yield offset
    library.set_bit_products(1)


def real(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Random values with zeros of both signs, NaN and infinities; misaligned by ``offset`` elements."""
    generator = torch.Generator().manual_seed(sum(shape) + offset)
    x = torch.randn(shape, generator=generator)
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1.0, -1.0])
    at = torch.randint(max(1, x.numel()), special.shape, generator=generator)
    if x.numel() > 1:
        x.view(-1)[at] = special
    memory = torch.zeros(x.numel() + offset, dtype=dtype)
    memory[offset:] = x.flatten()
    return memory[offset:].view(shape)


def dirty(packed: Tensor, k: int, offset: int) -> Tensor:
    """The same signs with random padding bits, misaligned by ``offset`` words."""
    noise = torch.randint(-(1 << 31), 1 << 31, packed.shape, generator=torch.Generator().manual_seed(k)).int()
    padding = torch.zeros_like(packed)
    if k % WORD:
        padding[..., -1] = -1 << (k % WORD)
    memory = torch.zeros(packed.numel() + offset, dtype=torch.int32)
    memory[offset:] = (packed | (noise & padding)).flatten()
    return memory[offset:].view(packed.shape)


def equal(actual: Tensor, expected: Tensor) -> None:
    """To the last bit, signs of zero too."""
    assert actual.shape == expected.shape
    assert torch.equal(actual.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))


@pytest.mark.parametrize("n", [1, 7, 8, 64, 5003])
@pytest.mark.parametrize(("dtype", "offset"), INPUTS, ids=str)
def test_binarize(kernels: ctypes.CDLL, n: int, dtype: torch.dtype, offset: int) -> None:
    x = real((n,), dtype, offset)
    y, mask = Output(n, dtype), Output((n + 7) // 8, torch.uint8)
    pointers = pointer(x), pointer(y.tensor), pointer(mask.tensor)
    assert kernels.binarize(DTYPES[dtype], *pointers, ctypes.c_int64(n)) == 0
    assert torch.equal(y.checked(), reference.binarize(x))
    assert torch.equal(unpack(mask.checked(), n), x.abs() <= 1)
    again = Output(n, dtype)
    assert kernels.binarize(DTYPES[dtype], pointer(x), pointer(again.tensor), None, ctypes.c_int64(n)) == 0
    assert torch.equal(again.checked(), y.tensor)


@pytest.mark.parametrize("view", PACK_VIEWS, ids=str)
@pytest.mark.parametrize(("dtype", "offset"), INPUTS, ids=str)
def test_pack_and_unpack(kernels: ctypes.CDLL, view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    x = real(view, dtype, offset)
    expected, counts = reference.pack_signs_counted(x, 1)
    rows, words = counts.numel(), expected.shape[-1]
    packed, ones, y = Output(rows * words, torch.int32), Output(rows, torch.int32), Output(x.numel(), dtype)
    assert kernels.pack_signs(DTYPES[dtype], pointer(x), pointer(packed.tensor), ints(*view)) == 0
    assert torch.equal(packed.checked().view(expected.shape), expected)
    sizes = ctypes.c_int64(rows), ctypes.c_int64(words)
    assert kernels.count_signs(pointer(packed.tensor), *sizes, pointer(ones.tensor)) == 0
    assert torch.equal(ones.checked().view(counts.shape), counts)
    sizes = ctypes.c_int64(rows), ctypes.c_int64(view[1])
    assert kernels.unpack_signs(DTYPES[dtype], pointer(packed.tensor), pointer(y.tensor), *sizes) == 0
    assert torch.equal(y.checked().view(rows, view[1]), reference.unpack_signs(expected, view[1], dtype).flatten(0, -2))


def matmul(
    kernels: ctypes.CDLL, a: Tensor, b: Tensor, k: int, ones: Tensor | None, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    m, n = a.shape[0], b.shape[0]
    y = Output(m * n, torch.float32)
    operands = pointer(a), pointer(b), ints(m, n, k), pointer(ones), pointer(y.tensor)
    assert kernels.binary_matmul(*operands, pointer(scale), pointer(bias)) == 0
    return y.checked().view(m, n)


def thresholds(n: int, k: int) -> tuple[Tensor, Tensor]:
    """Around the sums that occur, and some no sum reaches."""
    generator = torch.Generator().manual_seed(n)
    threshold = torch.randint(-9, 10, (n,), generator=generator, dtype=torch.int32)
    threshold[::5] = k + 1
    return threshold, reference.pack_signs(torch.randn(n, generator=generator))


@pytest.mark.parametrize("sizes", MATMULS, ids=str)
def test_matmul(kernels: ctypes.CDLL, sizes: tuple[int, int, int], offset: int) -> None:
    m, n, k = sizes
    clean = reference.pack_signs(real((m, k), torch.float32)), reference.pack_signs(real((n, k), torch.float32, 1))
    a, b = (dirty(t, k, offset) for t in clean)
    ones = reference.pack_signs_counted(real((n, k), torch.float32, 1))[1]
    equal(matmul(kernels, a, b, k, None, None, None), reference.binary_matmul(*clean, k))
    scale, bias = torch.linspace(-0.7, 0.3, n), torch.linspace(5.0, -3.0, n)
    equal(matmul(kernels, a, b, k, ones, scale, bias), reference.binary_matmul(*clean, k, scale, bias))
    equal(matmul(kernels, a, b, k, ones, scale, None), reference.binary_matmul(*clean, k, scale))
    threshold, flip = thresholds(n, k)
    for given in (None, ones):
        words = Output(m * -(-n // WORD), torch.int32)
        operands = pointer(a), pointer(b), ints(*sizes), pointer(given), pointer(words.tensor)
        assert kernels.binary_matmul_sign(*operands, pointer(threshold), pointer(flip)) == 0
        equal(words.checked().view(m, -1), reference.binary_matmul_sign(*clean, k, threshold, flip))


def test_more_tiles_than_blocks(library: ctypes.CDLL) -> None:
    """Blocks go on to further tiles, and over the borders of the groups in which tiles are done."""
    library.set_multiprocessors(1)
    k = 128
    a, b = (reference.pack_signs(real((rows, k), torch.float32)) for rows in (2200, 130))
    equal(matmul(library, a, b, k, None, None, None), reference.binary_matmul(a, b, k))


def test_matmul_of_nothing(kernels: ctypes.CDLL) -> None:
    some, none = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(0, 2, dtype=torch.int32)
    for a, b in ((some, none), (none, some), (none, none)):
        assert matmul(kernels, a, b, 64, None, None, None).numel() == 0


def window_of(case: Convolution, words: int) -> list[int]:
    images, height, width, _, _, taps, stride, padding, dilation = case
    out = [
        (size + 2 * pad - step * (count - 1) - 1) // by + 1
        for size, count, by, pad, step in zip((height, width), taps, stride, padding, dilation, strict=True)
    ]
    return [images, height, width, words, *taps, *stride, *padding, *dilation, *out]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv2d(kernels: ctypes.CDLL, case: Convolution, offset: int) -> None:
    images, height, width, channels, columns, taps, *geometry = case
    weights = real((columns, *taps, channels), torch.float32, 1)
    clean = reference.pack_signs(real((images, height, width, channels), torch.float32)), reference.pack_signs(weights)
    x, weight = (dirty(t, channels, offset) for t in clean)
    window = window_of(case, x.shape[-1])
    pixels = window[-2] * window[-1]
    ones = (weights >= 0).sum((1, 2, 3), dtype=torch.int32)
    scale, bias = torch.linspace(-0.7, 0.3, columns), torch.linspace(5.0, -3.0, columns)
    inputs = pointer(x), pointer(weight), ints(*window), ints(columns, channels)
    for given, factor, shift, last in (
        (None, None, None, False),
        (ones, scale, bias, True),
        (ones, scale, None, False),
    ):
        y = Output(images * columns * pixels, torch.float32)
        vectors = pointer(given), pointer(y.tensor), pointer(factor), pointer(shift)
        assert kernels.binary_conv2d(*inputs, *vectors, ctypes.c_int64(1 if last else pixels)) == 0
        shape = (images, *window[-2:], columns) if last else (images, columns, *window[-2:])
        actual = y.checked().view(shape)
        expected = reference.binary_conv2d(*clean, channels, *geometry, factor, shift)
        equal(actual.permute(0, 3, 1, 2) if last else actual, expected)
    threshold, flip = thresholds(columns, channels * taps[0] * taps[1])
    words = Output(images * pixels * -(-columns // WORD), torch.int32)
    vectors = pointer(None), pointer(words.tensor), pointer(threshold), pointer(flip)
    assert kernels.binary_conv2d_sign(*inputs, *vectors) == 0
    expected = reference.binary_conv2d_sign(*clean, channels, *geometry, threshold, flip)
    equal(words.checked().view(expected.shape), expected)


def test_conv2d_of_no_channels(kernels: ctypes.CDLL) -> None:
    """Every sum is empty: the bias alone."""
    bias, y = torch.tensor([1.0, -2.0]), Output(2 * 9, torch.float32)
    inputs = pointer(None), pointer(None), ints(1, 3, 3, 0, 3, 3, 1, 1, 1, 1, 1, 1, 3, 3), ints(2, 0)
    vectors = pointer(None), pointer(y.tensor), pointer(None), pointer(bias)
    assert kernels.binary_conv2d(*inputs, *vectors, ctypes.c_int64(9)) == 0
    assert torch.equal(y.checked().view(2, 9), bias[:, None].expand(2, 9))


def test_conv2d_with_long_steps(kernels: ctypes.CDLL) -> None:
    """A stride or a dilation that is never taken may be longer than 32 bits hold."""
    packed = torch.tensor([5, 6], dtype=torch.int32).view(1, 2, 1, 1)
    far = 1 << 40
    for padding, expected in ((0, [6.0]), (3, [0.0] * 3 + [6.0] + [0.0] * 3)):
        out = 1 + 2 * padding
        window = [1, 2, 1, 1, 2, 1, far, 1, 0, padding, 1, far, 1, out]
        y = Output(out, torch.float32)
        vectors = pointer(None), pointer(y.tensor), pointer(None), pointer(None)
        inputs = pointer(packed), pointer(packed), ints(*window), ints(1, 3)
        assert kernels.binary_conv2d(*inputs, *vectors, ctypes.c_int64(out)) == 0
        assert y.checked().tolist() == expected


@pytest.mark.parametrize(
    ("size", "words", "kernel", "stride", "padding"),
    [
        ((1, 1), 1, (1, 1), (1, 1), (0, 0)),
        ((8, 8), 2, (2, 2), (2, 2), (0, 0)),
        ((9, 7), 3, (3, 3), (2, 2), (1, 1)),
        ((5, 6), 5, (4, 2), (1, 3), (2, 0)),
        ((30, 31), 4, (3, 2), (1, 1), (1, 1)),
    ],
)
def test_max_pool2d(kernels: ctypes.CDLL, size: Pair, words: int, kernel: Pair, stride: Pair, padding: Pair) -> None:
    generator = torch.Generator().manual_seed(words)
    # Sparse and dense words, so that neither OR nor AND over a window is all ones or zeros.
    bits = torch.rand(2, *size, words * WORD, generator=generator) < torch.linspace(0.1, 0.9, words * WORD)
    x = reference.pack_signs(bits.float() - 0.5)
    flip = reference.pack_signs(torch.randn(words * WORD, generator=generator))
    expected = reference.packed_max_pool2d(x, flip, kernel, stride, padding)
    window = [2, *size, words, *kernel, *stride, *padding, 1, 1, *expected.shape[1:3]]
    y = Output(expected.numel(), torch.int32)
    assert kernels.packed_max_pool2d(pointer(x), pointer(flip), pointer(y.tensor), ints(*window)) == 0
    equal(y.checked().view(expected.shape), expected)
