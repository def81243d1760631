"""The CUDA kernels of the learned step size and of DoReFa, run on the processor as in ``test_cuda_emulation``.

DoReFa's formulas take the same operations on every device, so the CPU's results are compared bit for bit; only sums
are added in another order.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from test_cuda_emulation import (
    DTYPES,
    INPUTS,
    VIEWS,
    Output,
    axis_of,
    emulated_kernels,  # noqa: F401
    emulated_library,  # noqa: F401
    fake_quantize,
    ints,
    make_input,
    pointer,
    pytestmark,  # noqa: F401
    same,
    unpack,
)
from torch import Tensor

from quantkern import (
    ops,  # noqa: F401  (registers torch.ops.quantkern)
    reference,
)

OPS = torch.ops.quantkern

# Rows cut into several parts, columns cut into several parts.
LSQ_VIEWS = [*VIEWS, (8, 4, 1000), (1, 2, 70000), (1, 1, 300000), (700, 40, 1), (900, 2, 9)]
SIZES = [1, 7, 8, 9, 4001, 100_003]
BITS = [1, 2, 4, 8, 16]


def steps(bits: int) -> ctypes.c_float:
    return ctypes.c_float(2**bits - 1)


def gradient_like(x: Tensor, offset: int) -> Tensor:
    """Random values in memory that is misaligned by ``offset`` elements."""
    memory = torch.randn(x.numel() + offset, generator=torch.Generator().manual_seed(x.numel())).to(x.dtype)
    return memory[offset:].view(x.shape)


def lsq_backward(
    kernels: ctypes.CDLL,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    limits: tuple[int, int],
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dscale = Output(x.numel(), x.dtype), Output(x.shape[1], torch.float32)
    dzero = Output(0 if zero_point is None else x.shape[1], torch.float32)
    error = kernels.lsq_backward(
        DTYPES[x.dtype], pointer(x), pointer(grad), pointer(dx.tensor), ints(*x.shape), pointer(scale),
        pointer(zero_point), *limits, ctypes.c_double(grad_scale), pointer(dscale.tensor),
        None if zero_point is None else pointer(dzero.tensor),
    )  # fmt: skip
    assert error == 0
    return dx.checked().view(x.shape), dscale.checked(), dzero.checked()


def check_lsq_gradients(actual: tuple[Tensor, ...], grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None,
                        limits: tuple[int, int], grad_scale: float) -> None:  # fmt: skip
    """dx bit for bit; the sums within the rounding of adding n float32 numbers."""
    x = x.detach().clone().requires_grad_()
    leaves = [value.clone().requires_grad_() for value in (scale, zero_point) if value is not None]
    axis = axis_of(x)
    y = reference.lsq(x, leaves[0], *limits, axis, grad_scale, None if zero_point is None else leaves[1])
    y.backward(grad)
    assert x.grad is not None
    same(actual[0], x.grad)
    if zero_point is None:
        assert actual[2].numel() == 0
    v, position, step, offset = reference.lsq_positions(x.detach(), scale, zero_point, axis)
    below, above = ~(position > limits[0]), position >= limits[1]
    inside = ~(below | above)
    factor = torch.where(inside, v.round() - v, torch.where(below, limits[0] - offset, limits[1] - offset))
    sizes = [factor, torch.where(inside, 0.0, -step.expand_as(v))]
    for value, leaf, size in zip(actual[1:], leaves, sizes, strict=False):
        assert leaf.grad is not None
        total = (size * grad).abs().double()
        total = total.sum() if axis is None else total.sum((0, 2))
        bound = total * abs(grad_scale) * 64 * torch.finfo(torch.float32).eps + leaf.grad.abs() * 1e-6 + 1e-30
        wrong = ~((value - leaf.grad).abs() <= bound) & ~(value.isnan() & leaf.grad.isnan())
        assert not wrong.any(), (value[wrong], leaf.grad[wrong])


@pytest.mark.parametrize("view", LSQ_VIEWS, ids=str)
@pytest.mark.parametrize(("dtype", "offset"), INPUTS, ids=str)
def test_lsq_backward(kernels: ctypes.CDLL, view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    x = make_input(view, dtype, offset)
    grad, scale = gradient_like(x, offset), torch.linspace(0.05, 0.4, view[1])
    for limits, zero_point in (((-8, 7), None), ((0, 15), torch.linspace(-3.0, 9.5, view[1]))):
        actual = lsq_backward(kernels, grad, x, scale, zero_point, limits, 0.37)
        check_lsq_gradients(actual, grad, x, scale, zero_point, limits, 0.37)
        again = lsq_backward(kernels, grad, x, scale, zero_point, limits, 0.37)
        for first, second in zip(actual, again, strict=True):
            same(first, second)


@pytest.mark.parametrize("view", [(1, 1, 1003), (3, 5, 40), (9, 5, 1)], ids=str)
def test_lsq_backward_in_place(kernels: ctypes.CDLL, view: tuple[int, int, int]) -> None:
    """dx may overwrite x."""
    x = make_input(view, torch.float32, special=False)
    grad, scale = gradient_like(x, 0), torch.full((view[1],), 0.1)
    expected = lsq_backward(kernels, grad, x, scale, None, (-8, 7), 1.0)
    dscale = torch.empty(view[1])
    error = kernels.lsq_backward(
        0, pointer(x), pointer(grad), pointer(x), ints(*view), pointer(scale), None, -8, 7, ctypes.c_double(1.0),
        pointer(dscale), None,
    )  # fmt: skip
    assert error == 0
    same(x, expected[0])
    same(dscale, expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lsq_backward_of_unusable_scale(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Everything counts as below: no gradient for x, quant_min times grad for the scale."""
    x = make_input((1, 2, 40), dtype, special=False)
    grad = torch.ones_like(x)
    dx, dscale, _ = lsq_backward(kernels, grad, x, torch.tensor([0.0, -1.0]), None, (-8, 7), 1.0)
    assert not dx.any()
    assert dscale.tolist() == [-320.0, -320.0]


