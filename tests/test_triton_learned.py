"""The Triton twins of lsq equal the native CPU operators bit for bit, except in sums, whose bound is stated; and what
holds for DoReFa's too, whose own tests are in test_triton_dorefa.py.

Where and how they run is told in triton_checks.py, from which the tensors of these tests come.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Iterator
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
    assert_same_bits,
    channels_of,
    run_python,
    values,
)
from triton_learned_checks import (
    GIVEN,
    INF,
    NAN,
    SUM_ERROR,
    check_activation,
    check_gradient,
    check_lsq,
    check_weight,
    check_weight_backward,
    gradient_of,
    native,
    steps,
)

from quantkern import Backend, reference
from quantkern import functional as F
from quantkern import triton as twins

pytestmark = RUNS_HERE


@pytest.fixture(params=DEVICES or ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# ---- lsq


@pytest.mark.parametrize(("layout", "axis"), WITH_AXES)
def test_lsq_layouts(layout: str, axis: int | None, device: str) -> None:
    x = LAYOUTS[layout]()
    scale, zero_point = steps(channels_of(x, axis), axis)
    check_lsq(x, gradient_of(x), scale, None if axis is None else zero_point, axis, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize(("low", "high"), [(-128, 127), (0, 15), (-32768, 32767)])
def test_lsq_special_values(dtype: torch.dtype, axis: int | None, low: int, high: int, device: str) -> None:
    ties = torch.arange(-40, 40).reshape(10, 8) * 0.25
    x = torch.cat([GIVEN, ties], 1).to(dtype)
    scale, zero_point = steps(channels_of(x, axis), axis)
    scale = torch.where(scale > 0.5, 0.5, scale)
    for zero in (zero_point, None):
        check_lsq(x, gradient_of(x), scale, zero, axis, device, low, high)


@pytest.mark.parametrize("axis", [None, 1])
def test_lsq_keeps_special_gradients(axis: int | None, device: str) -> None:
    grad = torch.tensor(SPECIAL).reshape(7, 2)
    x = values(7, 2)
    scale, zero_point = steps(channels_of(x, axis), axis)
    want = native.lsq_backward(grad, x, scale, -8, 7, 1.0, axis, zero_point)
    given = [t.to(device) for t in (grad, x, scale)]
    got = twins.lsq_backward(*given, -8, 7, 1.0, axis, zero_point.to(device))
    assert_same_bits(got[0], want[0])
    assert not got[1].isfinite().any()
    assert not want[1].isfinite().any()


@pytest.mark.parametrize("layout", ["image", "channels_last", "sliced", "transposed"])
def test_lsq_takes_gradients_of_any_strides(layout: str, device: str) -> None:
    x = LAYOUTS[layout]()
    backwards = tuple(reversed(range(x.dim())))
    scale, zero_point = steps(x.shape[1], 1)
    reversed_strides = gradient_of(x).permute(backwards).contiguous().permute(backwards)
    for grad in (reversed_strides, torch.ones(()).expand(x.shape)):
        before = x.clone(), grad.clone()
        check_lsq(x, grad, scale, zero_point, 1, device)
        assert torch.equal(x, before[0])
        assert torch.equal(grad, before[1])


@pytest.mark.parametrize(
    ("scale", "zero_point"),
    [(0.0, 0.5), (-1.0, 0.5), (NAN, 0.5), (INF, 0.5), (1e-45, 0.5), (0.3, INF), (0.3, -INF), (0.3, NAN)],
)
def test_lsq_unusable_parameters(scale: float, zero_point: float, device: str) -> None:
    parameters = torch.tensor([0.1, scale]), torch.tensor([0.5, zero_point])
    x, grad = values(5, 2), torch.ones(5, 2)
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    want = reference.lsq(leaves[0], leaves[1], -8, 7, 1, 1.0, leaves[2])
    want.backward(grad)
    given = [t.to(device) for t in (x, *parameters)]
    assert_same_bits(twins.lsq_forward(*given[:2], -8, 7, 1, given[2]), want.detach())
    gradients = twins.lsq_backward(grad.to(device), *given[:2], -8, 7, 1.0, 1, given[2])
    assert_same_bits(gradients[0], leaves[0].grad)
    for have, leaf in zip(gradients[1:], leaves[1:], strict=True):
        torch.testing.assert_close(have.cpu(), leaf.grad, rtol=SUM_ERROR, atol=0, equal_nan=True)


@pytest.mark.parametrize(("layout", "axis"), [("image", None), ("image", 1), ("channels_last", 1)])
def test_lsq_sums_are_the_same_in_every_call(layout: str, axis: int | None, device: str) -> None:
    x = (
        LAYOUTS[layout]()
        .repeat(8, 1, 2, 4)
        .contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    )
    first = check_lsq(x, gradient_of(x), *steps(channels_of(x, axis), axis), axis, device)
    again = check_lsq(x, gradient_of(x), *steps(channels_of(x, axis), axis), axis, device)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


# ---- all of them


@pytest.mark.parametrize("layout", ["image", "channels_last"])
def test_many_partial_results(layout: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles make of a small tensor what is otherwise a large one."""
    from quantkern.triton import min_max

    monkeypatch.setattr(min_max, "TILE", 8)
    monkeypatch.setattr(min_max, "MERGE_TILE", 8)
    x = LAYOUTS[layout]()
    assert min_max.tiles_of(min_max.Layout(1, 1, x.numel())).splits > 1
    for axis in (None, 1):
        check_lsq(x, gradient_of(x), *steps(channels_of(x, axis), axis), axis, device)
    check_weight(x, 1, device)
    check_weight_backward(x, gradient_of(x), device, check_weight(x, 4, device).cpu())
    check_gradient(x, 4, 3, device)


