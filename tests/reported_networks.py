"""A network under every quantizer, for the tests of its report."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantkern import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqQuantizer,
    NaiveQuantizer,
    ObserverQuantizer,
    QAT_Quantizer,
)
from quantkern.quantizers.base import Quantizer
from quantkern.report import Report, Row

BOTH = {"quant_types": ["weight", "input"], "quant_bits": 8, "op_types": ["default"]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.fc(self.dropout(self.conv2(x)).flatten(1))


def batch(count: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int = 2) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(seed=step)).square().mean().backward()
        optimizer.step()
    return model


def make(kind: str) -> Quantizer:
    """A quantizer of each kind on a Net that has taken training steps or seen calibration batches."""
    torch.manual_seed(0)
    model, few = Net(), {**BOTH, "quant_bits": 4}
    if kind.startswith("observer"):
        observer = ObserverQuantizer(model.eval(), [BOTH])
        observer.calibrate([batch(seed=1), batch(seed=2)], progress=False)
        if kind == "observer":
            observer.compress()
        return observer
    builders: dict[str, Callable[[], Quantizer]] = {
        "qat": lambda: QAT_Quantizer(model, [BOTH], fold_bn=False),
        "qat folded": lambda: QAT_Quantizer(model, [BOTH], dummy_input=batch()),
        "qat open": lambda: QAT_Quantizer(model, [BOTH]),
        "lsq": lambda: LsqQuantizer(model, [few]),
        "lsq folded": lambda: LsqQuantizer(model, [few], dummy_input=batch()),
        "lsq fresh": lambda: LsqQuantizer(model, [{**few, "quant_scheme": "per_channel_symmetric"}]),
        "dorefa": lambda: DoReFaQuantizer(model, [{**few, "quant_types": ["weight", "input", "gradient"]}]),
        "bnn": lambda: BNNQuantizer(model, [{**BOTH, "quant_bits": 1, "op_types": ["Linear"]}]),
        "naive": lambda: NaiveQuantizer(model),
    }
    quantizer = builders[kind]()
    if kind != "lsq fresh":
        train(model)
    return quantizer


KINDS = (
    *("qat", "qat folded", "qat open", "lsq", "lsq folded", "lsq fresh", "dorefa", "bnn", "naive"),
    *("observer", "observer before compress"),
)


def row_of(report: Report, name: str) -> Row:
    (found,) = [row for row in report.rows if row.name == name]
    return found


def codes(report: Report) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in report.warnings:
        found.setdefault(finding.code, []).append(finding.subject)
    return found


def sqnr(x: Tensor, y: Tensor) -> float:
    return 10 * math.log10(float(x.detach().double().square().sum() / (x - y).detach().double().square().sum()))
