"""Calibration files: exact round trips, from one quantizer to another, from NNI, and those that do not fit."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import pytest
import torch
from torch import Tensor, nn

from quantkern.quantizers import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqQuantizer,
    NaiveQuantizer,
    ObserverQuantizer,
    QAT_Quantizer,
)
from quantkern.quantizers.base import Quantizer

ROOT = Path(__file__).resolve().parents[1]


def _load_generator() -> ModuleType:
    sys.path.append(str(ROOT / "scripts"))
    import make_nni_dicts

    return make_nni_dicts


NNI = _load_generator()
TABLE = json.loads(NNI.TABLE.read_text())
KINDS = {
    "qat": QAT_Quantizer,
    "lsq": LsqQuantizer,
    "observer": ObserverQuantizer,
    "dorefa": DoReFaQuantizer,
    "bnn": BNNQuantizer,
    "naive": NaiveQuantizer,
}
BITS = {"bnn": 1, "lsq": 4}
FOLDING = ("qat", "lsq", "observer")


def nni_dict(name: str) -> dict[str, dict[str, Any]]:
    """What NNI's export_model returned."""
    return {
        layer: {key: NNI.restored(value) for key, value in entry.items()}
        for layer, entry in TABLE["dicts"][name].items()
    }


def batch(seed: int) -> Tensor:
    return torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def net() -> nn.Module:
    """NNI's net with statistics and gammas as after some training."""
    model = NNI.Net()
    with torch.no_grad():
        model.bn.running_mean.copy_(torch.tensor([0.3, -0.2, 0.1]))
        model.bn.running_var.copy_(torch.tensor([0.5, 2.0, 1.3]))
        model.bn.weight.copy_(torch.tensor([0.7, -1.2, 0.0]))
    return model


def build(kind: str, model: nn.Module, rules: Any = None, fold: bool = False, **more: Any) -> Quantizer:
    """A quantizer of this kind, with rules that it takes."""
    if kind == "observer":
        model.eval()
    if rules is None:
        types = ["weight", "input"] if kind in FOLDING else ["weight"]
        rules = [{"quant_types": types, "quant_bits": BITS.get(kind, 8), "op_types": ["Conv2d", "Linear"], **more}]
        if kind in ("bnn", *FOLDING):
            rules.append({"quant_types": ["output"], "quant_bits": BITS.get(kind, 8), "op_names": ["relu"], **more})
    keywords = {"fold_bn": True} if fold else {}
    return KINDS[kind](model, rules, **keywords)


def used(kind: str, quantizer: Quantizer) -> nn.Module:
    """The quantizer's model after what gives it its numbers, in evaluation mode."""
    model = quantizer.bound_model
    if isinstance(quantizer, ObserverQuantizer):
        quantizer.calibrate([batch(seed) for seed in range(3)], progress=False)
        return quantizer.compress()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for seed in range(3):
        optimizer.zero_grad()
        model(batch(seed)).square().mean().backward()
        optimizer.step()
    return model.eval()


def equal(mine: object, theirs: object) -> bool:
    return torch.equal(mine, theirs) if isinstance(mine, Tensor) and isinstance(theirs, Tensor) else mine == theirs


