"""Convolutions and linear layers whose weight and input are both binary, in training: the packed kernels compute them.

A layer becomes one by its class alone and loses nothing by it. The classes have torch's names, because rules and
printed models know a layer by the name of its class.
"""

from __future__ import annotations

from torch import Tensor, nn

from quantkern import functional
from quantkern.exporting import is_exporting
from quantkern.reference import LONGEST_SUM


class Linear(nn.Linear):
    """``nn.Linear`` of the signs of its input and weight, with one saved bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """See ``quantkern.functional.sign_linear``."""
        if _is_exported(self):
            packed, bias = _packed(self.weight, -1), _as_float(self.bias)
            return functional.binary_linear(input, packed, self.in_features, bias)
        return functional.sign_linear(input, *_like(input, self.weight, self.bias))


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` of the signs of its input and weight, with one saved bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """See ``quantkern.functional.sign_conv2d``."""
        padding = symmetric_padding(self)
        assert padding is not None
        images = input.unsqueeze(0) if input.dim() == 3 else input
        if _is_exported(self):
            packed, bias = _packed(self.weight, 1), _as_float(self.bias)
            y = functional.binary_conv2d(images, packed, bias, self.stride, padding, self.dilation)
        else:
            weight, bias = _like(input, self.weight, self.bias)
            y = functional.sign_conv2d(images, weight, bias, self.stride, padding, self.dilation)
        return y.squeeze(0) if input.dim() == 3 else y


def _packed(weight: Tensor, axis: int) -> Tensor:
    packed = functional.pack_signs(weight, axis)
    assert isinstance(packed, Tensor)
    return packed


def _as_float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def _is_exported(layer: nn.Module) -> bool:
    """Whether an inference program is made of the layer: with the operations that keep nothing for a backward."""
    return not layer.training and is_exporting()


def _like(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in x's dtype, which autocast makes another than theirs."""
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


def symmetric_padding(layer: nn.Conv2d) -> tuple[int, int] | None:
    """The layer's zero padding as numbers; None where the two sides of an image get different ones."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = [by * (size - 1) for by, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        return None if any(pad % 2 for pad in total) else (total[0] // 2, total[1] // 2)
    assert isinstance(layer.padding, tuple)
    return layer.padding[0], layer.padding[1]


def why_not_packed(layer: nn.Module) -> str | None:
    """What keeps the packed kernels from computing this layer, whatever its input; None: nothing."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            return f"groups={layer.groups}, the packed kernels have groups=1"
        if layer.padding_mode != "zeros":
            return f"padding_mode={layer.padding_mode!r}, the packed kernels pad with zeros"
        if symmetric_padding(layer) is None:
            return "padding='same' pads its two sides differently, the packed kernels pad both alike"
    elif not isinstance(layer, nn.Linear):
        return f"it is a {type(layer).__name__}, the packed kernels know Conv2d and Linear"
    if layer.weight[0].numel() > LONGEST_SUM:
        return f"its sums have {layer.weight[0].numel()} terms, the packed kernels at most {LONGEST_SUM}"
    return None


def packed_class(layer: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """The class to train this layer with, or None and what stands against it."""
    own: dict[type, type[nn.Module]] = {nn.Linear: Linear, nn.Conv2d: Conv2d}
    if type(layer) not in own or "forward" in vars(layer):
        return None, f"it is a {type(layer).__name__}, the packed kernels know torch.nn's Conv2d and Linear"
    why = why_not_packed(layer)
    return (own[type(layer)], "") if why is None else (None, why)
