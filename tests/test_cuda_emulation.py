"""The logic of the CUDA kernels, run on the processor: indices, tails, channels, masks, reductions, state.

``cuda_emulation/`` holds a stand-in for the CUDA runtime, with which the ``.cu`` files compile as ordinary C++. What
only a GPU shows (races between blocks, launch limits, its own arithmetic) is left to the tests that need one.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkern import reference

HERE = Path(__file__).parent / "cuda_emulation"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build the emulation with")

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
GUARD = 64
"""Bytes behind every output that must stay as they were."""

# (outer, channels, inner): per tensor; rows in whole groups; rows that share groups; columns; many columns.
VIEWS = [(1, 1, 1), (1, 1, 8), (1, 1, 5003), (2, 3, 8), (3, 5, 40), (2, 7, 49), (1, 5, 9), (1, 3, 1), (9, 3, 1),
         (33, 64, 1), (5, 300, 1), (40, 6, 4), (7, 11, 3)]  # fmt: skip
RANGES = [(-128, 127), (0, 255), (-(1 << 20), 1 << 20)]
INPUTS = [(torch.float32, 0), (torch.float32, 1), (torch.float16, 0), (torch.bfloat16, 1)]
"""Element types, and by how many elements the input misses its alignment."""


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def ints(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


class Output:
    """A tensor of n elements, 16-byte aligned, poisoned, with a guard behind it."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        size = n * dtype.itemsize
        self.memory = torch.full((size + GUARD,), 0x5A, dtype=torch.uint8)
        assert self.memory.data_ptr() % 16 == 0
        self.tensor = self.memory[:size].view(dtype)

    def checked(self) -> Tensor:
        assert bool((self.memory[-GUARD:] == 0x5A).all()), "wrote beyond the end"
        return self.tensor


def unpack(mask: Tensor, n: int) -> Tensor:
    bits = (mask[:, None] >> torch.arange(8)) & 1
    assert not bits.flatten()[n:].any(), "padding bits must be zero"
    return bits.flatten()[:n].bool()


def make_input(view: tuple[int, int, int], dtype: torch.dtype, offset: int = 0, special: bool = True) -> Tensor:
    """Random values of different size a channel, with NaN and infinities if ``special``; ``offset`` misaligns it."""
    generator = torch.Generator().manual_seed(sum(view) + offset)
    n = view[0] * view[1] * view[2]
    x = torch.randn(view, generator=generator) * torch.linspace(0.2, 3.0, view[1])[:, None]
    if special and n > 4:
        flat = x.view(-1)
        flat[torch.randint(n, (4,), generator=generator)] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    memory = torch.zeros(n + offset, dtype=dtype)
    memory[offset:] = x.flatten()
    return memory[offset:].view(view)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# Other modules import these two: the names of the functions differ from those the tests ask for.
