"""BNNQuantizer: weights and activations of one bit (Courbariaux et al. 2016)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torch.optim import Optimizer

from quantkern.attach import DummyInput
from quantkern.binarized import (
    BinaryActivation,
    BinaryWeight,
    CannotTrace,
    WeightClipper,
    find_real_inputs,
    packed_class,
    trace,
)
from quantkern.config import Form, LayerPlan
from quantkern.layer_quantizers import Kinds
from quantkern.nn.conversion import convert
from quantkern.quantizers.base import ConfigList, Quantizer, require_parameters_of
from quantkern.settings import QUANT_TYPES

_FORM = Form(
    QUANT_TYPES, ("quant_types", "quant_bits"), dict.fromkeys(QUANT_TYPES, ("per_tensor_symmetric", "uint")), max_bits=1
)


class BNNQuantizer(Quantizer):
    """Trains networks whose weights and activations are +1 or -1, on kernels that take one bit for one bit.

    A binary weight is the sign of a real one, which gets the whole gradient and is kept in [-1, 1] after every step.
    A binary input or output is the sign of a real one, and the gradient passes where that lies in [-1, 1]; sign(0) =
    +1. Source: Courbariaux et al., "Binarized Neural Networks: Training Deep Neural Networks with Weights and
    Activations Constrained to +1 or -1", 2016, algorithm 1.

    Conv2d and Linear layers whose weight and input are both binary run on packed kernels, and save one bit an element
    for the backward. An input counts as binary where the layer's rule has 'input', or where the model's graph shows
    that only binary outputs reach it, through flatten, view, max pooling and the like; so calling such a layer by
    hand takes the signs of what it is given. ``float_layers`` says of every other layer with a binary weight why it
    runs in real arithmetic, with the same numbers.

    Args:
        model: its layers are quantized in place.
        config_list: list of rules, dicts with op_types, op_names and exclude as for ``QAT_Quantizer`` and the keys

            - ``quant_types``: 'weight', 'input', 'output', one or a list.
            - ``quant_bits``: 1, or a dict of 1 by quant type.

        optimizer: where given, the weights are clipped after its every step; else call ``step()`` after each.
        dummy_input: accepted as by every quantizer; nothing here needs it.

    Raises:
        ConfigError: everything that is wrong with config_list; ValueError: an optimizer that holds none of the
            model's parameters. Nothing is changed then.

    ``export_model`` saves the real weights, as every quantizer here does: their signs are the binary ones, and
    training can go on from them. The packed model is ``convert()``.

    >>> import torch
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(8, 64), torch.nn.BatchNorm1d(64), torch.nn.Hardtanh(), torch.nn.Linear(64, 2))
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    >>> rules = [{"quant_types": ["output"], "quant_bits": 1, "op_names": ["2"]},
    ...          {"quant_types": ["weight"], "quant_bits": 1, "op_names": ["3"]}]
    >>> quantizer = BNNQuantizer(model, rules, optimizer)
    >>> model(torch.randn(16, 8)).square().sum().backward()
    >>> optimizer.step()
    >>> quantizer.packed_layers
    ('3',)
    >>> packed, x = quantizer.convert(), torch.randn(4, 8)
    >>> torch.equal(packed(x), model.eval()(x))
    True
    """

    kinds: Kinds = {"weight": BinaryWeight, "input": BinaryActivation, "output": BinaryActivation}
    packed_layers: tuple[str, ...]
    float_layers: Mapping[str, str]

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList | None = None,
        optimizer: Optimizer | None = None,
        dummy_input: DummyInput | None = None,
    ) -> None:
        super().__init__(model, config_list, optimizer, dummy_input)
        self._clip = WeightClipper([a.layer for a in self._attachments if a.weight is not None])
        if optimizer is not None:
            self._hooks.append(optimizer.register_step_post_hook(self._clip))

    def form(self) -> Form:
        """See ``Quantizer.form``."""
        return _FORM

    def check_optimizer(self, model: nn.Module, optimizer: Optimizer) -> None:
        """See ``Quantizer.check_optimizer``."""
        require_parameters_of(model, optimizer)

    def refine_plans(self, model: nn.Module, plans: list[LayerPlan]) -> list[LayerPlan]:
        """Find out which layers the packed kernels can compute."""
        by_layer = {plan.layer: plan for plan in plans}
        classes = {plan.layer: packed_class(plan.layer) for plan in plans if "weight" in plan.specs}
        reasons = {layer: why for layer, (own, why) in classes.items() if own is None}
        asking = [layer for layer in classes if layer not in reasons and "input" not in by_layer[layer].specs]
        unknown: list[str] = []
        if asking:
            try:
                graphs = trace(model, list(by_layer))
            except CannotTrace as error:
                reasons.update(dict.fromkeys(asking, f"whether its input is binary is not known: {error}"))
                unknown = [by_layer[layer].name for layer in asking if model is not layer]
            else:
                binary = {layer for layer, plan in by_layer.items() if "output" in plan.specs}
                reasons.update(find_real_inputs(model, graphs, asking, binary.__contains__))
        self.packed_layers = tuple(by_layer[layer].name for layer in classes if layer not in reasons)
        self.float_layers = {by_layer[layer].name: why for layer, why in reasons.items()}
        if unknown:
            warnings.warn(
                f"{', '.join(map(repr, unknown))} run in real arithmetic, with the same numbers: "
                f"{self.float_layers[unknown[0]]}. With 'input' among their rule's quant_types they run on the packed "
                "kernels",
                UserWarning,
                stacklevel=4,
            )
        return [
            replace(plan, computed_as=classes[plan.layer][0]) if plan.name in self.packed_layers else plan
            for plan in plans
        ]

    def step(self) -> None:
        """Clip the real weights behind binary ones to [-1, 1]: call it after every step of an optimizer that the
        constructor did not get."""
        self._require_attached("step")
        self._clip()

    def convert(self) -> nn.Module:
        """A new model for inference with packed layers; the trained one stays as it is.

        Each layer of ``packed_layers`` becomes a ``quantkern.nn.BinaryConv2d`` or ``BinaryLinear``. Behind it a
        MaxPool2d, a batch norm and rising activations up to a binary output (or up to packed layers with a binary
        input) become the layer's integer thresholds, found with these very modules, and leave an ``nn.Identity``;
        the signs stay packed where only packed layers read them. Layers that have a binary weight and a real input
        stay real layers whose weights are +1 and -1.

        In evaluation on the same device the results are those of the trained model to the last bit. Its state_dict
        has one bit a weight for packed layers and loads into what ``convert()`` returns for another quantizer of
        the same model and rules.
        """
        self._require_whole("convert")
        return convert(self.bound_model, self._attachments)
