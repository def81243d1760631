"""dorefa_weight: y = 2 * q(tanh(w) / (2 * m) + 1/2) - 1, m = tanh(max|w|); with one bit y = sign(w) * mean|w|.

Three launches forward: partial ranges (or sums of magnitudes, with one bit), their one result, the quantizing pass.
The backward takes two: a pass that writes dw but for the part through m and leaves what that part is made of, then
one that adds it to the elements that attain m. With one bit the gradient passes whole.

Layout: programs take tiles of neighbouring elements in memory order, whatever the strides.
Who owns what: the host functions own y, ``largest`` (max|w|, or mean|w| with one bit), which the caller keeps for the
backward, and dw; the partial results live for the call.
Bytes an element: forward reads w twice and writes y, backward reads w and grad and writes dw; only the programs whose
tiles attain m look at them a second time. tanh is computed once an element in either direction.
Numerics: ``numerics.tanh_lane``, the same operations on every backend, so that values are bit-equal with the native
ones. Sums (mean|w|; grad * tanh(w), which reaches the elements at m only) are added in float32 in a program and in
float64 between programs, in an order fixed by the shape.
"""

# triton ships no types, so triton.jit is untyped.
# mypy: disallow-untyped-decorators=False

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
    laid_out_like,
    on_device,
)
from quantkern.triton.min_max import PROGRAMS, largest_magnitudes
from quantkern.triton.numerics import (
    SMALLEST_SCALE,
    dorefa_sign_lane,
    dorefa_weight_gradient_lane,
    dorefa_weight_lane,
    max_lane,
    narrow,
    tanh_lane,
    widen,
)


@triton.jit
def magnitude_sums_kernel(
    w_ptr: tl.tensor, sums_ptr: tl.tensor, numel: tl.tensor, INDEX: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """The sum of |w| over every num_programs-th block."""
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(numel, BLOCK), tl.num_programs(0)):
        at = tl.cast(tile, INDEX) * BLOCK + tl.arange(0, BLOCK)
        total += tl.abs(widen(tl.load(w_ptr + at, mask=at < numel, other=0.0)))
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def mean_kernel(
    sums_ptr: tl.tensor, mean_ptr: tl.tensor, numel: tl.tensor, programs: tl.tensor, PARTS: tl.constexpr
) -> None:
    """One program: the sums of all programs in, their mean out."""
    part = tl.arange(0, PARTS)
    sums = tl.load(sums_ptr + part, mask=part < programs, other=0.0).to(tl.float64)
    tl.store(mean_ptr, (tl.sum(sums, axis=0) / tl.cast(numel, tl.float64)).to(tl.float32))


