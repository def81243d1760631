"""fake_quantize_weight: the current range of x, its scale and zero point, and x fake-quantized, in three launches.

Layout: as in min_max.py (statistics) and fake_quantize.py (the last pass).
Who owns what: the caller owns scale and zero_point, which are written; the partial ranges live for the call.
Bytes an element: x is read twice and written once, plus 1/8 for the mask.
Numerics: ``numerics.choose_scale``; bit-equal with the reference. Before start_step scale and zero_point are written
too, but y is x and the gradient passes everywhere.
"""

# triton ships no types, so triton.jit is untyped.
# mypy: disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkern.triton.fake_quantize import launch_fake_quantize
from quantkern.triton.layout import LAUNCH, dense_in_out, layout_of, new_mask, on_device
from quantkern.triton.min_max import merge_partials, merge_shape, partial_ranges
from quantkern.triton.numerics import choose_scale


@triton.jit
def weight_scale_kernel(
    low_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_point_ptr: tl.tensor,
    channels: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    quant_min: tl.tensor,
    quant_max: tl.tensor,
    SYMMETRIC: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """CHANNELS channels a program: partial ranges in, scale and zero point out."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    low, high = merge_partials(low_ptr, high_ptr, channel, channels, rows, width, CHANNELS, BLOCK)
    least = tl.cast(quant_min, tl.float32)
    most = tl.cast(quant_max, tl.float32)
    scale, zero_point = choose_scale(low, high, least, most, SYMMETRIC)
    tl.store(scale_ptr + channel, scale, mask=inside)
    tl.store(zero_point_ptr + channel, zero_point.to(zero_point_ptr.dtype.element_ty), mask=inside)


def fake_quantize_weight_forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    axis: int | None,
    step: Tensor | None,
    start_step: int,
    with_mask: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, mask); writes scale (float32) and zero_point (int32), contiguous, one value or one a channel of ``axis``."""
    dense, y = dense_in_out(x, dtype)
    mask = new_mask(x, with_mask)
    layout = layout_of(dense, axis)
    if layout.channels == 0:
        return y, mask
    together, at_once = merge_shape(layout.channels)
    with on_device(x):
        partials = partial_ranges(dense, layout, None)
        weight_scale_kernel[(triton.cdiv(layout.channels, together),)](
            partials.low, partials.high, scale, zero_point, layout.channels, partials.rows, partials.width,
            quant_min, quant_max, symmetric, together, at_once, **LAUNCH,
        )  # fmt: skip
        if x.numel() > 0:
            launch_fake_quantize(dense, y, mask, layout, scale, zero_point, quant_min, quant_max, step, start_step)
    return y, mask
