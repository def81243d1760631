"""What quantizers write and read: exports and calibration dicts."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from small_quantized_net import EVERY, EVERY_LAYER, batch, net, rule, train
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantkern.quantizers import NaiveQuantizer, QAT_Quantizer


def test_calibration_round_trip_is_exact_and_training_goes_on_from_it(tmp_path: Path) -> None:
    """D9: NNI loads the ranges only, and the first batch overwrites them."""
    rules = [{**EVERY, "op_types": ["Conv2d"], "quant_scheme": "per_channel_affine"}, *rule("weight input", "fc", 4)]
    model = net()
    quantizer = QAT_Quantizer(model, rules)
    train(model, None, range(3))
    expected = model.eval()(batch(7))
    going_on = copy.deepcopy(model)
    calibration = quantizer.export_model(tmp_path / "model.pt", tmp_path / "calibration.pt")

    again = net(1)
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    second = QAT_Quantizer(again, rules)
    second.load_calibration_config(torch.load(tmp_path / "calibration.pt", weights_only=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(again.eval()(batch(7)), expected)
    assert torch.equal(train(again, None, range(5, 6))[0], train(going_on, None, range(5, 6))[0])
    for name in ("conv.quantkern.input", "conv.quantkern.output", "fc.quantkern.input"):
        assert torch.equal(again.get_submodule(name).running_max, going_on.get_submodule(name).running_max)

    third = QAT_Quantizer(net(2), rules)
    third.load_calibration_config(calibration)
    back = third.export_model(tmp_path / "other.pt")
    assert [*back] == [*calibration]
    for layer, entry in calibration.items():
        assert [*back[layer]] == [*entry]
        for key, value in entry.items():
            same = torch.equal(back[layer][key], value) if isinstance(value, Tensor) else back[layer][key] == value
            assert same, (layer, key)


def test_loaded_weight_scales_hold_until_training_goes_on() -> None:
    """D9"""
    model = nn.Sequential(nn.Linear(4, 2))
    quantizer = QAT_Quantizer(model, rule("weight", "0", quant_dtype="int"))
    quantizer.load_calibration_config(
        {"0": {"weight_bits": 8, "weight_scale": torch.tensor([0.25]), "weight_zero_point": torch.tensor([3.0])}}
    )
    model.eval()
    grid = (model[0].weight / 0.25).detach()
    assert torch.equal(grid, grid.round()) and model[0].parametrizations.weight[0].zero_point.item() == 3
    model.train()
    assert not torch.equal(model[0].weight / 0.25, (model[0].weight / 0.25).round())
    assert model[0].parametrizations.weight[0].scale.item() != 0.25


def test_export_restores_the_plain_model(tmp_path: Path) -> None:
    """L19: NNI leaves its step counter in the exported state."""
    floating = net()
    rules = [{**EVERY, "op_types": ["Conv2d", "Linear"], "quant_start_step": 1}, *rule("output", "relu")]
    model = net()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantizer = QAT_Quantizer(model, rules, optimizer)
    train(model, optimizer, range(2))
    quantizer.export_model(tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(saved) == list(floating.state_dict())
    floating.load_state_dict(saved, strict=True)
    assert [name for name, _ in model.named_parameters()] == list(parameters)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert [type(module) for module in model.modules()] == [type(module) for module in floating.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not optimizer._optimizer_step_post_hooks
    assert torch.equal(model.eval()(batch()), floating.eval()(batch()))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    for method in (quantizer.compress, lambda: quantizer.export_model(tmp_path / "b.pt")):
        with pytest.raises(RuntimeError, match="has taken the quantizers off this model"):
            method()


def test_naive_alone_uses_the_current_maximum_and_exports(tmp_path: Path) -> None:
    """L20: NNI's needs a config_list, its scale only grows, and it has no export."""
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Embedding(4, 3), nn.PReLU())
    quantizer = NaiveQuantizer(model)
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(0.25)
    largest = model[0].parametrizations.weight.original.detach().abs().max()
    calibration = quantizer.export_model(tmp_path / "model.pt")
    assert list(calibration) == ["0", "2", "3"]
    assert torch.equal(calibration["0"]["weight_scale"], (largest / 127).reshape(1))
    entry = calibration["0"]
    assert (entry["weight_bits"], entry["weight_qmin"], entry["weight_qmax"]) == (8, -127, 127)
    assert entry["weight_zero_point"].tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model_path": None}, TypeError, "model_path must be a path, got None"),
        ({"model_path": "{}"}, IsADirectoryError, "model_path is the folder"),
        ({"model_path": "{}/missing/model.pt"}, FileNotFoundError, "cannot write model_path .*the model is unchanged"),
        ({"calibration_path": "{}/missing/c.pt"}, FileNotFoundError, "cannot write calibration_path"),
        ({"calibration_path": "{}/model.pt"}, ValueError, "must be different files"),
        ({"onnx_path": "{}/model.onnx"}, ValueError, "onnx_path needs input_shape, a tuple such as"),
    ],
)
def test_export_checks_before_it_changes_anything(
    arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = net()
    quantizer = QAT_Quantizer(model, [{**EVERY, "quant_types": ["weight"], "op_types": ["Conv2d"]}])
    expected = model.eval()(batch())
    given = {"model_path": "{}/model.pt", **arguments}
    with pytest.raises(error, match=message):
        quantizer.export_model(**{key: value and value.format(tmp_path) for key, value in given.items()})
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(model(batch()), expected)
    quantizer.export_model(tmp_path / "model.pt")


def test_a_failing_save_leaves_no_file_and_a_quantized_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    quantizer = QAT_Quantizer(model, EVERY_LAYER)
    train(model, None, range(1))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    (tmp_path / "model.pt").write_text("old")
    saved: list[Any] = []

    def fail_at_second(value: object, file: BinaryIO) -> None:
        file.write(b"half")
        saved.append(file)
        if len(saved) == 2:
            raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail_at_second)
        with pytest.raises(OSError, match="disk full"):
            quantizer.export_model(tmp_path / "model.pt", tmp_path / "calibration.pt")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.pt", "old")]
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    before = model.conv.quantkern.input.running_max.clone()
    train(model, None, range(1, 2))
    assert not torch.equal(model.conv.quantkern.input.running_max, before)
    quantizer.export_model(tmp_path / "model.pt", tmp_path / "calibration.pt")


