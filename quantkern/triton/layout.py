"""How kernels see a tensor: as ``outer`` x ``channels`` x ``inner`` elements in the order they lie in memory.

Any tensor whose elements fill one block of memory (contiguous, channels_last, permuted) is taken as it lies; anything
else (slices, expanded tensors) is first copied into the output, which is then worked on in place. Per tensor there is
one channel. The twin of csrc/common/layout.h.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements a program of an elementwise kernel takes; a multiple of 8, so that no two programs share a mask byte."""

LAUNCH: dict[str, Any] = {"enable_fp_fusion": False}
"""Options of every launch: a * b + c keeps both of its roundings, as in the reference."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Layout(NamedTuple):
    """A dense tensor in memory order."""

    outer: int
    channels: int
    inner: int


def is_dense(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill one block of memory, each place once."""
    filled = 1
    for stride, size in sorted((stride, size) for size, stride in zip(sizes, strides, strict=True) if size != 1):
        if size == 0:
            return True
        if stride != filled:
            return False
        filled *= size
    return True


def layout_of(dense: Tensor, axis: int | None) -> Layout:
    """The layout of a dense tensor; of an empty one only the number of channels counts."""
    numel = dense.numel()
    if axis is None or dense.shape[axis] == 1:
        return Layout(1, 1, numel)
    channels = dense.shape[axis]
    if numel == 0:
        return Layout(0, channels, 1)
    inner = dense.stride(axis)
    return Layout(numel // (channels * inner), channels, inner)


def dense_in_out(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """x as the kernels read it and the tensor they write: the same one where x had to be copied.

    dtype: what a float32 x becomes; the second tensor is then always another one.
    """
    if x.dtype not in DTYPES:
        expected = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"the Triton kernels take {expected}, got {x.dtype}; convert x or use another backend")
    x = x.detach()
    out = torch.empty_like(x)
    if dtype is not None and x.dtype is torch.float32:
        dense = x if is_dense(x.shape, x.stride()) else out.copy_(x)
        return dense, torch.empty_like(dense, dtype=dtype)
    if is_dense(x.shape, x.stride()):
        return x, out
    out.copy_(x)
    return out, out


def laid_out_like(grad: Tensor, dense: Tensor) -> Tensor:
    """grad with the strides of a dense tensor of its shape."""
    grad = grad.detach()
    if all(
        have == want for size, have, want in zip(grad.shape, grad.stride(), dense.stride(), strict=True) if size != 1
    ):
        return grad
    return torch.empty_like(dense).copy_(grad)


def new_mask(x: Tensor, with_mask: bool) -> Tensor:
    """Room for one bit an element; empty without a mask."""
    return x.new_empty((x.numel() + 7) // 8 if with_mask else 0, dtype=torch.uint8)


def index_type(numel: int) -> tl.dtype:
    """The integers that can count to numel and one block beyond."""
    return tl.int32 if numel < 2**31 - 2**16 else tl.int64


def blocks(numel: int) -> tuple[int]:
    """The grid of an elementwise kernel."""
    return (triton.cdiv(numel, BLOCK),)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make x's device the current one, where Triton launches."""
    if x.device.type == "cpu":
        return contextlib.nullcontext()
    device: contextlib.AbstractContextManager[Any] = torch.get_device_module(x.device).device(x.device)
    return device
