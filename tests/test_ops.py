"""What every row of the inventory buys: forward, backward, opcheck, strides, empties, compile, parity, errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from op_sample import Sample, make_x
from op_spec import Bad, OpSpec
from op_specs import SPECS
from torch import Tensor

from quantkern import _C, Backend
from quantkern import functional as F

SAMPLES = [pytest.param(sample, id=f"{spec.name}-{sample.name}") for spec in SPECS for sample in spec.samples]
CASES = [
    pytest.param(sample, dtype, id=f"{spec.name}-{sample.name}-{dtype}")
    for spec in SPECS
    for sample in spec.samples
    for dtype in spec.dtypes
]
CASES_WITHOUT_DOUBLE = [case for case in CASES if case.values[1] is not torch.float64]
BY_SPEC = [pytest.param(spec, id=spec.name) for spec in SPECS]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Equal to the last bit, NaN where NaN is expected."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=0, atol=0, equal_nan=True)


def assert_matches(sample: Sample, got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """As equal to the reference as the sample promises: results first, the gradient of x last."""
    if sample.step is None:
        assert_same(got, expected)
        return
    assert got[0].dtype == expected[0].dtype
    off = (got[0].float() - expected[0].float()).abs().cpu()
    eps = torch.finfo(got[0].dtype).eps
    assert bool((off <= sample.step * 1.01 + 2 * eps).all())
    assert int((off > 2 * eps).sum()) <= 1 + off.numel() // 1000
    same = {"rtol": 8 * eps, "atol": 8 * eps, "equal_nan": True}
    torch.testing.assert_close(got[-1].cpu(), expected[-1].cpu(), **same)


def with_gradient(sample: Sample, x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
    """Results, state and the gradient of x for one fixed gradient of y, which ends in NaN and infinity."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    results = sample.run(leaf, backend)
    y = results[0]
    if not sample.differentiable:
        return results
    grad = make_x(tuple(y.shape), y.dtype, seed=1, edges=False).to(y.device)
    if grad.numel() > 2:
        grad.view(-1)[-2:] = torch.tensor([torch.nan, torch.inf])
    (dx,) = torch.autograd.grad(y, leaf, grad)
    return (*(result.detach() for result in results), dx)


def sample_x(sample: Sample, dtype: torch.dtype) -> Tensor:
    return make_x(sample.shape, dtype, edges=sample.edges)


