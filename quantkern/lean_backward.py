"""What a training step keeps for its backward, made small.

A ReLU keeps its whole result to know where the gradient passes; one bit an element says it too. A convolution keeps
its quantized input and weight as float32; where they have at most 256 values a byte an element holds them, and the
backward gets the very same numbers back. Eager training only: a compiler decides by itself what it keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.utils import parametrize

from quantkern import functional
from quantkern.backend import has_native
from quantkern.config import CHILD_NAME
from quantkern.fake_quant import FakeQuant, Grid
from quantkern.layer_quantizers import quantize_outputs
from quantkern.learned.leaf_scale import NODE as SCALE_NODE
from quantkern.learned.lsq import LearnedActivation
from quantkern.running_range import ActivationFakeQuant

_OPS = torch.ops.quantkern

SMALLEST = 8192
"""Tensors with fewer elements stay as they are: a call costs more than they weigh."""

_SAVED = {
    "ConvolutionBackward0": ("_raw_saved_input", "_raw_saved_weight"),
    "AddmmBackward0": ("_raw_saved_mat1", "_raw_saved_mat2"),
    "MmBackward0": ("_raw_saved_self", "_raw_saved_mat2"),
}
"""The backward nodes of convolutions and matrix products, and what they call their operands."""

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)

_FORWARDS = {plain.forward for plain in _PLAIN}

Kept = Tensor | tuple[Tensor, Tensor, int, int | None]
Input = tuple[int, torch.Size]
"""Where a layer's input lies, and its shape."""


def _keeps_bits(x: Tensor) -> bool:
    """Whether a backward will follow that can be served with bits."""
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and type(x) is Tensor
        and x.requires_grad
        and x.is_floating_point()
        and has_native(x.device.type)
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _clip(layer: nn.ReLU | nn.Hardtanh, x: Tensor, lower: float, upper: float) -> Tensor | None:
    """The activation with one kept bit an element; None where torch's own has to do it."""
    if not _keeps_bits(x) or (x.dtype is torch.float64 and x.is_cuda) or not lower < upper:
        return None
    if not layer.inplace:
        quantizer = _output_quantizer(layer)
        if isinstance(quantizer, ActivationFakeQuant) and quantizer.clips():
            quantizer.__dict__["clip"] = (lower, upper)
            return x
        if lower == 0 and upper == math.inf and isinstance(quantizer, LearnedActivation) and quantizer.is_relu():
            return x
        return functional.clip_activation(x, lower, upper)
    if x.is_leaf or not _is_dense(x):
        return None
    _OPS.clip_activation_.default(x, lower, upper)
    return x


def _output_quantizer(layer: nn.Module) -> nn.Module | None:
    """What gets the layer's output next, with nobody looking at it in between."""
    hooks = layer._forward_hooks
    if not hooks or next(iter(hooks.values())) is not quantize_outputs or layer._backward_hooks:
        return None
    if layer._backward_pre_hooks or _module._global_forward_hooks or _module._global_backward_hooks:
        return None
    if _module._global_backward_pre_hooks:
        return None
    return layer._modules[CHILD_NAME]._modules.get("output")  # type: ignore[union-attr]


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


class ReLU(nn.ReLU):
    """``torch.nn.ReLU`` that keeps one bit an element for its backward."""

    def forward(self, x: Tensor) -> Tensor:
        """max(x, 0)"""
        y = _clip(self, x, 0.0, math.inf)
        return super().forward(x) if y is None else y


class Hardtanh(nn.Hardtanh):
    """``torch.nn.Hardtanh`` that keeps one bit an element for its backward."""

    def forward(self, x: Tensor) -> Tensor:
        """x within [min_val, max_val]."""
        y = _clip(self, x, self.min_val, self.max_val)
        return super().forward(x) if y is None else y


class ReLU6(nn.ReLU6):
    """``torch.nn.ReLU6`` that keeps one bit an element for its backward."""

    def forward(self, x: Tensor) -> Tensor:
        """x within [0, 6]."""
        y = _clip(self, x, self.min_val, self.max_val)
        return super().forward(x) if y is None else y


_LEAN: dict[type[nn.Module], type[nn.Module]] = {nn.ReLU: ReLU, nn.ReLU6: ReLU6, nn.Hardtanh: Hardtanh}
_FAT = {lean: plain for plain, lean in _LEAN.items()}