@pytest.mark.parametrize("view", [(1, 1, 1003), (3, 5, 40), (2, 7, 49)], ids=str)
@pytest.mark.parametrize(("dtype", "offset"), INPUTS, ids=str)
def test_lsq_forward_without_zero_point(
    kernels: ctypes.CDLL, view: tuple[int, int, int], dtype: torch.dtype, offset: int
) -> None:
    x, scale = make_input(view, dtype, offset), torch.linspace(0.05, 0.4, view[1])
    y = Output(x.numel(), dtype)
    error = kernels.fake_quantize(
        DTYPES[dtype], pointer(x), pointer(y.tensor), None, ints(*view), pointer(scale), None, 0, ctypes.c_float(0),
        ctypes.c_float(0), -8, 7, None, ctypes.c_int64(0),
    )  # fmt: skip
    assert error == 0
    same(y.checked().view(view), reference.lsq(x, scale, -8, 7, axis_of(x)))
    same(y.tensor.view(view), fake_quantize(kernels, x, scale, torch.zeros(view[1]), (-8, 7))[0])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("dtype", "offset"), INPUTS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_dorefa_activation(kernels: ctypes.CDLL, n: int, dtype: torch.dtype, offset: int, bits: int) -> None:
    x = make_input((1, 1, n), dtype, offset).flatten()
    x[n // 2 :][:2] = torch.tensor([1.0, 0.0])[: min(2, n - n // 2)]
    y, mask = Output(n, dtype), Output((n + 7) // 8, torch.uint8)
    arguments = ctypes.c_int64(n), steps(bits)
    assert (
        kernels.dorefa_activation(DTYPES[dtype], pointer(x), pointer(y.tensor), pointer(mask.tensor), *arguments) == 0
    )
    expected, passes = OPS.dorefa_activation_forward(x, bits, True)
    same(y.checked(), expected)
    assert torch.equal(mask.checked(), passes)
    assert torch.equal(unpack(passes, n), (x >= 0) & (x <= 1))
    again = Output(n, dtype)
    assert kernels.dorefa_activation(DTYPES[dtype], pointer(x), pointer(again.tensor), None, *arguments) == 0
    same(again.checked(), expected)


def dorefa_weight(kernels: ctypes.CDLL, w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    y, largest = Output(w.numel(), w.dtype), Output(1, torch.float32)
    error = kernels.dorefa_weight(
        DTYPES[w.dtype], pointer(w), pointer(y.tensor), ctypes.c_int64(w.numel()), steps(bits), pointer(largest.tensor)
    )
    assert error == 0
    return y.checked(), largest.checked()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("dtype", "offset"), INPUTS, ids=str)
@pytest.mark.parametrize("special", [False, True], ids=["finite", "special"])
def test_dorefa_weight(kernels: ctypes.CDLL, n: int, dtype: torch.dtype, offset: int, special: bool) -> None:
    w = make_input((1, 1, n), dtype, offset, special).flatten()
    for bits in BITS[1:]:
        y, largest = dorefa_weight(kernels, w, bits)
        expected, wanted = OPS.dorefa_weight_forward(w, bits)
        same(y, expected)
        same(largest[0], wanted)
    y, mean = dorefa_weight(kernels, w, 1)
    expected, wanted = OPS.dorefa_weight_forward(w, 1)
    torch.testing.assert_close(mean[0], wanted, rtol=1e-6, atol=0, equal_nan=True)
    signed = torch.where(w < 0, -mean, torch.where(w >= 0, mean, w.float()))
    same(y, signed.to(dtype))


@pytest.mark.parametrize("values", [0.0, torch.nan, torch.inf, 1e-30], ids=str)
def test_dorefa_weight_of_one_value(kernels: ctypes.CDLL, values: float) -> None:
    """Nothing to normalise by, everything at the maximum."""
    w, grad = torch.full((77,), values), torch.ones(77)
    y, largest = dorefa_weight(kernels, w, 4)
    expected, wanted = OPS.dorefa_weight_forward(w, 4)
    same(y, expected)
    same(largest[0], wanted)
    same(dorefa_weight_backward(kernels, grad, w, largest), OPS.dorefa_weight_backward(grad, w, wanted))


def dorefa_weight_backward(kernels: ctypes.CDLL, grad: Tensor, w: Tensor, largest: Tensor) -> Tensor:
    dw = Output(w.numel(), w.dtype)
    pointers = pointer(w), pointer(grad), pointer(dw.tensor)
    numel = ctypes.c_int64(w.numel())
    assert kernels.dorefa_weight_backward(DTYPES[w.dtype], *pointers, numel, pointer(largest)) == 0
    return dw.checked()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("dtype", "offset"), INPUTS, ids=str)
@pytest.mark.parametrize("kind", ["one maximum", "many maxima", "nan"])
def test_dorefa_weight_backward(kernels: ctypes.CDLL, n: int, dtype: torch.dtype, offset: int, kind: str) -> None:
    """Bit for bit but where the gradient of the maximum, a sum, arrives."""
    w = make_input((1, 1, n), dtype, offset, special=False).flatten()
    if kind == "many maxima":
        w[::3] = w.abs().max()
        w[1::3] = -w.abs().max()
    if kind == "nan":
        w[n // 2] = torch.nan
    grad = gradient_like(w, offset)
    largest = w.float().abs().nan_to_num(0.0).max().reshape(1)
    dw = dorefa_weight_backward(kernels, grad, w, largest)
    expected = OPS.dorefa_weight_backward(grad, w, largest)
    elsewhere = w.float().abs() != largest
    same(dw[elsewhere], expected[elsewhere])
    size = (grad.float() * torch.tanh(w.float())).abs().sum() / torch.tanh(largest) ** 2
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(
        dw[~elsewhere], expected[~elsewhere], rtol=tolerance, atol=float(size.nan_to_num(0.0)) * 1e-6, equal_nan=True
    )


def dorefa_gradient(kernels: ctypes.CDLL, grad: Tensor, bits: int, seed: int) -> Tensor:
    out, key = Output(grad.numel(), grad.dtype), torch.tensor(seed)
    pointers = pointer(grad), pointer(out.tensor), ints(*grad.shape)
    error = kernels.dorefa_gradient(DTYPES[grad.dtype], *pointers, steps(bits), pointer(key))
    assert error == 0
    return out.checked().view(grad.shape)


@pytest.mark.parametrize("view", LSQ_VIEWS, ids=str)
@pytest.mark.parametrize(("dtype", "offset"), INPUTS, ids=str)
def test_dorefa_gradient(kernels: ctypes.CDLL, view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    """Samples are the middle axis of the view, the first one of the tensor."""
    grad = make_input(view, dtype, offset, special=False)
    grad.view(-1)[view[2] // 2] = torch.nan
    grad[:, view[1] // 2] *= 0.0
    for bits, seed in ((2, 7), (8, -(1 << 62) - 12345)):
        expected = OPS.dorefa_gradient(grad.transpose(0, 1), bits, torch.tensor(seed)).transpose(0, 1)
        same(dorefa_gradient(kernels, grad, bits, seed), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dorefa_gradient_keeps_overflow(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    """A sample with an infinity comes back unchanged; one of zeros or of NaN becomes zeros."""
    grad = make_input((1, 4, 27), dtype, special=False)
    grad[0, 1, 3], grad[:, 2], grad[:, 3] = -torch.inf, 0.0, torch.nan
    out = dorefa_gradient(kernels, grad, 4, 1)
    same(out[:, 1], grad[:, 1])
    assert not out[:, 2:].any()
    same(out[:, 0], OPS.dorefa_gradient(grad[0], 4, torch.tensor(1))[0][None])
