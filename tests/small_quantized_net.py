"""A small network, its rules, and its training: what several tests of the quantizers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

EVERY = {"quant_types": ["weight", "input", "output"], "quant_bits": 8}


EVERY_LAYER = [{**EVERY, "op_types": ["Conv2d", "Linear"]}]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.bn(self.conv(x))).flatten(1))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(seed: int = 0, size: int = 4) -> Tensor:
    return torch.randn(size, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def rule(kinds: str, layer: str, bits: int = 8, **more: Any) -> list[dict[str, Any]]:
    return [{"quant_types": kinds.split(), "quant_bits": bits, "op_names": [layer], **more}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None, seeds: range) -> list[Tensor]:
    model.train()
    outputs = []
    for seed in seeds:
        if optimizer is not None:
            optimizer.zero_grad()
        output = model(batch(seed))
        output.square().mean().backward()
        if optimizer is not None:
            optimizer.step()
        outputs.append(output.detach())
    return outputs
