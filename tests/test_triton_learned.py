"""The Triton twins of lsq and DoReFa equal the native CPU operators bit for bit, except in sums, whose bound is stated.

Where and how they run is told in test_triton.py, from which the tensors of these tests come.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_triton import (
    COMPILE_EVERY_KERNEL,
    DEVICES,
    DTYPES,
    LAYOUTS,
    SPECIAL,
    WITH_AXES,
    assert_same_bits,
    channels_of,
    run_python,
    values,
)
from torch import Tensor

from quantkern import Backend, reference
from quantkern import functional as F
from quantkern import triton as twins

native = torch.ops.quantkern
pytestmark = [
    pytest.mark.skipif(not DEVICES, reason="Triton cannot run here, see test_triton.py"),
    # The interpreter computes with numpy, which warns where a GPU silently gives NaN or infinity.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

EPSILON = torch.finfo(torch.float32).eps
# A sum of n float32 numbers is wrong by at most the depth of its additions times epsilon times the sum of their
# magnitudes; the depth of the sums of tensors as small as these stays below 64 in any order that is not one chain.
SUM_ERROR = 64 * EPSILON
FULL = [name for name in LAYOUTS if name != "empty"]
BITS = [1, 2, 4, 8]
GIVEN = torch.cat([torch.tensor(SPECIAL), values(206) * 10.0 ** torch.linspace(-8, 6, 206)]).reshape(10, 22)


@pytest.fixture(params=DEVICES or ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def gradient_of(x: Tensor) -> Tensor:
    return (values(3, *x.shape)[1] if x.numel() else torch.zeros(x.shape)).to(x.dtype)


# ---- lsq


def steps(count: int, axis: int | None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    scale, zero_point = torch.rand(count, generator=generator) + 0.05, torch.randn(count, generator=generator)
    return (scale, zero_point) if axis is not None else (scale.reshape(()), zero_point.reshape(()))


def assert_sum(have: Tensor, want: Tensor, grad: Tensor, factor: float, axis: int | None) -> None:
    """Equal but for the rounding of a sum of parts up to factor * |grad|."""
    assert have.dtype is torch.float32
    assert have.shape == want.shape
    size = grad.double().abs()
    size = size.sum().reshape(1) if axis is None else size.unsqueeze(-1).movedim(axis, 0).flatten(1).sum(1)
    assert ((have.cpu().double() - want).abs().reshape(-1) <= SUM_ERROR * factor * size).all()


def check_lsq(
    x: Tensor,
    grad: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int | None,
    device: str,
    low: int = -8,
    high: int = 7,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward against the native operators; the sums against those of the reference too."""
    on_device = [None if t is None else t.to(device) for t in (grad, x, scale, zero_point)]
    y = twins.lsq_forward(*on_device[1:3], low, high, axis, on_device[3])
    assert_same_bits(y, native.lsq_forward(x, scale, low, high, axis, zero_point))
    factor = 0.37
    got = twins.lsq_backward(*on_device[:3], low, high, factor, axis, on_device[3])
    want = native.lsq_backward(grad, x, scale, low, high, factor, axis, zero_point)
    assert_same_bits(got[0], want[0])
    assert y.stride() == got[0].stride() == torch.empty_like(x).stride()
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, scale, zero_point)]
    column = leaves[0].unsqueeze(-1)
    reference.lsq(column, leaves[1], low, high, axis, factor, leaves[2]).backward(grad.unsqueeze(-1))
    reach = high - low + (0.0 if zero_point is None else float(zero_point.abs().sum()))
    for expected in (want[1], leaves[1].grad):
        assert_sum(got[1], expected, grad, factor * reach, axis)
    if zero_point is None:
        assert got[2].shape == (0,)
    else:
        for expected in (want[2], leaves[2].grad):
            assert_sum(got[2], expected, grad, factor * float(scale.sum()), axis)
    return got


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


NAN, INF = float("nan"), float("inf")


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


# ---- dorefa_weight


def check_weight(x: Tensor, bits: int, device: str) -> Tensor:
    """The forward against the native operator; returns ``largest``."""
    y, largest = twins.dorefa_weight_forward(x.to(device), bits)
    want, want_largest = native.dorefa_weight_forward(x, bits)
    assert largest.shape == ()
    assert largest.dtype is torch.float32
    assert y.stride() == torch.empty_like(x).stride()
    if bits > 1:
        assert torch.equal(largest.cpu(), want_largest)
    else:
        torch.testing.assert_close(largest.cpu(), want_largest, rtol=SUM_ERROR, atol=0, equal_nan=True)
        mean = largest.cpu()
        wide = x.float()
        want = torch.where(wide >= 0, mean, torch.where(wide < 0, -mean, wide)).to(x.dtype)
    assert_same_bits(y, want)
    return largest


