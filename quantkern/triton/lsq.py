"""lsq: fake_quantize with a learned scale and, where given, a learned zero point.

The forward is fake_quantize's. The backward takes two launches: one pass over x and its gradient writes dx and leaves
partial sums of dscale and dzero_point, then one program for up to 32 channels adds them.

Layout: the rows or columns of min_max.py; a program takes tiles of one channel, or of a strip of columns.
Who owns what: the host functions own y, dx, dscale and dzero_point; the partial sums live for the call. scale and
zero_point are read on the device only.
Bytes an element: the backward reads x and grad once and writes dx once, 12 in float32 and 6 in the 16-bit formats.
Numerics: ``numerics.lsq_gradient_lane``. dx is bit-equal with the reference. An element's part of a sum is the
reference's too; the parts are added in float32 in a program and in float64 between programs, in an order fixed by the
shape: the same bits in every call.
"""

# triton ships no types, so triton.jit is untyped.
# mypy: disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkern.triton.fake_quantize import launch_fake_quantize
from quantkern.triton.layout import (
    LAUNCH,
    Layout,
    dense_in_out,
    index_type,
    laid_out_like,
    layout_of,
    new_mask,
    on_device,
)
from quantkern.triton.min_max import merge_shape, partials_shape, sum_partials, tiles_of
from quantkern.triton.numerics import lsq_gradient_lane, reciprocal_scale, widen


@triton.jit
def load_zero_point(zero_point_ptr: tl.tensor, channel: tl.tensor, inside: tl.tensor, like: tl.tensor) -> tl.tensor:
    """The zero points of channels (inside None: all); 0 where none is learned."""
    return tl.zeros_like(like) if zero_point_ptr is None else tl.load(zero_point_ptr + channel, mask=inside)


