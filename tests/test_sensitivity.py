"""What quantizing one layer at a time costs, as ``quantkern.sensitivity`` measures it."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantkern
from quantkern import ObserverQuantizer, QAT_Quantizer
from quantkern.config import ConfigError
from quantkern.layer_sensitivity import LayerSensitivity, Sensitivity

WEIGHTS = [{"quant_types": ["weight"], "op_types": ["default"]}]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.dropout = nn.Conv2d(4, 6, 3), nn.Dropout(0.5)
        self.fc = nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.bn(self.conv1(x))))
        return self.fc(self.dropout(torch.relu(x)).flatten(1))


class Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(32, 1, 8, 8))  # statistics for the batch norm
    return net


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(count)
    ]


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Sensitivity:
    return quantkern.sensitivity(model, *args, progress=False, **kwargs)


def row_of(found: Sensitivity, layer: str) -> LayerSensitivity:
    (row,) = [row for row in found.rows if row.layer == layer]
    return row


@torch.no_grad()
def by_hand(model: nn.Module, rules: list[dict[str, Any]]) -> float:
    """SQNR of the outputs of a copy that an ObserverQuantizer has quantized."""
    own = copy.deepcopy(model).eval()
    quantizer = ObserverQuantizer(own, rules)
    quantizer.calibrate(batches(), progress=False)
    quantizer.compress()
    x = torch.cat([images for images, _ in batches()])
    expected = model.eval()(x).double()
    return 10 * math.log10(float(expected.square().sum() / (own(x) - expected).square().sum()))


@pytest.mark.parametrize("observer", ["minmax", "histogram", "mse"])
def test_equals_an_observer_quantizer_on_that_layer_alone(model: nn.Module, observer: str) -> None:
    rules = [{"op_types": ["default"], "observer": observer}]
    found = run(model, batches(), rules, bits=(8, 4, 3))
    assert found.bits == (8, 4, 3) and {row.layer for row in found.rows} == {"conv1", "conv2", "fc"}
    for row in found.rows:
        for bits in found.bits:
            rule = {"quant_types": ["weight", "input"], "quant_bits": bits, "op_names": [row.layer]}
            assert row.values[bits] == pytest.approx(by_hand(model, [{**rule, "observer": observer}]), abs=1e-3)
            assert row.drops[bits] == pytest.approx(10 ** (-row.values[bits] / 10))


def test_only_what_the_rules_name_is_quantized(model: nn.Module) -> None:
    rules = [
        {"quant_types": ["weight"], "op_types": ["Conv2d"], "quant_scheme": "per_channel_symmetric"},
        {"quant_types": ["output"], "op_names": ["fc"], "quant_bits": 5},
        {"op_names": ["conv1"], "exclude": True},
    ]
    found = run(model, batches(), rules, bits=[4])
    assert {row.layer for row in found.rows} == {"conv2", "fc"}
    for layer, quant_type, extra in (
        ("conv2", "weight", {"quant_scheme": "per_channel_symmetric"}),
        ("fc", "output", {}),
    ):
        expected = by_hand(model, [{"quant_types": [quant_type], "quant_bits": 4, "op_names": [layer], **extra}])
        assert row_of(found, layer).values[4] == pytest.approx(expected, abs=1e-3)
    assert row_of(run(model, batches(), WEIGHTS, bits=[3]), "fc").values[3] == pytest.approx(
        by_hand(model, [{"quant_types": ["weight"], "quant_bits": 3, "op_names": ["fc"]}]), abs=1e-3
    )


def test_the_most_sensitive_layer_comes_first(model: nn.Module) -> None:
    found = run(model, batches())
    assert found.bits == (8, 6, 4, 3, 2)
    drops = [row.mean_drop for row in found.rows]
    assert drops == sorted(drops, reverse=True)
    assert all(row.values[8] > row.values[4] > row.values[2] for row in found.rows)
    assert [row.weights for row in found.rows if row.layer == "fc"] == [288]


def test_accuracy(model: nn.Module) -> None:
    model.eval()
    labelled = [(x, model(x).argmax(1)) for x, _ in batches()]
    found = run(model, labelled, WEIGHTS, bits=(8, 2), metric="accuracy")
    assert found.baseline == 100.0 and found.metric == "accuracy"
    own = copy.deepcopy(model)
    quantizer = ObserverQuantizer(own, [{**WEIGHTS[0], "quant_bits": 2, "op_names": ["conv2"]}])
    quantizer.compress()
    x, y = (torch.cat(part) for part in zip(*labelled, strict=True))
    expected = 100 * float((own(x).argmax(1) == y).float().mean())
    row = row_of(found, "conv2")
    assert row.values[2] == pytest.approx(expected) and row.drops[2] == pytest.approx(100 - expected)
    assert "minus 100 as float" in found.plain() and "-0.00" not in found.plain()
    with pytest.raises(TypeError, match=r"metric='accuracy' needs batches of \(input, labels\)"):
        run(model, [x], metric="accuracy")


def test_a_function_of_the_model_as_metric(model: nn.Module) -> None:
    x = batches()[0][0]

    def mean_score(net: nn.Module) -> float:
        assert net is not model and not net.training
        return float(net(x).mean())

    found = run(model, batches(), WEIGHTS, bits=(8, 2), metric=mean_score)
    assert found.metric == "mean_score" and found.baseline == pytest.approx(float(model.eval()(x).detach().mean()))
    for row in found.rows:
        assert row.drops[2] == pytest.approx(found.baseline - row.values[2]) and row.drops[2] != 0


def test_the_model_stays_as_it_is(model: nn.Module) -> None:
    model.train()
    model.bn.eval()
    modes = [module.training for module in model.modules()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    types = [type(module) for module in model.modules()]
    run(model, batches(), bits=(4,))
    assert [module.training for module in model.modules()] == modes
    assert [type(module) for module in model.modules()] == types
    assert torch.equal(torch.get_rng_state(), random)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_batches_may_be_tensors_dicts_or_a_generator(model: nn.Module) -> None:
    tensors = [x for x, _ in batches()]
    expected = run(model, tensors, bits=(4,)).plain()
    assert run(model, (x for x in tensors), bits=(4,)).plain() == expected
    assert run(model, [{"x": x} for x in tensors], bits=(4,)).plain() == expected
    assert run(model, [*tensors, torch.full((8, 1, 8, 8), math.nan)], bits=(4,), steps=3).plain() == expected


def test_shows_its_progress(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    quantkern.sensitivity(model, batches(), bits=(4, 2))
    printed = capsys.readouterr().err
    assert "calibration" in printed and "fc, 2 bits" in printed and "100%" in printed


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"bits": ()}, ValueError, r"bits must be numbers of bits such as \(8, 4\), got \(\)"),
        ({"bits": (4.5,)}, ValueError, "bits must be numbers"),
        ({"bits": (40,)}, ConfigError, "quant_bits'] is 40"),
        ({"metric": "f1"}, ValueError, "metric must be 'sqnr', 'accuracy' or a function of the model, got 'f1'"),
        ({"steps": 0}, ValueError, "steps must be at least 1 or None, got 0"),
        ({"config_list": {"op_types": ["Linear"]}}, ConfigError, "put it in brackets"),
        ({"config_list": [{"op_types": ["Linear"], "observer": "median"}]}, ConfigError, "median"),
        ({"batches": []}, ValueError, "loader gave no batch"),
        ({"batches": ["text"]}, TypeError, "a batch is str"),
        ({"batches": [torch.full((2, 1, 8, 8), math.nan)]}, ValueError, "holds NaN or infinity"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
    ],
)
def test_says_what_is_wrong(model: nn.Module, change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"model": model, "batches": batches(1), **change}
    with pytest.raises(error, match=text):
        quantkern.sensitivity(**arguments, progress=False)


def test_a_quantized_model_is_refused_and_unknown_names_are_warned_of_once(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match="did you mean 'conv2' or 'conv1'") as caught:
        run(model, batches(), [{"op_names": ["conv3", "fc"]}], bits=(8, 4))
    assert len(caught) == 1
    QAT_Quantizer(model, [{**WEIGHTS[0], "quant_bits": 8}])
    with pytest.raises(ConfigError, match="has a quantizer already"):
        run(model, batches())


def test_suggested_bits_keep_what_was_asked_for(model: nn.Module) -> None:
    found = run(model, batches(), bits=(8, 7, 6, 5, 4, 3, 2))
    spent = []
    for least in (30.0, 22.0, 15.0):
        chosen = found.suggest(least)
        assert chosen.keys() == {"conv1", "conv2", "fc"} and set(chosen.values()) <= set(found.bits)
        rules = [
            {"quant_types": ["weight", "input"], "quant_bits": bits, "op_names": [layer]}
            for layer, bits in chosen.items()
        ]
        assert by_hand(model, rules) > least - 2  # independent noise is an assumption
        assert math.fsum(row_of(found, layer).drops[bits] for layer, bits in chosen.items()) <= 10 ** (-least / 10)
        spent.append(sum(row_of(found, layer).weights * bits for layer, bits in chosen.items()))
    assert spent[0] > spent[1] > spent[2]
    with pytest.raises(ValueError, match=r"min_sqnr=90 dB cannot be kept: with 8 bits everywhere about \d+\.\d dB"):
        found.suggest(90)
    with pytest.raises(ValueError, match="needs metric='sqnr', this sensitivity has 'accuracy'"):
        run(model, batches(), bits=(8,), metric="accuracy").suggest(20)


def test_table_and_notebook(model: nn.Module) -> None:
    found = run(model, batches(), bits=(8, 4))
    lines = found.plain().splitlines()
    assert lines[2].split() == ["layer", "type", "weights", "8", "bits", "4", "bits"]
    assert [line.split()[0] for line in lines[4:]] == [row.layer for row in found.rows]
    assert lines[4].split()[-1] == f"{found.rows[0].values[4]:.1f}"
    assert str(found) == repr(found) == found.plain() and "<table>" in found._repr_html_()


def test_plot(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install matplotlib)")
    found = run(model, batches(), bits=(8, 4))
    run(Spare(), [torch.randn(8, 4)], bits=(4,)).plot(tmp_path / "found.png")  # infinite values too
    found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OSError, match="cannot write path"):
        found.plot(tmp_path / "missing" / "found.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'quantkern\[report\]'"):
        found.plot(tmp_path / "other.png")
    assert [path.name for path in tmp_path.iterdir()] == ["found.png"]


def test_layers_that_do_not_run_cost_nothing() -> None:
    found = run(Spare(), [torch.randn(8, 4)], bits=(4,))
    spare = row_of(found, "spare")
    assert found.rows[-1] is spare and spare.values[4] == math.inf and spare.drops[4] == 0
    assert "inf" in found.plain()
