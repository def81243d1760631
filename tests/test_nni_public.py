"""What NNI 2.x's own tests of its quantizers ask for, asked of the public API here.

Which layers a config_list selects, wrong config_lists, export and load, batch-norm folding, modules that are used
twice. What they ask of numbers is in test_nni_numbers.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from nni_networks import ALL, RANGED, Net, bits_for, build, images, use, weights
from torch import nn

from quantkern import BNNQuantizer, DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, ObserverQuantizer, QAT_Quantizer
from quantkern.config import ConfigError

pytestmark = pytest.mark.usefixtures("factory_settings")


# ---------------------------------------------------------------- which tensors are quantized


@pytest.mark.parametrize("kind", ALL)
def test_a_quantized_weight_is_computed_from_the_parameter(kind: type) -> None:
    """The layer's weight is no Parameter any more, and an optimizer step on the Parameter changes it."""
    torch.manual_seed(0)
    model = Net()
    parameters = {id(parameter) for parameter in model.parameters()}
    quantizer = build(kind, model, weights(kind))
    assert parameters <= {id(parameter) for parameter in model.parameters()}
    if kind is ObserverQuantizer:
        quantizer.compress()
    elif kind is LsqQuantizer:
        use(quantizer, 1)
    for layer in (model.conv1, model.conv2, model.fc1, model.fc2):
        assert not isinstance(layer.weight, nn.Parameter)
        real = layer.parametrizations.weight.original
        assert isinstance(real, nn.Parameter) and layer.weight.shape == real.shape
        assert not torch.equal(layer.weight, real)
        assert layer.weight.detach().unique().numel() <= 2 ** bits_for(kind)
        before = layer.weight.detach().clone()
        with torch.no_grad():
            real.neg_()
        assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", [QAT_Quantizer, LsqQuantizer, ObserverQuantizer])
