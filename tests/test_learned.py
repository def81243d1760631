"""Learned step sizes and DoReFa: the gradients that the inventory does not see, in float64, and the random numbers."""

from __future__ import annotations

import math

import pytest
import torch
from op_sample import make_x
from torch import Tensor

from quantkern import Backend, reference
from quantkern import functional as F

LAYOUTS = [
    ((4096,), None),
    ((3, 5, 40, 40), None),
    ((6, 700), 0),
    ((3, 5, 9, 11), 1),
    ((50, 33), 1),
    ((90, 1, 3, 3), 0),
]


def formula(
    x: Tensor, grad: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the paper's terms in float64, and the sum of their magnitudes, which bounds the rounding."""
    x64, g64 = x.double(), grad.double()
    s, z = (reference.along_axis(value, x, axis) for value in (scale, zero_point))
    v = (x.float() * (1 / s)).double()  # the kernels' own v: whether an element is inside must not depend on rounding
    position = (x.float() * (1 / s) + z).double()
    inside = (position > low) & (position < high)
    end = torch.where(position <= low, float(low), float(high)) - z.double()
    by_scale = torch.where(inside, torch.round(v) - x64 / s.double(), end) * g64
    by_zero = torch.where(inside, 0.0, -s.double()) * g64

    def total(part: Tensor) -> Tensor:
        return part.sum() if axis is None else part.movedim(axis, 0).flatten(1).sum(1)

    return total(by_scale), total(by_zero), total(by_scale.abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("low", "high"), [(-8, 7), (0, 15), (-2, 1)])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_scale_and_zero_point_gradients(
    shape: tuple[int, ...], axis: int | None, low: int, high: int, dtype: torch.dtype
) -> None:
    x = make_x(shape, dtype, edges=False).requires_grad_()
    channels = 1 if axis is None else shape[axis]
    scale = torch.linspace(0.1, 0.5, channels, requires_grad=True)
    zero_point = torch.linspace(-1.5, 2.0, channels, requires_grad=True)
    grad = make_x(shape, dtype, seed=3, edges=False)
    y = F.lsq(x, scale, low, high, axis, 0.25, zero_point)
    _, dscale, dzero = torch.autograd.grad(y, (x, scale, zero_point), grad)
    want_scale, want_zero, size = formula(x.detach(), grad, scale.detach(), zero_point.detach(), low, high, axis)
    # Each term carries two roundings, each partial sum of at most 4096 terms over 8 lanes some more.
    bound = 64 * torch.finfo(torch.float32).eps * size.reshape(-1) + 1e-6
    assert bool(((dscale.double() / 0.25 - want_scale).abs() <= bound).all())
    assert bool(((dzero.double() / 0.25 - want_zero).abs() <= 64 * 1.2e-7 * grad.double().abs().sum() + 1e-6).all())


def test_float64_gradients_are_the_float64_formula() -> None:
    x = torch.randn(500, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.3, requires_grad=True)
    grad = torch.randn(500, dtype=torch.float64)
    dx, dscale = torch.autograd.grad(F.lsq(x, scale, -4, 3, grad_scale=1.0), (x, scale), grad)
    v = x.detach() * float(1 / scale.detach())
    inside = (v > -4) & (v < 3)
    assert torch.equal(dx, torch.where(inside, grad, 0.0))
    want = torch.where(inside, torch.round(v) - v, torch.where(v <= -4, -4.0, 3.0)) * grad
    torch.testing.assert_close(dscale, want.sum().float(), rtol=1e-6, atol=1e-6)


def test_grad_scale_counts_the_elements_that_share_a_scale() -> None:
    x = torch.ones(6, 50)
    assert reference.lsq_grad_scale(x, 7) == 1 / math.sqrt(300 * 7)
    assert reference.lsq_grad_scale(x, 7, 0) == 1 / math.sqrt(50 * 7)
    scale = torch.full((6,), 10.0, requires_grad=True)
    F.lsq(x * 1000, scale, -8, 7, 0).sum().backward()
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, torch.full((6,), 50 * 7 / math.sqrt(50 * 7)))


def test_the_same_bits_whatever_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for shape, axis in [((1_000_003,), None), ((64, 20_000), 0), ((20_000, 24), 1)]:
            x = torch.randn(shape)
            scale = torch.full((1 if axis is None else shape[axis],), 0.1, requires_grad=True)
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                (dscale,) = torch.autograd.grad(F.lsq(x, scale, -8, 7, axis), scale, x)
                found.append(dscale)
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(threads)


