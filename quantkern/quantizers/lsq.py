"""LsqQuantizer: quantization steps that are learned (Esser et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from quantkern.attach import DummyInput
from quantkern.config import Extra, Form, TensorSpec
from quantkern.layer_quantizers import Kinds
from quantkern.learned import LearnedActivation, LearnedState, LearnedWeight, LsqSpec
from quantkern.quantizers.base import ConfigList, require_parameters_of
from quantkern.quantizers.folding import FoldingQuantizer
from quantkern.ranks import StartSharing
from quantkern.settings import QUANT_TYPES, default_settings

_KEYS = ("quant_types", "quant_bits", "quant_dtype", "quant_scheme", "quant_start_step", "axis")
_FACTORY = dict.fromkeys(QUANT_TYPES, ("per_tensor_symmetric", "auto")) | {"weight": ("per_tensor_symmetric", "int")}


def _one_of(*values: object) -> Extra:
    def check(value: object) -> bool:
        return any(value is known or (isinstance(known, str) and value == known) for known in values)

    return Extra(check, f"one of {', '.join(map(repr, values))}")


_EXTRAS = {
    "init": _one_of("paper", "minmax", "mse"),
    "grad_scale": _one_of("paper", "numel", "none"),
    "signed": _one_of("auto", True, False),
    "offset": _one_of(True, False),
}


def _refine(quant_type: str, spec: TensorSpec, given: Mapping[str, Any]) -> TensorSpec:
    """Decide dtype and scheme from what the rule says about signs and offsets."""
    assert isinstance(spec, LsqSpec)
    if quant_type == "weight":
        if spec.dtype != "int":
            raise ValueError(f"quant_dtype of 'weight' is {spec.dtype!r}, expected 'int': LSQ's weights are signed")
        if not spec.symmetric:
            what = f"quant_scheme of 'weight' is {spec.scheme!r}"
            raise ValueError(f"{what}, expected a symmetric one: LSQ's weights have no zero point")
        return spec
    if spec.offset:
        spec = replace(spec, scheme=spec.scheme.replace("symmetric", "affine"))
    if spec.dtype == "auto" and isinstance(spec.signed, bool):
        spec = replace(spec, dtype="int" if spec.signed else "uint")
    if spec.dtype == "auto" and not spec.symmetric:  # the zero point takes care of signs
        spec = replace(spec, dtype="uint")
    return spec


def _check_state_dict(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Pre-hook of ``load_state_dict``: refuse scales that do not fit before anything is loaded."""
    problems = []
    for name, module in model.named_modules():
        if isinstance(module, LearnedState):
            problems += module.check_state(state_dict, f"{prefix}{name}.")
    if problems:
        lines = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise ValueError(f"state_dict does not fit the quantizer's rules, nothing was loaded:{lines}")


class _ScaleGroup:
    """Pre-hook of an optimizer: brings it the scales that it lacks, all in one group without weight decay.

    A quantizer of a tensor that the constructor did not know about appears in the first forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, optimizer: Optimizer, *_: object) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [parameter for parameter in scale_parameters(self.model) if id(parameter) not in held]
        own = [group for group in optimizer.param_groups if group.get("quantkern_scales")]
        if missing and own:
            own[0]["params"].extend(missing)
        elif missing:
            first = optimizer.param_groups[0]
            group: dict[str, Any] = {"params": missing, "weight_decay": 0.0, "quantkern_scales": True}
            for key in {"lr", "initial_lr"} & first.keys():
                group[key] = first[key].clone() if isinstance(first[key], Tensor) else first[key]
            optimizer.add_param_group(group)


def scale_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The learned scales and zero points in a model."""
    for module in model.modules():
        if isinstance(module, LearnedState):
            yield from module.parameters(recurse=False)


