"""The networks of NNI's own tests, quantized as its scripts do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkern import BNNQuantizer, DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, ObserverQuantizer, QAT_Quantizer

ALL = [NaiveQuantizer, QAT_Quantizer, LsqQuantizer, DoReFaQuantizer, BNNQuantizer, ObserverQuantizer]
RANGED = [QAT_Quantizer, LsqQuantizer, ObserverQuantizer]


class Net(nn.Module):
    """Two convolutions with batch norm and two linear layers, one ReLU called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 5, 5)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 10, 5)
        self.bn2 = nn.BatchNorm2d(10)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(160, 20)
        self.fc2 = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        x = self.pool(self.relu(self.bn2(self.conv2(x))))
        return self.fc2(self.relu(self.fc1(x.flatten(1))))


class Linear(nn.Module):
    """One linear layer and a ReLU, whose tensors a test gives."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x))


def images(seed: int = 0, size: int = 4) -> Tensor:
    return torch.randn(size, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def bits_for(kind: type) -> int:
    return 1 if kind is BNNQuantizer else 8


def weights(kind: type, *types: str) -> list[dict[str, Any]]:
    return [{"quant_types": ["weight"], "quant_bits": bits_for(kind), "op_types": list(types or ("Conv2d", "Linear"))}]


def build(kind: type, model: nn.Module, rules: list[dict[str, Any]], **more: Any) -> Any:
    """A quantizer as NNI's scripts build it, with an optimizer."""
    if kind is ObserverQuantizer:
        model.eval()
    torch.manual_seed(0)
    return kind(model, rules, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5), **more)


def use(quantizer: Any, steps: int = 2) -> nn.Module:
    """Calibrate or train."""
    model = quantizer.bound_model
    if isinstance(quantizer, ObserverQuantizer):
        quantizer.calibrate([images(seed) for seed in range(steps)], progress=False)
    else:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for seed in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images(seed)), torch.tensor([1, 2, 3, 0])).backward()
            optimizer.step()
    return quantizer.compress()


def entry(quantizer: Any, layer: str, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = quantizer.export_model(folder / "model.pth")[layer]
    return found
