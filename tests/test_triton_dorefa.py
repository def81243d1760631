"""The Triton twins of DoReFa equal the native CPU operators bit for bit, except in sums, whose bound is stated.

Where and how they run is told in triton_checks.py, from which the tensors of these tests come.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_checks import DEVICES, DTYPES, LAYOUTS, RUNS_HERE, assert_same_bits, values
from triton_learned_checks import (
    BITS,
    GIVEN,
    INF,
    NAN,
    check_activation,
    check_gradient,
    check_weight,
    check_weight_backward,
    gradient_of,
)

from quantkern import reference
from quantkern import triton as twins

pytestmark = RUNS_HERE


@pytest.fixture(params=DEVICES or ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# ---- dorefa_weight


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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dorefa_activation_layouts(layout: str, device: str) -> None:
    check_activation(LAYOUTS[layout](), 2, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [*BITS, 16])
def test_dorefa_activation_special_values(dtype: torch.dtype, bits: int, device: str) -> None:
    x = torch.cat([GIVEN.flatten(), torch.linspace(-0.25, 1.25, 193)]).to(dtype)
    check_activation(x, bits, device)


# ---- dorefa_gradient


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
