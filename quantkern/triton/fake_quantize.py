"""fake_quantize: y = (clamp(rint(x * (1 / scale)) + zero_point, quant_min, quant_max) - zero_point) * scale.

Layout: programs take ``layout.BLOCK`` neighbouring elements in memory order, whatever the strides. Per channel the
element at place p has channel p // inner % channels; a program finds its first row once, so the elements themselves
count in 32 bits up to 2^31 elements.
Who owns what: the host functions own y, the mask and dx; scale, zero_point and step are read on the device only.
Bytes an element: forward reads and writes x's size and writes 1/8 for the mask, backward reads it again.
Numerics: ``numerics.fake_quantize_lane``; bit-equal with the reference. While step < start_step y is x and the
gradient passes everywhere. The mask holds element i in bit i % 8 of byte i / 8, padding bits are 0.
"""

# triton ships no types, so triton.jit is untyped.
# mypy: disallow-untyped-decorators=False

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkern.triton.layout import (
    BLOCK,
    LAUNCH,
    Layout,
    blocks,
    dense_in_out,
    index_type,
    layout_of,
    new_mask,
    on_device,
)
from quantkern.triton.numerics import fake_quantize_lane, narrow, reciprocal_scale, widen


@triton.jit
def has_started(step_ptr: tl.tensor, start_step: tl.tensor) -> tl.tensor:
    """Whether x is quantized in this call; always, without a step."""
    return tl.full((), 1, tl.int1) if step_ptr is None else tl.load(step_ptr) >= start_step


