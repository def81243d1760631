"""Batch norms folded in ObserverQuantizer: by their running statistics, before anything is observed."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from folded_networks import Convolutions, Net, Untraceable, batch, layer_of, net, rules, shake
from torch import Tensor, nn

from quantkern import reference
from quantkern.quantizers import LsqQuantizer, ObserverQuantizer, QAT_Quantizer

CHANNELS = {"quant_scheme": "per_channel_symmetric", "quant_dtype": "int"}


def batches() -> list[Tensor]:
    return [batch(seed) for seed in range(3)]


def quantized(model: nn.Module, given: Any = None, **more: Any) -> ObserverQuantizer:
    more = more or {"fold_bn": True}
    quantizer = ObserverQuantizer(model.eval(), given or rules(8, "weight input output"), **more)
    quantizer.calibrate(batches(), progress=False)
    quantizer.compress()
    return quantizer


def folded_of(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The convolution's folded weight and bias, by the formula."""
    conv, bn = model.conv, model.bn
    factor = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach()
    return conv.weight.detach() * factor.reshape(-1, 1, 1, 1), bn.bias.detach() - bn.running_mean * factor


@pytest.mark.parametrize("more", [{}, CHANNELS], ids=["tensor", "channel"])
def test_the_folded_weight_is_what_is_quantized(more: dict[str, Any]) -> None:
    model, plain = net(), net().eval()
    quantizer = quantized(model, rules(8, "weight", **more))
    assert quantizer.folded_layers == {"conv": "bn", "fc": "bn1"} and quantizer.unfolded_layers == {}
    weight, bias = folded_of(plain)
    own = model.conv.parametrizations.weight[0]
    largest = weight.abs().amax((1, 2, 3)) if more else weight.abs().amax()
    torch.testing.assert_close(own.scale * 127, largest)
    axis = 0 if more else None
    on_grid = reference.quantize(weight, own.scale, own.zero_point, -127, 127, axis)[0]
    torch.testing.assert_close(model.conv.weight, on_grid)
    output = model.conv(batch())
    torch.testing.assert_close(output, nn.functional.conv2d(batch(), on_grid, bias))
    assert model.bn(output) is output
    assert 0 < (model(batch()) - plain(batch())).abs().max() < 0.02 * plain(batch()).abs().max()


def test_the_model_computes_as_before_until_compress() -> None:
    model, plain = net().eval(), net().eval()
    ObserverQuantizer(model, rules(8, "weight input output"), fold_bn=True)
    torch.testing.assert_close(model(batch()), plain(batch()), rtol=1e-5, atol=1e-6)
    with Convolutions() as counted:
        model(batch())
    assert counted.count == 3


def test_the_output_of_a_layer_is_its_batch_norms() -> None:
    model, plain = net(), net().eval()
    quantized(model, rules(8, "weight output", ("Conv2d",), observer="minmax"))
    with torch.no_grad():
        seen = torch.cat([plain.bn(plain.conv(x)) for x in batches()])
        own = model.conv.quantkern.output
        assert own.running_min.item() == pytest.approx(seen.min().item(), abs=own.scale.item())
        assert own.running_max.item() == pytest.approx(seen.max().item(), abs=own.scale.item())
        steps = model.bn(model.conv(batch(1))) / own.scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


def test_folding_is_asked_for_as_in_qat() -> None:
    given = rules(8, "weight")
    assert ObserverQuantizer(net().eval(), given, dummy_input=batch()).folded_layers == {"conv": "bn", "fc": "bn1"}
    assert ObserverQuantizer(net().eval(), given).folded_layers == {}
    assert ObserverQuantizer(net().eval(), given, dummy_input=batch(), fold_bn=False).folded_layers == {}
    with pytest.raises(TypeError, match="fold_bn must be True, False or None"):
        ObserverQuantizer(net().eval(), given, fold_bn=1)  # type: ignore[arg-type]
    model = net().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"call model.eval\(\) first. The model is unchanged"):
        ObserverQuantizer(model, given, dummy_input=batch())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert type(model.conv) is nn.Conv2d and "folding" not in vars(model.bn)


