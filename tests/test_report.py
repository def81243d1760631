"""What a quantizer's report says, when it warns, how it is shown, and that it changes nothing."""

from __future__ import annotations

import copy
import io
import math
import sys
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkern import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqQuantizer,
    NaiveQuantizer,
    ObserverQuantizer,
    QAT_Quantizer,
    reference,
)
from quantkern.files import replaced
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


def test_rows_hold_what_the_quantizer_holds() -> None:
    quantizer = make("qat")
    model = quantizer.bound_model.eval()
    report = quantizer.report(batch())
    assert [row.name for row in report.rows] == [
        f"{layer}.{tensor}" for layer in ("conv1", "conv2", "fc") for tensor in ("input", "weight")
    ]
    seen: list[Tensor] = []
    model.relu1.register_forward_hook(lambda module, args, output: seen.append(output))
    model(batch())
    x, fake, row = seen[0], model.conv2.quantkern.input, row_of(report, "conv2.input")
    y, inside = reference.quantize(x, fake.scale, fake.zero_point, 0, 255)
    assert (row.bits, row.dtype, row.scheme, row.state) == (8, "uint", "per_tensor_affine", "")
    assert row.scale == (fake.scale.item(), fake.scale.item())
    assert row.zero_point == (fake.zero_point.item(), fake.zero_point.item())
    assert row.range is not None and row.range[1] == pytest.approx((255 - fake.zero_point.item()) * fake.scale.item())
    assert row.saturation == pytest.approx(100 * float((~inside).float().mean()))
    assert row.sqnr == pytest.approx(sqnr(x, y), abs=0.01)
    assert row.values == (x.min().item(), x.max().item())
    assert row.histogram is not None and sum(row.histogram.counts) == x.numel()
    weight = model.fc.parametrizations.weight.original
    row = row_of(report, "fc.weight")
    assert row.sqnr == pytest.approx(sqnr(weight, model.fc.weight), abs=0.01)
    assert row.gradient == pytest.approx(weight.grad.norm().item()) and row.elements == weight.numel()


def test_saturation_counts_clipped_values() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    quantizer = QAT_Quantizer(model, [BOTH])
    model(torch.linspace(0, 1, 8).reshape(2, 4))
    x = torch.tensor([[0.0, 0.5, 1.0, 7.0]])
    row = row_of(quantizer.report(x), "0.input")
    assert row.saturation == 25.0 and row.values == (0.0, 7.0)
    assert row.range == pytest.approx((0.0, 1.0))


def test_a_folded_weight_is_measured_with_its_batch_norm() -> None:
    quantizer = make("qat folded")
    model = quantizer.bound_model.eval()
    row = row_of(quantizer.report(batch()), "conv1.weight")
    fake = model.conv1.parametrizations.weight[0]
    folded = fake.folded_weight(model.conv1.parametrizations.weight.original)
    assert row.norm == "bn1" and row.sqnr == pytest.approx(sqnr(folded, model.conv1.weight), abs=0.01)
    assert row.values == (folded.min().item(), folded.max().item())
    assert "conv1 + bn1" in quantizer.report().plain()


def test_a_learned_folded_scale_is_that_of_the_folded_weight() -> None:
    quantizer = make("lsq folded")
    model = quantizer.bound_model.eval()
    row = row_of(quantizer.report(), "conv1.weight")
    steps = model.conv1.weight.detach() / row.scale[0]  # type: ignore[index]
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert row.scale_gradient is not None and row.scale_gradient > 0


def test_dorefa_is_measured_behind_its_tanh() -> None:
    quantizer = make("dorefa")
    model = quantizer.bound_model.eval()
    report = quantizer.report(batch())
    row, weight = row_of(report, "fc.weight"), model.fc.parametrizations.weight.original.detach()
    squashed = weight.tanh() / weight.tanh().abs().max()
    assert row.sqnr == pytest.approx(sqnr(squashed, model.fc.weight.detach()), abs=0.01)
    assert (row.range, row.saturation, row.scheme) == ((-1.0, 1.0), 0.0, "dorefa")
    first, outside = row_of(report, "conv1.input"), (batch() < -1 / 30) | (batch() > 1 + 1 / 30)
    assert first.saturation == pytest.approx(100 * float(outside.float().mean()))
    assert row_of(report, "fc.gradient").state == "in training only"