@triton.jit
def store_mask(mask_ptr: tl.tensor, start: tl.tensor, numel: tl.tensor, passes: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Eight elements to a byte; ``passes`` is 0 beyond numel."""
    bits = tl.reshape(passes.to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
    at = start // 8 + tl.arange(0, BLOCK // 8)
    tl.store(mask_ptr + at, tl.sum(bits, axis=1).to(tl.uint8), mask=at * 8 < numel)


@triton.jit
def quantize_block(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    start: tl.tensor,
    numel: tl.tensor,
    scale: tl.tensor,
    inverse: tl.tensor,
    zero_point: tl.tensor,
    quant_min: tl.tensor,
    quant_max: tl.tensor,
    started: tl.tensor,
    WITH_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program's block; scale, inverse and zero_point are one number or one an element."""
    at = start + tl.arange(0, BLOCK)
    inside = at < numel
    x = widen(tl.load(x_ptr + at, mask=inside, other=0.0))
    low = tl.cast(quant_min, tl.float32)
    high = tl.cast(quant_max, tl.float32)
    y, passes = fake_quantize_lane(x, inverse, scale, zero_point, low, high)
    tl.store(y_ptr + at, narrow(tl.where(started, y, x), y_ptr.dtype.element_ty), mask=inside)
    if WITH_MASK:
        store_mask(mask_ptr, start, numel, inside & (passes | (started == 0)), BLOCK)


@triton.jit
def fake_quantize_tensor_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    step_ptr: tl.tensor,
    numel: tl.tensor,
    quant_min: tl.tensor,
    quant_max: tl.tensor,
    start_step: tl.tensor,
    BY_VALUE: tl.constexpr,
    WITH_MASK: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """scale and zero_point are numbers (BY_VALUE) or pointers to one."""
    start = tl.program_id(0).to(INDEX) * BLOCK
    if BY_VALUE:
        one_scale = tl.cast(scale, tl.float32)
        one_zero = tl.cast(zero_point, tl.float32)
    else:
        one_scale = tl.load(scale)
        one_zero = tl.load(zero_point).to(tl.float32)
    inverse = reciprocal_scale(one_scale)
    started = has_started(step_ptr, start_step)
    quantize_block(
        x_ptr, y_ptr, mask_ptr, start, numel, one_scale, inverse, one_zero, quant_min, quant_max, started,
        WITH_MASK, BLOCK,
    )  # fmt: skip


@triton.jit
def fake_quantize_channel_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_point_ptr: tl.tensor,
    step_ptr: tl.tensor,
    numel: tl.tensor,
    channels: tl.tensor,
    inner: tl.tensor,
    quant_min: tl.tensor,
    quant_max: tl.tensor,
    start_step: tl.tensor,
    LONG_ROWS: tl.constexpr,
    WITH_MASK: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """LONG_ROWS: inner >= BLOCK, so that a block meets at most two channels and their inverses are found once."""
    start = tl.program_id(0).to(INDEX) * BLOCK
    row = start // inner
    place = start - row * inner + tl.arange(0, BLOCK)
    if LONG_ROWS:
        here = row % channels
        following = (row + 1) % channels
        first = place < inner
        scale = tl.where(first, tl.load(scale_ptr + here), tl.load(scale_ptr + following))
        zeros = tl.where(first, tl.load(zero_point_ptr + here), tl.load(zero_point_ptr + following))
        one = reciprocal_scale(tl.load(scale_ptr + here))
        other = reciprocal_scale(tl.load(scale_ptr + following))
        inverse = tl.where(first, one, other)
    else:
        channel = (row + place // inner) % channels
        scale = tl.load(scale_ptr + channel)
        zeros = tl.load(zero_point_ptr + channel)
        inverse = reciprocal_scale(scale)
    started = has_started(step_ptr, start_step)
    quantize_block(
        x_ptr, y_ptr, mask_ptr, start, numel, scale, inverse, zeros.to(tl.float32), quant_min, quant_max, started,
        WITH_MASK, BLOCK,
    )  # fmt: skip


@triton.jit
def fake_quantize_backward_kernel(
    grad_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    numel: tl.tensor,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """dx = grad where the mask's bit is 1, else 0."""
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
    byte = tl.load(mask_ptr + (at >> 3), mask=inside, other=0).to(tl.int32)
    passes = ((byte >> (at & 7).to(tl.int32)) & 1) != 0
    tl.store(dx_ptr + at, tl.where(passes, grad, 0.0), mask=inside)


def launch_fake_quantize(
    x: Tensor,
    y: Tensor,
    mask: Tensor,
    layout: Layout,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    step: Tensor | None,
    start_step: int,
) -> None:
    """Fake-quantize a dense x into y of the same layout (they may be one tensor) and its mask, if there is room."""
    numel, with_mask, index = x.numel(), mask.numel() > 0, index_type(x.numel())
    if layout.channels == 1:
        fake_quantize_tensor_kernel[blocks(numel)](
            x, y, mask, scale, zero_point, step, numel, quant_min, quant_max, start_step,
            False, with_mask, index, BLOCK, **LAUNCH,
        )  # fmt: skip
    else:
        fake_quantize_channel_kernel[blocks(numel)](
            x, y, mask, scale, zero_point, step, numel, layout.channels, layout.inner, quant_min, quant_max,
            start_step, layout.inner >= BLOCK, with_mask, index, BLOCK, **LAUNCH,
        )  # fmt: skip


def fake_quantize_forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    step: Tensor | None,
    start_step: int,
    with_mask: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, mask). scale: float32, zero_point: int32 or float32, one value or one a channel of ``axis``."""
    dense, y = dense_in_out(x, dtype)
    mask = new_mask(x, with_mask)
    if x.numel() > 0:
        scale, zero_point = scale.detach().contiguous(), zero_point.detach().contiguous()
        with on_device(x):
            launch_fake_quantize(
                dense, y, mask, layout_of(dense, axis), scale, zero_point, quant_min, quant_max, step, start_step
            )
    return y, mask


def fake_quantize_forward_number(
    x: Tensor, scale: float, zero_point: float, quant_min: int, quant_max: int, with_mask: bool
) -> tuple[Tensor, Tensor]:
    """(y, mask) with a scale and a zero point known on the host; both are rounded to float32."""
    dense, y = dense_in_out(x)
    mask = new_mask(x, with_mask)
    if x.numel() > 0:
        with on_device(x):
            fake_quantize_tensor_kernel[blocks(x.numel())](
                dense, y, mask, float(scale), float(zero_point), None, x.numel(), quant_min, quant_max, 0,
                True, with_mask, index_type(x.numel()), BLOCK, **LAUNCH,
            )  # fmt: skip
    return y, mask


def in_layout(grad: Tensor, strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """grad with ``strides`` and the tensor for dx: the same one where grad had to be copied."""
    dx = torch.empty_strided(grad.shape, tuple(strides), dtype=grad.dtype, device=grad.device)
    if all(have == want for size, have, want in zip(grad.shape, grad.stride(), strides, strict=True) if size != 1):
        return grad, dx
    dx.copy_(grad)
    return dx, dx


def fake_quantize_backward(grad: Tensor, mask: Tensor, strides: Sequence[int]) -> Tensor:
    """grad where the mask's bit is 1, else 0, laid out by ``strides``: those of the y that the mask came with."""
    expected = (grad.numel() + 7) // 8
    if mask.dtype != torch.uint8 or mask.numel() != expected:
        raise ValueError(
            f"mask must hold {expected} uint8 values, one bit an element of grad, got {mask.numel()} of {mask.dtype}; "
            "pass the mask of the forward call"
        )
    dense, dx = in_layout(grad.detach(), strides)
    if grad.numel() > 0:
        with on_device(grad):
            fake_quantize_backward_kernel[blocks(grad.numel())](
                dense, mask, dx, grad.numel(), index_type(grad.numel()), BLOCK, **LAUNCH
            )
    return dx
