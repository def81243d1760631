"""A small binary network, its training, and the same network simulated in float."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantkern import BNNQuantizer, reference


class Net(nn.Module):
    """A real first and last layer, two binary ones between them, pooling before the batch norm as in the paper."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.Hardtanh()
        self.conv2 = nn.Conv2d(16, 40, 3, padding=1, bias=bias)
        self.pool = nn.MaxPool2d(2)
        self.bn2 = nn.BatchNorm2d(40)
        self.act2 = nn.Hardtanh(inplace=True)
        self.conv3 = nn.Conv2d(40, 36, 3, padding=1, bias=bias)
        self.bn3 = nn.BatchNorm2d(36)
        self.act3 = nn.Hardtanh(inplace=True)
        self.fc1 = nn.Linear(36 * 9, 24, bias=bias)
        self.bn4 = nn.BatchNorm1d(24)
        self.act4 = nn.Hardtanh()
        self.fc2 = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.pool(self.conv2(x))))
        x = self.act3(self.bn3(self.conv3(x)))
        x = self.act4(self.bn4(self.fc1(x.view(-1, 36 * 9))))
        return self.fc2(x)


BINARY = ["conv2", "conv3", "fc1"]
RULES = [
    {"quant_types": ["weight"], "quant_bits": 1, "op_names": BINARY},
    {"quant_types": ["output"], "quant_bits": 1, "op_types": ["Hardtanh"]},
]


def net(**more: Any) -> Net:
    torch.manual_seed(0)
    return Net(**more)


def batch(seed: int = 0, size: int = 8) -> Tensor:
    return torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def target(seed: int = 0, size: int = 8) -> Tensor:
    return torch.randint(0, 3, (size,), generator=torch.Generator().manual_seed(seed))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range, after: Callable[[], None] | None = None
) -> list[float]:
    model.train()
    losses = []
    for seed in seeds:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch(seed)), target(seed))
        loss.backward()
        optimizer.step()
        if after is not None:
            after()
        losses.append(loss.item())
    return losses


def trained(rules: list[dict[str, Any]] = RULES, steps: int = 4, **more: Any) -> tuple[Net, BNNQuantizer]:
    """A network away from its start, with batch norms of either sign."""
    model = net(**more)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    quantizer = BNNQuantizer(model, rules, optimizer)
    train(model, optimizer, range(steps))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight[::3] *= -1
                module.weight[1] = 0
                module.bias.add_(torch.linspace(-0.3, 0.3, len(module.bias)))
    return model, quantizer


class SimulatedSign(nn.Module):
    """Float simulation of a binary weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return reference.binarize(weight, clip_gradient=False)


def simulate(model: Net) -> None:
    """The same network in plain PyTorch: float layers over +1 and -1, the bias added to the exact sums.

    Behind a batch norm an exact 0 is common: where a sum is just the mean of its channel. Which sign that gets is up
    to the last bit, so the simulation must not add the bias in the middle of a sum.
    """
    for name in BINARY:
        layer = model.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", SimulatedSign())
        layer.forward = partial(simulated, layer)
    for name in ("act1", "act2", "act3", "act4"):
        model.get_submodule(name).register_forward_hook(lambda _, __, y: reference.binarize(y))


def simulated(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        y = nn.functional.linear(x, layer.weight)
        return y if layer.bias is None else y + layer.bias
    y = nn.functional.conv2d(x, layer.weight, None, layer.stride, layer.padding)
    return y if layer.bias is None else y + layer.bias.view(-1, 1, 1)


def clip(model: Net) -> None:
    with torch.no_grad():
        for name in BINARY:
            model.get_submodule(name).parametrizations.weight.original.clamp_(-1, 1)
