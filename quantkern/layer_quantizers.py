"""The fake-quantizers of a layer's inputs and outputs: how tensors are found in a call, named, and quantized.

The hooks are plain functions: copies, replicas and pickles of a model find their own state through the layer.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantkern.config import CHILD_NAME, TensorSpec
from quantkern.fake_quant import FakeQuant
from quantkern.learned.leaf_scale import quantize_leaf

Visit = Callable[[str, Tensor], Tensor]
Kinds = Mapping[str, type[Any]]
"""The class of fake-quantizers by quant type: for weights of (label, spec, weight), else (label, spec, channels,
device)."""
Sizes = dict[str, torch.Size]
Arguments = tuple[Any, ...]
Keywords = dict[str, Any]

_CHANNELS = {
    "input": ("in_channels", "in_features", "in1_features", "num_features", "num_channels", "num_parameters"),
    "output": ("out_channels", "out_features", "num_features", "num_channels", "num_parameters"),
}


def visit_tensors(value: object, name: str, separator: str, visit: Visit, seen: list[str] | None = None) -> object:
    """``value`` with ``visit(name, tensor)`` in the place of every floating-point tensor in it.

    Goes through tuples, lists and dicts. The first tensor is called ``name``, the next name + separator + "1", ...
    """
    seen = [] if seen is None else seen
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        seen.append(f"{name}{separator}{len(seen)}" if seen else name)
        return visit(seen[-1], value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields: Any = [visit_tensors(entry, name, separator, visit, seen) for entry in value]
        return type(value)(*fields)
    if type(value) is tuple:
        return tuple([visit_tensors(entry, name, separator, visit, seen) for entry in value])
    if type(value) is list:
        return [visit_tensors(entry, name, separator, visit, seen) for entry in value]
    if isinstance(value, dict):
        new: dict[Any, Any] = {} if type(value) is dict else copy.copy(value)
        for key, entry in value.items():
            new[key] = visit_tensors(entry, name, separator, visit, seen)
        return new
    return value


def argument_names(layer: nn.Module) -> tuple[list[str], int]:
    """The names of forward's parameters, and how many of them come first without a default."""
    try:
        parameters = list(inspect.signature(layer.forward).parameters.values())
    except (TypeError, ValueError):
        return [], 1
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in plain if p.default is p.empty]
    return [p.name for p in plain], max(1, len(required))


def visit_arguments(
    names: Sequence[str], args: Arguments, kwargs: Keywords, visit: Visit
) -> tuple[Arguments, Keywords]:
    """Visit a call's tensors: the first argument is ``input``, the second ``input_1``, however they are passed.

    An argument that is none of forward's named ones is ``input_<keyword>``; further tensors inside one argument
    are ``<argument>_item1``, ...
    """

    def name_of(position: int) -> str:
        return f"input_{position}" if position else "input"

    new_args = tuple([visit_tensors(value, name_of(i), "_item", visit) for i, value in enumerate(args)])
    new_kwargs = {}
    for key, value in kwargs.items():
        name = name_of(names.index(key)) if key in names else f"input_{key}"
        new_kwargs[key] = visit_tensors(value, name, "_item", visit)
    return new_args, new_kwargs


def kind_of(name: str) -> str:
    """The quant type of a tensor's name: ``input`` of ``input_1``."""
    return name.split("_")[0]


class LayerQuantizers(nn.Module):
    """The quantizers of one layer's inputs and outputs, a child of that layer; called, it is the identity.

    ``input`` and ``output`` are there from the start, and one more for each further argument without a default.
    Those of optional arguments and of further outputs come with the first tensor, a dummy_input or a state_dict.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        specs: Mapping[str, TensorSpec],
        kinds: Kinds,
        sizes: Sizes,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.kinds = {kind: kinds[kind] for kind in specs}
        self.layer_name, self.specs, self.device_at_start = name, dict(specs), device
        self.arguments, required = argument_names(layer)
        names = ["input", "output", "gradient", *(sizes or [f"input_{i}" for i in range(1, required)])]
        for tensor_name in dict.fromkeys(names):
            spec = specs.get(kind_of(tensor_name))
            if spec is not None:
                size = tuple(sizes.get(tensor_name, ()))
                axis = spec.axis if spec.axis is not None else 0
                known = -len(size) <= axis < len(size)
                channels = size[axis] if known else self._count_channels(tensor_name, layer, spec)
                self.add_module(tensor_name, self.make(tensor_name, channels))

    @staticmethod
    def _count_channels(name: str, layer: nn.Module, spec: TensorSpec) -> int:
        """What the layer itself says about its channels; the first tensor has the last word."""
        found = [getattr(layer, attribute, None) for attribute in _CHANNELS.get(name, ())]
        counts = [value for value in found if isinstance(value, int)]
        return counts[0] if counts and spec.axis == 1 else 0

    def make(self, name: str, channels: int = 0) -> FakeQuant:
        """A quantizer for the tensor ``name``, as far as its siblings in mode, device and steps; not yet a child."""
        device = next((buffer.device for buffer in self.buffers()), self.device_at_start)
        kind = kind_of(name)
        module: FakeQuant = self.kinds[kind](f"{self.layer_name}.{name}", self.specs[kind], channels, device)
        for other in self.children():
            if isinstance(other, FakeQuant):
                module.follow(other)
        return module.train(self.training)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that the rule asks for and that have no quantizer yet."""
        return [name for name in names if kind_of(name) in self.specs and name not in self._modules]

    def forward(self, *args: Any) -> object:
        """What came in: an nn.Sequential that is quantized itself also calls this child."""
        return args[0] if len(args) == 1 else args

    def quantize(self, name: str, x: Tensor) -> Tensor:
        """x through the quantizer called ``name``, which is made when it is not there yet."""
        module = self._modules.get(name)
        if module is None:
            module = self.make(name)
            self.add_module(name, module)
        return module(x)  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        keys = [key[len(prefix) :].split(".") for key in state_dict if key.startswith(prefix)]
        for name in self.missing(dict.fromkeys(parts[0] for parts in keys if len(parts) == 2)):
            self.add_module(name, self.make(name))
        super()._load_from_state_dict(state_dict, prefix, *args)


def quantize_inputs(layer: nn.Module, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords]:
    """Forward pre-hook."""
    own: LayerQuantizers = getattr(layer, CHILD_NAME)
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):  # the common call, without the detours
        (x,) = args
        if not x.is_floating_point():
            return args, kwargs
        later = None if x.requires_grad else quantize_leaf(layer, own._modules.get("input"), x, quantize_inputs)
        return (own.quantize("input", x) if later is None else later,), kwargs
    return visit_arguments(own.arguments, args, kwargs, own.quantize)


def quantize_outputs(layer: nn.Module, args: Arguments, output: object) -> object:
    """Forward hook."""
    own: LayerQuantizers = getattr(layer, CHILD_NAME)
    return visit_tensors(output, "output", "_", own.quantize)


def quantize_gradients(layer: nn.Module, args: Arguments, output: object) -> object:
    """Forward hook."""
    own: LayerQuantizers = getattr(layer, CHILD_NAME)
    return visit_tensors(output, "gradient", "_", own.quantize)
