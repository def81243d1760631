"""What LsqQuantizer's scales survive: checkpoints, copies, exports, calibration dicts."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from lsq_models import LAYERS, linear
from quantizer_checks import check_exact_resume, same_state, state_of
from small_quantized_net import EVERY, batch, net, rule, train
from torch import Tensor, nn

from quantkern.quantizers import LsqQuantizer, QAT_Quantizer

# ---------------------------------------------------------------- living with a quantized model


@pytest.mark.parametrize("delay", [0, 2, 4])
def test_resuming_from_a_state_dict_is_exact(delay: int) -> None:
    rules = [{**LAYERS[0], "quant_start_step": delay}]
    rules += rule("output", "relu", quant_scheme="per_channel_symmetric", offset=True)
    resumed, whole = check_exact_resume(
        net, lambda model, optimizer: LsqQuantizer(model, rules, optimizer), train, 3, 3
    )
    assert resumed.conv.quantkern.input.spec == whole.conv.quantkern.input.spec


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    rules = [{**LAYERS[0], "quant_scheme": "per_channel_symmetric"}]
    trained, model = net(), net(1)
    LsqQuantizer(trained, rules)
    quantizer = LsqQuantizer(model, rules)
    train(trained, None, range(1))
    train(model, None, range(1))
    wrong = state_of(trained)
    wrong["conv.parametrizations.weight.0.scale"] = torch.ones(3)
    wrong["fc.quantkern.output.scale"] = torch.ones(())
    before = state_of(model)
    for target, prefix in ((model, ""), (quantizer, "bound_model.")):
        with pytest.raises(
            ValueError, match="state_dict does not fit the quantizer's rules, nothing was loaded"
        ) as error:
            target.load_state_dict({prefix + key: value for key, value in wrong.items()})
        where = f"{prefix}conv.parametrizations.weight.0.scale has shape [3], expected [4] (per_channel_symmetric)"
        assert where in str(error.value)
        assert f"{prefix}fc.quantkern.output.scale has shape [], expected [3]" in str(error.value)
        assert same_state(state_of(model), before)
    signed = net(2)
    LsqQuantizer(signed, [{**rules[0], "signed": False}])
    with pytest.raises(
        ValueError, match="conv.quantkern.input.signed is True, this quantizer's rule says dtype 'uint'"
    ):
        signed.load_state_dict(state_of(trained))
    model.load_state_dict(state_of(trained))


def test_copies_live_on_their_own(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantizer = LsqQuantizer(model, LAYERS, optimizer)
    train(model, optimizer, range(2))
    twin, whole = copy.deepcopy(model), copy.deepcopy(quantizer)
    state = state_of(model)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), range(2))
    assert same_state(state_of(model), state)
    assert not torch.equal(twin.conv.quantkern.input.scale, model.conv.quantkern.input.scale)
    quantizer.export_model(tmp_path / "model.pt")
    assert twin.eval()(batch(5)).isfinite().all()
    whole.export_model(tmp_path / "copy.pt")
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("model.pt", "copy.pt"))
    assert same_state(first, second)
    assert type(whole.bound_model.conv) is nn.Conv2d


def test_models_with_learned_activations_pickle() -> None:
    """torch does not pickle parametrized modules; a model without quantized weights pickles."""
    model = net()
    LsqQuantizer(model, [{**LAYERS[0], "quant_types": ["input", "output"]}])
    train(model, None, range(1))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.eval()(batch(3)), model.eval()(batch(3)))


def test_export_restores_the_plain_model(tmp_path: Path) -> None:
    """L19"""
    model, floating = net(), net()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantizer = LsqQuantizer(model, [{**LAYERS[0], "quant_start_step": 1}], optimizer)
    train(model, optimizer, range(3))
    quantizer.export_model(tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    floating.load_state_dict(saved, strict=True)
    assert [*saved] == [*floating.state_dict()]
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert [type(module) for module in model.modules()] == [type(module) for module in floating.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not (model._load_state_dict_pre_hooks or optimizer._optimizer_step_pre_hooks)
    assert not (optimizer._optimizer_step_post_hooks or optimizer._optimizer_load_state_dict_pre_hooks)
    train(model, optimizer, range(3))
    assert len(optimizer.param_groups) == 2


# ---------------------------------------------------------------- calibration dicts


@pytest.mark.parametrize("scheme", ["per_tensor_symmetric", "per_channel_symmetric"])
@pytest.mark.parametrize("offset", [False, True])
def test_calibration_round_trip_is_exact(scheme: str, offset: bool, tmp_path: Path) -> None:
    """D9, D14: NNI writes the scale of the input for the weight, and none for the weight."""
    rules = [{**LAYERS[0], "quant_scheme": scheme, "offset": offset}, *rule("output", "relu", 3)]
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    quantizer = LsqQuantizer(model, rules, optimizer)
    train(model, optimizer, range(3))
    model(batch(0))  # the last step may have left a zero point off the grid
    expected = model.eval()(batch(7))
    state = state_of(model)
    calibration = quantizer.export_model(tmp_path / "model.pt", tmp_path / "calibration.pt")
    for kind, key in (
        ("weight", "parametrizations.weight.0"),
        ("input", "quantkern.input"),
        ("output", "quantkern.output"),
    ):
        scale = state[f"conv.{key}.scale"]
        assert torch.equal(torch.as_tensor(calibration["conv"][f"{kind}_scale"]).reshape(scale.shape), scale)
    entry = calibration["relu"]
    assert (entry["output_qmin"], entry["output_qmax"], entry["output_dtype"]) == (0, 7, "uint")
    assert entry["tracked_min_output"] == 0 and entry["tracked_max_output"] == pytest.approx(7 * entry["output_scale"])
    assert (calibration["conv"]["weight_qmin"], calibration["conv"]["weight_qmax"]) == (-8, 7)

    again = net(1)
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    second = LsqQuantizer(again, rules)
    second.load_calibration_config(torch.load(tmp_path / "calibration.pt", weights_only=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(again.eval()(batch(7)), expected)
    kept = {key: value for key, value in state_of(again).items() if key.endswith(("scale", "zero_point", "signed"))}
    assert all(torch.equal(value, state[key]) for key, value in kept.items()) and len(kept) > 9
    model = again.train()
    model(batch(3) * 5)  # a loaded scale is not initialised again
    assert all(torch.equal(state_of(model)[key], value) for key, value in kept.items())

    back = second.export_model(tmp_path / "other.pt")
    assert [*back] == [*calibration]
    for layer, entry in calibration.items():
        assert [*back[layer]] == [*entry]
        for key, value in entry.items():
            same = torch.equal(back[layer][key], value) if isinstance(value, Tensor) else back[layer][key] == value
            assert same, (layer, key)


def test_weights_alone_export(tmp_path: Path) -> None:
    """D14: NNI raises AttributeError."""
    model = net()
    quantizer = LsqQuantizer(model, [{"quant_types": ["weight"], "quant_bits": 4, "op_types": ["default"]}])
    train(model, None, range(1))
    scale = model.conv.parametrizations.weight[0].scale.detach().clone()
    calibration = quantizer.export_model(tmp_path / "model.pt")
    assert [*calibration] == ["conv", "fc"]
    assert torch.equal(calibration["conv"]["weight_scale"], scale.reshape(1))
    assert not any("input" in key for key in calibration["conv"])


def test_tensors_never_seen_are_left_out_with_a_warning(tmp_path: Path) -> None:
    quantizer = LsqQuantizer(net(), rule("weight input", "fc"))
    with pytest.warns(UserWarning) as found:
        calibration = quantizer.export_model(tmp_path / "model.pt")
    texts = sorted(str(entry.message) for entry in found)
    assert texts == [
        "the input of layer 'fc' was never seen in training: the calibration dict has no range and no scale for it",
        "the weight of layer 'fc' was never seen in training: the calibration dict has no scale for it",
    ]
    assert "weight_scale" not in calibration["fc"] and "input_scale" not in calibration["fc"]
    again = LsqQuantizer(net(), rule("weight input", "fc"))
    again.load_calibration_config(calibration)
    assert not again.bound_model.fc.quantkern.input.initialized


@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_tensor_symmetric", "per_channel_affine"])
@pytest.mark.parametrize("dtype", ["int", "uint"])
def test_dicts_of_the_qat_quantizer_are_converted(scheme: str, dtype: str, tmp_path: Path) -> None:
    """The loaded grid holds the whole range of the other, and is no coarser than its signs make it."""
    model = net()
    qat = QAT_Quantizer(
        model, [{**EVERY, "op_types": ["Conv2d", "Linear"], "quant_scheme": scheme, "quant_dtype": dtype}]
    )
    train(model, None, range(2))
    expected = model.eval()(batch(9)).detach()
    calibration = qat.export_model(tmp_path / "model.pt")
    granularity = "per_channel_symmetric" if "channel" in scheme else "per_tensor_symmetric"
    rules = [{**EVERY, "op_types": ["Conv2d", "Linear"], "quant_scheme": granularity, "offset": "affine" in scheme}]
    lsq = LsqQuantizer(model, rules)
    lsq.load_calibration_config(calibration)
    for name in ("conv", "fc"):
        for kind in ("input", "output"):
            quant = model.get_submodule(f"{name}.quantkern.{kind}")
            low, high = (torch.as_tensor(calibration[name][f"tracked_{end}_{kind}"]) for end in ("min", "max"))
            qmin, qmax = quant.spec.quant_range
            scale = quant.scale.detach()
            zero_point = 0 if quant.zero_point is None else quant.zero_point.detach()
            assert ((qmin - zero_point) * scale <= low + scale / 2).all()
            assert ((qmax - zero_point) * scale >= high - scale / 2).all()
            low, high = low.clamp(max=0), high.clamp(min=0)
            width = torch.maximum(high, -low) if quant.zero_point is None else (high - low) / 2
            width = torch.where(width > 0, width, width.max())  # a feature that was always 0
            assert quant.ready and (scale * (qmax - qmin) <= width * 2.05).all()
        weight = model.get_submodule(name).parametrizations.weight
        assert (weight[0](weight.original) - weight.original).abs().max() <= weight[0].scale.max() * 1.01
    if "tensor" in scheme:  # per channel, features that were always 0 in calibration are revived, and others clipped
        assert (model.eval()(batch(9)) - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_dict_as_nni_writes_it() -> None:
    """NNI has symmetric ranges only: tracked_max is its scale times qmax."""
    layer, quantizer = linear("weight input output", 8)
    quantizer.load_calibration_config(
        {
            "0": {
                "weight_bits": 8, "input_bits": 8, "tracked_min_input": -2.54, "tracked_max_input": 2.54,
                "output_bits": 8, "tracked_min_output": -1.27, "tracked_max_output": 1.27,
            }
        }
    )  # fmt: skip
    assert layer.quantkern.input.scale.item() == pytest.approx(0.02)
    assert layer.quantkern.output.scale.item() == pytest.approx(0.01)
    assert layer.quantkern.input.spec.quant_range == (-128, 127)
    assert not layer.parametrizations.weight[0].initialized  # NNI's dict has no scale for it


def test_a_calibration_that_does_not_fit_changes_nothing() -> None:
    model = net()
    quantizer = LsqQuantizer(model, [{**LAYERS[0], "quant_scheme": "per_channel_symmetric"}])
    train(model, None, range(1))
    state = state_of(model)
    good = {"weight_bits": 4, "input_bits": 4, "output_bits": 4}
    wrong = {
        "conv": {**good, "weight_bits": 8, "weight_scale": "x", "output_scale": [1.0] * 3, "input_scale": -1.0},
        "fc": {"weight_bits": 4, "input_bits": 4, "weight_scale": [1.0, 1.0, 1.0], "weight_qmin": 0.5},
    }
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        quantizer.load_calibration_config(wrong)
    for part in (
        "conv.weight: weight_bits is 8, this quantizer's rule says 4",
        "conv.weight: weight_scale is 'x', expected numbers",
        "conv.input: input_scale is -1.0, expected positive values",
        "conv.output: output_scale is [1.0, 1.0, 1.0], expected 4 finite values",
        "fc.weight: weight_qmin is 0.5, expected an integer",
        "fc.output: output_bits is missing, expected 4",
    ):
        assert part in str(error.value), part
    assert same_state(state_of(model), state)