def test_the_layers_that_rules_select(kind: type, tmp_path: Path) -> None:
    """By type, by name and without those that are excluded, inside containers too."""
    model = nn.Sequential(Net(), nn.Sequential(nn.Linear(10, 4), nn.ReLU()))
    rules = [
        {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Conv2d", "Linear"]},
        {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU"]},
        {"exclude": True, "op_names": ["0.fc2"]},
    ]
    quantizer = build(kind, model, rules)
    use(quantizer)
    calibration = quantizer.export_model(tmp_path / "model.pth")
    assert set(calibration) == {"0.conv1", "0.conv2", "0.relu", "0.fc1", "1.0", "1.1"}
    assert all(("weight_bits" in calibration[name]) == (name not in ("0.relu", "1.1")) for name in calibration)
    assert all(("output_bits" in calibration[name]) == (name in ("0.relu", "1.1")) for name in calibration)


def test_the_last_rule_that_matches_counts(tmp_path: Path) -> None:
    rules = [*weights(QAT_Quantizer), {"quant_types": ["weight"], "quant_bits": {"weight": 4}, "op_names": ["fc1"]}]
    with pytest.warns(UserWarning, match="fc1"):
        quantizer = build(QAT_Quantizer, Net(), rules)
    calibration = quantizer.export_model(tmp_path / "model.pth")
    assert {name: part["weight_bits"] for name, part in calibration.items()} == {
        "conv1": 8, "conv2": 8, "fc1": 4, "fc2": 8,
    }  # fmt: skip


# ---------------------------------------------------------------- config_list


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "wrong",
    [
        {"op_types": ["Conv2d"]},
        {"quant_types": ["weight"], "op_types": ["Conv2d"]},
        {"quant_types": ["weight"], "quant_bits": 8},
        {"quant_types": ["weigth"], "quant_bits": 8, "op_types": ["Conv2d"]},
        {"quant_types": ["weight"], "quant_bits": 99, "op_types": ["Conv2d"]},
        {"quant_types": ["weight"], "quant_bits": -1, "op_types": ["Conv2d"]},
        {"quant_types": ["weight"], "quant_bits": {"output": 8}, "op_types": ["Conv2d"]},
        {"quant_types": ["weight"], "quant_bits": 8, "op_types": "Conv2d "},
        {"quant_types": ["weight"], "quant_bits": 8, "op_names": ["abc"]},
        {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Conv2d"], "sparsity": 0.5},
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrong_rules_are_errors_and_change_nothing(kind: type, wrong: dict[str, Any]) -> None:
    model = Net()
    plain = copy.deepcopy(model)
    with pytest.raises(ConfigError):
        build(kind, model, [wrong])
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    ("kind", "quant_types", "bits"),
    [
        (NaiveQuantizer, ["output"], 8),
        (DoReFaQuantizer, ["weight"], 33),
        (BNNQuantizer, ["weight"], 8),
        (ObserverQuantizer, ["gradient"], 8),
    ],
)
def test_what_one_quantizer_does_not_take(kind: type, quant_types: list[str], bits: int) -> None:
    with pytest.raises(ConfigError):
        build(kind, Net(), [{"quant_types": quant_types, "quant_bits": bits, "op_types": ["Conv2d"]}])


# ---------------------------------------------------------------- export and load


@pytest.mark.parametrize("kind", ALL)
def test_export_writes_a_float_model_its_numbers_and_onnx(kind: type, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (pip install onnx onnxscript)")
    model = Net()
    quantizer = build(kind, model, weights(kind))
    use(quantizer)
    paths = [tmp_path / name for name in ("model.pth", "calibration.pth", "model.onnx")]
    calibration = quantizer.export_model(*paths, (1, 1, 28, 28), torch.device("cpu"))
    assert {name: part["weight_bits"] for name, part in calibration.items()} == dict.fromkeys(
        ("conv1", "conv2", "fc1", "fc2"), bits_for(kind)
    )
    assert all(path.stat().st_size > 100 for path in paths)
    fresh = Net()
    fresh.load_state_dict(torch.load(paths[0], weights_only=True), strict=True)
    assert torch.equal(fresh.eval()(images()), model.eval()(images()))
    assert torch.load(paths[1], weights_only=True).keys() == calibration.keys()


def test_numbers_go_from_observer_to_qat_to_lsq(tmp_path: Path) -> None:
    """A range that one has found is the one that the next goes on with; rules leave the defaults to each."""
    rules = [
        {"quant_types": ["weight", "input"], "quant_bits": {"weight": 8, "input": 8}, "op_names": ["conv1"]},
        {"quant_types": ["weight", "input", "output"], "quant_bits": 8, "op_names": ["fc1"]},
    ]
    calibration: dict[str, Any] | None = None
    for kind in (ObserverQuantizer, QAT_Quantizer, LsqQuantizer):
        model = Net()
        quantizer = build(kind, model, rules)
        if calibration is None:
            use(quantizer)
        else:
            quantizer.load_calibration_config(calibration)
            quantizer.compress()
        found = quantizer.export_model(tmp_path / "model.pth", tmp_path / "calibration.pth")
        assert set(found) == {"conv1", "fc1"}
        if calibration is not None:
            for layer, name in (("conv1", "input"), ("fc1", "input"), ("fc1", "output")):
                low, high = (calibration[layer][f"tracked_{end}_{name}"] for end in ("min", "max"))
                widest = max(-low, high)
                held = max(abs(found[layer][f"tracked_{end}_{name}"]) for end in ("min", "max"))
                assert held == pytest.approx(widest, rel=0.01), (kind, layer, name)
        calibration = torch.load(tmp_path / "calibration.pth", weights_only=True)


@pytest.mark.parametrize("kind", RANGED)
def test_bits_that_differ_are_an_error(kind: type, tmp_path: Path) -> None:
    first = build(kind, Net(), weights(kind))
    use(first)
    calibration = first.export_model(tmp_path / "model.pth")
    second = build(kind, Net(), [{"quant_types": ["weight"], "quant_bits": 4, "op_types": ["Conv2d", "Linear"]}])
    with pytest.raises(ValueError, match="conv1.weight: weight_bits is 8, this quantizer's rule says 4"):
        second.load_calibration_config(calibration)


# ---------------------------------------------------------------- batch norms, modules used twice


@pytest.mark.parametrize("kind", RANGED)
def test_batch_norms_are_folded_with_a_dummy_input(kind: type, tmp_path: Path) -> None:
    model = Net()
    optimizer_groups = [id(parameter) for parameter in model.parameters()]
    quantizer = build(kind, model, weights(kind), dummy_input=images(size=1))
    assert quantizer.folded_layers == {"conv1": "bn1", "conv2": "bn2"}
    use(quantizer, 3)
    model.eval()
    output = model(images(7))
    folded = quantizer.folded_model()
    assert isinstance(folded.bn1, nn.Identity) and isinstance(folded.bn2, nn.Identity)
    calibration = quantizer.export_model(tmp_path / "model.pth")
    floating = model(images(7))
    torch.testing.assert_close(folded(images(7)), floating, rtol=1e-4, atol=1e-5)
    if kind is not LsqQuantizer:  # LSQ's first scales are meant for few bits
        assert (output - floating).abs().max() < 0.05 * floating.abs().max()
        factor = model.bn1.weight / (model.bn1.running_var + model.bn1.eps).sqrt()
        weight = (model.conv1.weight * factor.reshape(-1, 1, 1, 1)).detach()
        widest = weight.abs().max() * 2 if kind is ObserverQuantizer else weight.max() - weight.min()
        steps = 254 if kind is ObserverQuantizer else 255
        assert calibration["conv1"]["weight_scale"].item() == pytest.approx(widest.item() / steps, rel=1e-5)
    assert isinstance(model.bn1, nn.BatchNorm2d) and [id(p) for p in model.parameters()] == optimizer_groups
    Net().load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)


@pytest.mark.parametrize("kind", RANGED)
def test_a_module_that_is_called_several_times(kind: type) -> None:
    """Net's one ReLU is: its output has one range, over all calls."""
    model = Net()
    quantizer = build(kind, model, [{"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU"]}])
    seen: list[float] = []
    handle = model.relu.register_forward_hook(lambda module, args, output: seen.append(args[0].max().item()))
    use(quantizer, 1)
    handle.remove()
    assert len(seen) == 3 and max(seen) > 1.2 * min(seen)
    module = model.relu.quantkern.output
    top = (module.spec.quant_range[1] * module.scale).item()
    if kind is QAT_Quantizer:
        average = seen[0]
        for value in seen[1:]:
            average = average * 0.99 + value * 0.01
        assert top == pytest.approx(average, rel=1e-3)
    elif kind is ObserverQuantizer:
        assert min(seen) < top <= max(seen) * 1.01


@pytest.mark.parametrize("kind", ALL)
def test_a_layer_under_two_names(kind: type, tmp_path: Path) -> None:
    """It is quantized once, its gradient adds up, and both names hold it still."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    quantizer = build(kind, model, weights(kind, "Linear"))
    if kind is ObserverQuantizer:
        quantizer.compress()
    assert model[0] is model[2] and len(shared.parametrizations.weight) == 1
    model.train()
    model(torch.randn(3, 4)).sum().backward()
    assert shared.parametrizations.weight.original.grad.abs().sum() > 0
    calibration = quantizer.export_model(tmp_path / "model.pth")
    assert list(calibration) == ["0"] and type(model[0]) is nn.Linear and model[0] is model[2]