@triton.jit
def gradient_tile(
    x_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    quant_min: tl.tensor,
    quant_max: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Write a tile of dx; returns the elements' parts of dscale and dzero_point, 0 outside."""
    # dx may lie where x lies: every element is read before it is written, by one program.
    x = widen(tl.load(x_ptr + at, mask=inside, other=0.0))
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
    low = tl.cast(quant_min, tl.float32)
    high = tl.cast(quant_max, tl.float32)
    passes, by_scale, by_zero_point = lsq_gradient_lane(
        x, widen(grad), reciprocal_scale(scale), scale, zero_point, low, high
    )
    tl.store(dx_ptr + at, tl.where(passes, grad, 0.0), mask=inside)
    return tl.where(inside, by_scale, 0.0), tl.where(inside, by_zero_point, 0.0)


@triton.jit
def lsq_rows_kernel(
    x_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_point_ptr: tl.tensor,
    by_scale_ptr: tl.tensor,
    by_zero_point_ptr: tl.tensor,
    outer: tl.tensor,
    channels: tl.tensor,
    inner: tl.tensor,
    quant_min: tl.tensor,
    quant_max: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
) -> None:
    """One pair of sums a channel and split."""
    channel = tl.program_id(0)
    split = tl.program_id(1)
    scale = tl.load(scale_ptr + channel)
    zero_point = load_zero_point(zero_point_ptr, channel, None, scale)
    by_scale = tl.zeros((ROWS, COLUMNS), tl.float32)
    by_zero_point = tl.zeros((ROWS, COLUMNS), tl.float32)
    across = tl.cdiv(inner, COLUMNS)
    for tile in range(split, tl.cdiv(outer, ROWS) * across, tl.num_programs(1)):
        row = tl.cast(tile // across, INDEX) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.cast(tile % across, INDEX) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = (row < outer) & (column < inner)
        at = (row * channels + channel) * inner + column
        one, other = gradient_tile(x_ptr, grad_ptr, dx_ptr, at, inside, scale, zero_point, quant_min, quant_max)
        by_scale += one
        by_zero_point += other
    partial = channel * tl.num_programs(1) + split
    tl.store(by_scale_ptr + partial, tl.sum(tl.sum(by_scale, axis=1), axis=0))
    if zero_point_ptr is not None:
        tl.store(by_zero_point_ptr + partial, tl.sum(tl.sum(by_zero_point, axis=1), axis=0))


@triton.jit
def lsq_columns_kernel(
    x_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_point_ptr: tl.tensor,
    by_scale_ptr: tl.tensor,
    by_zero_point_ptr: tl.tensor,
    outer: tl.tensor,
    width: tl.tensor,
    inner: tl.tensor,
    quant_min: tl.tensor,
    quant_max: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
) -> None:
    """One pair of sums a column and split; width = channels * inner."""
    column = tl.program_id(0).to(INDEX) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    used = column < width
    scale = tl.load(scale_ptr + column // inner, mask=used, other=1.0)
    zero_point = load_zero_point(zero_point_ptr, column // inner, used, scale)
    by_scale = tl.zeros((ROWS, COLUMNS), tl.float32)
    by_zero_point = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(split, tl.cdiv(outer, ROWS), tl.num_programs(1)):
        row = tl.cast(tile, INDEX) * ROWS + tl.arange(0, ROWS)[:, None]
        one, other = gradient_tile(
            x_ptr, grad_ptr, dx_ptr, row * width + column[None, :], (row < outer) & used[None, :],
            scale[None, :], zero_point[None, :], quant_min, quant_max,
        )  # fmt: skip
        by_scale += one
        by_zero_point += other
    partial = split.to(INDEX) * width + column
    tl.store(by_scale_ptr + partial, tl.sum(by_scale, axis=0), mask=used)
    if zero_point_ptr is not None:
        tl.store(by_zero_point_ptr + partial, tl.sum(by_zero_point, axis=0), mask=used)


@triton.jit
def lsq_sums_kernel(
    parts_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    channels: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    grad_scale: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """CHANNELS channels a program: partial sums in, the gradient of scale (0) or zero point (1) out."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    which = tl.program_id(1)
    parts = parts_ptr + tl.cast(which, tl.int64) * channels * rows * width
    total = sum_partials(parts, channel, channels, rows, width, CHANNELS, BLOCK)
    total = total * tl.cast(grad_scale, tl.float64)
    tl.store(sums_ptr + which * channels + channel, total.to(tl.float32), mask=channel < channels)


def launch_gradients(
    x: Tensor,
    grad: Tensor,
    dx: Tensor,
    layout: Layout,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    grad_scale: float,
) -> Tensor:
    """Write dx, which may be x; returns [dscale, dzero_point], the second row only with a zero point."""
    outer, channels, inner = layout
    tiles, index, learned = tiles_of(layout), index_type(x.numel()), 1 if zero_point is None else 2
    rows, width = partials_shape(tiles, layout)
    parts = x.new_empty((learned, rows, channels, width), dtype=torch.float32)
    sums = x.new_empty((learned, channels), dtype=torch.float32)
    kernel, across = (lsq_rows_kernel, channels) if tiles.by_rows else (lsq_columns_kernel, channels * inner)
    kernel[(tiles.strips, tiles.splits)](
        x, grad, dx, scale, zero_point, parts[0], parts[-1], outer, across, inner, quant_min, quant_max,
        tiles.rows, tiles.columns, index, **LAUNCH,
    )  # fmt: skip
    together, at_once = merge_shape(channels)
    lsq_sums_kernel[(triton.cdiv(channels, together), learned)](
        parts, sums, channels, rows, width, float(grad_scale), together, at_once, **LAUNCH
    )
    return sums


def lsq_forward(
    x: Tensor,
    scale: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    zero_point: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y. scale and zero_point (None: 0): float32, one value or one a channel of ``axis``."""
    dense, y = dense_in_out(x, dtype)
    if x.numel() > 0:
        scale = scale.detach().contiguous()
        zeros = torch.zeros_like(scale) if zero_point is None else zero_point.detach().contiguous()
        layout = layout_of(dense, axis)
        with on_device(x):
            launch_fake_quantize(dense, y, new_mask(x, False), layout, scale, zeros, quant_min, quant_max, None, 0)
    return y


def lsq_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    quant_min: int,
    quant_max: int,
    grad_scale: float,
    axis: int | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dzero_point), the last one empty without a zero point; arguments as in the forward.

    grad_scale is rounded to float32.
    """
    dense, dx = dense_in_out(x)
    if x.numel() == 0:
        sums = x.new_zeros((1 if zero_point is None else 2, scale.numel()), dtype=torch.float32)
    else:
        zeros = None if zero_point is None else zero_point.detach().contiguous()
        with on_device(x):
            sums = launch_gradients(
                dense, laid_out_like(grad, dx), dx, layout_of(dense, axis), scale.detach().contiguous(), zeros,
                quant_min, quant_max, grad_scale,
            )  # fmt: skip
    dzero_point = scale.new_empty(0) if zero_point is None else sums[1].reshape(zero_point.shape)
    return dx, sums[0].reshape(scale.shape), dzero_point