@triton.jit
def dorefa_weight_kernel(
    w_ptr: tl.tensor,
    y_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    numel: tl.tensor,
    steps: tl.tensor,
    ONE_BIT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block; steps = n."""
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    w = widen(tl.load(w_ptr + at, mask=inside, other=0.0))
    largest = tl.load(largest_ptr)
    if ONE_BIT:
        y = dorefa_sign_lane(w, largest)
    else:
        width = 2.0 * max_lane(tl.cast(SMALLEST_SCALE, tl.float32), tanh_lane(largest))
        y = dorefa_weight_lane(w, width, tl.cast(steps, tl.float32))
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dorefa_weight_backward_kernel(
    w_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    dw_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    numel: tl.tensor,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """dw but for the part through m, the sum of grad * tanh(w) and the number of |tanh(w)| = m, by program."""
    m = tanh_lane(tl.load(largest_ptr))
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(numel, BLOCK), tl.num_programs(0)):
        at = tl.cast(tile, INDEX) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        w = widen(tl.load(w_ptr + at, mask=inside, other=0.0))
        grad = widen(tl.load(grad_ptr + at, mask=inside, other=0.0))
        dw, t = dorefa_weight_gradient_lane(w, grad, m)
        # Where every weight is 0 there is no gradient.
        tl.store(dw_ptr + at, narrow(tl.where(m == 0.0, 0.0, dw), dw_ptr.dtype.element_ty), mask=inside)
        total += tl.where(inside, grad * t, 0.0)
        count += (inside & (tl.abs(t) == m)).to(tl.int32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0))
    tl.store(counts_ptr + tl.program_id(0), tl.where(m == 0.0, 0, tl.sum(count, axis=0)))


@triton.jit
def dorefa_weight_at_largest_kernel(
    w_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    dw_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    numel: tl.tensor,
    PARTS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """dw of the elements that attain m, in the blocks of the same program of the first pass, if it met any."""
    m = tanh_lane(tl.load(largest_ptr))
    part = tl.arange(0, PARTS)
    sums = tl.load(sums_ptr + part, mask=part < tl.num_programs(0), other=0.0).to(tl.float64)
    counts = tl.load(counts_ptr + part, mask=part < tl.num_programs(0), other=0).to(tl.int64)
    # Not m * m, which underflows where every weight is tiny.
    through = tl.div_rn(tl.div_rn(tl.sum(sums, axis=0).to(tl.float32), m), m)
    through = tl.div_rn(through, tl.sum(counts, axis=0).to(tl.float32))
    tiles = tl.where(tl.load(counts_ptr + tl.program_id(0)) > 0, tl.cdiv(numel, BLOCK), 0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        at = tl.cast(tile, INDEX) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        t = tanh_lane(widen(tl.load(w_ptr + at, mask=inside, other=0.0)))
        grad = widen(tl.load(grad_ptr + at, mask=inside, other=0.0))
        dw = (tl.div_rn(grad, m) - tl.where(t < 0.0, -through, through)) * (1.0 - t * t)
        tl.store(dw_ptr + at, narrow(dw, dw_ptr.dtype.element_ty), mask=inside & (tl.abs(t) == m))


def programs_of(numel: int) -> int:
    """Programs of a reducing pass: some blocks to each before their number is split further."""
    return int(min(triton.cdiv(triton.cdiv(numel, BLOCK), 4), PROGRAMS))


def mean_magnitude(w: Tensor) -> Tensor:
    """mean|w| of a dense w that is not empty."""
    numel, programs = w.numel(), programs_of(w.numel())
    sums = w.new_empty(programs, dtype=torch.float32)
    mean = w.new_empty(1, dtype=torch.float32)
    magnitude_sums_kernel[(programs,)](w, sums, numel, index_type(numel), BLOCK, **LAUNCH)
    mean_kernel[(1,)](sums, mean, numel, programs, triton.next_power_of_2(programs), **LAUNCH)
    return mean


def dorefa_weight_forward(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(y, largest); largest is max|x|, or mean|x| with one bit: float32, without dimensions."""
    dense, y = dense_in_out(x)
    numel = x.numel()
    if numel == 0:
        return y, x.new_zeros((), dtype=torch.float32)
    with on_device(x):
        largest = mean_magnitude(dense) if bits == 1 else largest_magnitudes(dense, Layout(1, 1, numel))
        dorefa_weight_kernel[blocks(numel)](
            dense, y, largest, numel, float(2**bits - 1), bits == 1, index_type(numel), BLOCK, **LAUNCH
        )
    return y, largest.reshape(())


def dorefa_weight_backward(grad: Tensor, x: Tensor, largest: Tensor) -> Tensor:
    """dx for more than one bit; largest is what the forward returned."""
    dense, dx = dense_in_out(x)
    if x.numel() == 0:
        return dx
    numel, programs, index = x.numel(), programs_of(x.numel()), index_type(x.numel())
    # dx overwrites a copied x, which the second pass still needs.
    dense = dense.clone() if dense is dx else dense
    above = laid_out_like(grad, dx)
    sums = x.new_empty(programs, dtype=torch.float32)
    counts = x.new_empty(programs, dtype=torch.int32)
    with on_device(x):
        dorefa_weight_backward_kernel[(programs,)](
            dense, above, dx, largest, sums, counts, numel, index, BLOCK, **LAUNCH
        )
        dorefa_weight_at_largest_kernel[(programs,)](
            dense, above, dx, largest, sums, counts, numel, triton.next_power_of_2(programs), index, BLOCK, **LAUNCH
        )
    return dx
