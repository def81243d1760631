"""Which rule says what about which layer of a model.

``plan_layers`` reads the rules, matches them with a model and says every problem at once; nothing is touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from quantkern.config import CHILD_NAME, DEFAULT_OP_TYPES, ConfigError, Form, LayerPlan, Rule, TensorSpec, read_rules
from quantkern.settings import did_you_mean


def op_type(module: nn.Module) -> str:
    """The class name a rule knows a module by; a parametrized module keeps the name of its own class."""
    cls = type(module)
    return (cls.__bases__[0] if parametrize.is_parametrized(module) else cls).__name__


def is_quantized(module: nn.Module) -> bool:
    """Whether a quantizer holds this layer already."""
    own = parametrize.is_parametrized(module, "weight") and module.parametrizations["weight"]  # type: ignore[index]
    ours = any(type(entry).__module__.startswith("quantkern.") for entry in own or ())
    return ours or CHILD_NAME in module._modules


def layers_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all its names. As in NNI the model itself is none, unless it is a single layer."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module is not model or not any(True for _ in model.children()):
            names.setdefault(module, []).append(name)
    return names


def _notes_on_names(rules: Sequence[Rule], names: Mapping[nn.Module, Sequence[str]]) -> list[str]:
    """What rules name that the model lacks, and rules that select nothing."""
    types = {op_type(module) for module in names}
    all_names = {name for own in names.values() for name in own}
    notes = []
    for rule in rules:
        unknown = False
        for key, asked, known in (("op_types", rule.op_types, types), ("op_names", rule.op_names, all_names)):
            wanted = asked or frozenset()
            if "default" in wanted and key == "op_types":
                wanted = wanted - {"default", *DEFAULT_OP_TYPES}
            for word in sorted(wanted - known):
                unknown = True
                notes.append(f"{rule.label}[{key!r}]: the model has no {word!r}{did_you_mean(word, known)}")
        if not unknown and not any(rule.selects(op_type(module), own) for module, own in names.items()):
            notes.append(f"{rule.label} selects no layer of the model")
    return notes


def _check_weight(plan: LayerPlan, spec: TensorSpec, problems: list[str]) -> TensorSpec:
    """The spec with its axis resolved for this layer's weight."""
    where = f"{plan.rule}: layer {plan.name!r} ({op_type(plan.layer)})"
    if is_lazy(plan.layer._parameters.get("weight")):  # type: ignore[arg-type]
        problems.append(f"{where} has no weight yet; run one batch through the model first")
        return spec
    weight = getattr(plan.layer, "weight", None)
    owned = "weight" in plan.layer._parameters or "weight" in plan.layer._buffers
    if not isinstance(weight, Tensor) or not (owned or parametrize.is_parametrized(plan.layer, "weight")):
        problems.append(f"{where} has no parameter 'weight'; take 'weight' or the layer out of the rule")
        return spec
    if not weight.is_floating_point():
        problems.append(f"{where} has a weight of {weight.dtype}, expected a floating-point one")
    if not spec.per_channel:
        return replace(spec, axis=None)
    transposed = isinstance(plan.layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    axis = spec.axis if spec.axis is not None else int(transposed)
    if not -weight.dim() <= axis < weight.dim():
        shape = list(weight.shape)
        limits = f"[{-weight.dim()}, {weight.dim() - 1}]"
        problems.append(f"{where}: axis {axis} is out of range, its weight of shape {shape} has axes {limits}")
        return spec
    return replace(spec, axis=axis % weight.dim())


def plan_layers(
    model: nn.Module, config_list: object, form: Form, stacklevel: int = 2, notes: list[str] | None = None
) -> list[LayerPlan]:
    """The layers of ``model`` that ``config_list`` selects, each with its specs; the model is only looked at.

    Raises ConfigError with all problems. Warns about names and types that the model lacks (with the nearest ones),
    about rules that select nothing and rules that a later rule replaces; ``notes`` gets these warnings too.
    """
    rules, problems = read_rules(config_list, form)
    names = layers_of(model)
    chosen: dict[nn.Module, Rule] = {}
    replaced: dict[tuple[str, str], list[str]] = {}
    for rule in rules:
        for module, own in names.items():
            if rule.selects(op_type(module), own):
                earlier = chosen.get(module)
                if earlier is not None and earlier.specs and rule.specs:
                    replaced.setdefault((earlier.label, rule.label), []).append(own[0])
                chosen[module] = rule
    plans: list[LayerPlan] = []
    for module, own in names.items():
        rule_of = chosen.get(module)
        if rule_of is None or not rule_of.specs:
            continue
        plan = LayerPlan(own[0], module, rule_of.label, rule_of.specs)
        if is_quantized(module):  # not looked at: a learned scale starts when its weight is asked for in training
            problems.append(f"{plan.rule}: layer {plan.name!r} has a quantizer already; export_model() takes it off")
            continue
        specs = {}
        for quant_type, spec in rule_of.specs.items():
            if quant_type == "weight":
                specs[quant_type] = _check_weight(plan, spec, problems)
            else:
                default_axis = 1 if spec.axis is None else spec.axis
                specs[quant_type] = replace(spec, axis=default_axis if spec.per_channel else None)
        plans.append(replace(plan, specs=specs))
    if not plans and not problems:
        types = sorted({op_type(module) for module in names})
        problems.append(f"it selects no layer of the model; the model has the types {', '.join(types) or '(none)'}")
    found = _notes_on_names(rules, names)
    for (earlier_label, label), layers in replaced.items():
        found.append(
            f"{label} replaces {earlier_label} for {', '.join(map(repr, layers))}: rules are not merged, the last one "
            "counts. Put all quant_types of a layer into one rule."
        )
    for text in found:
        warnings.warn(text, UserWarning, stacklevel=stacklevel + 1)
    if notes is not None:
        notes.extend(found)
    if problems:
        raise ConfigError(problems)
    return plans
