"""The CUDA kernels on a GPU against the specification: values, masks, state, no host synchronisation, graphs."""

from __future__ import annotations

import pytest
import torch
from test_cuda_emulation import DTYPES, VIEWS, WEIGHT_VIEWS, axis_of, fresh_state, make_input, same
from torch import Tensor

from quantkern import ops, reference  # noqa: F401  (ops registers torch.ops.quantkern)

OPS = torch.ops.quantkern


def why_not() -> str | None:
    """The reason why nothing here can run."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("quantkern::fake_quantize_forward", "CUDA"):
        return "this build has no CUDA kernels"
    return None


@pytest.fixture(autouse=True)
def device() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


def unpack(mask: Tensor, x: Tensor) -> Tensor:
    bits = ((mask.cpu()[:, None] >> torch.arange(8)) & 1).flatten()
    assert not bits[x.numel() :].any(), "padding bits must be zero"
    return bits[: x.numel()].bool().view(x.shape)


def on_device(x: Tensor, offset: int = 0) -> Tensor:
    """x on the GPU, misaligned by ``offset`` elements."""
    memory = torch.empty(x.numel() + offset, dtype=x.dtype, device="cuda")
    memory[offset:] = x.flatten().cuda()
    return memory[offset:].view(x.shape)


def check_fake_quantize(view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    x = make_input(view, dtype)
    axis = axis_of(x)
    scale = torch.linspace(0.003, 0.4, view[1])
    zero_point = torch.arange(view[1], dtype=torch.int32) - 3
    y, mask = OPS.fake_quantize_forward(
        on_device(x, offset), scale.cuda(), zero_point.cuda(), -128, 127, axis, None, 0, True
    )
    expected, passes = reference.quantize(x, scale, zero_point, -128, 127, axis)
    same(y.cpu(), expected)
    assert torch.equal(unpack(mask, x), passes)
    grad = torch.randn(view).to(dtype)
    gradient = OPS.fake_quantize_backward(on_device(grad, offset), mask, y.stride())
    same(gradient.cpu(), torch.where(passes, grad, torch.zeros((), dtype=dtype)))


def check_weight(view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    x = make_input(view, dtype, special=False)
    axis = axis_of(x)
    for limits, symmetric, with_mask in (((-127, 127), True, False), ((-128, 127), False, True)):
        scale, zero_point = torch.zeros(view[1]).cuda(), torch.zeros(view[1], dtype=torch.int32).cuda()
        y, mask = OPS.fake_quantize_weight_forward(
            on_device(x, offset), scale, zero_point, *limits, symmetric, axis, None, 0, with_mask
        )
        expected, wanted_scale, wanted_zero_point = reference.fake_quantize_weight(x, *limits, symmetric, axis)
        same(y.cpu(), expected)
        same(scale.cpu(), wanted_scale)
        assert torch.equal(zero_point.cpu(), wanted_zero_point)
        if with_mask:
            assert torch.equal(
                unpack(mask, x), reference.quantize(x, wanted_scale, wanted_zero_point, *limits, axis)[1]
            )


def check_activation(view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    state, expected = tuple(value.cuda() for value in fresh_state(view[1])), fresh_state(view[1])
    for batch, observing in enumerate((False, True, True, False)):
        x = make_input(view, dtype, special=False) * (1.0 + batch)
        axis = axis_of(x)
        flag = torch.tensor([observing], device="cuda")
        y, _ = OPS.fake_quantize_activation_forward(
            on_device(x, offset), *state, flag, -128, 127, False, 0.9, axis, None, 0, True
        )
        wanted, *after = reference.fake_quantize_activation(
            x, *expected, -128, 127, False, 0.9, axis, observing=observing
        )
        expected = tuple(after)
        same(y.cpu(), wanted)
        for actual, value in zip(state, expected, strict=True):
            same(actual.cpu(), value)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [*VIEWS, (32, 64, 3136), (1, 1, 6_422_529)], ids=str)
def test_against_reference(view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    check_fake_quantize(view, dtype, offset)
    check_activation(view, dtype, offset)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [*WEIGHT_VIEWS, (1, 512, 4608), (1, 1, 2_359_296)], ids=str)
def test_weight_against_reference(view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    check_weight(view, dtype, offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smallest_cases(dtype: torch.dtype) -> None:
    """One case of each kernel and layout, small enough for a memory checker."""
    for view in ((1, 1, 1003), (2, 3, 40), (2, 3, 9), (9, 5, 1), (40, 6, 4)):
        check_fake_quantize(view, dtype, 1)
        check_activation(view, dtype, 0)
        check_weight(view, dtype, 0)
    for inner in (768, 4104, 8200):
        check_weight((1, 2, inner), dtype, 0)


def test_no_host_synchronisation_and_graph_capture() -> None:
    """Weight and activation path and the backward, captured once and replayed on new data."""
    x = torch.randn(4, 6, 40, device="cuda")
    state = tuple(value.cuda() for value in fresh_state(6))
    scale, zero_point = torch.zeros(6, device="cuda"), torch.zeros(6, dtype=torch.int32, device="cuda")
    flag, step = torch.tensor([True], device="cuda"), torch.tensor([0], device="cuda")

    def work() -> tuple[Tensor, Tensor, Tensor]:
        w, _ = OPS.fake_quantize_weight_forward(x, scale, zero_point, -128, 127, False, 1, step, 2, True)
        y, mask = OPS.fake_quantize_activation_forward(x, *state, flag, -128, 127, False, 0.9, 1, step, 2, True)
        step.add_(1)
        return w, y, OPS.fake_quantize_backward(y, mask, y.stride())

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for value, start in zip(state, fresh_state(6), strict=True):
        value.copy_(start)
    step.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        w, y, _ = work()
    for value, start in zip(state, fresh_state(6), strict=True):
        value.copy_(start)
    step.zero_()
    expected = fresh_state(6)
    for batch in range(4):
        x.copy_(torch.randn(4, 6, 40) * (1 + batch))
        graph.replay()
        host = x.cpu()
        wanted, *after = reference.fake_quantize_activation(
            host, *expected, -128, 127, False, 0.9, 1, quantizing=batch >= 2
        )
        expected = tuple(after)
        same(y.cpu(), wanted)
        same(w.cpu(), reference.fake_quantize_weight(host, -128, 127, False, 1, quantizing=batch >= 2)[0])
        for actual, value in zip(state, expected, strict=True):
            same(actual.cpu(), value)


def test_more_than_2_to_31_elements() -> None:
    """The last elements of a tensor beyond 32-bit indices are computed like the first."""
    n = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 3 * 2 * n:
        pytest.skip("not enough free GPU memory for three tensors of 4 GiB")
    x = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    x[-1000:] = torch.randn(1000, device="cuda")
    scale, zero_point = torch.tensor([0.05], device="cuda"), torch.tensor([3], device="cuda", dtype=torch.int32)
    y, mask = OPS.fake_quantize_forward(x, scale, zero_point, -8, 7, None, None, 0, True)
    expected, passes = reference.quantize(x[-1000:].cpu(), scale.cpu(), zero_point.cpu(), -8, 7)
    same(y[-1000:].cpu(), expected)
    assert torch.equal(unpack(mask[-125:], expected), passes)
    assert not y[:-1000].any()
