"""The CUDA kernels that make a float32 tensor one of 16 bits, run on the processor as in ``test_cuda_emulation``."""

from __future__ import annotations

import ctypes

import pytest
import torch
from test_cuda_emulation import (
    DTYPES,
    WEIGHT_VIEWS,
    activation,
    emulated_kernels,  # noqa: F401
    emulated_library,  # noqa: F401
    fake_quantize,
    fresh_state,
    make_input,
    pytestmark,  # noqa: F401
    same,
    weight,
)
from torch import Tensor


@pytest.mark.parametrize("view", WEIGHT_VIEWS, ids=str)
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_float32_becomes_a_narrow_type_in_the_same_pass(
    kernels: ctypes.CDLL, view: tuple[int, int, int], narrow: torch.dtype
) -> None:
    x = make_input(view, torch.float32, special=False)
    channels = view[1]
    scale, zero_point = torch.linspace(0.003, 0.4, channels), torch.zeros(channels, dtype=torch.int32)
    gates = [(None, None), (None, (0.0, 1.5)), (torch.tensor([6]), None), (torch.tensor([6]), (0.0, 1.5))]

    def run(y: torch.dtype | None) -> list[Tensor | None]:
        kernels.set_y_dtype(-1 if y is None else DTYPES[y])
        found: list[Tensor | None] = [*fake_quantize(kernels, x, scale, zero_point, (-8, 7), narrow=y)]
        found += weight(kernels, x, (-128, 127), False, True, narrow=y)
        for step, clip in gates:
            found += activation(kernels, x, fresh_state(channels), True, True, step, clip, narrow=y)
        return found

    try:
        wide, narrowed = run(None), run(narrow)
    finally:
        kernels.set_y_dtype(-1)
    for own, other in zip(wide, narrowed, strict=True):
        assert own is not None and other is not None
        same(other, own.to(other.dtype))
    assert {other.dtype for other in narrowed if other is not None} == {narrow, torch.bool, torch.float32, torch.int32}