class LeanActivations:
    """Every ReLU, ReLU6 and Hardtanh of a model, those classes themselves and no subclass, keeping bits or not."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if type(module) in _LEAN or type(module) in _FAT]

    def attach(self) -> None:
        """Keep bits."""
        for layer in self.layers:
            layer.__class__ = _LEAN.get(type(layer), type(layer))

    def detach(self) -> None:
        """Be torch's own again."""
        for layer in self.layers:
            layer.__class__ = _FAT.get(type(layer), type(layer))


def keeps_codes(layer: nn.Module) -> bool:
    """Whether ``keep_codes`` has something to do on a layer: its forward is one product of its input and weight."""
    return isinstance(layer, _PLAIN)


def multiplies_only(layer: nn.Module) -> bool:
    """Whether all that a layer does with its weight is torch's own product with its input, which autocast narrows."""
    return _plain_class(layer) in _PLAIN and "forward" not in vars(layer)


def keep_codes(layer: nn.Module, args: tuple[Any, ...], output: object) -> None:
    """Forward hook, ahead of those that change the output: the product's operands are kept as codes."""
    if torch.compiler.is_compiling() or type(output) is not Tensor or output.grad_fn is None:
        return
    if not has_native(output.device.type) or output.dtype is not torch.float32:
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return
    node: Any = output.grad_fn
    while (node.name() == SCALE_NODE or "View" in node.name()) and node.next_functions:
        node = node.next_functions[0][0]
    checked = output.is_cpu  # there, what does not lie on the grid is noticed and kept as it is
    if not checked and type(layer).forward not in _FORWARDS and _plain_class(layer).forward not in _FORWARDS:
        return
    given = args[0] if len(args) == 1 and type(args[0]) is Tensor else None
    x = None if given is None else (given.data_ptr(), given.shape)  # the hooks outlive this call and must not hold it
    for name in _SAVED.get(node.name(), ()):
        _replace(getattr(node, name), layer, x, checked)


def _plain_class(layer: nn.Module) -> type[Any]:
    """The class of a layer without what a parametrization made of it."""
    return type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)


def _replace(saved: Any, layer: nn.Module, x: Input | None, checked: bool) -> None:
    """Have a saved tensor kept as codes, if it is the quantized input or weight of the layer."""

    def pack(tensor: Tensor) -> Kept:
        if tensor.numel() < SMALLEST or tensor.dtype is not torch.float32:
            return tensor
        is_input = x is not None and tensor.data_ptr() == x[0] and tensor.numel() == x[1].numel()
        found = _input_grid(layer, tensor.shape == x[1]) if x and is_input else _weight_grid(layer, tensor)
        if found is None or (found[5] and not checked):
            return tensor
        scale, zero_point, low, high, axis, _ = found
        codes, parameters = _OPS.to_codes.default(tensor, scale, zero_point, low, high, axis)
        return (codes, parameters, low, axis) if codes.numel() else tensor

    try:
        saved.register_hooks(pack, _unpack)
    except RuntimeError:  # nothing was saved there, or other hooks hold it already, such as those of checkpointing
        return


def _unpack(kept: Kept) -> Tensor:
    return kept if isinstance(kept, Tensor) else _OPS.from_codes.default(*kept)


Found = tuple[Tensor, Tensor | None, int, int, int | None, bool]
"""A grid, and whether a delayed start may have left the tensor off it."""


def _found(module: object, axis_of: Callable[[int], int | None]) -> Found | None:
    grid: Grid | None = module.code_grid() if isinstance(module, FakeQuant) else None
    if grid is None or grid[3] - grid[2] > 255:
        return None
    axis = None if grid[4] is None else axis_of(grid[4])
    if grid[4] is not None and axis is None:
        return None
    return (*grid[:4], axis, module.step is not None)  # type: ignore[attr-defined]


def _input_grid(layer: nn.Module, in_shape: bool) -> Found | None:
    own = layer._modules.get(CHILD_NAME)
    return None if own is None else _found(own._modules.get("input"), lambda axis: axis if in_shape else None)


def _weight_grid(layer: nn.Module, tensor: Tensor) -> Found | None:
    if not parametrize.is_parametrized(layer, "weight") or len(layer.parametrizations["weight"]) != 1:  # type: ignore
        return None
    entries: Any = layer.parametrizations["weight"]  # type: ignore[index]
    place = getattr(entries[0], "ahead", None)
    if place is not None and place.holds(tensor):  # it stays in any case
        return None
    shape = entries.original.shape
    if tensor.shape == shape:
        return _found(entries[0], lambda axis: axis)
    if tensor.dim() == 2 and tensor.shape == shape[::-1]:  # a linear layer multiplies by its transpose
        return _found(entries[0], lambda axis: 1 - axis % 2)
    return None
