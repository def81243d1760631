"""LsqQuantizer on a model of one layer, and the rules of its usual network."""

from __future__ import annotations

from typing import Any

import torch
from small_quantized_net import EVERY, rule
from torch import nn

from quantkern.quantizers import LsqQuantizer

LAYERS = [{**EVERY, "quant_bits": 4, "op_types": ["Conv2d", "Linear"]}]


def linear(quant_types: str, bits: int = 4, **more: Any) -> tuple[nn.Linear, LsqQuantizer]:
    """A model of one linear layer, 6 -> 5."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    quantizer = LsqQuantizer(model, rule(quant_types, "0", bits, **more))
    return model[0], quantizer