@pytest.mark.parametrize("axis", [None, 1])
def test_64_bit_indices(axis: int | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    from quantkern.triton import dorefa_activation, dorefa_gradient, dorefa_weight, lsq, min_max

    for module in (dorefa_activation, dorefa_gradient, dorefa_weight, lsq, min_max):
        monkeypatch.setattr(module, "index_type", lambda numel: tl.int64)
    for x in (values(3, 40, 11), values(3, 5, 40)):
        check_lsq(x, gradient_of(x), *steps(channels_of(x, axis), axis), axis, device)
        check_weight(x, 1, device)
        check_weight_backward(x, gradient_of(x), device, check_weight(x, 4, device).cpu())
        check_activation(x, 4, device)
        check_gradient(x, 4, 3, device)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_empty_tensors(axis: int | None, device: str) -> None:
    x = LAYOUTS["empty"]()
    scale, zero_point = steps(channels_of(x, axis), axis)
    dx, dscale, dzero_point = check_lsq(x, x, scale, zero_point, axis, device)
    assert dx.shape == x.shape
    assert (dscale == 0).all()
    assert (dzero_point == 0).all()


def test_float64_is_refused(device: str) -> None:
    x = values(3).double().to(device)
    one = torch.ones((), device=device)
    calls: list[Callable[[], object]] = [
        lambda: twins.lsq_forward(x, one, -8, 7, None, None),
        lambda: twins.dorefa_weight_forward(x, 2),
        lambda: twins.dorefa_activation_forward(x, 2, False),
        lambda: twins.quantize_gradient(x, 2, torch.tensor(1, device=device)),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="float64"):
            call()


def test_no_module_hides_a_function() -> None:
    modules = {module.name for module in pkgutil.iter_modules(twins.__path__)}
    assert "lsq" in modules
    assert modules.isdisjoint(twins.__all__)


def leaves_of(device: str) -> list[Tensor]:
    x = LAYOUTS["channels_last"]() * 0.4
    scale, zero_point = steps(3, 1)
    # detach keeps the strides, clone too: all elements of an image in another order.
    return [t.to(device).detach().clone().requires_grad_() for t in (x, scale, zero_point)]


@pytest.mark.parametrize("operation", ["lsq", "lsq_offset", "weight", "one_bit", "activation", "gradient"])
def test_functional_runs_them(operation: str, device: str) -> None:
    operations: dict[str, Callable[[Tensor, Tensor, Tensor, Backend], Tensor]] = {
        "lsq": lambda x, s, z, backend: F.lsq(x, s, -2, 1, 1, backend=backend),
        "lsq_offset": lambda x, s, z, backend: F.lsq(x, s, -2, 1, 1, zero_point=z, backend=backend),
        "weight": lambda x, s, z, backend: F.dorefa_weight(x, 4, backend=backend),
        "one_bit": lambda x, s, z, backend: F.dorefa_weight(x, 1, backend=backend),
        "activation": lambda x, s, z, backend: F.dorefa_activation(x, 4, backend=backend),
        "gradient": lambda x, s, z, backend: F.dorefa_gradient(x, 4, 9, backend=backend),
    }
    results = []
    for backend, place in ((Backend.TRITON, device), (Backend.NATIVE, "cpu")):
        leaves = leaves_of(place)
        y = operations[operation](*leaves, backend)
        y.backward(gradient_of(y.detach().cpu()).to(place))
        results.append([y, *[leaf.grad for leaf in leaves if leaf.grad is not None]])
    assert len(results[0]) == len(results[1]) == {"lsq": 3, "lsq_offset": 4}.get(operation, 2)
    for have, want in zip(*results, strict=True):
        torch.testing.assert_close(have.cpu(), want, rtol=1e-6, atol=1e-6)
    assert math.isfinite(results[0][1].sum())
    assert results[0][1].abs().sum() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="host synchronisation exists only with a CUDA device")
