"""dorefa_gradient: every sample of a gradient, in proportion to its largest element, rounded at random to bits.

Three launches: partial ranges and the largest magnitude of every sample (min_max.py), the quantizing pass. The file
is not named after its operation alone, since a module hides a function of its own name in the package.

Layout: programs take ``layout.BLOCK`` neighbouring elements in memory order; the first axis, if there are more, is
that of the samples.
Who owns what: the host function owns the result; the ranges live for the call. The seed is read on the device only.
Bytes an element: read twice and written once.
Numerics: ``numerics.dorefa_gradient_lane`` with word i of Philox4x32-10(seed) for element i in memory order;
bit-equal with the reference. A sample whose largest magnitude is 0 becomes 0, or stays as it is when that is not
finite.
"""

# triton ships no types, so triton.jit is untyped.
# mypy: disallow-untyped-decorators=False

import triton
import triton.language as tl
from torch import Tensor

from quantkern.triton.layout import BLOCK, LAUNCH, blocks, dense_in_out, index_type, layout_of, on_device
from quantkern.triton.min_max import largest_magnitudes
from quantkern.triton.numerics import centered_uniform, dorefa_gradient_lane, is_finite, narrow, philox, widen


@triton.jit
def noise_of(seed: tl.tensor, start: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """The noise of BLOCK elements from ``start``, a multiple of 4: four of them share a block of random words."""
    block = tl.cast(start, tl.int64) // 4 + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = philox(seed, block)
    return centered_uniform(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))


@triton.jit
def dorefa_gradient_kernel(
    grad_ptr: tl.tensor,
    out_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    numel: tl.tensor,
    channels: tl.tensor,
    inner: tl.tensor,
    steps: tl.tensor,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block; steps = n, a channel is a sample."""
    start = tl.program_id(0).to(INDEX) * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < numel
    row = start // inner
    sample = (row + (start - row * inner + tl.arange(0, BLOCK)) // inner) % channels
    width = 2.0 * tl.load(largest_ptr + sample)
    stored = tl.load(grad_ptr + at, mask=inside, other=0.0)
    noise = noise_of(tl.load(seed_ptr), start, BLOCK)
    y = dorefa_gradient_lane(widen(stored), width, tl.cast(steps, tl.float32), noise)
    y = narrow(tl.where(width > 0.0, y, 0.0), out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, tl.where(is_finite(width), y, stored), mask=inside)


def quantize_gradient(grad: Tensor, bits: int, seed: Tensor) -> Tensor:
    """grad quantized; bits from 1 to 16, seed a 1-element int64 tensor on grad's device."""
    dense, out = dense_in_out(grad)
    if grad.numel() > 0:
        layout = layout_of(dense, 0 if grad.dim() > 1 else None)
        with on_device(grad):
            largest = largest_magnitudes(dense, layout)
            dorefa_gradient_kernel[blocks(grad.numel())](
                dense, out, largest, seed, grad.numel(), layout.channels, layout.inner, float(2**bits - 1),
                index_type(grad.numel()), BLOCK, **LAUNCH,
            )  # fmt: skip
    return out
