"""Networks calibrated by ObserverQuantizer."""

from __future__ import annotations

from typing import Any

import torch
from small_quantized_net import EVERY, batch, net, rule
from torch import Tensor, nn

from quantkern.quantizers import ObserverQuantizer

LAYERS = [{**EVERY, "op_types": ["Conv2d", "Linear"]}]


def batches(count: int = 3) -> list[Tensor]:
    return [batch(seed) for seed in range(count)]


def calibrated(rules: list[dict[str, Any]] = LAYERS, count: int = 3) -> tuple[nn.Module, ObserverQuantizer]:
    model = net().eval()
    quantizer = ObserverQuantizer(model, rules)
    quantizer.calibrate(batches(count), progress=False)
    return model, quantizer


def compressed(rules: list[dict[str, Any]] = LAYERS) -> tuple[nn.Module, ObserverQuantizer]:
    model, quantizer = calibrated(rules)
    assert quantizer.compress() is model
    return model, quantizer


def linear(quant_types: str, bits: int = 8, **more: Any) -> tuple[nn.Linear, ObserverQuantizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    return model[0], ObserverQuantizer(model, rule(quant_types, "0", bits, **more))
