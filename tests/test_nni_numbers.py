"""Ranges, scales, moving averages, dtypes and schemes as NNI's own tests ask for them, worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nni_networks import Linear, Net, build, entry, weights
from torch import nn

from quantkern import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqQuantizer,
    NaiveQuantizer,
    ObserverQuantizer,
    QAT_Quantizer,
    set_quant_scheme_dtype,
)

pytestmark = pytest.mark.usefixtures("factory_settings")


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
