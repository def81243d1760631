"""The checks of CUDA kernels on a GPU against the specification, and how their launches are watched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from test_cuda_emulation import axis_of, fresh_state, make_input, same
from test_cuda_emulation_binary import Convolution, dirty, equal, real, thresholds
from test_cuda_emulation_learned import check_lsq_gradients
from torch import Tensor

from quantkern import ops, reference  # noqa: F401  (ops registers torch.ops.quantkern)

OPS = torch.ops.quantkern


def why_not() -> str | None:
    """The reason why nothing here can run."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("quantkern::fake_quantize_forward", "CUDA"):
        return "this build has no CUDA kernels"
    return None


def run_without_waiting(work: Callable[[], object]) -> None:
    """An error where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(work: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """The graph of ``work``, and the tensors that a replay fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    return graph, outputs


def unpack(mask: Tensor, x: Tensor) -> Tensor:
    bits = ((mask.cpu()[:, None] >> torch.arange(8)) & 1).flatten()
    assert not bits[x.numel() :].any(), "padding bits must be zero"
    return bits[: x.numel()].bool().view(x.shape)


def on_device(x: Tensor, offset: int = 0) -> Tensor:
    """x on the GPU, misaligned by ``offset`` elements."""
    memory = torch.empty(x.numel() + offset, dtype=x.dtype, device="cuda")
    memory[offset:] = x.flatten().cuda()
    return memory[offset:].view(x.shape)


