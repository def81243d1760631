"""Triton kernels that return (y, mask), made differentiable with the straight-through backward kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkern import triton as triton_twins


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Any, arguments: tuple[Any, ...], needs_mask: bool, dtype: Any) -> Tensor:
        y: Tensor
        narrow = {} if dtype is None else {"dtype": dtype}
        y, mask = kernel(x, *arguments, needs_mask, **narrow)
        ctx.save_for_backward(mask)
        ctx.strides = y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (mask,) = ctx.saved_tensors
        grad = grads[0]
        if mask.numel() or not grad.numel():
            grad = triton_twins.fake_quantize_backward(grad, mask, ctx.strides)
        return grad, None, None, None, None


def run_triton(
    kernel: Any, x: Tensor, *arguments: Any, needs_mask: bool = True, dtype: torch.dtype | None = None
) -> Tensor:
    """``kernel(x, *arguments, with_mask, dtype)``'s y; without a mask every gradient passes."""
    mask = needs_mask and torch.is_grad_enabled() and x.requires_grad
    y: Tensor = _StraightThrough.apply(x, kernel, arguments, mask, dtype)  # type: ignore[no-untyped-call]
    return y