def test_signs_have_an_agreement() -> None:
    quantizer = make("bnn")
    row = row_of(quantizer.report(batch()), "fc.weight")
    weight = quantizer.bound_model.fc.parametrizations.weight.original.detach()
    expected = 100 * float(weight.abs().mean() / weight.square().mean().sqrt())
    assert row.agreement == pytest.approx(expected, rel=1e-4) and row.sqnr is None and row.scheme == "sign"
    assert "agree %" in quantizer.report().plain()
    assert "agree %" not in make("qat").report(batch()).plain()


def test_an_observer_says_that_it_observes() -> None:
    quantizer = make("observer before compress")
    report = quantizer.report(batch())
    assert all(row.state == "observing" and row.sqnr is None for row in report.rows)
    assert len(codes(report)["not-compressed"]) == 6
    assert row_of(report, "conv1.input").range == pytest.approx(
        (min(batch(seed=s).min().item() for s in (1, 2)), max(batch(seed=s).max().item() for s in (1, 2)))
    )
    quantizer.compress()
    after = quantizer.report(batch(seed=1))
    assert "not-compressed" not in codes(after) and all(row.sqnr is not None and row.sqnr > 25 for row in after.rows)


def test_without_a_batch_weights_are_measured() -> None:
    report = make("qat").report()
    assert not report.measured
    assert all((row.sqnr is not None) == (row.tensor == "weight") for row in report.rows)
    assert all(row.scale is not None and row.range is not None for row in report.rows)
    assert make("qat").report(batch()).measured


def facts(model: nn.Module) -> list[Any]:
    """Everything of a model that a report could change, as comparable values."""
    found: list[Any] = [torch.get_rng_state().tolist()]
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple))}
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks)]
        tensors = [(key, tensor, tensor.grad) for key, tensor in module.named_parameters(recurse=False)]
        tensors += [(key, tensor, None) for key, tensor in module.named_buffers(recurse=False)]
        values = [(k, t._version, t.tolist(), None if g is None else g.tolist()) for k, t, g in tensors]
        found.append((name, type(module), plain, hooks, repr(values)))
    return found


