"""Outputs, learned scales, calibration and export of layers with a folded batch norm; D13 is what NNI does wrong."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from folded_networks import BOTH, batch, fine, net, rules, train
from torch import nn

from quantkern.quantizers import LsqQuantizer, QAT_Quantizer


@BOTH
def test_the_output_of_a_folded_layer_is_its_batch_norms(kind: type) -> None:
    model = net()
    quantizer = kind(model, rules(4, "weight output"), fold_bn=True)
    for mode in (True, False):
        model.train(mode)
        between = model.conv(batch())
        output = model.bn(between)
        assert output[:, 0].unique().numel() <= 16 and output.unique().numel() <= 16
        if mode:
            assert between.unique().numel() > 16
    assert set(dict(model.named_children())) == set(dict(net().named_children()))
    assert "output_bits" in quantizer._attachments[0].calibration()


def test_a_learned_scale_starts_on_the_folded_weight() -> None:
    """D13: NNI's starts on the unfolded one."""
    model, twin = net(), net()
    quantizer = LsqQuantizer(model, rules(4), fold_bn=True)
    model.train()(batch())
    for module in (model.bn, twin.bn):
        module.load_state_dict(net().bn.state_dict())
    folded = twin.conv.weight * (twin.bn.weight / (twin.bn.running_var + 1e-5).sqrt()).reshape(-1, 1, 1, 1)
    expected = 2 * folded.abs().mean() / math.sqrt(7)
    scale = quantizer._attachments[0].calibration()["weight_scale"]
    torch.testing.assert_close(scale, expected.detach().reshape(1))


@pytest.mark.parametrize("scheme", ["per_tensor_symmetric", "per_channel_symmetric"])
def test_a_learned_scale_is_exported_as_that_of_the_folded_weight(scheme: str, tmp_path: Path) -> None:
    """And read as that, by either quantizer."""
    model = net()
    config = rules(4, quant_scheme=scheme, quant_dtype="int")
    quantizer = LsqQuantizer(model, config, fold_bn=True)
    train(model, None, range(3))
    model.eval()
    with torch.no_grad():
        steps = model.conv.weight / quantizer._attachments[0].calibration()["weight_scale"].reshape(-1, 1, 1, 1)
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert steps.abs().max() > 2
        expected = model(batch())
    calibration = quantizer.export_model(tmp_path / "m.pt")
    again = LsqQuantizer(model, config, fold_bn=True)
    again.load_calibration_config(calibration)
    torch.testing.assert_close(model(batch()), expected, rtol=1e-4, atol=1e-4)


def test_a_learned_scale_follows_the_factor() -> None:
    """From statistics of a new batch norm to its own: a scale left behind would clip all weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    LsqQuantizer(model, rules(4, layers=("Conv2d",)), fold_bn=True)
    model.train()
    for seed in range(120):
        model(batch(seed) * 0.1)
    floating = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    floating.load_state_dict(
        {
            key.replace("parametrizations.weight.original", "weight"): value
            for key, value in model.state_dict().items()
            if "weight.0" not in key
        }
    )
    floating[1].reset_running_stats()
    floating.train()
    for seed in range(120):
        floating(batch(seed) * 0.1)
    ratio = model[1].running_var / floating[1].running_var
    assert floating[1].running_var.max() < 0.02
    assert ratio.min() > 0.7 and ratio.max() < 1.4, ratio
    difference = model.eval()(batch() * 0.1) - floating.eval()(batch() * 0.1)
    assert difference.abs().mean() < 0.25


def test_calibration_says_the_scale_of_the_folded_weight(tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        model.bn.weight[1] = 0
    quantizer = QAT_Quantizer(model, rules(quant_scheme="per_channel_symmetric", quant_dtype="int"), fold_bn=True)
    train(model, None, range(2))
    folded = quantizer.folded_model().conv.weight.detach()
    calibration = quantizer.export_model(tmp_path / "m.pt", tmp_path / "c.pt")
    torch.testing.assert_close(calibration["conv"]["weight_scale"] * 127, folded.abs().amax((1, 2, 3)))
    again = QAT_Quantizer(model, rules(quant_scheme="per_channel_symmetric", quant_dtype="int"), fold_bn=True)
    again.load_calibration_config(torch.load(tmp_path / "c.pt"))
    assert torch.equal(again._attachments[0].calibration()["weight_scale"], calibration["conv"]["weight_scale"])


@BOTH
def test_export_restores_the_plain_model(kind: type, tmp_path: Path) -> None:
    model, plain = net(), net()
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    quantizer = kind(model, rules(8, "weight", **fine(kind)), optimizer, fold_bn=True, freeze_bn_step=2)
    held = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    assert held == list(parameters.values())
    train(model, optimizer, range(3))
    model.eval()
    folded, outputs = quantizer.folded_model(), model(batch(9))
    quantizer.export_model(tmp_path / "m.pt")
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    for (name, module), expected in zip(model.named_modules(), plain.modules(), strict=True):
        assert type(module) is type(expected), name
        assert not module._forward_hooks and not module._forward_pre_hooks and "folding" not in vars(module)
    plain.load_state_dict(torch.load(tmp_path / "m.pt"), strict=True)
    float_outputs = plain.eval()(batch(9))
    torch.testing.assert_close(folded(batch(9)), float_outputs, rtol=1e-4, atol=1e-5)
    assert (outputs - float_outputs).abs().max() < 0.1 * float_outputs.abs().max()
    with pytest.raises(RuntimeError, match="folded_model\\(\\): export_model\\(\\) has taken the quantizers off"):
        quantizer.folded_model()


def test_a_failing_export_leaves_the_folded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    quantizer = QAT_Quantizer(model, rules(8, "weight output"), fold_bn=True)
    train(model, None, range(1))
    before = model.eval()(batch())

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        quantizer.export_model(tmp_path / "m.pt")
    assert torch.equal(model(batch()), before) and torch.equal(copy.deepcopy(model)(batch()), before)
