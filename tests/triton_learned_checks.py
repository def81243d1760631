"""What the tests of the Triton twins of lsq and DoReFa share: tensors, the bound of sums, and checks."""

from __future__ import annotations

import torch
from torch import Tensor
from triton_checks import LAYOUTS, SPECIAL, assert_same_bits, values

from quantkern import reference
from quantkern import triton as twins

native = torch.ops.quantkern

EPSILON = torch.finfo(torch.float32).eps
# A sum of n float32 numbers is wrong by at most the depth of its additions times epsilon times the sum of their
# magnitudes; the depth of the sums of tensors as small as these stays below 64 in any order that is not one chain.
SUM_ERROR = 64 * EPSILON
FULL = [name for name in LAYOUTS if name != "empty"]
BITS = [1, 2, 4, 8]
GIVEN = torch.cat([torch.tensor(SPECIAL), values(206) * 10.0 ** torch.linspace(-8, 6, 206)]).reshape(10, 22)


def gradient_of(x: Tensor) -> Tensor:
    return (values(3, *x.shape)[1] if x.numel() else torch.zeros(x.shape)).to(x.dtype)


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


NAN, INF = float("nan"), float("inf")


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


def check_gradient(grad: Tensor, bits: int, seed: int, device: str) -> Tensor:
    quantized = twins.quantize_gradient(grad.to(device), bits, torch.tensor(seed, device=device))
    assert_same_bits(quantized, native.dorefa_gradient(grad, bits, torch.tensor(seed)))
    assert quantized.stride() == torch.empty_like(grad).stride()
    return quantized
