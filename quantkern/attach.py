"""Puts fake-quantizers on a model's layers and takes them off again without a trace.

A weight is parametrized, so that its Parameter stays the same object; inputs and outputs are reached by the forward
hooks of ``layer_quantizers``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from quantkern.config import CHILD_NAME, LayerPlan
from quantkern.current_range import WeightFakeQuant
from quantkern.fake_quant import FakeQuant
from quantkern.layer_quantizers import (
    Arguments,
    Keywords,
    Kinds,
    LayerQuantizers,
    Sizes,
    argument_names,
    quantize_gradients,
    quantize_inputs,
    quantize_outputs,
    visit_arguments,
    visit_tensors,
)
from quantkern.lean_backward import LeanActivations, keep_codes, keeps_codes, multiplies_only
from quantkern.learned.leaf_scale import is_product, scale_through_product
from quantkern.learned.lsq import LearnedActivation

DummyInput = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]


def fake_quants(layer: nn.Module) -> list[FakeQuant]:
    """Every fake-quantizer on a layer."""
    found: list[Any] = []
    if parametrize.is_parametrized(layer, "weight"):
        found += list(layer.parametrizations["weight"])  # type: ignore[index]
    if CHILD_NAME in layer._modules:
        found += list(getattr(layer, CHILD_NAME).children())  # lists: for torch 2.11
    return [module for module in found if isinstance(module, FakeQuant)]


def count_step(layer: nn.Module, args: Arguments, output: object) -> None:
    """Forward hook of layers with a delayed start when no optimizer counts: a training forward is a step."""
    if layer.training:
        _count([layer])


class OptimizerStepCounter:
    """Step post-hook of an optimizer: counts for all these layers at once, on their device."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)

    def __call__(self, *_: Any) -> None:
        """Count one finished step."""
        _count(self.layers)


def _count(layers: Sequence[nn.Module]) -> None:
    counting = [(m, m.step) for layer in layers for m in fake_quants(layer) if m.step is not None]
    if counting:
        torch._foreach_add_([step for _, step in counting], 1)
        for module, _ in counting:
            module.stepped()