class LsqQuantizer(FoldingQuantizer):
    """Trains the step size of every quantized tensor together with the weights.

    Source: Esser et al., "Learned Step Size Quantization", 2020; the learned offset after Bhalgat et al., "LSQ+",
    2020. Weights are quantized to -2^(b-1) .. 2^(b-1)-1, inputs and outputs to that or to 0 .. 2^b-1. A scale starts
    on the tensor that is really quantized, in the first training forward, and never again. It never gets smaller
    than 1/1000 of where it started: a training forward sets it back to that. The step in which scales start has
    to run on the model itself before ``torch.compile(model, fullgraph=True)`` or a CUDA graph quantizes.

    Args:
        model: its layers are quantized in place.
        config_list: list of rules, dicts with op_types, op_names, exclude and quant_types as for ``QAT_Quantizer``
            and the keys

            - ``quant_bits``: 2 to 16, one number or a dict by quant type.
            - ``quant_scheme``: 'per_tensor_symmetric' (default) or 'per_channel_symmetric'; for inputs and outputs
              also the affine ones, which learn a zero point. ``quant_dtype``: 'int' or 'uint'; weights are 'int'.
              ``axis`` and ``quant_start_step``: as for ``QAT_Quantizer``.
            - ``init``: where a scale starts, 'paper' (default, 2 * mean|v| / sqrt(quant_max)), 'minmax' or 'mse'.
            - ``grad_scale``: factor of the scale's gradient, 1 / sqrt(N * quant_max) with N the number of weights
              that share the scale, or of the layer's features without the batch ('paper', default); N all elements
              with the batch ('numel', as NNI); or 1 ('none').
            - ``signed``: True, False or 'auto' (default: unsigned when the first training batch has no negative
              value), for inputs and outputs; a quant_dtype decides instead.
            - ``offset``: True learns a zero point for inputs and outputs (LSQ+), the same as an affine scheme.

            All but the names of layers and quant_start_step are one value or a dict by quant type.
        optimizer: gets the scales as one new parameter group without weight decay, with the learning rate of its
            first group; the group stays after an export. Build learning rate schedulers afterwards. Without an
            optimizer here, build it afterwards from ``model.parameters()``, which holds the scales, or add
            ``scale_parameters()``. ``fully_shard`` must leave the scales alone: give it
            ``ignored_params=set(quantizer.scale_parameters())``; their gradients are averaged here.
        dummy_input, fold_bn, freeze_bn_step: as for ``QAT_Quantizer``. The scale of a folded weight starts on the
            folded weight, and follows the factor of its batch norm from there.

    Raises:
        ConfigError: everything that is wrong with config_list; ValueError: an optimizer that holds none of the
            model's parameters, or fold_bn=True as for ``QAT_Quantizer``. Nothing is changed then.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
    >>> rules = [{"quant_types": ["weight", "input"], "quant_bits": 4, "op_types": ["Linear"]}]
    >>> quantizer = LsqQuantizer(model, rules, optimizer)
    >>> model(torch.randn(16, 4)).square().sum().backward()
    >>> optimizer.step()
    >>> len(list(quantizer.scale_parameters())), [len(group["params"]) for group in optimizer.param_groups]
    (4, [4, 4])
    """

    kinds: Kinds = {"weight": LearnedWeight, "input": LearnedActivation, "output": LearnedActivation}

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList | None = None,
        optimizer: Optimizer | None = None,
        dummy_input: DummyInput | None = None,
        *,
        fold_bn: bool | None = None,
        freeze_bn_step: int | None = None,
    ) -> None:
        self.choose_folding(fold_bn, freeze_bn_step, dummy_input)
        super().__init__(model, config_list, optimizer, dummy_input)
        check = self.bound_model.register_load_state_dict_pre_hook(_check_state_dict)  # type: ignore[no-untyped-call]
        self._hooks.append(check)
        self._hooks.append(self.bound_model.register_forward_pre_hook(StartSharing()))
        if optimizer is not None:
            scales = _ScaleGroup(self.bound_model)
            scales(optimizer)
            self._hooks.append(optimizer.register_step_pre_hook(scales))
            self._hooks.append(optimizer.register_load_state_dict_pre_hook(scales))

    def form(self) -> Form:
        """See ``Quantizer.form``."""
        return Form(QUANT_TYPES, _KEYS, default_settings(_FACTORY), 2, LsqSpec, _EXTRAS, _refine)

    def check_optimizer(self, model: nn.Module, optimizer: Optimizer) -> None:
        """See ``Quantizer.check_optimizer``."""
        require_parameters_of(model, optimizer)

    def scale_parameters(self) -> Iterator[nn.Parameter]:
        """The learned scales and zero points, for an optimizer that was not given to the constructor."""
        return scale_parameters(self.bound_model)

    def freeze_ranges(self, frozen: bool = True) -> None:
        """Stop (or with False resume) learning the scales."""
        for parameter in self.scale_parameters():
            parameter.requires_grad_(not frozen)
