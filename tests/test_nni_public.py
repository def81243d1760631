"""What NNI 2.x's own tests of its quantizers ask for, asked of the public API here.

Ranges and scales of given tensors, moving averages, dtypes and schemes, which layers a config_list selects, wrong
config_lists, export and load, batch-norm folding, modules that are used twice. The numbers are worked out by hand.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
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
    set_quant_scheme_dtype,
)
from quantkern.config import ConfigError
from quantkern.settings import reset_quant_scheme_dtype

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


@pytest.fixture(autouse=True)
def _factory_settings() -> Iterator[None]:
    yield
    reset_quant_scheme_dtype()


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


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("weight", "scale", "zero_point"),
    [
        ([[1.0, 2.0], [3.0, 5.0]], 5 / 255, 0),  # a range always holds 0
        ([[-1.0, 2.0], [3.0, 5.0]], 6 / 255, 42),
        ([[-4.0, -2.0], [-3.0, -1.0]], 4 / 255, 255),
        ([[0.0, 0.0], [0.0, 0.0]], None, 0),
    ],
)
def test_qat_quantizes_a_weight_by_its_range(
    weight: list[list[float]], scale: float | None, zero_point: int, tmp_path: Path
) -> None:
    model = Linear()
    quantizer = build(QAT_Quantizer, model, [{"quant_types": ["weight"], "quant_bits": 8, "op_names": ["fc"]}])
    with torch.no_grad():
        model.fc.parametrizations.weight.original.copy_(torch.tensor(weight))
    model(torch.randn(3, 2))
    if scale is not None:
        torch.testing.assert_close(model.fc.weight, torch.tensor(weight), rtol=0, atol=0.501 * scale)
    else:
        assert not model.fc.weight.any()
    found = entry(quantizer, "fc", tmp_path)
    assert found["weight_zero_point"].item() == zero_point
    if scale is not None:
        assert math.isclose(found["weight_scale"].item(), scale, rel_tol=1e-6)


def test_qat_follows_ranges_with_a_moving_average(tmp_path: Path) -> None:
    model = Linear()
    rules = [
        {"quant_types": ["input"], "quant_bits": 8, "op_names": ["fc"]},
        {"quant_types": ["output"], "quant_bits": 8, "op_names": ["relu"]},
    ]
    quantizer = build(QAT_Quantizer, model, rules)
    with torch.no_grad():
        model.fc.weight.copy_(torch.eye(2))
    model.train()
    model(torch.tensor([[0.0, 4.0], [2.0, 1.0]]))
    assert model.fc.quantkern.input.scale.item() == pytest.approx(4 / 255)
    assert model.relu.quantkern.output.running_max.item() == pytest.approx(4.0, rel=1e-2)
    model(torch.tensor([[-1.0, 8.0], [2.0, 1.0]]))
    found = entry(quantizer, "fc", tmp_path)
    assert found["tracked_min_input"] == pytest.approx(-0.01) and found["tracked_max_input"] == pytest.approx(4.04)
    assert found["input_scale"] == pytest.approx(4.05 / 255) and found["input_zero_point"] == 1


def test_qat_waits_for_quant_start_step() -> None:
    """Ranges are followed meanwhile, and the tensor passes as it is, gradient included."""
    model = Linear()
    rules = [{"quant_types": ["output"], "quant_bits": 2, "quant_start_step": 2, "op_names": ["relu"]}]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    quantizer = QAT_Quantizer(model, rules, optimizer)
    assert quantizer.compress() is model
    x = torch.tensor([[0.3, 0.7], [0.5, 0.9]])
    floating = torch.relu(x @ model.fc.weight.detach().T)
    for step in range(3):
        optimizer.zero_grad()
        output = model(x)
        output.sum().backward()
        assert model.fc.weight.grad.abs().sum() > 0
        optimizer.step()
        assert torch.equal(output, floating) == (step < 2)
    assert model.relu.quantkern.output.running_max.item() == pytest.approx(floating.max().item())


@pytest.mark.parametrize("dtype", ["int", "uint"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("how", ["rule", "set_quant_scheme_dtype"])
def test_dtypes_and_schemes(dtype: str, symmetric: bool, per_channel: bool, how: str, tmp_path: Path) -> None:
    scheme = f"per_{'channel' if per_channel else 'tensor'}_{'symmetric' if symmetric else 'affine'}"
    rule: dict[str, Any] = {"quant_types": ["weight", "input"], "quant_bits": 8, "op_names": ["fc"]}
    if how == "rule":
        rule |= {"quant_dtype": dtype, "quant_scheme": scheme}
    else:
        for quant_type in ("weight", "input"):
            set_quant_scheme_dtype(quant_type, scheme, dtype)
    model = Linear()
    quantizer = build(QAT_Quantizer, model, [rule])
    x = torch.tensor([[-1.0, 0.5], [4.0, 2.0]])  # columns -1..4 and 0..2 with 0; rows of the weight likewise
    with torch.no_grad():
        model.fc.parametrizations.weight.original.copy_(x.T)
    model.train()(x)
    found = entry(quantizer, "fc", tmp_path)
    low, high = (-127, 127) if dtype == "int" else (0, 255)
    ranges = [(-1.0, 4.0), (0.0, 2.0)] if per_channel else [(-1.0, 4.0)]
    scales, zero_points = [], []
    for smallest, largest in ranges:
        if symmetric:
            scales.append(max(-smallest, largest) / ((high - low) / 2))
            zero_points.append((low + high) // 2)
        else:
            scales.append((largest - smallest) / (high - low))
            zero_points.append(round(low - smallest / scales[-1]))
    for kind in ("weight", "input"):
        assert (found[f"{kind}_qmin"], found[f"{kind}_qmax"], found[f"{kind}_scheme"]) == (low, high, scheme)
        torch.testing.assert_close(torch.as_tensor(found[f"{kind}_scale"]).reshape(-1), torch.tensor(scales))
        assert torch.as_tensor(found[f"{kind}_zero_point"]).reshape(-1).tolist() == zero_points


def test_observers_grids_are_those_of_the_tensors_seen(tmp_path: Path) -> None:
    model = Linear().eval()
    rules = [
        {"quant_types": ["weight", "input"], "quant_bits": 8, "op_names": ["fc"], "observer": {"input": "minmax"}},
        {"quant_types": ["output"], "quant_bits": 8, "op_names": ["relu"], "observer": "minmax"},
    ]
    quantizer = build(ObserverQuantizer, model, rules)
    with torch.no_grad():
        model.fc.parametrizations.weight.original.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        model(torch.tensor([[-1.0, 2.0]]))
        model(torch.tensor([[3.0, 1.0]]))
    quantizer.compress()
    found = quantizer.export_model(tmp_path / "model.pth")
    assert found["fc"]["weight_scale"].item() == pytest.approx(2 / 127) and found["fc"]["weight_zero_point"].item() == 0
    assert found["fc"]["input_scale"] == pytest.approx(4 / 127) and found["fc"]["input_zero_point"] == 32
    assert found["relu"]["output_scale"] == pytest.approx(4 / 127) and found["relu"]["output_zero_point"] == 0


def test_observer_refuses_a_model_in_training_mode() -> None:
    with pytest.raises(ValueError, match="training mode"):
        ObserverQuantizer(Net().train(), weights(ObserverQuantizer))


def test_lsq_scales_start_as_in_the_paper_and_learn(tmp_path: Path) -> None:
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rules = [{"quant_types": ["weight", "input"], "quant_bits": {"weight": 8, "input": 8}, "op_names": ["fc"]}]
    quantizer = LsqQuantizer(model, rules, optimizer)
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    with torch.no_grad():
        model.fc.parametrizations.weight.original.copy_(weight)
    x = torch.tensor([[0.5, -1.5], [1.0, 2.0]])
    output = model.train()(x)
    scales = list(quantizer.scale_parameters())
    assert len(scales) == 2
    expected = [2 * value.abs().mean().item() / 127**0.5 for value in (weight, x)]
    assert sorted(scale.item() for scale in scales) == pytest.approx(sorted(expected), rel=1e-6)
    output.square().sum().backward()
    real = model.fc.parametrizations.weight.original
    assert real.grad.abs().sum() > 0
    before = [scale.item() for scale in scales]
    optimizer.step()
    assert all(scale.item() != old for scale, old in zip(scales, before, strict=True))
    assert entry(quantizer, "fc", tmp_path)["weight_bits"] == 8


def test_dorefa_weights_by_hand() -> None:
    model = Linear()
    build(DoReFaQuantizer, model, [{"quant_types": ["weight"], "quant_bits": 2, "op_names": ["fc"]}])
    with torch.no_grad():
        model.fc.parametrizations.weight.original.copy_(torch.tensor([[2.0, -2.0], [0.4, -0.1]]))
    # tanh / (2 max tanh) + 1/2 = 1, 0, 0.697, 0.448; to thirds: 1, 0, 2/3, 1/3; times 2 minus 1
    torch.testing.assert_close(model.fc.weight, torch.tensor([[1.0, -1.0], [1 / 3, -1 / 3]]))


def test_bnn_signs_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Hardtanh())
    rules = [*weights(BNNQuantizer, "Linear"), {"quant_types": ["output"], "quant_bits": 1, "op_types": ["Hardtanh"]}]
    build(BNNQuantizer, model, rules)
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(torch.tensor([[0.3, -0.2], [0.0, -0.0]]))
    assert model[0].weight.tolist() == [[1.0, -1.0], [1.0, 1.0]]
    x = torch.tensor([[0.5, 3.0], [0.2, -0.5]], requires_grad=True)
    output = model(x)
    assert output.tolist() == [[-1.0, 1.0], [1.0, -1.0]]
    output.sum().backward()
    # behind the layer stand -2.5, 3.5 (outside [-1, 1]: no gradient) and 0.7, -0.3
    assert x.grad.tolist() == [[0.0, 0.0], [2.0, 0.0]]


def test_naive_weights_by_hand() -> None:
    model = Linear()
    with torch.no_grad():
        model.fc.weight.copy_(torch.tensor([[1.27, -0.006], [0.004, 0.514]]))
    NaiveQuantizer(model).compress()
    torch.testing.assert_close(model.fc.weight, torch.tensor([[1.27, -0.01], [0.0, 0.51]]))


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