class Attachment:
    """The fake-quantizers of one layer. ``attach`` and ``detach`` may follow each other; the state stays."""

    def __init__(self, plan: LayerPlan, kinds: Kinds, sizes: Sizes, device: torch.device, count_forwards: bool) -> None:
        self.name, self.layer = plan.name, plan.layer
        self.own_class, self.computed_as = type(plan.layer), plan.computed_as
        if plan.computed_as is not None and parametrize.is_parametrized(plan.layer):
            self.own_class = type(plan.layer).__bases__[0]
        tensors = (*plan.layer.parameters(recurse=False), *plan.layer.buffers(recurse=False), *plan.layer.parameters())
        device = next((tensor.device for tensor in tensors), device)
        label = plan.name or type(plan.layer).__name__
        activations = {kind: spec for kind, spec in plan.specs.items() if kind != "weight"}
        self.weight: FakeQuant | None = None
        self.tensors: LayerQuantizers | None = None
        if "weight" in plan.specs:
            weight = plan.layer.weight
            assert isinstance(weight, Tensor)
            self.weight = kinds["weight"](f"{label}.weight", plan.specs["weight"], weight)
        if activations:
            self.tensors = LayerQuantizers(label, plan.layer, activations, kinds, sizes, device)
            self.tensors.train(plan.layer.training)
        self.kinds = frozenset(activations)
        self.delayed = any(spec.start_step for spec in plan.specs.values())
        self.counts = count_forwards and self.delayed
        self.handles: list[RemovableHandle] = []
        self.order: list[str] = []

    def damage(self, present: Collection[nn.Module]) -> str | None:
        """What somebody else has taken away since ``attach``; ``present``: the model's modules."""
        layer, own = self.layer, self.weight
        if layer not in present:
            return f"layer {self.name!r} is no longer part of the model, another one took its place"
        taken = f"the fake-quantizers of layer {self.name!r} were taken off it"
        if own is not None and not (
            parametrize.is_parametrized(layer, "weight") and own in list(layer.parametrizations["weight"])  # type: ignore[index]
        ):
            return taken
        return taken if self.tensors is not None and layer._modules.get(CHILD_NAME) is not self.tensors else None

    def attach(self) -> None:
        """Put everything on the layer."""
        layer = self.layer
        if self.computed_as is not None:
            change_class(layer, self.own_class, self.computed_as)
        if self.weight is not None:
            self.order = list(layer._parameters)
            parametrize.register_parametrization(layer, "weight", self.weight, unsafe=True)
            type(layer).register_parameter = register_parameter  # type: ignore[assignment]
        if self.tensors is not None:
            layer.add_module(CHILD_NAME, self.tensors)
        own = self.tensors._modules.get("input") if self.tensors is not None else None
        for operand in (self.weight, own):
            if isinstance(operand, FakeQuant):
                operand.narrows = multiplies_only(layer)
        if "input" in self.kinds:
            self.handles.append(layer.register_forward_pre_hook(quantize_inputs, with_kwargs=True))
        if "input" in self.kinds and self._learns_input_scale():
            self.handles.append(layer.register_forward_hook(scale_through_product))
        if keeps_codes(layer) and (
            self.weight is not None or "input" in self.kinds
        ):  # before those that change the output
            self.handles.append(layer.register_forward_hook(keep_codes))
        if "gradient" in self.kinds:  # before the output: its gradient is quantized last, as it enters the layer
            self.handles.append(layer.register_forward_hook(quantize_gradients))
        self.attach_to_outputs()

    def _learns_input_scale(self) -> bool:
        """Whether ``leaf_scale`` can serve this layer."""
        own = self.tensors._modules.get("input") if self.tensors is not None else None
        return isinstance(own, LearnedActivation) and is_product(self.layer)

    def attach_to_outputs(self) -> None:
        """Put on what comes after the layer's forward."""
        if "output" in self.kinds:
            self.handles.append(self.layer.register_forward_hook(quantize_outputs))
        if self.counts:
            self.handles.append(self.layer.register_forward_hook(count_step))

    def detach(self) -> None:
        """Leave the layer as it was before ``attach``."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.tensors is not None:
            delattr(self.layer, CHILD_NAME)
        if self.weight is not None:
            remove_parametrization(self.layer, self.weight, self.order)
        if self.computed_as is not None and isinstance(self.layer, self.computed_as):
            change_class(self.layer, self.computed_as, self.own_class)

    def refresh(self) -> Tensor | None:
        """Bring a scale that follows the weight up to date; the weight as evaluation has it, where a scale does."""
        if not isinstance(self.weight, WeightFakeQuant):
            return None
        training, self.weight.training = self.weight.training, False
        with torch.no_grad():
            weight = self.layer.weight
        self.weight.training = training
        assert isinstance(weight, Tensor)
        return weight

    def calibration(self) -> dict[str, Any]:
        """This layer's part of the calibration dict."""
        self.refresh()
        entry = self.weight.calibration("weight") if self.weight is not None else {}
        for name, module in self.tensors.named_children() if self.tensors is not None else ():
            assert isinstance(module, FakeQuant)
            entry.update(module.calibration(name))
        return entry

    def read_calibration(self, given: Mapping[str, Any], problems: list[str]) -> list[Callable[[], None]]:
        """Check a layer's part of a calibration dict; the returned functions take it over."""
        own: dict[str, Any] = {} if self.weight is None else {"weight": self.weight}
        if self.tensors is not None:
            found = [key.removesuffix("_bits") for key in given if key.endswith("_bits")]
            own.update(self.tensors.named_children())
            own.update({name: self.tensors.make(name) for name in self.tensors.missing(found)})
        for name in ("weight", "input", "output", "gradient"):
            if name in own and f"{name}_bits" not in given:
                problems.append(f"{own[name].label}: {name}_bits is missing, expected {own[name].spec.bits}")
        if isinstance(self.weight, WeightFakeQuant):
            state = [(buffer, buffer.clone()) for buffer in self.weight.buffers()]
            weight = self.refresh()
            assert weight is not None
            given = self.weight.state_range("weight", given, weight)
            for buffer, value in state:
                buffer.copy_(value)
        actions = [module.read_calibration(name, given, problems) for name, module in own.items()]
        if self.tensors is not None:  # quantizers that the dict knows and the layer does not have yet
            children = self.tensors._modules
            new = {name: module for name, module in own.items() if name != "weight" and name not in children}
            actions.append(lambda: children.update(new))
        return actions