def test_only_x_is_saved_and_second_derivatives_are_refused() -> None:
    x, scale = torch.randn(100, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = F.lsq(x, scale, -8, 7)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), scale.data_ptr()}
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(y, x, torch.ones(100, requires_grad=True), create_graph=True)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_dorefa_weight_gradient_is_autograds(bits: int) -> None:
    """Through tanh and the maximum as torch differentiates them, straight through the rounding only."""
    w = torch.randn(40, 30, requires_grad=True)
    grad = torch.randn(40, 30)
    (got,) = torch.autograd.grad(F.dorefa_weight(w, bits), w, grad)
    wide = w.detach().double().requires_grad_()
    t = torch.tanh(wide)
    z = t / (2 * t.abs().max()) + 0.5
    n = 2**bits - 1
    y = 2 * (z + (torch.round(z * n) / n - z).detach()) - 1
    (want,) = torch.autograd.grad(y, wide, grad.double())
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


def test_dorefa_weight_shares_the_gradient_of_the_maximum() -> None:
    w = torch.tensor([2.0, -2.0, 0.5, 0.1], requires_grad=True)
    grad = torch.tensor([0.3, 0.2, -1.0, 4.0])
    (got,) = torch.autograd.grad(F.dorefa_weight(w, 4), w, grad)
    (want,) = torch.autograd.grad(reference.dorefa_weight(w, 4), w, grad)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_dorefa_weight_of_zeros() -> None:
    w = torch.zeros(5, requires_grad=True)
    y = F.dorefa_weight(w, 4)
    y.sum().backward()
    assert bool(torch.isfinite(y).all()) and w.grad is not None and w.grad.tolist() == [0.0] * 5


def test_tanh_is_accurate_everywhere() -> None:
    """65535 steps resolve tanh to 3e-5; the backward shows it to 2e-6: 1 - tanh^2 from 0 to saturation."""
    w = torch.linspace(-12, 12, 20001).requires_grad_()
    (dw,) = torch.autograd.grad(F.dorefa_weight(w, 16), w, torch.ones(20001))
    want = 1 - torch.tanh(w.detach().double()) ** 2
    inner = slice(1, -1)  # the two ends are the maximum
    assert float((dw.double() - want)[inner].abs().max()) < 2e-6


def test_philox_known_answers() -> None:
    """The published test vector of Philox4x32-10 for counter 0 and key 0."""
    words = [f"{word:08x}" for word in reference.philox(0, 4).tolist()]
    assert words == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_gradient_noise_is_unbiased_and_seeded() -> None:
    grad = torch.full((200, 500), 0.3)
    grad[:, 0] = 1.0
    seed = torch.tensor(11)
    got = F.quantize_gradient(grad, 2, seed)
    assert torch.equal(got, F.quantize_gradient(grad, 2, seed))
    assert not torch.equal(got, F.quantize_gradient(grad, 2, torch.tensor(12)))
    assert abs(float(got[:, 1:].mean()) - 0.3) < 0.01
    levels = {round(value, 4) for value in got.unique().tolist()}
    assert levels <= {-1.0, -0.3333, 0.3333, 1.0}


def test_gradient_of_zeros_infinities_and_nan() -> None:
    grad = torch.zeros(3, 4)
    grad[1, 2] = math.inf
    grad[2] = torch.tensor([1.0, math.nan, -0.5, 0.25])
    got = F.quantize_gradient(grad, 4, torch.tensor(1))
    assert got[0].tolist() == [0.0] * 4
    assert got[1].tolist() == [0.0, 0.0, math.inf, 0.0]
    assert got[2].isnan().tolist() == [False, True, False, False]


def test_seed_is_drawn_from_torchs_generator() -> None:
    def once() -> Tensor:
        torch.manual_seed(4)
        x = torch.randn(50, requires_grad=True)
        F.dorefa_gradient(x, 3).sin().sum().backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(once(), once())


@pytest.mark.parametrize("backend", [Backend.NATIVE, Backend.REFERENCE])
def test_dorefa_activation_edges(backend: Backend) -> None:
    x = torch.tensor([-0.1, 0.0, 0.49, 0.51, 1.0, 1.01, math.nan], requires_grad=True)
    y = F.dorefa_activation(x, 1, backend=backend)
    assert y[:-1].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0] and math.isnan(y[-1].item())
    (dx,) = torch.autograd.grad(y, x, torch.ones(7))
    assert dx.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