@pytest.fixture(params=_C.supported_cpu_capabilities())
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this processor has, in turn."""
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)


@pytest.mark.parametrize(("sample", "dtype"), CASES)
def test_results_and_gradients_equal_the_reference(sample: Sample, dtype: torch.dtype, capability: str) -> None:
    x = sample_x(sample, dtype)
    assert_matches(sample, with_gradient(sample, x, Backend.NATIVE), with_gradient(sample, x, Backend.REFERENCE))


@CUDA
@pytest.mark.parametrize(("sample", "dtype"), CASES_WITHOUT_DOUBLE)
def test_cuda_equals_the_cpu(sample: Sample, dtype: torch.dtype) -> None:
    x = sample_x(sample, dtype)
    assert_same(with_gradient(sample, x.cuda(), Backend.NATIVE), with_gradient(sample, x, Backend.NATIVE))


TRITON_DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize(("sample", "dtype"), CASES_WITHOUT_DOUBLE)
def test_triton_equals_the_cpu(sample: Sample, dtype: torch.dtype, device: str) -> None:
    from quantkern import triton

    runs, why = triton.available(device)
    if not runs:
        pytest.skip(f"Triton does not run on {device} here: {why}")
    x = sample_x(sample, dtype)
    assert_same(with_gradient(sample, x.to(device), Backend.TRITON), with_gradient(sample, x, Backend.NATIVE))


IDENTITIES = [sample for spec in SPECS if spec.name == "dorefa_gradient" for sample in spec.samples]
"""Operations that return x itself."""

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "permuted": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "sliced": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "offset": lambda x: torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].reshape(x.shape),
    "stepped": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_any_strides(sample: Sample, layout: str) -> None:
    x = LAYOUTS[layout](sample_x(sample, torch.float32))
    if sample.like_x and sample not in IDENTITIES:
        assert sample.run(x, Backend.NATIVE)[0].stride() == torch.empty_like(x).stride()
    expected = with_gradient(sample, x.contiguous(), Backend.REFERENCE)
    assert_matches(sample, with_gradient(sample, x, Backend.NATIVE), expected)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if len(s.values[0].shape) == 4 and s.values[0].like_x])
def test_channels_last(sample: Sample) -> None:
    x = sample_x(sample, torch.float32).to(memory_format=torch.channels_last)
    got = with_gradient(sample, x, Backend.NATIVE)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert_matches(sample, got, with_gradient(sample, x.contiguous(), Backend.REFERENCE))


@pytest.mark.parametrize("spec", BY_SPEC)
def test_empty_tensors_come_back_empty(spec: OpSpec) -> None:
    """Every dimension of a sample emptied in turn; only the channel axis may refuse: its parameters do not fit."""
    for sample in spec.samples:
        if not sample.like_x:
            continue  # tests/test_binary_ops.py empties these
        worked = 0
        for emptied in range(len(sample.shape)):
            shape = [0 if i == emptied else size for i, size in enumerate(sample.shape)]
            leaf = torch.empty(shape, requires_grad=True)
            try:
                y = sample.run(leaf, Backend.NATIVE)[0]
            except ValueError as error:
                assert "must be a vector of 0 values" in str(error)
                continue
            assert y.shape == leaf.shape
            (dx,) = torch.autograd.grad(y, leaf, torch.empty_like(y))
            assert dx.shape == leaf.shape
            worked += 1
        assert worked >= max(1, len(sample.shape) - 1), sample.name


def test_empty_batch_leaves_channel_state_alone() -> None:
    low, high = torch.full((4,), -1.0), torch.full((4,), 2.0)
    scale, zero_point = torch.full((4,), 0.5), torch.zeros(4, dtype=torch.int32)
    flag = torch.tensor(True)
    y = F.fake_quantize_activation(torch.empty(0, 4, 3), low, high, scale, zero_point, flag, 0, 255, False, 0.9, 1)
    assert y.shape == (0, 4, 3)
    assert low.tolist() == [-1.0] * 4 and scale.tolist() == [0.5] * 4


@pytest.mark.parametrize("spec", BY_SPEC)
def test_opcheck(spec: OpSpec) -> None:
    for op, arguments in spec.op_calls():
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("sample", SAMPLES)
def test_compile_equals_eager(sample: Sample) -> None:
    torch._dynamo.reset()
    x = sample_x(sample, torch.float32)
    compiled = torch.compile(lambda x: sample.run(x, Backend.AUTO), fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    eager = with_gradient(sample, x, Backend.AUTO)
    results = compiled(leaf)
    assert_same(tuple(r.detach() for r in results), eager[:-1] if sample.differentiable else eager)


@pytest.mark.parametrize("spec", BY_SPEC)
def test_inductor_equals_eager(spec: OpSpec) -> None:
    """One sample an operation through the whole compiler, backward included, and without a gradient."""
    torch._dynamo.reset()
    names = ("number", "rows", "channels", "layer")
    sample = next((s for s in reversed(spec.samples) if s.name in names), spec.samples[0])
    compiled = torch.compile(lambda x: sample.run(x, Backend.AUTO), fullgraph=True)
    x = sample_x(sample, torch.float32).nan_to_num(0.0, 2.0, -2.0)
    with torch.no_grad():
        assert_same(compiled(x), sample.run(x, Backend.NATIVE))
    if not sample.differentiable:
        return
    leaf = x.clone().requires_grad_()
    results = compiled(leaf)
    grad = torch.randn_like(results[0])
    (dx,) = torch.autograd.grad(results[0], leaf, grad)
    other = x.clone().requires_grad_()
    expected = sample.run(other, Backend.NATIVE)
    (expected_dx,) = torch.autograd.grad(expected[0], other, grad)
    assert_same(tuple(r.detach() for r in results), tuple(r.detach() for r in expected))
    if sample.name == "layer":  # torch's own product or convolution, whose sums the compiler may order in its way
        torch.testing.assert_close(dx, expected_dx, rtol=1e-4, atol=1e-5)
    else:
        assert_same((dx,), (expected_dx,))


BAD = [pytest.param(bad, id=f"{spec.name}-{bad.name}") for spec in SPECS for bad in spec.bad]


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_a_clear_error(bad: Bad) -> None:
    with pytest.raises(bad.error) as caught:
        bad.call()
    assert re.search(bad.message, str(caught.value)), str(caught.value)