def register_parameter(layer: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """For the class of a quantized layer: ``layer.weight = nn.Parameter(...)`` gives it another float weight."""
    entries: Any = layer.parametrizations[name] if parametrize.is_parametrized(layer, name) else ()  # type: ignore[index]
    if param is not None and entries and all(isinstance(entry, FakeQuant) for entry in entries):
        entries.original = param
    else:
        nn.Module.register_parameter(layer, name, param)


def copy_of(model: nn.Module, attachments: Sequence[Attachment]) -> tuple[nn.Module, list[Attachment]]:
    """A quantized model of its own to change, with its attachments; its activations are torch's."""
    new, copies = copy.deepcopy((model, list(attachments)))
    LeanActivations(new).detach()
    return new, copies


def change_class(layer: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    """Take ``new`` for ``old``, also where ``old`` is the base of a class that a parametrization made."""
    own = type(layer)
    if own is not old:
        kept = {key: value for key, value in vars(own).items() if key not in ("__dict__", "__weakref__")}
        new = type(own.__name__, tuple(new if base is old else base for base in own.__bases__), kept)
    layer.__class__ = new


def remove_parametrization(layer: nn.Module, parametrization: nn.Module, order: Sequence[str]) -> None:
    """Undo ``register_parametrization`` for one of a weight's parametrizations; the Parameter object stays.

    torch's ``remove_parametrizations`` takes the property off a class that copies of the layer share, and puts the
    weight behind the bias. Here copies keep working and the parameters come back in ``order``.
    """
    entries: Any = layer.parametrizations["weight"]  # type: ignore[index]
    if len(entries) > 1:
        del entries[list(entries).index(parametrization)]
        return
    weight = entries.original
    del layer.parametrizations["weight"]  # type: ignore[operator, union-attr]
    own = type(layer)
    if len(layer.parametrizations):  # type: ignore[arg-type]
        # Another tensor is parametrized too: a class of this layer's own, without the property.
        kept = {key: value for key, value in vars(own).items() if key not in ("weight", "__dict__", "__weakref__")}
        layer.__class__ = type(own.__name__, own.__bases__, kept)
    else:
        del layer.parametrizations
        layer.__class__ = own.__bases__[0]
    owner: dict[str, Any] = layer._parameters if isinstance(weight, nn.Parameter) else layer._buffers
    owner["weight"] = weight
    for name in [*(name for name in order if name in owner), *(name for name in list(owner) if name not in order)]:
        owner[name] = owner.pop(name)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def run_model(model: nn.Module, dummy_input: DummyInput, name: str = "dummy_input") -> object:
    """What the model returns in one evaluation-mode forward without gradient.

    ``dummy_input`` is a tensor, a tuple or list of positional arguments or a dict of keyword arguments. Nothing
    stays behind: no gradient, no change of mode or of batch statistics. ``name``: what the caller calls it.
    """
    try:
        with in_evaluation(model), torch.no_grad():
            if isinstance(dummy_input, dict):
                return model(**dummy_input)
            if isinstance(dummy_input, (tuple, list)):
                return model(*dummy_input)
            return model(dummy_input)
    except Exception as error:
        raise ValueError(
            f"the model does not run on {name}: {error}. Expected a tensor, a tuple of the model's positional "
            "arguments or a dict of its keyword arguments, on the model's device; the model is unchanged"
        ) from error


def run_dummy(model: nn.Module, plans: Sequence[LayerPlan], dummy_input: DummyInput) -> dict[str, Sizes]:
    """The shapes that each layer sees when the model runs on ``dummy_input``; no hook stays behind."""
    sizes: dict[str, Sizes] = {plan.name: {} for plan in plans}
    handles: list[RemovableHandle] = []

    def watch(plan: LayerPlan) -> None:
        names, _ = argument_names(plan.layer)

        def note(name: str, tensor: Tensor) -> Tensor:
            sizes[plan.name].setdefault(name, tensor.shape)
            return tensor

        def before(_: nn.Module, args: Arguments, kwargs: Keywords) -> None:
            visit_arguments(names, args, kwargs, note)

        def after(_: nn.Module, args: Arguments, output: object) -> None:
            visit_tensors(output, "output", "_", note)

        handles.append(plan.layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(plan.layer.register_forward_hook(after))

    try:
        for plan in plans:
            watch(plan)
        run_model(model, dummy_input)
    finally:
        for handle in handles:
            handle.remove()
    return sizes
