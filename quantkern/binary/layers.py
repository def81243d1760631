"""Layers that binarize their inputs and weights and are trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quantkern import ops, reference
from quantkern import triton as triton_twins
from quantkern.backend import Backend, resolve
from quantkern.binary.checks import Pair, check_real, pair
from quantkern.binary.convolutions import check_kernel_fits


class _TritonSignLinear(torch.autograd.Function):
    """``sign_linear`` on the Triton kernels: packed signs are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        k = weight.shape[1]
        packed, rows = (triton_twins.pack_signs_forward(t.detach(), -1, False)[0] for t in (x, weight))
        ctx.save_for_backward(packed, rows)
        ctx.k, ctx.dtype = k, x.dtype
        flat = packed.view(math.prod(x.shape[:-1]), packed.shape[-1])
        bias = None if bias is None else bias.detach().float()
        y = triton_twins.binary_matmul_forward(flat, rows, k, None, bias)
        return y.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = (triton_twins.unpack_signs_forward(t, ctx.k, ctx.dtype) for t in ctx.saved_tensors)
        rows = math.prod(grads[0].shape[:-1])
        flat = grads[0].reshape(rows, grads[0].shape[-1])
        dx, dweight, dbias = ctx.needs_input_grad
        return (
            grads[0] @ weight if dx else None,
            flat.t() @ x.view(rows, ctx.k) if dweight else None,
            flat.sum(0) if dbias else None,
        )


class _TritonSignConv2d(torch.autograd.Function):
    """``sign_conv2d`` on the Triton kernels: packed signs are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        packed, taps = (triton_twins.pack_signs_forward(t.detach(), 1, False)[0] for t in (x, weight))
        ctx.save_for_backward(packed, taps)
        ctx.channels, ctx.dtype, ctx.geometry = x.shape[1], x.dtype, geometry
        ctx.form = torch.channels_last if ops.is_channels_last(x) else torch.contiguous_format
        bias = None if bias is None else bias.detach().float()
        stride, padding, dilation = geometry
        y = triton_twins.binary_conv2d_forward(packed, taps, x.shape[1], stride, padding, dilation, None, bias)
        return y.to(x.dtype).contiguous(memory_format=ctx.form)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        signs = (triton_twins.unpack_signs_forward(t, ctx.channels, ctx.dtype) for t in ctx.saved_tensors)
        x, weight = (t.permute(0, 3, 1, 2).contiguous(memory_format=ctx.form) for t in signs)
        stride, padding, dilation = ctx.geometry
        needs = list(ctx.needs_input_grad[:3])
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            grads[0], x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], 1, needs
        )
        return dx, dweight, dbias, None, None, None


def sign_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend = Backend.AUTO) -> Tensor:
    """The linear layer of the signs of x and weight, for training: through the packed kernels, saving packed signs.

    y = sign(x) @ sign(weight)^T + bias; its gradients are those of the linear layer at those signs, so for operands
    that ``binarize`` made. Saved: one bit an element. Source: Courbariaux et al. 2016, algorithm 1.

    Args:
        x: floating-point [..., K]. weight: [N, K] in x's dtype. bias: [N].
        backend: which kernels run, see ``Backend``.

    Raises:
        TypeError: not floating point. ValueError: sizes that do not fit.

    >>> from quantkern.functional import binarize
    >>> x, weight = binarize(torch.randn(4, 9)), binarize(torch.randn(3, 9))
    >>> bool((sign_linear(x, weight) == torch.nn.functional.linear(x, weight)).all())
    True
    """
    chosen = resolve(x, backend)
    if chosen is Backend.NATIVE:
        return torch.ops.quantkern.sign_linear.default(x, weight, bias)  # type: ignore[no-any-return]
    check_real(x, "x")
    check_real(weight, "weight")
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., K] and weight [N, K], got shapes {list(x.shape)} and {list(weight.shape)}")
    if chosen is Backend.TRITON:
        y: Tensor = _TritonSignLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return reference.sign_linear(x, weight, bias)


def sign_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    *,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """The convolution of the signs of x and weight, for training, as ``sign_linear`` is for linear layers.

    Args:
        x: floating-point [N, C, H, W]. weight: [O, C, kh, kw] in x's dtype. bias: [O].
        stride, padding, dilation: as in ``torch.nn.functional.conv2d``. backend: see ``Backend``.

    Raises:
        TypeError: not floating point. ValueError: sizes that do not fit.

    >>> from quantkern.functional import binarize
    >>> x, weight = binarize(torch.randn(1, 3, 5, 5)), binarize(torch.randn(2, 3, 3, 3))
    >>> bool((sign_conv2d(x, weight, padding=1) == torch.nn.functional.conv2d(x, weight, padding=1)).all())
    True
    """
    geometry = pair(stride, "stride", 1), pair(padding, "padding", 0), pair(dilation, "dilation", 1)
    chosen = resolve(x, backend)
    if chosen is Backend.NATIVE:
        return torch.ops.quantkern.sign_conv2d.default(x, weight, bias, *geometry)  # type: ignore[no-any-return]
    check_real(x, "x")
    check_real(weight, "weight")
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x must be [N, C, H, W] and weight [O, C, kh, kw], got shapes {list(x.shape)} and {list(weight.shape)}"
        )
    check_kernel_fits(x.shape[2:], weight.shape[2:], *geometry)
    if chosen is Backend.TRITON:
        y: Tensor = _TritonSignConv2d.apply(x, weight, bias, *geometry)  # type: ignore[no-untyped-call]
        return y
    return reference.sign_conv2d(x, weight, bias, *geometry)