def same_dicts(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    assert list(mine) == list(theirs)
    for layer, entry in mine.items():
        assert list(entry) == list(theirs[layer])
        for key, value in entry.items():
            assert equal(value, theirs[layer][key]), (layer, key, value, theirs[layer][key])


# ---------------------------------------------------------------- our own files


CASES = [
    *((kind, fold, {}) for kind in FOLDING for fold in (False, True)),
    ("qat", True, {"quant_scheme": "per_channel_affine"}),
    ("observer", True, {"quant_scheme": "per_channel_symmetric", "quant_dtype": "int"}),
    ("lsq", True, {"quant_scheme": "per_channel_symmetric"}),
    *((kind, False, {}) for kind in ("dorefa", "bnn", "naive")),
]


@pytest.mark.parametrize(("kind", "fold", "more"), CASES, ids=lambda value: str(value))
def test_a_file_gives_the_same_model_and_the_same_file(
    kind: str, fold: bool, more: dict[str, Any], tmp_path: Path
) -> None:
    quantizer = build(kind, net(), fold=fold, **more)
    expected = used(kind, quantizer)(batch(7))
    returned = quantizer.export_model(tmp_path / "model.pt", tmp_path / "calibration.pt")
    calibration = torch.load(tmp_path / "calibration.pt", weights_only=True)
    same_dicts(calibration, returned)
    model = NNI.Net()
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    second = build(kind, model, fold=fold, **more)
    second.load_calibration_config(calibration)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = second.compress().eval()(batch(7))
        if kind == "lsq" and fold:  # the learned scale is the file's divided by the factor: one rounding
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(output, expected)
        same_dicts(second.export_model(tmp_path / "again.pt"), calibration)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("target", FOLDING)
@pytest.mark.parametrize("source", FOLDING)
def test_files_go_from_one_quantizer_to_another(source: str, target: str, fold: bool, tmp_path: Path) -> None:
    """With one grid that all three have, every scale and zero point is taken as it is.

    LSQ's learned zero points are no integers: the others get the grid of the range, whose ends are a step away at most.
    """
    own = {"quant_dtype": "uint", "quant_scheme": "per_tensor_affine"}
    rules = [
        {"quant_types": ["input", "output"], "quant_bits": 8, "op_names": ["conv"], **own},
        {"quant_types": ["input"], "quant_bits": 8, "op_names": ["fc"], **own},
    ]

    def rules_for(kind: str) -> list[dict[str, Any]]:
        weight = {"quant_dtype": "int", "quant_scheme": "per_tensor_symmetric"}
        reduced = {"reduce_range": False} if kind == "observer" else {}
        one = {key: {"weight": weight[key], "input": own[key], "output": own[key]} for key in own}
        return [{**rules[0], "quant_types": ["weight", "input", "output"], **one, **reduced}, {**rules[1], **reduced}]

    quantizer = build(source, net(), rules_for(source), fold)
    used(source, quantizer)
    calibration = quantizer.export_model(tmp_path / "model.pt")
    model = NNI.Net()
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    second = build(target, model, rules_for(target), fold)
    second.load_calibration_config(calibration)
    second.compress().eval()
    found = second.export_model(tmp_path / "again.pt")
    for layer, entry in calibration.items():
        for end in (f"tracked_{end}_{which}" for end in ("min", "max") for which in ("input", "output")):
            if end in entry:
                assert found[layer][end] == pytest.approx(entry[end], abs=entry[f"{end[12:]}_scale"]), (layer, end)
        if source != "lsq" or target == "lsq":
            for key in ("input_scale", "input_zero_point", "output_scale", "output_zero_point"):
                if key in entry:
                    assert found[layer][key] == entry[key], (layer, key)
    # LSQ's weights have 256 steps, the others' 255; QAT's follow the weight itself.
    scales = [entry["conv"]["weight_scale"] for entry in (found, calibration)]
    if (source == "lsq") == (target == "lsq"):
        assert torch.equal(*scales)
    else:
        assert scales[0] * 127 >= scales[1] * 127 * 0.99 and scales[0] <= scales[1] * 128 / 127 * 1.01


# ---------------------------------------------------------------- NNI's files


def test_the_table_has_every_exporting_quantizer_of_nni() -> None:
    assert set(TABLE["dicts"]) == set(NNI.RULES) and TABLE["about"]["nni"] == "2.10"
    assert {name.split()[0] for name in TABLE["dicts"]} == set(KINDS) - {"naive"}


@pytest.mark.parametrize("name", TABLE["dicts"])
def test_a_dict_of_nni_loads_with_equal_numbers(name: str, tmp_path: Path) -> None:
    """Made by export_model of NNI 2.10's quantizers: scripts/make_nni_dicts.py."""
    given = nni_dict(name)
    quantizer = build(name.split()[0], NNI.Net(), NNI.RULES[name], fold=name == "qat folded")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quantizer.load_calibration_config(given)
        quantizer.compress().eval()
        if name != "lsq":  # NNI's LSQ exports no scale of a weight
            quantizer(batch(0))
    # NNI's BNN writes nothing about outputs.
    expected = ["calibration_config has no layer 'relu'"] if name == "bnn" else []
    assert [str(entry.message) for entry in said] == expected
    if isinstance(quantizer, (QAT_Quantizer, ObserverQuantizer)):
        entries = [quantizer._attachments[i].weight for i in (0, -1)]
        assert all(entry.loaded for entry in entries)
    # A weight's scale is the one of the dict until training goes on; an export gives that of the weight as it is.
    found = {attachment.name: attachment.calibration() for attachment in quantizer._attachments}
    for layer, entry in given.items():
        for key, value in entry.items():
            mine = torch.as_tensor(found[layer][key], dtype=torch.float64).reshape(-1)
            theirs = torch.as_tensor(value, dtype=torch.float64).reshape(-1)
            if name == "lsq" and key.startswith("tracked_min"):
                theirs = theirs * 128 / 127  # -128 is on our grid
            rounding = 3e-7 if name in ("lsq", "observer") and "tracked" in key else 0.0
            torch.testing.assert_close(mine, theirs, rtol=rounding, atol=0, msg=f"{layer} {key} {mine} {theirs}")


@pytest.mark.parametrize("target", FOLDING)
@pytest.mark.parametrize("name", ["qat", "qat symmetric", "qat folded", "lsq", "observer"])
def test_a_dict_of_nni_loads_into_other_quantizers(name: str, target: str) -> None:
    """Every value of a range that NNI tracked is at most a step away on the grid made of it, and no step is wasted."""
    given = nni_dict(name)
    model = NNI.Net()
    rules = [{key: value for key, value in rule.items() if "quant_d" not in key} for rule in NNI.RULES[name]]
    rules = [{key: value for key, value in rule.items() if "quant_sch" not in key} for rule in rules]
    quantizer = build(target, model, rules, fold=name == "qat folded")
    quantizer.load_calibration_config(given)
    quantizer.compress().eval()
    checked = 0
    for layer, entry in given.items():
        for kind in ("input", "output"):
            if f"tracked_min_{kind}" not in entry:
                continue
            low, high = (entry[f"tracked_{end}_{kind}"] for end in ("min", "max"))
            module = model.get_submodule(layer).quantkern.get_submodule(kind)
            steps = module.spec.quant_range[1] - module.spec.quant_range[0]
            x = torch.linspace(low, high, 301)
            scale = module.scale.detach()
            assert (module(x) - x).abs().max() <= 1.01 * scale
            assert scale * steps <= 2.02 * (high - low)
            checked += 1
    assert checked >= 3
    if name == "lsq":  # NNI's LSQ exports no scale of a weight
        return
    # The weights too, whatever grid NNI had and the rule has; its training had moved them by less than two steps.
    entry = given["fc"]
    step = float(entry["weight_scale"]) if "weight_scale" in entry else entry["tracked_max_weight"] / 127
    weight = NNI.Net().fc.weight
    assert (model.fc.weight - weight).abs().max() <= 2 * step
    assert float(model.fc.parametrizations.weight[0].scale.detach()) == pytest.approx(step, rel=0.15)


def test_a_dict_that_does_not_fit_leaves_a_stale_scale() -> None:
    """Finding out which grid NNI's scale belongs to looks at the weight, and must not move what follows it."""
    model = NNI.Net()
    quantizer = build("qat", model, NNI.RULES["qat folded"], fold=True)
    model.train()(batch(0))
    with torch.no_grad():
        model.fc.parametrizations.weight.original.mul_(3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    given = nni_dict("qat folded")
    given["relu"]["output_bits"] = 4
    with pytest.raises(ValueError, match="relu.output: output_bits is 4"):
        quantizer.load_calibration_config(given)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_training_goes_on_from_a_dict_of_nni() -> None:
    model = NNI.Net()
    model.bn = nn.Identity()
    quantizer = build("qat", model, NNI.RULES["qat"])
    given = nni_dict("qat")
    quantizer.load_calibration_config(given)
    model.train()
    x = torch.full((1, 2, 4, 4), 4.0)
    model(x)
    expected = given["conv"]["tracked_max_input"] * 0.99 + 4.0 * 0.01
    assert model.conv.quantkern.input.running_max.item() == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- files that do not fit, paths that cannot be written


@pytest.mark.parametrize("kind", KINDS)
def test_a_dict_of_another_model(kind: str) -> None:
    quantizer = build(kind, net())
    given = {"conv1": {"weight_bits": 8}, "head": {"weight_bits": 8}}
    with pytest.raises(ValueError, match="calibration_config is of another model") as error:
        quantizer.load_calibration_config(given)
    assert "it has none of the quantized layers 'conv', " in str(error.value) and "Nothing was loaded" in str(
        error.value
    )
    assert "\n  'conv1' is not quantized here; did you mean 'conv'?" in str(error.value)
    assert str(error.value).endswith("\n  'head' is not quantized here")
    with pytest.raises(ValueError, match="Nothing was loaded, it is empty"):
        quantizer.load_calibration_config({})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["model_path", "calibration_path", "onnx_path"])
def test_a_path_that_cannot_be_written(kind: str, which: str, tmp_path: Path) -> None:
    """The others are not written either, and the model stays quantized."""
    quantizer = build(kind, net())
    model = used(kind, quantizer)
    expected = model(batch(7))
    (tmp_path / "file").write_text("no folder")
    for wrong, error in (
        (tmp_path / "missing" / "x.pt", FileNotFoundError),
        (tmp_path / "file" / "x.pt", NotADirectoryError),
        (tmp_path, IsADirectoryError),
    ):
        paths: dict[str, Any] = {"model_path": tmp_path / "model.pt", "calibration_path": tmp_path / "c.pt"}
        with pytest.raises(error, match=which):
            quantizer.export_model(**{**paths, which: wrong}, input_shape=(1, 2, 4, 4))
    with pytest.raises(ValueError, match="onnx_path needs input_shape, a tuple such as"):
        quantizer.export_model(tmp_path / "model.pt", onnx_path=tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert torch.equal(model(batch(7)), expected)


def test_a_failing_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = build("observer", net(), fold=True)
    model = used("observer", quantizer)
    expected = model(batch(7))

    def fail(value: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        quantizer.export_model(tmp_path / "model.pt", tmp_path / "calibration.pt")
    assert not any(tmp_path.iterdir()) and torch.equal(model(batch(7)), expected)
