"""fake_quantize_activation: x's range into a moving average, scale and zero point, and x fake-quantized.

Three launches: partial ranges (min_max.py), the update of the state (a program for up to 32 channels), the quantizing
pass (fake_quantize.py). Nothing waits for the host: the observing flag and the step are read by the kernels.

Layout: as in min_max.py and fake_quantize.py.
Who owns what: the caller owns running_min, running_max, scale and zero_point, which are written while the flag is
set; the partial ranges and the word ``active`` live for the call. active is 1 when the step is reached and every
channel has seen a value; otherwise the last pass is the identity.
Bytes an element: x is read twice (once while the flag is 0) and written once, plus 1/8 for the mask.
Numerics: ``numerics.update_running`` and ``choose_scale``; bit-equal with the reference.
"""

# triton ships no types, so triton.jit is untyped.
# mypy: disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkern.triton.fake_quantize import has_started, launch_fake_quantize
from quantkern.triton.layout import LAUNCH, dense_in_out, layout_of, new_mask, on_device
from quantkern.triton.min_max import merge_partials, merge_shape, partial_ranges
from quantkern.triton.numerics import choose_scale, update_running


@triton.jit
def update_state_kernel(
    low_ptr: tl.tensor,
    high_ptr: tl.tensor,
    running_min_ptr: tl.tensor,
    running_max_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_point_ptr: tl.tensor,
    observing_ptr: tl.tensor,
    active_ptr: tl.tensor,
    step_ptr: tl.tensor,
    channels: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    quant_min: tl.tensor,
    quant_max: tl.tensor,
    keep: tl.tensor,
    take: tl.tensor,
    start_step: tl.tensor,
    SYMMETRIC: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """CHANNELS channels a program: partial ranges and old state in, new state out."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    observing = tl.load(observing_ptr) != 0
    # While the flag is 0 there is no channel to write.
    renewed = channel < tl.where(observing, channels, 0)
    low, high = merge_partials(low_ptr, high_ptr, channel, channels, rows, width, CHANNELS, BLOCK)
    old_min = tl.load(running_min_ptr + channel, mask=inside, other=0.0)
    old_max = tl.load(running_max_ptr + channel, mask=inside, other=0.0)
    new_min, new_max = update_running(old_min, old_max, low, high, tl.cast(keep, tl.float32), tl.cast(take, tl.float32))
    new_min = tl.where(renewed, new_min, old_min)
    new_max = tl.where(renewed, new_max, old_max)
    tl.store(running_min_ptr + channel, new_min, mask=renewed)
    tl.store(running_max_ptr + channel, new_max, mask=renewed)
    seen = new_min <= new_max
    least = tl.cast(quant_min, tl.float32)
    most = tl.cast(quant_max, tl.float32)
    scale, zero_point = choose_scale(new_min, new_max, least, most, SYMMETRIC)
    tl.store(scale_ptr + channel, scale, mask=renewed & seen)
    tl.store(zero_point_ptr + channel, zero_point.to(zero_point_ptr.dtype.element_ty), mask=renewed & seen)
    unseen = tl.sum((inside & (seen == 0)).to(tl.int32), axis=0)
    active = (unseen == 0) & has_started(step_ptr, start_step)
    # A lone program answers for all channels; of several, any may turn the 1 that was there before to 0.
    tl.store(active_ptr, active.to(tl.int32), mask=(active == 0) | (tl.num_programs(0) == 1))


def fake_quantize_activation_forward(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    observing: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    ema_decay: float,
    axis: int | None,
    step: Tensor | None,
    start_step: int,
    with_mask: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, mask); writes the state, contiguous, one value or one a channel of ``axis``, while ``observing`` is set."""
    dense, y = dense_in_out(x, dtype)
    mask = new_mask(x, with_mask)
    layout = layout_of(dense, axis)
    if layout.channels == 0:
        return y, mask
    flag = observing.view(torch.uint8)
    together, at_once = merge_shape(layout.channels)
    lone = layout.channels <= together
    active = x.new_empty(1, dtype=torch.int32) if lone else x.new_ones(1, dtype=torch.int32)
    with on_device(x):
        partials = partial_ranges(dense, layout, flag)
        update_state_kernel[(triton.cdiv(layout.channels, together),)](
            partials.low, partials.high, running_min, running_max, scale, zero_point, flag, active, step,
            layout.channels, partials.rows, partials.width, quant_min, quant_max, ema_decay, 1.0 - ema_decay,
            start_step, symmetric, together, at_once, **LAUNCH,
        )  # fmt: skip
        if x.numel() > 0:
            launch_fake_quantize(dense, y, mask, layout, scale, zero_point, quant_min, quant_max, active, 1)
    return y, mask
