"""The CUDA kernels on a GPU against the specification: values, masks, state, no host synchronisation, graphs."""

from __future__ import annotations

import pytest
import torch
from cuda_checks import (
    OPS,
    capture,
    check_activation,
    check_binary_conv2d,
    check_binary_matmul,
    check_dorefa,
    check_fake_quantize,
    check_lsq,
    check_packing,
    check_weight,
    run_without_waiting,
    unpack,
    why_not,
)
from test_cuda_emulation import DTYPES, VIEWS, WEIGHT_VIEWS, fresh_state, make_input, same
from test_cuda_emulation_binary import CONVOLUTIONS, MATMULS, PACK_VIEWS, Convolution, equal
from test_cuda_emulation_learned import LSQ_VIEWS
from torch import Tensor

from quantkern import ops, reference  # noqa: F401  (ops registers torch.ops.quantkern)


@pytest.fixture(autouse=True)
def device() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [*LSQ_VIEWS, (32, 64, 3136), (25088, 64, 1), (1, 1, 6_422_529)], ids=str)
def test_lsq_and_dorefa(view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    check_lsq(view, dtype, offset)
    check_dorefa(make_input(view, dtype, special=False), offset)


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_lsq_and_dorefa_in_other_layouts(layout: str) -> None:
    """Any strides give the CPU's numbers and strides; the gradient may lie in another order than x."""
    base = torch.randn(6, 5, 7, 14)
    x = base[..., ::2] if layout == "sliced" else base.to(memory_format=torch.channels_last)
    grad, scale, seed = torch.randn(x.shape), torch.linspace(0.05, 0.4, 5), torch.tensor(3)
    device_x = base.cuda()[..., ::2] if layout == "sliced" else x.cuda()
    assert device_x.stride() == x.stride()
    actual = OPS.lsq_backward(grad.cuda(), device_x, scale.cuda(), -8, 7, 0.5, 1, None)
    expected = OPS.lsq_backward(grad, x, scale, -8, 7, 0.5, 1, None)
    same(actual[0].cpu(), expected[0])
    torch.testing.assert_close(actual[1].cpu(), expected[1], rtol=1e-5, atol=1e-4)
    pairs = [
        (OPS.lsq_forward(device_x, scale.cuda(), -8, 7, 1, None), OPS.lsq_forward(x, scale, -8, 7, 1, None)),
        (OPS.dorefa_gradient(device_x, 4, seed.cuda()), OPS.dorefa_gradient(x, 4, seed)),
        (OPS.dorefa_activation_forward(device_x, 4, False)[0], OPS.dorefa_activation_forward(x, 4, False)[0]),
        (OPS.dorefa_weight_forward(device_x, 4)[0], OPS.dorefa_weight_forward(x, 4)[0]),
    ]
    for value, wanted in pairs:
        same(value.cpu(), wanted)
        assert value.stride() == wanted.stride()
    largest = x.abs().max()
    torch.testing.assert_close(
        OPS.dorefa_weight_backward(grad.cuda(), device_x, largest.cuda()).cpu(),
        OPS.dorefa_weight_backward(grad, x, largest), rtol=1e-5, atol=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [*PACK_VIEWS, (32, 256, 784), (512, 4096, 1), (300, 4001, 1)], ids=str)
def test_packing(view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    check_packing(view, dtype, offset)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("sizes", [*MATMULS, (1, 4096, 4096), (8, 1000, 8192), (64, 1024, 8192)], ids=str)
def test_binary_matmul(sizes: tuple[int, int, int], offset: int) -> None:
    check_binary_matmul(sizes, offset)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_binary_conv2d(case: Convolution, offset: int) -> None:
    check_binary_conv2d(case, offset)


@pytest.mark.parametrize("k", [4096, 4095, 4100])
def test_many_tiles(k: int) -> None:
    """Sizes at which every multiprocessor has several large tiles, against the float product, which is exact too."""
    a, b = torch.randn(4133, k, device="cuda"), torch.randn(4010, k, device="cuda")
    packed = OPS.pack_signs(a), OPS.pack_signs(b)
    expected = OPS.binarize_forward(a, False)[0].double() @ OPS.binarize_forward(b, False)[0].double().t()
    for _ in range(3):
        assert torch.equal(OPS.binary_matmul(*packed, k), expected.float())
    images, weight = torch.randn(8, 256, 56, 56, device="cuda"), torch.randn(300, 256, 3, 3, device="cuda")
    packed = OPS.pack_signs(images, 1), OPS.pack_signs(weight, 1)
    signs = (OPS.binarize_forward(t, False)[0].double() for t in (images, weight))
    expected = torch.nn.functional.conv2d(*signs, padding=1).float()
    actual = OPS.binary_conv2d(*packed, 256, [1, 1], [1, 1], [1, 1])
    assert torch.equal(actual, expected)


def test_binary_operations_in_a_graph() -> None:
    """No host synchronisation; captured once and replayed on new images and weights."""
    x, weight = torch.randn(4, 128, 9, 9, device="cuda"), torch.randn(40, 128, 3, 3, device="cuda")
    threshold = torch.zeros(40, dtype=torch.int32, device="cuda")
    flip = torch.zeros(2, dtype=torch.int32, device="cuda")
    geometry = [1, 1], [1, 1], [1, 1]

    def work() -> tuple[Tensor, ...]:
        packed = OPS.pack_signs(x, 1), OPS.pack_signs(weight, 1)
        signs = OPS.binary_conv2d_sign(*packed, 128, *geometry, threshold, flip)
        pooled = OPS.packed_max_pool2d(signs, flip, [3, 3], [2, 2], [1, 1])
        rows = pooled.view(-1, 2)
        return OPS.binary_conv2d(*packed, 128, *geometry), pooled, OPS.binary_matmul(rows, rows[:5], 64)

    run_without_waiting(work)
    graph, outputs = capture(work)
    for _ in range(3):
        x.copy_(torch.randn(x.shape))
        weight.copy_(torch.randn(weight.shape))
        graph.replay()
        replayed = [value.clone() for value in outputs]
        for value, wanted in zip(replayed, work(), strict=True):
            equal(value.cpu(), wanted.cpu())
        signs = reference.binary_conv2d_sign(
            reference.pack_signs(x.cpu(), 1), reference.pack_signs(weight.cpu(), 1), 128, *map(tuple, geometry),
            threshold.cpu(), flip.cpu(),
        )  # fmt: skip
        equal(replayed[1].cpu(), reference.packed_max_pool2d(signs, flip.cpu(), (3, 3), (2, 2), (1, 1)))


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
        check_lsq(view, dtype, 0)
        check_dorefa(make_input(view, dtype, special=False), 1)
    for inner in (768, 4104, 8200):
        check_weight((1, 2, inner), dtype, 0)
    for view in ((3, 64, 1), (3, 33, 1), (2, 65, 9)):
        check_packing(view, dtype, 1)


def test_smallest_binary_cases() -> None:
    """One case of each kernel and tile of the products, small enough for a memory checker."""
    tiles = 128 * torch.cuda.get_device_properties(0).multi_processor_count
    for sizes in ((1, 33, 300), (3, 40, 256), (70, 65, 1300), (tiles, 100, 1152), (tiles, 3, 1100)):
        check_binary_matmul(sizes, 0)
    for case in (*CONVOLUTIONS[1:4], (tiles // 256 + 1, 16, 16, 128, 40, (3, 3), (1, 1), (1, 1), (1, 1))):
        check_binary_conv2d(case, 0)
    x = torch.randint(1 << 31, (2, 9, 7, 3), dtype=torch.int32)
    flip = torch.randint(1 << 31, (3,), dtype=torch.int32)
    pooled = OPS.packed_max_pool2d(x.cuda(), flip.cuda(), [3, 3], [2, 2], [1, 1])
    equal(pooled.cpu(), reference.packed_max_pool2d(x, flip, (3, 3), (2, 2), (1, 1)))


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

    run_without_waiting(work)
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


def test_lsq_and_dorefa_in_a_graph() -> None:
    """No host synchronisation; captured once and replayed on new data, scales and seeds."""
    x, grad = torch.randn(4, 6, 40, device="cuda"), torch.randn(4, 6, 40, device="cuda")
    scale, seed = torch.full((6,), 0.1, device="cuda"), torch.tensor(5, device="cuda")

    def work() -> tuple[Tensor, ...]:
        w, largest = OPS.dorefa_weight_forward(x, 4)
        return (
            OPS.lsq_forward(x, scale, -8, 7, 1, None),
            *OPS.lsq_backward(grad, x, scale, -8, 7, 0.5, 1, None)[:2],
            OPS.dorefa_activation_forward(x, 4, True)[0],
            w,
            OPS.dorefa_weight_backward(grad, x, largest),
            OPS.dorefa_gradient(grad, 4, seed),
        )

    run_without_waiting(work)
    graph, outputs = capture(work)
    for batch in range(3):
        x.copy_(torch.randn(4, 6, 40) * (1 + batch))
        scale.fill_(0.05 + 0.1 * batch)
        seed.fill_(batch)
        graph.replay()
        replayed = [value.clone() for value in outputs]
        for value, wanted in zip(replayed, work(), strict=True):
            same(value, wanted)


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
    packed = OPS.pack_signs(x)
    equal(packed[-32:].cpu(), reference.pack_signs(x[-1000:].cpu()))
    assert bool((packed[:-32] == -1).all())
