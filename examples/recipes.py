"""The quantizers, each set up as in an NNI script. Only the import line differs: in NNI it is

    from nni.algorithms.compression.pytorch.quantization import NaiveQuantizer, QAT_Quantizer, LsqQuantizer, ...

A recipe gets the model, its optimizer and the number of steps in an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import models
from torch import nn
from torch.optim import Optimizer

from quantkern import BNNQuantizer, DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, QAT_Quantizer


class Quantizer(Protocol):
    """What the examples use of a quantizer."""

    def compress(self) -> nn.Module:
        """Attach to the model and return it."""

    def export_model(self, model_path: str, calibration_path: str | None = None) -> Mapping[str, object]:
        """Detach, save the float model and its calibration."""


MakeQuantizer = Callable[[nn.Module, Optimizer, int], Quantizer]


@dataclass(frozen=True)
class Recipe:
    """A way to train a model.

    weights, activations: their bits. make: the quantizer of a model, given its optimizer and the number of steps in
    an epoch; None trains the float model. prepare: what is done to a new model before its optimizer is built.
    """

    weights: int
    activations: int
    make: MakeQuantizer | None
    what: str
    prepare: Callable[[nn.Module], nn.Module] = models.as_built


def naive(model: nn.Module, optimizer: Optimizer, steps_per_epoch: int) -> Quantizer:  # noqa: ARG001
    """8-bit weights everywhere, nothing to configure."""
    return NaiveQuantizer(model)


def qat(model: nn.Module, optimizer: Optimizer, steps_per_epoch: int) -> Quantizer:
    """8 bits for what every matrix product reads (weights and inputs) and for what every activation writes."""
    config_list: list[dict[str, object]] = [
        {
            "quant_types": ["weight", "input"],
            "quant_bits": {"weight": 8, "input": 8},
            "op_types": ["Conv2d", "Linear"],
        },
        {
            "quant_types": ["output"],
            "quant_bits": 8,
            "quant_start_step": steps_per_epoch,  # the ranges settle during the first epoch
            "op_types": ["ReLU6"],
        },
    ]
    return QAT_Quantizer(model, config_list, optimizer)


def lsq(bits: int) -> MakeQuantizer:
    """Learned step sizes for weights and inputs; as in the paper the first and the last layer keep 8 bits."""

    def make(model: nn.Module, optimizer: Optimizer, steps_per_epoch: int) -> Quantizer:  # noqa: ARG001
        config_list: list[dict[str, object]] = [
            {
                "quant_types": ["weight", "input"],
                "quant_bits": {"weight": width, "input": width},
                "op_names": names,
            }
            for width, names in ((8, ["conv1", "fc2"]), (bits, ["conv2", "fc1"]))
        ]
        return LsqQuantizer(model, config_list, optimizer)

    return make


def dorefa(weights: int, inputs: int = 32, gradients: int = 32) -> MakeQuantizer:
    """DoReFa on the two inner layers, as in the paper; 32 bits: left as it is."""

    def make(model: nn.Module, optimizer: Optimizer, steps_per_epoch: int) -> Quantizer:  # noqa: ARG001
        bits = {"weight": weights, "input": inputs, "gradient": gradients}
        chosen = {kind: width for kind, width in bits.items() if width < 32}
        config_list: list[dict[str, object]] = [
            {"quant_types": list(chosen), "quant_bits": chosen, "op_names": ["conv2", "fc1"]}
        ]
        return DoReFaQuantizer(model, config_list, optimizer)

    return make


def bnn(model: nn.Module, optimizer: Optimizer, steps_per_epoch: int) -> Quantizer:  # noqa: ARG001
    """The two inner layers with weights and inputs of one bit, clipped after every step."""
    config_list: list[dict[str, object]] = [
        {"quant_types": ["weight"], "quant_bits": 1, "op_names": ["conv2", "fc1"]},
        {"quant_types": ["output"], "quant_bits": 1, "op_names": ["relu1.2", "relu2.2"]},
    ]
    return BNNQuantizer(model, config_list, optimizer)


RECIPES = {
    "float": Recipe(32, 32, None, "no quantization"),
    "naive": Recipe(8, 32, naive, "NaiveQuantizer"),
    "qat": Recipe(8, 8, qat, "QAT_Quantizer"),
    **{f"lsq-{bits}": Recipe(bits, bits, lsq(bits), "LsqQuantizer") for bits in (8, 4, 3, 2)},
    **{f"dorefa-w{bits}": Recipe(bits, 32, dorefa(bits), "DoReFaQuantizer") for bits in (4, 3, 2, 1)},
    "dorefa-w1a2g4": Recipe(1, 2, dorefa(1, 2, 4), "DoReFaQuantizer, gradients of 4 bits"),
    "bnn": Recipe(1, 1, bnn, "BNNQuantizer", models.with_batch_norm),
}

ONE_OF_EACH = ("float", "naive", "qat", "lsq-4", "dorefa-w2", "bnn")
"""One recipe for every quantizer."""