def test_nothing_waits_for_the_host() -> None:
    x = values(8, 40).cuda()
    scale, zero_point = (t.cuda() for t in steps(40, 1))
    seed = torch.tensor(4, device="cuda")

    def every_operation() -> Iterator[Tensor]:
        y = twins.lsq_forward(x, scale, -8, 7, 1, zero_point)
        yield twins.lsq_backward(y, x, scale, -8, 7, 0.5, 1, zero_point)[0]
        yield twins.dorefa_weight_forward(x, 1)[0]
        y, largest = twins.dorefa_weight_forward(x, 4)
        yield twins.dorefa_weight_backward(y, x, largest)
        yield twins.dorefa_activation_forward(x, 4, True)[0]
        yield twins.quantize_gradient(x, 4, seed)

    list(every_operation())
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(every_operation())) == 5
    finally:
        torch.cuda.set_sync_debug_mode("default")


# The compiler of triton_checks in place of a launch, with the operations of this file instead of its own.
COMPILE_THESE_KERNELS = (
    COMPILE_EVERY_KERNEL.partition("x = torch.empty")[0]
    + """
x = torch.empty(2, 64, 40, 40)
channels_last = x.to(torch.bfloat16, memory_format=torch.channels_last)
scale, zero_point, seed = torch.ones(64), torch.zeros(64), torch.tensor([1])
twins.lsq_backward(x, x, scale[:1], 0, 1, 0.5, None, None)
twins.lsq_backward(x.half(), x.half(), scale, -8, 7, 0.5, 1, zero_point)
twins.lsq_backward(channels_last, channels_last, scale, -8, 7, 0.5, 1, zero_point)
twins.dorefa_weight_forward(channels_last, 1)
_, largest = twins.dorefa_weight_forward(x, 4)
twins.dorefa_weight_backward(x, x, largest)
twins.dorefa_activation_forward(x, 1, True)
twins.quantize_gradient(x.half(), 4, seed)
"""
)


def test_compiled_kernels_are_exact(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia", reason="this Triton was built without its NVIDIA compiler")
    lines = run_python(COMPILE_THESE_KERNELS, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    kernels = {"lsq_rows", "lsq_columns", "lsq_sums", "magnitude_sums", "mean", "dorefa_weight"}
    kernels |= {"dorefa_weight_backward", "dorefa_weight_at_largest", "dorefa_activation", "dorefa_gradient"}
    kernels |= {"row_ranges", "largest_magnitudes"}
    assert {line.split()[0].removesuffix("_kernel") for line in lines} == kernels
    assert [line for line in lines if line.split()[1] != "exact"] == []
