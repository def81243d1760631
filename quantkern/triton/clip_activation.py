"""clip_activation: y = x within [lower, upper].

Layout: programs take ``layout.BLOCK`` neighbouring elements in memory order, whatever the strides.
Who owns what: the host functions own y and the mask; in place y is x.
Bytes an element: reads and writes x's size and writes 1/8 for the mask; the backward is fake_quantize's.
Numerics: comparisons; NaN stays NaN. The mask is 1 where lower < x < upper.
"""

# triton ships no types, so triton.jit is untyped.
# mypy: disallow-untyped-decorators=False

import triton
import triton.language as tl
from torch import Tensor

from quantkern.triton.fake_quantize import store_mask
from quantkern.triton.layout import BLOCK, LAUNCH, blocks, dense_in_out, index_type, new_mask, on_device
from quantkern.triton.numerics import narrow, widen


@triton.jit
def clip_activation_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    numel: tl.tensor,
    lower: tl.tensor,
    upper: tl.tensor,
    WITH_MASK: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block."""
    start = tl.program_id(0).to(INDEX) * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < numel
    x = widen(tl.load(x_ptr + at, mask=inside, other=0.0))
    low = tl.cast(lower, tl.float32)
    high = tl.cast(upper, tl.float32)
    y = tl.where(x < low, low, tl.where(x > high, high, x))
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=inside)
    if WITH_MASK:
        store_mask(mask_ptr, start, numel, inside & (low < x) & (x < high), BLOCK)


def clip_activation_forward(x: Tensor, lower: float, upper: float, with_mask: bool) -> tuple[Tensor, Tensor]:
    """(y, mask)."""
    dense, y = dense_in_out(x)
    mask = new_mask(x, with_mask)
    if x.numel() > 0:
        with on_device(x):
            clip_activation_kernel[blocks(x.numel())](
                dense, y, mask, x.numel(), lower, upper, with_mask, index_type(x.numel()), BLOCK, **LAUNCH
            )
    return y, mask