def check_weight_backward(x: Tensor, grad: Tensor, device: str, largest: Tensor | None = None) -> Tensor:
    """Bit-equal but for the elements at the maximum, through which a sum passes."""
    largest = native.dorefa_weight_forward(x, 2)[1] if largest is None else largest
    want = native.dorefa_weight_backward(grad, x, largest)
    dx = twins.dorefa_weight_backward(grad.to(device), x.to(device), largest.to(device))
    assert dx.dtype is x.dtype
    assert dx.stride() == torch.empty_like(x).stride()
    # tanh_lane may give neighbours of the largest weight its tanh.
    at_largest = x.float().abs() >= largest * (1 - 1e-4)
    have, nothing = dx.cpu(), torch.zeros((), dtype=x.dtype)
    assert_same_bits(torch.where(at_largest, nothing, have), torch.where(at_largest, nothing, want))
    m = float(torch.tanh(largest))
    if m > 0 and x.numel():
        size = float((grad.double().abs() * torch.tanh(x.double()).abs().nan_to_num(0)).sum()) / m**2
        rounding = torch.finfo(x.dtype).eps
        torch.testing.assert_close(
            have[at_largest], want[at_largest], rtol=2 * rounding, atol=SUM_ERROR * size, equal_nan=True
        )
    return dx


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [1, 4])
def test_dorefa_weight_layouts(layout: str, bits: int, device: str) -> None:
    x = LAYOUTS[layout]()
    check_weight(x, bits, device)
    if bits > 1:
        check_weight_backward(x, gradient_of(x), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [*BITS, 16])
def test_dorefa_weight_of_any_size(dtype: torch.dtype, bits: int, device: str) -> None:
    for size in (1e-30, 0.3, 40.0):
        check_weight((values(31, 40) * size).to(dtype), bits, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dorefa_weight_backward_of_any_size(dtype: torch.dtype, device: str) -> None:
    for size in (1e-3, 0.3, 2.0, 40.0):
        x = (values(31, 40) * size).to(dtype)
        check_weight_backward(x, gradient_of(x), device)


def test_dorefa_weight_special_values(device: str) -> None:
    nan, inf = NAN, INF
    rows = [[nan, 1.0, -2.0, 0.0], [inf, -inf, 1.0, nan], [1e-42, -1e-42, 0.0, -0.0], [3e38, -1.0, 1e-7, 0.6]]
    rows += [
        [nan] * 4,
        [0.0, -0.0, 0.0, 0.0],
        [2.0, -2.0, 2.0, 1.0],
        [0.625, -0.6249999, 0.0, 1.0],
        [nan, 0.0, 0.0, 0.0],
    ]
    for row in rows:
        x = torch.tensor(row)
        for bits in (1, 2, 8):
            check_weight(x, bits, device)
        check_weight_backward(x, torch.tensor([1.0, -0.5, 2.0, 0.25]), device)


def test_dorefa_weight_shares_the_gradient_of_its_maximum(device: str) -> None:
    # Two blocks and more, with the maximum attained by either sign in several of them.
    x = values(6000) * 0.2
    x[[3, 2047, 4100]], x[[700, 5999]] = 2.5, -2.5
    for dtype in DTYPES:
        dx = check_weight_backward(x.to(dtype), gradient_of(x.to(dtype)), device)
        assert (dx[[3, 2047, 4100, 700, 5999]] != 0).all()
    leaf = x.double().requires_grad_()
    reference.dorefa_weight(leaf, 4).backward(gradient_of(x).double())
    dx = check_weight_backward(x, gradient_of(x), device)
    torch.testing.assert_close(dx.cpu().double(), leaf.grad, rtol=1e-5, atol=1e-5)


def test_dorefa_weight_of_zeros_has_no_gradient(device: str) -> None:
    dx = check_weight_backward(torch.zeros(5, 3), gradient_of(values(5, 3)), device)
    assert (dx == 0).all()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_dorefa_weight_takes_gradients_of_any_strides(layout: str, device: str) -> None:
    x = LAYOUTS[layout]()
    before = x.clone()
    for grad in (gradient_of(x).t().contiguous().t(), torch.ones(()).expand(x.shape)):
        check_weight_backward(x, grad, device)
    assert torch.equal(x, before)


def test_dorefa_weight_sums_are_the_same_in_every_call(device: str) -> None:
    x, grad = values(9000), gradient_of(values(9000))
    assert torch.equal(check_weight(x, 1, device), check_weight(x, 1, device))
    assert torch.equal(check_weight_backward(x, grad, device), check_weight_backward(x, grad, device))


# ---- dorefa_activation


def check_activation(x: Tensor, bits: int, device: str) -> None:
    y, mask = twins.dorefa_activation_forward(x.to(device), bits, True)
    want, want_mask = native.dorefa_activation_forward(x, bits, True)
    assert_same_bits(y, want)
    assert y.stride() == torch.empty_like(x).stride()
    assert torch.equal(mask.cpu(), want_mask)
    assert_same_bits(y, reference.dorefa_activation(x, bits))
    unmasked, none = twins.dorefa_activation_forward(x.to(device), bits, False)
    assert_same_bits(unmasked, want)
    assert none.numel() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dorefa_activation_layouts(layout: str, device: str) -> None:
    check_activation(LAYOUTS[layout](), 2, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [*BITS, 16])
def test_dorefa_activation_special_values(dtype: torch.dtype, bits: int, device: str) -> None:
    x = torch.cat([GIVEN.flatten(), torch.linspace(-0.25, 1.25, 193)]).to(dtype)
    check_activation(x, bits, device)


# ---- dorefa_gradient


def check_gradient(grad: Tensor, bits: int, seed: int, device: str) -> Tensor:
    quantized = twins.quantize_gradient(grad.to(device), bits, torch.tensor(seed, device=device))
    assert_same_bits(quantized, native.dorefa_gradient(grad, bits, torch.tensor(seed)))
    assert quantized.stride() == torch.empty_like(grad).stride()
    return quantized


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dorefa_gradient_layouts(layout: str, device: str) -> None:
    check_gradient(LAYOUTS[layout](), 4, 12345, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "seed"), [(1, 0), (2, -1), (4, (1 << 62) + 987654321), (8, 1 << 31), (16, 3)])
