"""The quantizers, each set up as in an NNI script. Only the import line differs: in NNI it is

    from nni.algorithms.compression.pytorch.quantization import NaiveQuantizer, QAT_Quantizer

A recipe gets the model, its optimizer and the number of steps in an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn
from torch.optim import Optimizer

from quantkern import NaiveQuantizer, QAT_Quantizer


class Quantizer(Protocol):
    """What the examples use of a quantizer."""

    def compress(self) -> nn.Module:
        """Attach to the model and return it."""

    def export_model(self, model_path: str, calibration_path: str | None = None) -> Mapping[str, object]:
        """Detach, save the float model and its calibration."""


@dataclass(frozen=True)
class Recipe:
    """A way to train a model.

    weights, activations: their bits. make: the quantizer of a model, given its optimizer and the number of steps in
    an epoch; None trains the float model.
    """

    weights: int
    activations: int
    make: Callable[[nn.Module, Optimizer, int], Quantizer] | None
    what: str


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


RECIPES = {
    "float": Recipe(32, 32, None, "no quantization"),
    "naive": Recipe(8, 32, naive, "NaiveQuantizer"),
    "qat": Recipe(8, 8, qat, "QAT_Quantizer"),
}