def check_fake_quantize(view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    x = make_input(view, dtype)
    axis = axis_of(x)
    scale = torch.linspace(0.003, 0.4, view[1])
    zero_point = torch.arange(view[1], dtype=torch.int32) - 3
    y, mask = OPS.fake_quantize_forward(
        on_device(x, offset), scale.cuda(), zero_point.cuda(), -128, 127, axis, None, 0, True
    )
    expected, passes = reference.quantize(x, scale, zero_point, -128, 127, axis)
    same(y.cpu(), expected)
    assert torch.equal(unpack(mask, x), passes)
    grad = torch.randn(view).to(dtype)
    gradient = OPS.fake_quantize_backward(on_device(grad, offset), mask, y.stride())
    same(gradient.cpu(), torch.where(passes, grad, torch.zeros((), dtype=dtype)))


def check_weight(view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    x = make_input(view, dtype, special=False)
    axis = axis_of(x)
    for limits, symmetric, with_mask in (((-127, 127), True, False), ((-128, 127), False, True)):
        scale, zero_point = torch.zeros(view[1]).cuda(), torch.zeros(view[1], dtype=torch.int32).cuda()
        y, mask = OPS.fake_quantize_weight_forward(
            on_device(x, offset), scale, zero_point, *limits, symmetric, axis, None, 0, with_mask
        )
        expected, wanted_scale, wanted_zero_point = reference.fake_quantize_weight(x, *limits, symmetric, axis)
        same(y.cpu(), expected)
        same(scale.cpu(), wanted_scale)
        assert torch.equal(zero_point.cpu(), wanted_zero_point)
        if with_mask:
            assert torch.equal(
                unpack(mask, x), reference.quantize(x, wanted_scale, wanted_zero_point, *limits, axis)[1]
            )


def check_activation(view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    state, expected = tuple(value.cuda() for value in fresh_state(view[1])), fresh_state(view[1])
    for batch, observing in enumerate((False, True, True, False)):
        x = make_input(view, dtype, special=False) * (1.0 + batch)
        axis = axis_of(x)
        flag = torch.tensor([observing], device="cuda")
        y, _ = OPS.fake_quantize_activation_forward(
            on_device(x, offset), *state, flag, -128, 127, False, 0.9, axis, None, 0, True
        )
        wanted, *after = reference.fake_quantize_activation(
            x, *expected, -128, 127, False, 0.9, axis, observing=observing
        )
        expected = tuple(after)
        same(y.cpu(), wanted)
        for actual, value in zip(state, expected, strict=True):
            same(actual.cpu(), value)


def check_lsq(view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    x, grad = make_input(view, dtype), torch.randn(view).to(dtype)
    axis = axis_of(x)
    scale = torch.linspace(0.05, 0.4, view[1])
    for limits, zero_point in (((-8, 7), None), ((0, 15), torch.linspace(-3.0, 9.5, view[1]))):
        zero = None if zero_point is None else zero_point.cuda()
        y = OPS.lsq_forward(on_device(x, offset), scale.cuda(), *limits, axis, zero)
        same(y.cpu(), reference.lsq(x, scale, *limits, axis, 1.0, zero_point))
        arguments = on_device(grad, offset), on_device(x, offset), scale.cuda(), *limits, 0.37, axis, zero
        first, second = OPS.lsq_backward(*arguments), OPS.lsq_backward(*arguments)
        for value, again in zip(first, second, strict=True):
            same(value, again)
        check_lsq_gradients(tuple(value.cpu() for value in first), grad, x, scale, zero_point, limits, 0.37)


def check_dorefa(x: Tensor, offset: int) -> None:
    """The CPU's results bit for bit, but for one bit's mean and for what goes through the maximum."""
    dtype, device_x = x.dtype, on_device(x, offset)
    seed = torch.tensor(1 << 40)
    for bits in (1, 2, 8):
        y, mask = OPS.dorefa_activation_forward(device_x, bits, True)
        expected, passes = OPS.dorefa_activation_forward(x, bits, True)
        same(y.cpu(), expected)
        assert torch.equal(mask.cpu(), passes)
        same(OPS.dorefa_gradient(device_x, bits, seed.cuda()).cpu(), OPS.dorefa_gradient(x, bits, seed))
        y, largest = OPS.dorefa_weight_forward(device_x, bits)
        expected, wanted = OPS.dorefa_weight_forward(x, bits)
        rtol = 0.0 if bits > 1 else max(1e-6, torch.finfo(dtype).eps)
        torch.testing.assert_close(largest.cpu(), wanted, rtol=rtol, atol=0, equal_nan=True)
        torch.testing.assert_close(y.cpu(), expected, rtol=rtol, atol=0, equal_nan=True)
    grad = torch.randn(x.shape).to(dtype)
    dw = OPS.dorefa_weight_backward(on_device(grad, offset), device_x, largest).cpu()
    expected = OPS.dorefa_weight_backward(grad, x, wanted)
    elsewhere = x.float().abs() != wanted
    same(dw[elsewhere], expected[elsewhere])
    size = float((grad.float() * x.float().tanh()).abs().nan_to_num(0.0).sum() / wanted.tanh() ** 2)
    rtol = max(1e-5, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(dw[~elsewhere], expected[~elsewhere], rtol=rtol, atol=size * 1e-6, equal_nan=True)


def check_packing(view: tuple[int, int, int], dtype: torch.dtype, offset: int) -> None:
    x = real(view, dtype, offset)
    expected, counts = reference.pack_signs_counted(x, 1)
    packed, ones = OPS.pack_signs_counted(on_device(x, offset), 1)
    equal(packed.cpu(), expected)
    equal(ones.cpu(), counts)
    same(OPS.unpack_signs(packed, view[1], dtype).cpu(), reference.unpack_signs(expected, view[1], dtype))
    y, mask = OPS.binarize_forward(on_device(x, offset), True)
    same(y.cpu(), reference.binarize(x))
    assert torch.equal(unpack(mask, x), x.abs() <= 1)


def check_binary_matmul(sizes: tuple[int, int, int], offset: int) -> None:
    """With and without arranged weights; padding bits are ignored."""
    m, n, k = sizes
    clean = reference.pack_signs(real((m, k), torch.float32)), reference.pack_signs(real((n, k), torch.float32, 1))
    a, b = (on_device(dirty(t, k, 0), offset) for t in clean)
    scale, bias = torch.linspace(-0.7, 0.3, n), torch.linspace(5.0, -3.0, n)
    threshold, flip = thresholds(n, k)
    for arranged in (None, OPS.arrange_signs(clean[1].cuda())):
        y = OPS.binary_matmul(a, b, k, scale.cuda(), bias.cuda(), arranged)
        equal(y.cpu(), reference.binary_matmul(*clean, k, scale, bias))
        signs = OPS.binary_matmul_sign(a, b, k, threshold.cuda(), flip.cuda(), arranged)
        equal(signs.cpu(), reference.binary_matmul_sign(*clean, k, threshold, flip))


def check_binary_conv2d(case: Convolution, offset: int) -> None:
    images, height, width, channels, columns, taps, *geometry = case
    clean = (
        reference.pack_signs(real((images, height, width, channels), torch.float32)),
        reference.pack_signs(real((columns, *taps, channels), torch.float32, 1)),
    )
    x, weight = (on_device(dirty(t, channels, 0), offset) for t in clean)
    scale, bias = torch.linspace(-0.7, 0.3, columns), torch.linspace(5.0, -3.0, columns)
    expected = reference.binary_conv2d(*clean, channels, *geometry, scale, bias)
    threshold, flip = thresholds(columns, channels)
    signs = reference.binary_conv2d_sign(*clean, channels, *geometry, threshold, flip)
    for arranged, last in ((None, False), (OPS.arrange_signs(clean[1].cuda()), True)):
        y = OPS.binary_conv2d(x, weight, channels, *geometry, scale.cuda(), bias.cuda(), arranged, last)
        equal(y.cpu(), expected)
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        actual = OPS.binary_conv2d_sign(x, weight, channels, *geometry, threshold.cuda(), flip.cuda(), arranged)
        equal(actual.cpu(), signs)