def test_models_that_cannot_be_traced_fold_by_dummy_input() -> None:
    torch.manual_seed(0)
    model = shake(Untraceable()).eval()
    with pytest.raises(ValueError, match="give a dummy_input, or fold_bn=False. The model is unchanged"):
        ObserverQuantizer(model, rules(8, "weight"), fold_bn=True)
    quantizer = ObserverQuantizer(model, rules(8, "weight"), dummy_input=batch())
    assert quantizer.folded_layers == {"conv": "bn", "fc": "bn1"}


def test_the_dummy_input_is_not_observed() -> None:
    model = net().eval()
    quantizer = ObserverQuantizer(model, rules(8, "input", ("Conv2d",)), dummy_input=batch() * 100)
    with pytest.raises(RuntimeError, match="no calibration batch has been seen by conv.input"):
        quantizer.compress()


def test_batch_norms_stay_where_the_weight_is_not_quantized() -> None:
    model, plain = net(), net().eval()
    quantizer = quantized(model, rules(16, "input", ("Conv2d", "Linear")), dummy_input=batch())
    assert quantizer.folded_layers == {} and type(model.bn) is nn.BatchNorm2d
    torch.testing.assert_close(model(batch(1)), plain(batch(1)), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("gammas", [[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, -2.0, 1e-30]], ids=["all", "some"])
@pytest.mark.parametrize("more", [{}, CHANNELS], ids=["tensor", "channel"])
def test_gamma_zero(gammas: list[float], more: dict[str, Any]) -> None:
    """The channel is its bias, in the quantized model too."""
    model, plain = net(), net().eval()
    for one in (model, plain):
        with torch.no_grad():
            one.bn.weight.copy_(torch.tensor(gammas))
    quantized(model, rules(8, "weight", ("Conv2d",), **more))
    own = model.conv.parametrizations.weight[0]
    assert (own.scale > 0).all() and own.scale.isfinite().all()
    output, expected = model.bn(model.conv(batch())), plain.bn(plain.conv(batch()))
    assert torch.equal(output[:, 1], expected[:, 1])
    scale = own.scale.amax() * 9 * batch().abs().amax()
    assert (output - expected).abs().max() <= 0.5 * scale if max(gammas) else torch.equal(output, expected)


def test_statistics_without_a_number_are_an_error() -> None:
    model = net().eval()
    model.bn.running_var[2] = torch.nan
    quantizer = ObserverQuantizer(model, rules(8, "weight", ("Conv2d",)), fold_bn=True)
    with pytest.raises(ValueError, match="conv.weight holds NaN or infinity"):
        quantizer.compress()
    assert not quantizer.is_compressed()


@pytest.mark.parametrize("name", ["Conv1d", "Conv3d", "ConvTranspose2d", "Linear"])
def test_layers_of_every_kind(name: str) -> None:
    layer, norm, x = layer_of(name)
    model = nn.Sequential(layer, norm).eval()
    expected = model(x).detach()
    given = rules(16, "weight", (name,), quant_scheme="per_channel_symmetric", axis=int("Transpose" in name))
    quantizer = ObserverQuantizer(model, given, fold_bn=True)
    assert quantizer.folded_layers == {"0": "1"}
    quantizer.compress()
    assert not torch.equal(model(x), expected)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(quantizer.folded_model()(x), expected, rtol=1e-4, atol=1e-4)


def test_statistics_stay_even_in_training_mode() -> None:
    """The frozen grid is that of the folded weight with these statistics; gradients reach weight and gamma."""
    model = net()
    quantized(model, rules(8, "weight"))
    expected = model(batch())
    model.train()
    torch.testing.assert_close(model(batch()), expected, rtol=0, atol=0)
    assert model.bn.num_batches_tracked == 0
    model(batch()).square().sum().backward()
    assert model.conv.parametrizations.weight.original.grad.abs().max() > 0
    assert model.bn.weight.grad.abs().max() > 0 and model.bn.bias.grad.abs().max() > 0


def test_the_folded_model_is_the_quantized_one_up_to_rounding() -> None:
    model = net()
    quantizer = quantized(model, rules(16, "weight input output", reduce_range=False, observer="minmax"))
    folded = quantizer.folded_model()
    assert type(folded.bn) is nn.Identity and type(folded.conv) is nn.Conv2d
    torch.testing.assert_close(folded(batch(1)), model(batch(1)), rtol=0, atol=2e-4)
    torch.testing.assert_close(folded(batch(9)), net().eval()(batch(9)), rtol=1e-4, atol=1e-5)


def test_export_restores_the_plain_model(tmp_path: Path) -> None:
    model, plain = net(), net().eval()
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    quantizer = quantized(model, rules(8, "weight", **CHANNELS))
    scale = quantizer.folded_model().conv.weight.detach().abs().amax((1, 2, 3)) / 127
    calibration = quantizer.export_model(tmp_path / "m.pt", tmp_path / "c.pt")
    torch.testing.assert_close(calibration["conv"]["weight_scale"], scale)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(model(batch()), plain(batch()))
    again = Net().eval()
    again.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
    assert torch.equal(again(batch()), plain(batch()))


@pytest.mark.parametrize("kind", [QAT_Quantizer, LsqQuantizer])
def test_its_dict_is_that_of_other_folding_quantizers(kind: type, tmp_path: Path) -> None:
    """They quantize the same folded weight with the same scale, and training goes on from there."""
    model = net()
    given = rules(8, "weight", quant_scheme="per_channel_symmetric", quant_dtype="int")
    quantizer = quantized(model, given)
    weight, expected = model.conv.weight.detach().clone(), model(batch()).detach()
    calibration = quantizer.export_model(tmp_path / "m.pt")
    second = kind(model, given, fold_bn=True)
    second.load_calibration_config(calibration)
    torch.testing.assert_close(model.eval().conv.weight, weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model(batch()), expected, rtol=1e-4, atol=1e-5)
    model.train()
    model(batch()).square().mean().backward()
    assert model.conv.parametrizations.weight.original.grad.abs().max() > 0
    back = second.export_model(tmp_path / "again.pt")
    assert model.bn.num_batches_tracked == 1
    again = ObserverQuantizer(model.eval(), given, fold_bn=True)
    again.load_calibration_config(back)
    wider = 128 / 127 if kind is LsqQuantizer else 1.0  # LSQ's weights go down to -128 steps
    scale = again._attachments[0].calibration()["weight_scale"]
    torch.testing.assert_close(scale, back["conv"]["weight_scale"] * wider, rtol=1e-6, atol=0)


def test_resuming_from_a_state_dict_is_exact() -> None:
    model, other = net(), net().eval()
    quantized(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    ObserverQuantizer(other, rules(8, "weight input output"), fold_bn=True)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(batch(4)), model(batch(4)))


def test_copies_live_on_their_own(tmp_path: Path) -> None:
    model = net()
    quantizer = quantized(model)
    twin = copy.deepcopy(model)
    expected = model(batch(3))
    quantizer.export_model(tmp_path / "m.pt")
    assert torch.equal(twin(batch(3)), expected)
    assert not torch.equal(model(batch(3)), expected)


def test_a_half_model() -> None:
    model, plain = net().bfloat16(), net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer = ObserverQuantizer(model.eval(), rules(8, "weight input"), fold_bn=True)
        quantizer.calibrate([x.bfloat16() for x in batches()], progress=False)
        quantizer.compress()
    assert model.conv.parametrizations.weight[0].scale.dtype is torch.float32
    output = model(batch().bfloat16())
    assert output.dtype is torch.bfloat16
    assert (output.float() - plain(batch())).abs().max() < 0.1 * plain(batch()).abs().max()