@pytest.mark.parametrize("with_batch", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes(kind: str, training: bool, with_batch: bool) -> None:
    quantizer = make(kind)
    model = quantizer.bound_model
    if not kind.startswith("observer"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.train(training)
            model.dropout.eval()  # a mode of its own
    before = facts(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = quantizer.report(batch() if with_batch else None)
    assert facts(model) == before
    assert report.plain()


@pytest.mark.parametrize("kind", ["qat", "qat folded", "lsq folded"])
def test_training_goes_on_as_without_a_report(kind: str) -> None:
    results = []
    for reported in (False, True):
        quantizer = make(kind)
        model = quantizer.bound_model
        loss = model(batch(seed=5)).square().mean()
        if reported:
            quantizer.report(batch())
        loss.backward()  # what the backward needs is still there
        train(model)
        results.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_batch_may_be_a_tuple_or_a_dict() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bilinear = nn.Bilinear(3, 4, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.bilinear(left, right)

    quantizer = QAT_Quantizer(Two(), [{**BOTH, "op_types": ["Bilinear"]}])
    left, right = torch.randn(5, 3), torch.randn(5, 4)
    quantizer(left, right)
    reports = [quantizer.report((left, right)), quantizer.report({"left": left, "right": right})]
    assert [row.tensor for row in reports[0].rows] == ["input", "input_1", "weight"]
    assert reports[0].plain() == reports[1].plain()
    with pytest.raises(ValueError, match="does not run on batch: .*missing 1 required.*Expected a tensor, a tuple"):
        quantizer.report(left)


def test_after_an_export_there_is_nothing_to_report(tmp_path: Path) -> None:
    quantizer = make("qat")
    quantizer.export_model(tmp_path / "model.pth")
    with pytest.raises(RuntimeError, match=r"report\(\): export_model\(\) has taken the quantizers off"):
        quantizer.report()


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


def test_plain_table() -> None:
    quantizer = make("qat")
    few = LsqQuantizer(Net(), [{**BOTH, "quant_bits": 4}])
    train(few.bound_model)
    assert "see" not in quantizer.report().plain()
    text = few.report(batch(), min_sqnr=200.0).plain()
    lines = text.splitlines()
    assert lines[0].startswith("LsqQuantizer: 6 quantized tensors in 3 layers")
    assert lines[2].split() == [
        *("layer", "tensor", "bits", "dtype", "scheme", "scale", "zero", "range", "clipped", "%", "SQNR", "dB"),
        *("gradient", "of", "scale", "see"),
    ]
    assert text.isascii() and max(map(len, lines[2:9])) <= 140
    assert lines[lines.index("Warnings") + 1].startswith("  1. conv1: the first layer")


def test_warnings_that_many_tensors_share_are_one_line() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    report = QAT_Quantizer(model, [BOTH]).report()
    assert len(report.warnings) == 12
    (line,) = report.table().notes
    assert line.startswith("0.input, 1.input, ") and "7.input and 4 more: no range seen" in line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_need_rich_and_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="rich is not installed (pip install rich)")
    report = make("lsq").report(batch())
    assert str(report) == report.plain() == repr(report)
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in str(report) and "conv1" in str(report) and "Warnings" in str(report)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert str(report) == report.plain()


def test_a_narrow_terminal_gets_fewer_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    report = make("lsq").report(batch(), min_sqnr=200.0)
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setenv("COLUMNS", "90")
    lines = str(report).splitlines()
    assert lines[0].endswith("(no room for: zero, dtype, scale, scheme)")
    assert "SQNR dB" in lines[2] and "see" in lines[2] and "zero" not in lines[2]
    assert max(map(len, lines[2 : lines.index("Warnings")])) <= 90
    monkeypatch.setenv("COLUMNS", "20")
    assert str(report).splitlines()[2].split()[:3] == ["layer", "tensor", "bits"]  # the rest cannot be left out


class Checker(HTMLParser):
    """Counts elements and fails on one that is not closed in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


def test_html_is_one_whole_page(tmp_path: Path) -> None:
    report = make("lsq").report(batch())
    report.to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = parse(text)
    assert page.count["svg"] == 12 and page.count["figure"] == 6 and page.count["table"] == 1
    assert page.count["tr"] == 7 and page.count["td"] == 6 * page.count["th"]
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.count) and "http" not in text
    assert "color-scheme: light dark" in text
    assert any("first layer" in part for part in page.text)
    notebook = parse(report._repr_html_())
    assert notebook.count["svg"] == 6 and "html" not in notebook.count


def test_html_escapes_names(tmp_path: Path) -> None:
    model = nn.Module()
    model.add_module("a<b>&", nn.Linear(2, 2))
    report = NaiveQuantizer(model).report()
    report.to_html(tmp_path / "report.html")
    assert "a<b>&.weight" in parse((tmp_path / "report.html").read_text()).text


def test_clipped_bars_have_another_colour() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    quantizer = QAT_Quantizer(model, [{**BOTH, "quant_types": ["input"]}])
    model(torch.rand(8, 4))
    inside, outside = quantizer.report(torch.rand(8, 4) / 2), quantizer.report(torch.rand(8, 4) * 4)
    assert 'fill="#d9534f"' not in inside._repr_html_() and 'fill="#d9534f"' in outside._repr_html_()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_plot(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install matplotlib)")
    path = tmp_path / f"report{suffix}"
    make("bnn" if suffix == ".svg" else "qat").report(batch()).plot(path)
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert path.read_bytes().startswith(starts[suffix]) and list(tmp_path.iterdir()) == [path]


def test_plot_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = QAT_Quantizer(Net(), [{**BOTH, "quant_types": ["input"]}])
    with pytest.raises(ValueError, match="nothing in this report was measured"):
        quantizer.report().plot(tmp_path / "report.png")
    report = make("qat").report(batch())
    with pytest.raises(ValueError, match=r"path must end in \.png, \.svg, \.pdf, got 'report\.bmp'"):
        report.plot(tmp_path / "report.bmp")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'quantkern\[report\]'"):
        report.plot(tmp_path / "report.png")
    assert list(tmp_path.iterdir()) == []


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    report = make("naive").report()
    with pytest.raises(OSError, match="cannot write path .*missing"):
        report.to_html(tmp_path / "missing" / "report.html")
    with pytest.raises(IsADirectoryError, match="is the folder"):
        report.to_html(tmp_path)
    with pytest.raises(TypeError, match="path must be a path, got 3"):
        report.to_html(3)  # type: ignore[arg-type]
    target = tmp_path / "old.html"
    target.write_text("old")
    with pytest.raises(KeyError), replaced("path", target) as file:
        file.write_text("half")
        raise KeyError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_report_outlives_its_model() -> None:
    quantizer = make("qat")
    report = quantizer.report(batch())
    text = report.plain()
    train(quantizer.bound_model, 3)
    assert report.plain() == text == copy.deepcopy(report).plain()
