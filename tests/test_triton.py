"""The Triton twins equal quantkern.reference bit for bit: values, state, masks and gradients.

Where and how they run is told in triton_checks.py, from which the tensors of these tests come.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_checks import (
    COMPILE_EVERY_KERNEL,
    DEVICES,
    DTYPES,
    LAYOUTS,
    RUNS_HERE,
    SPECIAL,
    WITH_AXES,
    assert_mask,
    assert_same_bits,
    channels_of,
    check_activation,
    check_forward,
    check_weight,
    fresh_state,
    parameters,
    run_python,
    values,
)

from quantkern import reference
from quantkern import triton as twins

pytestmark = RUNS_HERE


@pytest.fixture(params=DEVICES or ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# ---- fake_quantize


@pytest.mark.parametrize(("layout", "axis"), WITH_AXES)
def test_fake_quantize_layouts(layout: str, axis: int | None, device: str) -> None:
    x = LAYOUTS[layout]()
    check_forward(x, *parameters(channels_of(x, axis)), -8, 7, axis, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize(("low", "high"), [(-128, 127), (0, 15), (-(2**20), 2**20)])
def test_fake_quantize_special_values(dtype: torch.dtype, axis: int | None, low: int, high: int, device: str) -> None:
    ties = torch.arange(-40, 40) * 0.25
    x = torch.cat([torch.tensor(SPECIAL), ties, values(206) * 10.0 ** torch.linspace(-8, 6, 206)]).to(dtype)
    count = 1 if axis is None else 3
    scale = torch.tensor([0.5, 0.0371, 3e-38])[:count]
    zero_point = torch.tensor([0, 3, 1], dtype=torch.int32)[:count]
    shaped = x.reshape(3, 100) if axis in (None, 0) else x.reshape(100, 3)
    check_forward(shaped, scale, zero_point, low, high, axis, device)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 1e-45])
def test_unusable_scale_gives_nan(bad: float, device: str) -> None:
    scale = torch.tensor([0.1, bad])
    check_forward(values(5, 2), scale, torch.zeros(2, dtype=torch.int32), -8, 7, 1, device)
    y, _ = twins.fake_quantize_forward_number(values(3).to(device), bad, 0.0, -8, 7, False)
    assert y.isnan().all()


def test_float_zero_point(device: str) -> None:
    check_forward(values(6, 4), torch.tensor([0.3]), torch.tensor([0.4]), -8, 7, None, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "zero_point"), [(0.1, 0), (1.0, 1), (0.0371, -3), (2e-39, 0), (0.3, 0.4)])
def test_fake_quantize_number(dtype: torch.dtype, scale: float, zero_point: float, device: str) -> None:
    x = torch.cat([values(117), torch.tensor(SPECIAL)]).to(dtype)
    y, mask = twins.fake_quantize_forward_number(x.to(device), scale, zero_point, -8, 7, True)
    expected, passes = reference.quantize(x, torch.tensor(scale), torch.tensor(float(zero_point)), -8, 7)
    assert_same_bits(y, expected)
    assert_mask(mask, passes, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 1])
def test_fake_quantize_waits_for_its_step(dtype: torch.dtype, axis: int | None, device: str) -> None:
    x = torch.cat([values(112), torch.tensor(SPECIAL)]).reshape(9, 14).to(dtype)
    scale, zero_point = parameters(channels_of(x, axis))
    expected, passes = reference.quantize(x, scale, zero_point, -8, 7, axis)
    # 1 is a value of its own to Triton's compiler, and steps are 64-bit.
    for start in (1, 5, 2**40):
        for step, quantized in ((start - 1, False), (start, True)):
            counter = torch.tensor([step], device=device)
            given = [t.to(device) for t in (x, scale, zero_point)]
            y, mask = twins.fake_quantize_forward(*given, -8, 7, axis, counter, start, True)
            assert_same_bits(y, expected if quantized else x)
            assert_mask(mask, passes if quantized else torch.ones_like(passes), y)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_64_bit_indices(axis: int | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    from quantkern.triton import fake_quantize, layout, min_max

    assert layout.index_type(2**31) is tl.int64
    assert layout.index_type(2**30) is tl.int32
    for module in (fake_quantize, min_max):
        monkeypatch.setattr(module, "index_type", lambda numel: tl.int64)
    x = values(3, 40, 11)
    mask, passes = check_forward(x, *parameters(channels_of(x, axis)), -8, 7, axis, device)
    dx = twins.fake_quantize_backward(x.to(device), mask, x.stride())
    assert_same_bits(dx, torch.where(passes, x, 0))
    check_weight(x, False, axis, -8, 7, device)


def test_negative_axis_counts_from_the_end(device: str) -> None:
    x = values(4, 6)
    check_forward(x, *parameters(6), -8, 7, -1, device)


# ---- fake_quantize_backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "empty"])
def test_backward(dtype: torch.dtype, layout: str, device: str) -> None:
    x = LAYOUTS[layout]().to(dtype)
    scale, zero_point = parameters(1)
    given = [t.to(device) for t in (x, scale, zero_point)]
    y, mask = twins.fake_quantize_forward(*given, -8, 7, None, None, 0, True)
    passes = reference.quantize(x, scale, zero_point, -8, 7)[1]
    gradient = values(1, *x.shape)[0].to(dtype)
    backwards = tuple(reversed(range(x.dim())))
    reversed_strides = gradient.permute(backwards).contiguous().permute(backwards)
    constant = torch.ones((), dtype=dtype).expand(x.shape)
    for grad in (gradient, reversed_strides, constant):
        dx = twins.fake_quantize_backward(grad.to(device), mask, y.stride())
        assert_same_bits(dx, torch.where(passes, grad, 0))
        assert dx.stride() == y.stride()


def test_backward_keeps_special_gradients(device: str) -> None:
    grad = torch.tensor(SPECIAL)
    mask = torch.tensor([0b10110111, 0b00101101], dtype=torch.uint8)
    passes = torch.tensor([bool(mask[i // 8] >> (i % 8) & 1) for i in range(len(SPECIAL))])
    dx = twins.fake_quantize_backward(grad.to(device), mask.to(device), grad.stride())
    assert_same_bits(dx, torch.where(passes, grad, 0))


def test_backward_leaves_its_gradient_alone(device: str) -> None:
    grad = values(5, 4).to(device)
    before = grad.clone()
    twins.fake_quantize_backward(grad, torch.zeros(3, dtype=torch.uint8, device=device), grad.stride())
    twins.fake_quantize_backward(grad, torch.zeros(3, dtype=torch.uint8, device=device), (1, 5))
    assert torch.equal(grad, before)


def test_backward_refuses_a_foreign_mask(device: str) -> None:
    grad = values(20).to(device)
    with pytest.raises(ValueError, match="mask must hold 3 uint8 values.*got 2"):
        twins.fake_quantize_backward(grad, torch.zeros(2, dtype=torch.uint8, device=device), grad.stride())


# ---- all of them


@pytest.mark.parametrize("axis", [None, 0])
def test_empty_tensors(axis: int | None, device: str) -> None:
    x = LAYOUTS["empty"]()
    count = channels_of(x, axis)
    mask, _ = check_forward(x, *parameters(count), -8, 7, axis, device)
    assert twins.fake_quantize_backward(x.to(device), mask, x.stride()).shape == x.shape
    assert twins.fake_quantize_forward_number(x.to(device), 0.1, 0.0, -8, 7, True)[0].shape == x.shape
    check_weight(x, True, axis, -8, 7, device)
    state = fresh_state(count, device)
    check_activation(x, state, False, axis)
    assert torch.isinf(state[0]).all()
    check_activation(values(3, 4, 2), state, False, axis)
    check_activation(x, state, False, axis)


def test_no_channels(device: str) -> None:
    x = values(2, 0).to(device)
    y, mask = twins.fake_quantize_weight_forward(x, *fresh_state(0, device)[2:], -8, 7, False, 1, None, 0, True)
    assert y.shape == x.shape
    assert mask.numel() == 0


def test_inputs_stay_as_they_are(device: str) -> None:
    for layout in ("matrix", "transposed", "sliced", "expanded"):
        x = LAYOUTS[layout]().to(device)
        before = x.clone()
        y, _ = twins.fake_quantize_forward_number(x, 0.5, 0.0, -8, 7, True)
        assert torch.equal(x, before)
        assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_float64_is_refused(device: str) -> None:
    with pytest.raises(TypeError, match="float64"):
        twins.fake_quantize_forward_number(values(3).double().to(device), 0.5, 0.0, -8, 7, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="host synchronisation exists only with a CUDA device")
def test_nothing_waits_for_the_host() -> None:
    x = values(8, 40).cuda()
    scale, zero_point = (t.cuda() for t in parameters(40))
    state, flag, step = fresh_state(40, "cuda"), torch.tensor([True], device="cuda"), torch.tensor([4], device="cuda")

    def every_operation() -> Iterator[Tensor]:
        y, mask = twins.fake_quantize_forward(x, scale, zero_point, -8, 7, 1, step, 3, True)
        yield twins.fake_quantize_backward(y, mask, y.stride())
        yield twins.fake_quantize_weight_forward(x, scale, zero_point, -8, 7, False, 1, step, 3, True)[0]
        yield twins.fake_quantize_activation_forward(x, *state, flag, -8, 7, False, 0.9, 1, step, 3, True)[0]

    list(every_operation())
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(every_operation())) == 3
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- where they can run


def test_availability_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, reason = twins.available("meta")
    assert not runs
    assert "meta" in reason
    monkeypatch.setattr(twins, "is_interpreted", lambda: False)
    assert twins.available("cuda:0")[0]
    runs, reason = twins.available(torch.device("cpu"))
    assert not runs
    assert "TRITON_INTERPRET=1" in reason
    monkeypatch.setattr(twins, "is_installed", lambda: False)
    runs, reason = twins.available("cuda")
    assert not runs
    assert "pip install triton" in reason


def test_import_does_not_need_triton() -> None:
    script = """
import sys
import quantkern.triton as twins
assert "triton" not in sys.modules, "importing quantkern.triton imported triton"
sys.modules["triton"] = None
print(twins.available("cpu"), twins.available("cuda"))
"""
    assert run_python(script).count("(False, 'triton is not installed; pip install triton')") == 2


def test_compiled_kernels_are_exact(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia", reason="this Triton was built without its NVIDIA compiler")
    lines = run_python(COMPILE_EVERY_KERNEL, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    kernels = {"fake_quantize_tensor", "fake_quantize_channel", "fake_quantize_backward", "row_ranges"}
    kernels |= {"column_ranges", "weight_scale", "update_state"}
    assert {line.split()[0].removesuffix("_kernel") for line in lines} == kernels
    assert [line for line in lines if line.split()[1] != "exact"] == []
