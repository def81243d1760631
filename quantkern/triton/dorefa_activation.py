"""dorefa_activation: y = q(clip(x, 0, 1)), q(z) = rint(z * n) / n with n = 2^bits - 1.

Layout: programs take ``layout.BLOCK`` neighbouring elements in memory order, whatever the strides.
Who owns what: the host function owns y and the mask.
Bytes an element: reads and writes x's size and writes 1/8 for the mask; the backward is fake_quantize's.
Numerics: ``numerics.dorefa_activation_lane``; bit-equal with the reference. The mask is 1 where 0 <= x <= 1.
"""

# triton ships no types, so triton.jit is untyped.
# mypy: disallow-untyped-decorators=False

import triton
import triton.language as tl
from torch import Tensor

from quantkern.triton.fake_quantize import store_mask
from quantkern.triton.layout import BLOCK, LAUNCH, blocks, dense_in_out, index_type, new_mask, on_device
from quantkern.triton.numerics import dorefa_activation_lane, narrow, widen


@triton.jit
def dorefa_activation_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    numel: tl.tensor,
    steps: tl.tensor,
    WITH_MASK: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block; steps = n."""
    start = tl.program_id(0).to(INDEX) * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < numel
    x = widen(tl.load(x_ptr + at, mask=inside, other=0.0))
    y, passes = dorefa_activation_lane(x, tl.cast(steps, tl.float32))
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=inside)
    if WITH_MASK:
        store_mask(mask_ptr, start, numel, inside & passes, BLOCK)


def dorefa_activation_forward(x: Tensor, bits: int, with_mask: bool) -> tuple[Tensor, Tensor]:
    """(y, mask); bits from 1 to 16."""
    dense, y = dense_in_out(x)
    mask = new_mask(x, with_mask)
    if x.numel() > 0:
        with on_device(x):
            dorefa_activation_kernel[blocks(x.numel())](
                dense, y, mask, x.numel(), float(2**bits - 1), with_mask, index_type(x.numel()), BLOCK, **LAUNCH
            )
    return y, mask
