"""The specification against torch's own operations, NNI's formulas in float64, and gradients of gradients."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from op_sample import make_x

from quantkern import Backend, reference
from quantkern import functional as F

RANGES = [(-128, 127, 0), (0, 255, 100), (-8, 7, -3), (0, 1, 0), (-32767, 32767, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("low", "high", "zero_point"), RANGES)
def test_equals_torch_per_tensor(low: int, high: int, zero_point: int, dtype: torch.dtype) -> None:
    x = (torch.randn(5000, dtype=torch.float64) * 40).to(dtype)
    x[:6] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -0.0], dtype=dtype)
    for scale in (1.0, 0.1, 0.37, 1e-3):
        x.requires_grad_()
        expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
        (expected_dx,) = torch.autograd.grad(expected.sum(), x)
        for backend in (Backend.NATIVE, Backend.REFERENCE):
            y = F.fake_quantize(x, scale, zero_point, low, high, backend=backend)
            (dx,) = torch.autograd.grad(y.sum(), x)
            assert torch.equal(y, expected) and torch.equal(dx, expected_dx)


def test_equals_torch_per_channel() -> None:
    x = torch.randn(6, 50, requires_grad=True)
    scale, zero_point = torch.linspace(0.01, 0.5, 6), torch.arange(6, dtype=torch.int32) - 3
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, -8, 7)
    (expected_dx,) = torch.autograd.grad(expected.sum(), x)
    y = F.fake_quantize(x, scale, zero_point, -8, 7, axis=0)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, expected) and torch.equal(dx, expected_dx)


def test_float64_oracle_is_the_papers_formula() -> None:
    """With float64 parameters every intermediate is float64: compare with plain Python arithmetic."""
    x = torch.tensor([0.04, 0.05, 0.15, -0.25, 3.0, -9.0], dtype=torch.float64)
    scale, zero_point = torch.tensor(0.1, dtype=torch.float64), torch.tensor(2)
    y, in_range = reference.quantize(x, scale, zero_point, 0, 15)
    for value, got, inside in zip(x.tolist(), y.tolist(), in_range.tolist(), strict=True):
        rounded = round(value * (1 / 0.1)) + 2
        q = min(max(rounded, 0), 15)
        assert got == (q - 2) * 0.1
        assert inside == (q == rounded)


@pytest.mark.parametrize(("low", "high"), [(-127, 127), (0, 255), (-7, 7), (0, 15)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_chosen_scale_covers_the_range(low: int, high: int, symmetric: bool) -> None:
    ranges = torch.randn(2, 200, dtype=torch.float64).sort(0).values
    scale, zero_point = reference.choose_scale(ranges[0], ranges[1], low, high, symmetric)
    ends = torch.stack([ranges[0].clamp(max=0), ranges[1].clamp(min=0)])
    q = ends / scale + zero_point
    assert bool((q > low - 1.01).all()) and bool((q < high + 1.01).all())
    assert int(zero_point.min()) >= low and int(zero_point.max()) <= high


def test_zero_is_exact_for_affine_ranges_that_leave_it_out() -> None:
    low, high = torch.tensor([2.0, -5.0, 0.0]), torch.tensor([5.0, -1.0, 0.0])
    scale, zero_point = reference.choose_scale(low, high, 0, 255, symmetric=False)
    assert zero_point.tolist() == [0, 255, 0]
    y = F.fake_quantize(torch.zeros(3, 1), scale, zero_point, 0, 255, axis=0)
    assert y.abs().max() == 0


def test_all_zero_tensor_has_a_scale_and_stays_zero() -> None:
    """NNI divides 0 by 0 here (D6)."""
    for symmetric, low in ((True, -127), (False, 0), (True, 0)):
        scale, zero_point = torch.ones(()), torch.ones((), dtype=torch.int32)
        y = F.fake_quantize_weight(torch.zeros(9), scale, zero_point, low, 127, symmetric)
        assert y.tolist() == [0.0] * 9 and scale.item() == reference.SMALLEST_SCALE


def test_range_whose_width_overflows_still_has_a_scale() -> None:
    scale, zero_point = torch.ones(()), torch.ones((), dtype=torch.int32)
    x = torch.tensor([-3e38, 3e38])
    y = F.fake_quantize_weight(x, scale, zero_point, 0, 255, False)
    assert math.isfinite(scale.item()) and bool(torch.isfinite(y).all())


def test_gradient_of_the_gradient() -> None:
    """The backward is linear in its gradient, with the same mask: exact in float64."""
    mask = torch.tensor([0b10110, 0xFF, 0b1], dtype=torch.uint8)
    grad = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for strides in ((6, 1), (1, 4)):
        backward = functools.partial(torch.ops.quantkern.fake_quantize_backward, mask=mask, strides=strides)
        assert torch.autograd.gradcheck(backward, (grad,))
        assert torch.autograd.gradgradcheck(backward, (grad,))


def test_gradcheck_while_delayed() -> None:
    """Before start_step the operations are the identity, which finite differences can check."""
    x = torch.randn(30, dtype=torch.float64, requires_grad=True)
    step, scale, zero_point = torch.tensor(3), torch.tensor(0.1), torch.zeros((), dtype=torch.int32)
    delay = {"step": step, "start_step": 4}
    assert torch.autograd.gradcheck(lambda x: F.fake_quantize(x, scale, zero_point, -8, 7, **delay), (x,))
    assert torch.autograd.gradcheck(
        lambda x: F.fake_quantize_weight(x, scale.clone(), zero_point.clone(), 0, 7, False, **delay), (x,)
    )
    low, high = torch.tensor(-1.0), torch.tensor(1.0)
    assert torch.autograd.gradcheck(
        lambda x: F.fake_quantize_activation(
            x, low, high, scale.clone(), zero_point.clone(), torch.tensor(True), 0, 7, False, **delay
        ),
        (x,),
    )


def saved_bytes(run: object) -> int:
    """Bytes autograd keeps for the backward of one call."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()  # type: ignore[operator]
    return sum(sizes)


