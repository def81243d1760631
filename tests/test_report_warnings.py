"""When a quantizer's report warns, and that a healthy model gives no reason to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reported_networks import BOTH, Net, batch, codes, make, row_of, train
from torch import Tensor, nn

from quantkern import (
    LsqQuantizer,
    QAT_Quantizer,
)


def test_a_healthy_model_has_no_warnings() -> None:
    for kind in ("qat", "qat folded", "naive"):
        assert make(kind).report(batch()).warnings == (), kind
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    rules = [BOTH, {**BOTH, "quant_bits": 4, "op_names": ["2"]}]
    with pytest.warns(UserWarning, match="replaces"):
        quantizer = QAT_Quantizer(model, rules)
    model(torch.rand(64, 4)).sum().backward()
    assert set(codes(quantizer.report(torch.rand(64, 4)))) == {"rule"}


def test_warns_of_rules_that_match_nothing() -> None:
    rules = [BOTH, {**BOTH, "op_types": ["LSTMCell"]}, {**BOTH, "op_names": ["conv3"]}]
    with pytest.warns(UserWarning, match="the model has no"):
        quantizer = QAT_Quantizer(Net(), rules)
    texts = [finding.text for finding in quantizer.report().warnings if finding.code == "rule"]
    assert len(texts) == 2 and "LSTMCell" in texts[0] and "did you mean 'conv2' or 'conv1'?" in texts[1]
    assert "rule" not in codes(make("qat").report())


def test_warns_of_few_bits_at_both_ends() -> None:
    few = {**BOTH, "quant_bits": {"weight": 4, "input": 8}}
    found = codes(QAT_Quantizer(Net(), [few]).report())
    assert (found["first-layer"], found["last-layer"]) == (["conv1"], ["fc"])
    middle = codes(QAT_Quantizer(Net(), [{**few, "op_names": ["conv2"]}]).report())
    assert not {"first-layer", "last-layer"} & set(middle)


def test_the_order_of_layers_is_that_of_the_forward() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.stem = nn.Linear(4, 2), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x))

    quantizer = QAT_Quantizer(Backwards(), [{**BOTH, "quant_bits": 4, "op_names": ["stem"]}])
    assert codes(quantizer.report())["last-layer"] == ["stem"]
    assert codes(quantizer.report(torch.randn(2, 4)))["first-layer"] == ["stem"]


def test_warns_of_a_weight_without_gradient() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + 0.0 * self.unused(x).detach()

    quantizer = LsqQuantizer(Unused(), [BOTH])
    assert "no-gradient" not in codes(quantizer.report())  # no step was taken: nothing is known
    quantizer(torch.randn(8, 4)).square().sum().backward()
    report = quantizer.report()
    assert codes(report)["no-gradient"] == ["unused.input", *["unused.weight"] * 2]
    assert row_of(report, "unused.weight").gradient is None and "none" in report.plain()
    quantizer.bound_model.unused.requires_grad_(False)
    report = quantizer.report()
    assert "no-gradient" not in codes(report) and "frozen" in report.plain()
    zero = make("qat")
    zero.bound_model.fc.parametrizations.weight.original.grad.zero_()
    (finding,) = zero.report().warnings
    assert finding.code == "no-gradient" and "gradient of zeros" in finding.text and finding.subject == "fc.weight"


def test_warns_of_batch_norms() -> None:
    class Branch(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(x)
            return self.fc(self.conv2(self.relu1(self.bn1(y)) + y).flatten(1))

    with pytest.warns(UserWarning, match="not folded"):
        quantizer = QAT_Quantizer(Branch(), [BOTH], dummy_input=batch())
    (finding,) = [f for f in quantizer.report().warnings if f.code == "batch-norm"]
    assert finding.subject == "conv1" and "something else reads the layer's output" in finding.text
    folded = make("qat folded")
    assert "batch-norm" not in codes(folded.report())
    with torch.no_grad():
        folded.bound_model.bn1.weight[:2] = 0
    (finding,) = [f for f in folded.report().warnings if f.code == "batch-norm"]
    assert finding.subject == "conv1" and "'bn1' is 0 in 2 of 4 channels" in finding.text


def test_warns_where_nobody_has_decided_about_batch_norms() -> None:
    quantizer = QAT_Quantizer(Net(), [BOTH])
    (finding,) = [f for f in quantizer.report().warnings if f.code == "batch-norm"]
    assert finding.subject == "conv1" and "batch norm behind it is not folded" in finding.text

    class ValueDependent(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) > 0 else -x)

    quantizer = QAT_Quantizer(ValueDependent(), [BOTH])
    assert "batch-norm" not in codes(quantizer.report())
    assert codes(quantizer.report(batch()))["batch-norm"] == ["conv1"]
    assert "batch-norm" not in codes(QAT_Quantizer(Net(), [BOTH], fold_bn=False).report())


def test_warns_of_ranges_that_are_missing_and_steps_to_come() -> None:
    fresh = QAT_Quantizer(Net(), [BOTH])
    assert codes(fresh.report())["no-range"] == ["conv1.input", "conv2.input", "fc.input"]
    assert len(codes(make("lsq fresh").report(batch()))["no-range"]) == 6
    model = Net()
    delayed = QAT_Quantizer(model, [{**BOTH, "quant_start_step": 2}], fold_bn=False)
    train(model, 1)
    report = delayed.report(batch())
    assert len(codes(report)["not-started"]) == 6 and row_of(report, "fc.weight").state == "step 1 of 2"
    assert row_of(report, "fc.weight").sqnr is None
    train(model, 1)
    assert codes(delayed.report(batch())) == {}


def test_warns_of_tensors_that_a_batch_does_not_reach() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.training_only = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.always(x) + (self.training_only(x) if self.training else 0)

    quantizer = QAT_Quantizer(Optional(), [BOTH])
    quantizer(torch.randn(8, 4))
    assert codes(quantizer.report(torch.randn(8, 4)))["not-reached"] == ["training_only.input"]
    assert codes(quantizer.report()) == {}


def test_warns_of_ranges_without_extent() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with torch.no_grad():
        model[1].weight.fill_(0.25)
    quantizer = QAT_Quantizer(model, [BOTH])
    model(torch.ones(2, 4))
    assert codes(quantizer.report())["dead-range"] == ["0.input", "1.weight"]
    assert codes(quantizer.report(torch.randn(2, 4)))["dead-range"] == ["1.weight"]
    with torch.no_grad():
        model[1].parametrizations.weight.original.copy_(torch.randn(3, 4))
    assert "dead-range" not in codes(quantizer.report(torch.randn(2, 4)))


def test_warns_of_dead_channels() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[1] = 0
    rule: dict[str, Any] = {
        **BOTH,
        "quant_types": ["weight"],
        "quant_scheme": "per_channel_symmetric",
        "quant_dtype": "int",
    }
    (finding,) = QAT_Quantizer(model, [rule]).report().warnings
    assert finding.code == "dead-range" and "in 1 channels" in finding.text
    prelu = nn.Sequential(nn.PReLU(4))  # one number a channel is no dead channel
    assert QAT_Quantizer(prelu, [{**rule, "op_types": ["PReLU"]}]).report().rows[0].dead_channels == 0


def test_warns_beyond_the_thresholds_that_are_given() -> None:
    quantizer = make("qat")
    x = batch() * 3
    plain = quantizer.report(x)
    assert codes(plain)["saturation"] == ["conv1.input"]
    assert "saturation" not in codes(quantizer.report(x, max_saturation=50.0))
    report = quantizer.report(batch(), min_sqnr=200.0)
    assert len(codes(report)["sqnr"]) == 6 and "below 200 dB" in report.warnings[0].text
    assert "sqnr" not in codes(quantizer.report(batch()))


def test_warns_of_nan() -> None:
    x = batch()
    x[0, 0, 0, 0] = math.nan
    report = make("qat").report(x)
    assert codes(report)["not-finite"][0] == "conv1.input"
    row = row_of(report, "conv1.input")
    assert row.not_finite == 1 and row.histogram is not None and sum(row.histogram.counts) == x.numel() - 1
    assert "not-finite" not in codes(make("qat").report(batch()))
