"""binarize: y = +1 where x >= 0, else -1.

Layout: programs take ``layout.BLOCK`` neighbouring elements in memory order, whatever the strides.
Who owns what: the host function owns y and the mask.
Bytes an element: reads and writes x's size and writes 1/8 for the mask; the backward is fake_quantize's.
Numerics: ``numerics.sign_bit``, so -1 for NaN. The mask is 1 where |x| <= 1.
"""

# triton ships no types, so triton.jit is untyped.
# mypy: disallow-untyped-decorators=False

import triton
import triton.language as tl
from torch import Tensor

from quantkern.triton.fake_quantize import store_mask
from quantkern.triton.layout import BLOCK, LAUNCH, blocks, dense_in_out, index_type, new_mask, on_device
from quantkern.triton.numerics import narrow, sign_bit, widen


@triton.jit
def binarize_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    numel: tl.tensor,
    WITH_MASK: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block."""
    start = tl.program_id(0).to(INDEX) * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < numel
    x = widen(tl.load(x_ptr + at, mask=inside, other=0.0))
    y = tl.where(sign_bit(x), 1.0, -1.0)
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=inside)
    if WITH_MASK:
        store_mask(mask_ptr, start, numel, inside & (tl.abs(x) <= 1.0), BLOCK)


def binarize_forward(x: Tensor, with_mask: bool) -> tuple[Tensor, Tensor]:
    """(y, mask)."""
    dense, y = dense_in_out(x)
    mask = new_mask(x, with_mask)
    if x.numel() > 0:
        with on_device(x):
            binarize_kernel[blocks(x.numel())](
                dense, y, mask, x.numel(), with_mask, index_type(x.numel()), BLOCK, **LAUNCH
            )
    return y, mask
