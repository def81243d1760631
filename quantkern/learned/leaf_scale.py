"""The gradient of an input's learned scale where the input itself needs none: the images of a first layer.

The scale's gradient is the sum of (gradient of the quantized input) * (its derivative d by the scale). A first layer
would have to make that gradient for this alone, often its most expensive product. The layer is linear, so with L the
layer without its bias

    sum(L'(grad_out) * d) = sum(grad_out * L(d))

and L(d) is one more forward of the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as _module

from quantkern.learned.lsq import LearnedActivation

PRODUCTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NODE = "_ScaleThroughProductBackward"


def is_product(layer: nn.Module) -> bool:
    """Whether the forward of a layer is one of these products and nothing else."""
    return any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in PRODUCTS)


def product(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer without its bias."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight)
    return layer._conv_forward(x, weight, None)  # type: ignore[operator, no-any-return]


def derivative_by_scale(x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """d(lsq(x)) / d(scale), element by element; Esser et al. 2020, eq. 3. NaN counts as below, as in the kernels."""
    v = x * (1.0 / scale)
    above = torch.where(v < quant_max, v.round() - v, quant_max)
    return torch.where(v > quant_min, above, quant_min)


class _ScaleThroughProduct(torch.autograd.Function):
    """Passes a layer's output on, the same tensor; in the backward it makes the scale's gradient."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, scale: Tensor, weight: Tensor, x: Tensor, layer: nn.Module, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(scale, weight, x)
        ctx.layer, ctx.settings = layer, settings
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, weight, x = ctx.saved_tensors
        low, high, factor = ctx.settings
        d = derivative_by_scale(x.float(), scale, low, high).to(weight.dtype)
        by_scale = (grads[0].float() * product(ctx.layer, d, weight).float()).sum() * factor
        return grads[0], by_scale.reshape(scale.shape), None, None, None, None


def quantize_leaf(layer: nn.Module, quantizer: object, x: Tensor, pre_hook: object) -> Tensor | None:
    """x on its grid without a way back, where ``scale_through_product`` will make one; else None.

    ``pre_hook``: who calls. Nobody else may stand between the quantizer and the layer, nor between the layer and the
    hook: what they change would be left out of the gradient.
    """
    if torch.compiler.is_compiling() or not isinstance(quantizer, LearnedActivation) or x.requires_grad:
        return None
    if not (quantizer.training and quantizer.started and quantizer.ready and torch.is_grad_enabled()):
        return None
    if not _is_between(layer, pre_hook):  # also every layer that is no product, and need have no weight
        return None
    weight = layer.parametrizations["weight"].original if hasattr(layer, "parametrizations") else layer.weight  # type: ignore
    if not (quantizer.scale.requires_grad and weight.requires_grad) or quantizer.zero_point is not None:
        return None
    if quantizer.spec.axis is not None or (isinstance(layer, nn.Linear) and x.dim() != 2) or type(x) is not Tensor:
        return None
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return None
    quantizer.__dict__["pending"] = x
    with torch.no_grad():
        y: Tensor = quantizer(x)
    return y


def _is_between(layer: nn.Module, pre_hook: object) -> bool:
    """Whether the layer's last pre-hook quantizes its input and its first hook takes the output."""
    before, after = list(layer._forward_pre_hooks.values()), list(layer._forward_hooks.values())
    return bool(before and after) and before[-1] is pre_hook and after[0] is scale_through_product


def _weight_of(layer: nn.Module, node: Any) -> Tensor:
    """The weight that the layer has just multiplied by, without asking for it a second time where it is at hand."""
    if node.name() == "ConvolutionBackward0" and node._saved_weight is not None:
        return node._saved_weight.detach()  # type: ignore[no-any-return]
    with torch.no_grad():
        weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def scale_through_product(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Forward hook, the first: hangs the scale on the output of the layer it quantized the input of."""
    if torch.compiler.is_compiling():  # then quantize_leaf has left nothing
        return None
    quantizer = layer.quantkern._modules["input"]  # type: ignore[union-attr]
    x = quantizer.__dict__.pop("pending", None) if quantizer is not None else None
    if x is None or not isinstance(quantizer, LearnedActivation) or output.grad_fn is None:
        return None
    low, high = quantizer.spec.quant_range
    settings = (low, high, quantizer.grad_scale(x, None))
    weight = _weight_of(layer, output.grad_fn)
    result: Tensor = _ScaleThroughProduct.apply(output, quantizer.scale, weight, x, layer, settings)  # type: ignore
    return result