@pytest.fixture(scope="session", name="library")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The emulated kernels, compiled once a run."""
    target = tmp_path_factory.getbasetemp() / "cuda_emulation.so"
    if target.exists():
        return ctypes.CDLL(str(target))
    flags = ["-O1", "-g0", "-std=c++17", "-shared", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"]
    # A misaligned 16-byte access, which a GPU would refuse, ends the test run here with a message too.
    checks = ["-fsanitize=alignment,bounds,shift,signed-integer-overflow,null", "-fno-sanitize-recover=all"]
    files = [f"-I{HERE}", str(HERE / "emulated.cpp"), "-o", str(target)]
    command = [str(COMPILER), *flags, *checks, "-Wno-unknown-pragmas", *files]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture(params=[1, 132], ids=["1-multiprocessor", "132-multiprocessors"], name="kernels")
def emulated_kernels(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """Few blocks that stride far, or as many as there is work for."""
    library.set_multiprocessors(request.param)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    yield library
    torch.set_num_threads(threads)


def fake_quantize(
    kernels: ctypes.CDLL,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    limits: tuple[int, int],
    step: Tensor | None = None,
    narrow: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    n, dtype = x.numel(), x.dtype
    y, mask = Output(n, narrow or dtype), Output((n + 7) // 8, torch.uint8)
    error = kernels.fake_quantize(
        DTYPES[dtype], pointer(x), pointer(y.tensor), pointer(mask.tensor), ints(*x.shape), pointer(scale),
        pointer(zero_point), int(zero_point.dtype == torch.float32), ctypes.c_float(0), ctypes.c_float(0),
        *limits, pointer(step), ctypes.c_int64(7),
    )  # fmt: skip
    assert error == 0
    return y.checked().view(x.shape), unpack(mask.checked(), n).view(x.shape)


def axis_of(x: Tensor) -> int | None:
    return None if x.shape[1] == 1 else 1


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize(("dtype", "offset"), INPUTS, ids=str)
def test_fake_quantize(kernels: ctypes.CDLL, view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    x = make_input(view, dtype, offset)
    scale = torch.linspace(0.003, 0.4, view[1])
    for (low, high), zero_dtype in itertools.product(RANGES, (torch.int32, torch.float32)):
        zero_point = torch.arange(view[1]).remainder(high - low + 1).add(low).to(zero_dtype)
        y, passes = fake_quantize(kernels, x, scale, zero_point, (low, high))
        expected, expected_passes = reference.quantize(x, scale, zero_point, low, high, axis_of(x))
        same(y, expected)
        assert torch.equal(passes, expected_passes)


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.inf, torch.nan, 1e-45])
def test_unusable_scale_gives_nan(kernels: ctypes.CDLL, scale: float) -> None:
    x = make_input((1, 1, 37), torch.float32)
    y, passes = fake_quantize(kernels, x, torch.tensor([scale]), torch.zeros(1), (-128, 127))
    assert bool(y.isnan().all())
    assert not passes.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_instead_of_tensors(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    x = make_input((1, 1, 1001), dtype)
    y = Output(x.numel(), dtype)
    error = kernels.fake_quantize(
        DTYPES[dtype], pointer(x), pointer(y.tensor), None, ints(*x.shape), None, None, 0,
        ctypes.c_float(0.03), ctypes.c_float(3.0), -8, 7, None, ctypes.c_int64(0),
    )  # fmt: skip
    assert error == 0
    same(y.checked().view(x.shape), reference.quantize(x, torch.tensor(0.03), torch.tensor(3.0), -8, 7)[0])


@pytest.mark.parametrize("view", [(1, 1, 1001), (3, 5, 40), (2, 7, 49)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_before_start(kernels: ctypes.CDLL, view: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = make_input(view, dtype)
    scale, zero_point = torch.full((view[1],), 0.1), torch.zeros(view[1], dtype=torch.int32)
    y, passes = fake_quantize(kernels, x, scale, zero_point, (-8, 7), step=torch.tensor([6]))
    same(y, x)
    assert bool(passes.all())
    y, _ = fake_quantize(kernels, x, scale, zero_point, (-8, 7), step=torch.tensor([7]))
    same(y, reference.quantize(x, scale, zero_point, -8, 7, axis_of(x))[0])


@pytest.mark.parametrize(("dtype", "offset"), INPUTS, ids=str)
@pytest.mark.parametrize("n", [1, 7, 8, 9, 4001])
def test_backward(kernels: ctypes.CDLL, dtype: torch.dtype, n: int, offset: int) -> None:
    grad = make_input((1, 1, n), dtype, offset)
    mask = torch.randint(256, ((n + 7) // 8,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    out = Output(n, dtype)
    pointers = pointer(grad), pointer(mask), pointer(out.tensor)
    assert kernels.fake_quantize_backward(DTYPES[dtype], *pointers, ctypes.c_int64(n)) == 0
    passes = ((mask[:, None] >> torch.arange(8)) & 1).flatten()[:n].bool()
    same(out.checked(), torch.where(passes, grad.flatten(), torch.zeros((), dtype=dtype)))


def weight(
    kernels: ctypes.CDLL,
    x: Tensor,
    limits: tuple[int, int],
    symmetric: bool,
    with_mask: bool,
    step: Tensor | None = None,
    narrow: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    n, channels = x.numel(), x.shape[1]
    y, mask = Output(n, narrow or x.dtype), Output((n + 7) // 8 if with_mask else 0, torch.uint8)
    scale, zero_point = Output(channels, torch.float32), Output(channels, torch.int32)
    error = kernels.fake_quantize_weight(
        DTYPES[x.dtype], pointer(x), pointer(y.tensor), pointer(mask.tensor) if with_mask else None, ints(*x.shape),
        pointer(scale.tensor), pointer(zero_point.tensor), *limits, int(symmetric), pointer(step), ctypes.c_int64(7),
    )  # fmt: skip
    assert error == 0
    passes = unpack(mask.checked(), n).view(x.shape) if with_mask else None
    return y.checked().view(x.shape), scale.checked(), zero_point.checked(), passes


# Rows one block can keep, of each size it has a kernel for, and one row too long for any.
WEIGHT_VIEWS = [*VIEWS, (1, 3, 768), (1, 2, 4104), (1, 2, 8200), (1, 3, 16384), (1, 1, 16383), (1, 2, 16392),
                (2, 2, 5000)]  # fmt: skip


@pytest.mark.parametrize("view", WEIGHT_VIEWS, ids=str)
@pytest.mark.parametrize(("dtype", "offset"), INPUTS, ids=str)
def test_weight(kernels: ctypes.CDLL, view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    x = make_input(view, dtype, offset, special=False)
    x.view(-1)[view[2] // 2] = torch.nan
    for limits, symmetric, with_mask in (((-127, 127), True, False), ((-128, 127), False, True), ((0, 15), True, True)):
        y, scale, zero_point, passes = weight(kernels, x, limits, symmetric, with_mask)
        expected, wanted_scale, wanted_zero_point = reference.fake_quantize_weight(x, *limits, symmetric, axis_of(x))
        same(y, expected)
        same(scale, wanted_scale)
        assert torch.equal(zero_point, wanted_zero_point)
        if passes is not None:
            assert torch.equal(passes, reference.quantize(x, scale, zero_point, *limits, axis_of(x))[1])


@pytest.mark.parametrize("view", [(1, 4, 24), (3, 4, 24), (5, 4, 1)], ids=str)
def test_weight_corner_values(kernels: ctypes.CDLL, view: tuple[int, int, int]) -> None:
    """A channel of zeros, one of NaN, one with an infinity; scales are written before the start too."""
    x = make_input(view, torch.float32, special=False)
    x[:, 0], x[:, 1], x[0, 2, 0] = 0.0, torch.nan, torch.inf
    for symmetric in (True, False):
        expected, expected_scale, expected_zero_point = reference.fake_quantize_weight(x, -128, 127, symmetric, 1)
        for step, wanted in ((torch.tensor([6]), x), (torch.tensor([7]), expected)):
            y, scale, zero_point, _ = weight(kernels, x, (-128, 127), symmetric, True, step)
            same(y, wanted)
            same(scale, expected_scale)
            assert torch.equal(zero_point, expected_zero_point)


def activation(
    kernels: ctypes.CDLL,
    x: Tensor,
    state: tuple[Tensor, ...],
    symmetric: bool,
    observing: bool,
    step: Tensor | None = None,
    clip: tuple[float, float] | None = None,
    narrow: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    y, mask = Output(x.numel(), narrow or x.dtype), Output((x.numel() + 7) // 8, torch.uint8)
    bounds = map(ctypes.c_float, clip or (0.0, 0.0))
    flag = torch.tensor([observing])
    error = kernels.fake_quantize_activation(
        DTYPES[x.dtype], pointer(x), pointer(y.tensor), pointer(mask.tensor), ints(*x.shape), *map(pointer, state),
        pointer(flag), -128, 127, int(symmetric), ctypes.c_double(0.9), pointer(step),
        ctypes.c_int64(7), *bounds, int(clip is not None),
    )  # fmt: skip
    assert error == 0
    return y.checked().view(x.shape), unpack(mask.checked(), x.numel()).view(x.shape)


def fresh_state(channels: int) -> tuple[Tensor, ...]:
    """Nothing seen; scale and zero point of anything."""
    low, high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
    return low, high, torch.full((channels,), 5.0), torch.full((channels,), 3, dtype=torch.int32)


@pytest.mark.parametrize("view", [*VIEWS, (8, 4, 1000), (1, 2, 70000)], ids=str)
@pytest.mark.parametrize(("dtype", "offset"), INPUTS, ids=str)
def test_activation(kernels: ctypes.CDLL, view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    symmetric = offset == 0
    state, expected = fresh_state(view[1]), fresh_state(view[1])
    for batch, observing in enumerate((False, True, True, False, True)):
        x = make_input(view, dtype, offset, special=False) * (1.0 + batch)
        x = x if offset == 0 else torch.cat([torch.zeros(offset, dtype=dtype), x.flatten()])[offset:].view(view)
        y, passes = activation(kernels, x, state, symmetric, observing)
        wanted, *after = reference.fake_quantize_activation(
            x, *expected, -128, 127, symmetric, 0.9, axis_of(x), observing=observing
        )
        expected = tuple(after)
        same(y, wanted)
        for actual, value in zip(state, expected, strict=True):
            same(actual, value)
        if observing:
            assert torch.equal(passes, reference.quantize(x, state[2], state[3], -128, 127, axis_of(x))[1])


def test_activation_waits_for_every_channel(kernels: ctypes.CDLL) -> None:
    """NaN and infinite batches leave a channel unseen; while one is, y is x. The same before the start."""
    state = fresh_state(3)
    x = make_input((2, 3, 10), torch.float32, special=False)
    blank = x.clone()
    blank[:, 1], blank[0, 2, 0] = torch.nan, torch.inf
    y, passes = activation(kernels, blank, state, True, True)
    same(y, blank)
    assert bool(passes.all())
    assert state[0].isfinite().tolist() == [True, False, False]
    assert state[2].tolist()[1:] == [5.0, 5.0]
    y, _ = activation(kernels, x, state, True, True, torch.tensor([6]))
    same(y, x)
    y, _ = activation(kernels, x, state, True, False, torch.tensor([7]))
    same(y, reference.quantize(x, state[2], state[3], -128, 127, 1)[0])


def test_float64_has_no_kernel(kernels: ctypes.CDLL) -> None:
    x = torch.zeros(8, dtype=torch.float64)
    assert kernels.fake_quantize_backward(3, pointer(x), pointer(x), pointer(x), ctypes.c_int64(8)) != 0


@pytest.mark.parametrize("bounds", [(0.0, torch.inf), (0.0, 6.0), (-0.5, 0.75)], ids=str)
@pytest.mark.parametrize(("dtype", "offset"), INPUTS, ids=str)
@pytest.mark.parametrize("n", [1, 8, 37, 5003])
def test_clip_activation(
    kernels: ctypes.CDLL, n: int, dtype: torch.dtype, offset: int, bounds: tuple[float, float]
) -> None:
    x = make_input((1, 1, n), dtype, offset)
    y, mask = Output(n, dtype), Output((n + 7) // 8, torch.uint8)
    arguments = (ctypes.c_int64(n), *map(ctypes.c_float, bounds))
    assert kernels.clip_activation(DTYPES[dtype], pointer(x), pointer(y.tensor), pointer(mask.tensor), *arguments) == 0
    same(y.checked(), reference.clip_activation(x, *bounds).flatten())
    assert torch.equal(unpack(mask.checked(), n), ((bounds[0] < x) & (x < bounds[1])).flatten())
    if offset == 0:
        assert kernels.clip_activation(DTYPES[dtype], pointer(x), pointer(x), None, *arguments) == 0
        same(x.flatten(), y.tensor)


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize(("dtype", "offset"), INPUTS, ids=str)
def test_activation_of_what_is_clipped(
    kernels: ctypes.CDLL, view: tuple[int, int, int], dtype: torch.dtype, offset: int
) -> None:
    """The same as clipping first: state, values and mask, before the start too."""
    state, expected, clip = fresh_state(view[1]), fresh_state(view[1]), (0.0, 1.5)
    for step in (6, 7, 8):
        x = make_input(view, dtype, offset)
        clipped = reference.clip_activation(x, *clip)
        inside = (clip[0] < x) & (x < clip[1])
        y, passes = activation(kernels, x, state, False, True, torch.tensor([step]), clip)
        wanted, *after = reference.fake_quantize_activation(
            clipped, *expected, -128, 127, False, 0.9, axis_of(x), quantizing=step >= 7
        )
        expected = tuple(after)
        same(y, wanted)
        for actual, value in zip(state, expected, strict=True):
            same(actual, value)
        seen = bool((state[0] <= state[1]).all()) and step >= 7
        rounded = reference.quantize(clipped, state[2], state[3], -128, 127, axis_of(x))[1]
        assert torch.equal(passes, inside & rounded if seen else inside)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_codes(kernels: ctypes.CDLL, view: tuple[int, int, int], offset: int) -> None:
    """A byte an element and back to the last bit; one that does not lie on the grid spoils everything, as NaN does."""
    scale, zero_point = torch.linspace(0.01, 0.2, view[1]), torch.arange(view[1], dtype=torch.int32) % 100
    x = make_input(view, torch.float32, offset, special=False)
    grid = reference.quantize(x, scale, zero_point, -100, 155, axis_of(x))[0]
    x.copy_(grid)
    n, limits = x.numel(), (-100, 155)
    for spoiled in (False, True):
        if spoiled:
            x.view(-1)[n // 2] = torch.nan if offset else 1.2345
        codes, parameters = Output(n, torch.uint8), Output(2 * view[1] + 1, torch.float32)
        error = kernels.to_codes(
            pointer(x), pointer(codes.tensor), pointer(parameters.tensor), ints(*view), pointer(scale),
            pointer(zero_point), *limits,
        )  # fmt: skip
        assert error == 0
        back = Output(n, torch.float32)
        arguments = (pointer(codes.checked()), pointer(parameters.checked()), pointer(back.tensor), ints(*view), -100)
        assert kernels.from_codes(*arguments) == 0
        if spoiled:
            assert bool(back.checked().isnan().all())
        else:
            same(back.checked().view(view), grid)
            expected = reference.to_codes(grid, scale, zero_point, *limits, axis_of(x))
            assert torch.equal(codes.tensor.view(view), expected)