def test_onnx_export_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    quantizer = QAT_Quantizer(model, EVERY_LAYER)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        quantizer.export_model(tmp_path / "model.pt", onnx_path=tmp_path / "model.onnx", input_shape=(1, 1, 6, 6))
    assert list(tmp_path.iterdir()) == [] and parametrize.is_parametrized(model.conv)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_export_of_the_float_model(tmp_path: Path) -> None:
    """As NNI: the exported graph is the float model."""
    onnx = pytest.importorskip("onnx", reason="pip install onnx onnxscript")
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript")
    model = net()
    quantizer = QAT_Quantizer(model, EVERY_LAYER)
    train(model, None, range(1))
    quantizer.export_model(tmp_path / "model.pt", None, tmp_path / "model.onnx", (1, 1, 6, 6), "cpu")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {"Conv", "Gemm"} <= {node.op_type for node in graph.node}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.pt"]
    assert model.training


def test_an_input_never_seen_is_left_out_with_a_warning(tmp_path: Path) -> None:
    quantizer = QAT_Quantizer(net(), rule("input", "fc"))
    with pytest.warns(UserWarning, match="the input of layer 'fc' was never seen in training"):
        calibration = quantizer.export_model(tmp_path / "model.pt")
    assert "input_bits" in calibration["fc"] and "tracked_min_input" not in calibration["fc"]
    again = QAT_Quantizer(net(), rule("input", "fc"))
    again.load_calibration_config(calibration)
    assert not again.bound_model.fc.quantkern.input.is_observed()


def test_a_calibration_that_does_not_fit_changes_nothing() -> None:
    model = net()
    quantizer = QAT_Quantizer(
        model, [{**EVERY, "op_types": ["Conv2d", "Linear"], "quant_scheme": "per_channel_affine"}]
    )
    train(model, None, range(1))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    good = {"weight_bits": 8, "input_bits": 8, "output_bits": 8}
    wrong = {
        "conv": {**good, "weight_bits": 4, "tracked_min_input": 0.5, "tracked_max_input": -0.5,
                 "tracked_min_output": [0.0] * 3, "tracked_max_output": [1.0] * 4, "weight_scale": "x"},
        "fc": {"input_bits": 8, "weight_bits": 8, "input_scheme": "per_tensor_affine"},
    }  # fmt: skip
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        quantizer.load_calibration_config(wrong)
    for part in (
        "conv.weight: weight_bits is 4, this quantizer's rule says 8",
        "conv.weight: weight_scale is 'x', expected numbers",
        "conv.input: tracked_min_input is 0.5 and tracked_max_input is -0.5, expected a smallest and a largest value",
        "conv.output: tracked_min_output is [0.0, 0.0, 0.0], expected 4 finite values",
        "fc.output: output_bits is missing, expected 8",
        "fc.input: input_scheme is 'per_tensor_affine', this quantizer's rule says 'per_channel_affine'",
    ):
        assert part in str(error.value), part
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(TypeError, match="calibration_config must be a dict of layer name -> dict, or the path of one"):
        quantizer.load_calibration_config(["calibration.pt"])  # type: ignore[arg-type]


def test_layers_missing_on_either_side_are_warnings() -> None:
    quantizer = QAT_Quantizer(net(), [*rule("input", "conv"), *rule("input", "fc")])
    with pytest.warns(UserWarning) as found:
        quantizer.load_calibration_config({"conv1": {"input_bits": 8}, "fc": {"input_bits": 8}})
    texts = [str(entry.message) for entry in found]
    assert "calibration_config has no layer 'conv'" in texts
    assert any("layer 'conv1', which is not quantized here; did you mean 'conv'?" in text for text in texts)


def test_a_calibration_loaded_in_evaluation_mode_counts_at_once() -> None:
    model = nn.Sequential(nn.ReLU()).eval()
    quantizer = QAT_Quantizer(model, rule("output", "0", 2))
    quantizer.load_calibration_config({"0": {"output_bits": 2, "tracked_min_output": 0.0, "tracked_max_output": 3.0}})
    assert model(torch.linspace(0, 5, 50)).unique().tolist() == [0.0, 1.0, 2.0, 3.0]