def test_saved_memory_is_one_bit_an_element() -> None:
    x = torch.randn(1000, 80, requires_grad=True)
    assert saved_bytes(lambda: F.fake_quantize(x, 0.1, 0, -8, 7)) == x.numel() // 8
    scale, zero_point = torch.ones(()), torch.zeros((), dtype=torch.int32)
    assert saved_bytes(lambda: F.fake_quantize_weight(x, scale, zero_point, -127, 127, True)) == 0
    assert saved_bytes(lambda: F.fake_quantize_weight(x, scale, zero_point, 0, 255, False)) == x.numel() // 8


def test_nothing_is_saved_without_a_gradient() -> None:
    settings = (torch.ones(1), torch.zeros(1), -8, 7, None, None, 0, False)
    y, mask = torch.ops.quantkern.fake_quantize_forward(torch.randn(9), *settings)
    assert y.shape == (9,) and mask.numel() == 0


def test_state_writes_are_seen_by_autograd() -> None:
    """A tensor saved for a backward and then overwritten by an operation must not be used silently."""
    scale, zero_point = torch.ones((), requires_grad=False), torch.zeros((), dtype=torch.int32)
    w = torch.randn(5, requires_grad=True)
    product = w * scale
    F.fake_quantize_weight(torch.randn(5), scale, zero_point, -127, 127, True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_inference_mode() -> None:
    with torch.inference_mode():
        x = make_x((40,), edges=False)
        state = [torch.zeros(()), torch.zeros((), dtype=torch.int32)]
        y = F.fake_quantize_weight(x, *state, -127, 127, True)
        assert not y.requires_grad and state[0].item() > 0
        assert F.fake_quantize(x, 0.1, 0, -8, 7).shape == x.shape


@pytest.mark.large
def test_more_than_two_to_the_31_elements() -> None:
    """Needs about 9 GiB: run with pytest -m large."""
    count = 2**31 + 77
    x = torch.zeros(count, dtype=torch.float16)
    x[-3:] = torch.tensor([1.0, 0.26, -9.0], dtype=torch.float16)
    x.requires_grad_()
    y = F.fake_quantize(x, 0.5, 0, -4, 3)
    assert y[-4:].tolist() == [0.0, 1.0, 0.5, -2.0]
    y.backward(x.detach())
    assert x.grad is not None and x.grad[-3:].tolist() == [1.0, x[-2].item(), 0.0]
