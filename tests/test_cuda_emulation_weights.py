"""The CUDA kernels that take all weights of a model, run on the processor as in ``test_cuda_emulation``."""

from __future__ import annotations

import ctypes

import pytest
import torch
from test_cuda_emulation import (
    DTYPES,
    WEIGHT_VIEWS,
    Output,
    axis_of,
    emulated_kernels,  # noqa: F401
    emulated_library,  # noqa: F401
    ints,
    make_input,
    pointer,
    pytestmark,  # noqa: F401
    same,
    unpack,
)
from torch import Tensor

from quantkern import reference

RULES = (((-127, 127), True), ((-128, 127), False), ((0, 15), True))

# More tensors of each element type than one table holds.
VIEWS = [*WEIGHT_VIEWS, (1, 1, 30_000), (3, 40, 9)] * 5


def pointers(tensors: list[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def model(special: bool) -> list[Tensor]:
    """Tensors of every layout and element type, some misaligned."""
    types = list(DTYPES)
    return [make_input(view, types[i % 3], offset=i % 2, special=special) for i, view in enumerate(VIEWS)]


def results(xs: list[Tensor]) -> list[Output]:
    """Of the type of their x, and of some float32 x in a 16-bit type."""
    others = [torch.float32, torch.float16, torch.bfloat16]
    kinds = [others[i // 3 % 3] if x.dtype is torch.float32 else x.dtype for i, x in enumerate(xs)]
    assert {kind for kind, x in zip(kinds, xs, strict=True) if x.dtype is torch.float32} == set(others)
    return [Output(x.numel(), kind) for x, kind in zip(xs, kinds, strict=True)]


def describe(xs: list[Tensor], ys: list[Output]) -> tuple[ctypes.Array[ctypes.c_int64], ...]:
    """The types of the xs and of the ys, and how the kernels see each x."""
    types = (ints(*(DTYPES[t.dtype] for t in tensors)) for tensors in (xs, [y.tensor for y in ys]))
    return (*types, ints(*(size for x in xs for size in x.shape)))


def limits_of(rules: list[tuple[tuple[int, int], bool]]) -> ctypes.Array[ctypes.c_int64]:
    return ints(*(end for limits, _ in rules for end in limits))


@pytest.mark.parametrize("delayed", [False, True])
def test_all_weights(kernels: ctypes.CDLL, delayed: bool) -> None:
    xs = model(special=False)
    rules = [RULES[i % 3] for i in range(len(xs))]
    masks = [Output((x.numel() + 7) // 8, torch.uint8) if i % 4 else None for i, x in enumerate(xs)]
    ys = results(xs)
    scales = [Output(x.shape[1], torch.float32) for x in xs]
    zero_points = [Output(x.shape[1], torch.int32) for x in xs]
    step = torch.tensor([6 if delayed else 7])
    dtypes, y_dtypes, views = describe(xs, ys)
    error = kernels.fake_quantize_weights(
        ctypes.c_int64(len(xs)), dtypes, y_dtypes, pointers(xs), pointers([y.tensor for y in ys]),
        pointers([None if mask is None else mask.tensor for mask in masks]), views,
        pointers([scale.tensor for scale in scales]), pointers([zero.tensor for zero in zero_points]),
        limits_of(rules), ints(*(same for _, same in rules)),
        pointers([step if i % 2 else None for i in range(len(xs))]), ctypes.c_int64(7),
    )  # fmt: skip
    assert error == 0
    for i, (x, (limits, symmetric)) in enumerate(zip(xs, rules, strict=True)):
        expected, scale, zero_point = reference.fake_quantize_weight(x, *limits, symmetric, axis_of(x))
        passes = reference.quantize(x, scale, zero_point, *limits, axis_of(x))[1]
        if delayed and i % 2:
            expected, passes = x, torch.ones_like(passes)
        same(ys[i].checked().view(x.shape), expected.to(ys[i].tensor.dtype))
        same(scales[i].checked(), scale)
        assert torch.equal(zero_points[i].checked(), zero_point)
        mask = masks[i]
        if mask is not None:
            assert torch.equal(unpack(mask.checked(), x.numel()).view(x.shape), passes)


def test_all_learned_weights(kernels: ctypes.CDLL) -> None:
    xs = model(special=True)
    ys = results(xs)
    scales = [torch.linspace(0.003, 0.4, x.shape[1]) for x in xs]
    rules = [RULES[i % 3] for i in range(len(xs))]
    dtypes, y_dtypes, views = describe(xs, ys)
    error = kernels.lsq_weights(
        ctypes.c_int64(len(xs)), dtypes, y_dtypes, pointers(xs), pointers([y.tensor for y in ys]), views,
        pointers(scales), limits_of(rules),
    )  # fmt: skip
    assert error == 0
    for x, y, scale, (limits, _) in zip(xs, ys, scales, rules, strict=True):
        expected = reference.quantize(x, scale, torch.zeros_like(scale), *limits, axis_of(x))[0]
        same(y.checked().view(x.shape), expected.to(y.tensor.dtype))


def test_no_weights_at_all(kernels: ctypes.CDLL) -> None:
    nothing = pointer(None)
    assert kernels.lsq_weights(ctypes.c_int64(0), *[nothing] * 7) == 0
    assert kernels.fake_quantize_weights(ctypes.c_int64(0), *[nothing] * 11, ctypes.c_int64(0)) == 0