def test_dorefa_gradient_seeds(dtype: torch.dtype, bits: int, seed: int, device: str) -> None:
    grad = values(3, 701).to(dtype)
    quantized = check_gradient(grad, bits, seed, device)
    assert_same_bits(quantized, reference.dorefa_gradient(grad, bits, seed))


def test_dorefa_gradient_special_values(device: str) -> None:
    for dtype in DTYPES:
        check_gradient(GIVEN.to(dtype), 4, 7, device)
        check_gradient(torch.zeros(3, 5, dtype=dtype), 4, 7, device)
        check_gradient(torch.full((2, 3), float("nan"), dtype=dtype), 4, 7, device)
    check_gradient(torch.tensor([[1e-42, 2e-42], [3e38, -3e38], [float("nan"), 1.0]]), 8, 7, device)


def test_dorefa_gradient_takes_a_vector_seed(device: str) -> None:
    grad = values(4, 9).to(device)
    seeds = torch.tensor([5], device=device)
    assert torch.equal(twins.quantize_gradient(grad, 4, seeds), twins.quantize_gradient(grad, 4, seeds[0]))


def philox_words(seed: int, block: int) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    low32 = 0xFFFFFFFF
    w, k = [block & low32, block >> 32, 0, 0], [seed & low32, seed >> 32 & low32]
    for _ in range(10):
        a, b = w[0] * 0xD2511F53, w[2] * 0xCD9E8D57
        w = [b >> 32 ^ w[1] ^ k[0], b & low32, a >> 32 ^ w[3] ^ k[1], a & low32]
        k = [k[0] + 0x9E3779B9 & low32, k[1] + 0xBB67AE85 & low32]
    return w


@pytest.mark.parametrize("first", [0, (1 << 34) - 32, (1 << 40) + 64])
def test_noise_beyond_32_bits(first: int, device: str, philox_noise: Callable[[int, int, str], Tensor]) -> None:
    """Elements from ``first`` on, where block numbers need their upper word too."""
    noise = philox_noise(97531, first, device)
    words = [word for block in range(first // 4, first // 4 + 16) for word in philox_words(97531, block)]
    assert noise.tolist() == [(word >> 8) * 2.0**-24 - 0.5 for word in words]
    assert philox_words(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.fixture
def philox_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int, str], Tensor]:
    """The noise of 64 elements from a place, by a kernel of its own, which Triton wants to read from a file."""
    (tmp_path / "noise_kernel.py").write_text("""
import triton
import triton.language as tl
from quantkern.triton.dorefa_gradient import noise_of

@triton.jit
def noise_kernel(seed_ptr, first_ptr, out_ptr):
    tl.store(out_ptr + tl.arange(0, 64), noise_of(tl.load(seed_ptr), tl.load(first_ptr), 64))
""")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "noise_kernel", raising=False)

    def run(seed: int, first: int, device: str) -> Tensor:
        kernel = importlib.import_module("noise_kernel").noise_kernel
        out = torch.empty(64, device=device)
        kernel[(1,)](torch.tensor([seed], device=device), torch.tensor([first], device=device), out)
        return out.cpu()

    return run


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


# test_triton's compiler in place of a launch, with the operations of this file instead of its own.
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
