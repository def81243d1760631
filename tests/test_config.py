"""config_list: every problem at once, NNI's meaning of the rules, the model untouched."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from quantkern.config import ConfigError, Form, LayerPlan, TensorSpec
from quantkern.layer_plans import plan_layers
from quantkern.quantizers import NaiveQuantizer, QAT_Quantizer
from quantkern.settings import (
    QUANT_TYPES,
    default_settings,
    reset_quant_scheme_dtype,
    set_quant_scheme_dtype,
)

KEYS = ("quant_types", "quant_bits", "quant_dtype", "quant_scheme", "quant_start_step", "ema_decay", "axis")
WEIGHT = {"quant_types": ["weight"], "quant_bits": 8}
OUTPUT = {"quant_types": ["output"], "quant_bits": 8}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.relu1 = nn.ReLU6()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.LeakyReLU())
        self.up = nn.ConvTranspose2d(4, 2, 2)
        self.fc = nn.Linear(8, 2)


def plan(config_list: object, model: nn.Module | None = None) -> list[LayerPlan]:
    return plan_layers(Net() if model is None else model, config_list, Form(QUANT_TYPES, KEYS, default_settings()))


def problems(config_list: object, model: nn.Module | None = None) -> tuple[str, ...]:
    with warnings.catch_warnings(), pytest.raises(ConfigError) as error:
        warnings.simplefilter("ignore")
        plan(config_list, model)
    return error.value.problems


def names(config_list: object, model: nn.Module | None = None) -> list[str]:
    return [layer.name for layer in plan(config_list, model)]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"quant_type": ["weight"]}, "unknown key 'quant_type'; did you mean 'quant_types'"),
        ({"quant_bits": 0}, "config_list[0]['quant_bits'] is 0, expected an integer from 1 to 16"),
        ({"quant_bits": 17}, "config_list[0]['quant_bits'] is 17, expected an integer from 1 to 16"),
        ({"quant_bits": True}, "config_list[0]['quant_bits'] is True, expected an integer"),
        ({"quant_bits": 8.0}, "config_list[0]['quant_bits'] is 8.0, expected an integer"),
        ({"quant_bits": {"weight": 33}}, "config_list[0]['quant_bits']['weight'] is 33, expected an integer from 1"),
        ({"quant_bits": {"wieght": 8}}, "did you mean 'weight'?"),
        ({"quant_bits": {"input": 8}}, "expected bits for every quant type, 'weight' too"),
        ({"quant_bits": 1, "quant_dtype": "int"}, "with dtype 'int' 1 bit holds only 0..0"),
        ({"quant_types": ["weights"]}, "did you mean 'weight'?"),
        ({"quant_types": []}, "config_list[0]['quant_types'] is [], expected a list out of"),
        ({"quant_types": 3}, "config_list[0]['quant_types'] is 3, expected a list out of"),
        ({"quant_dtype": "int8"}, "config_list[0]['quant_dtype'] is 'int8', expected one of ['int', 'uint']"),
        ({"quant_scheme": "per_tensor"}, "config_list[0]['quant_scheme'] is 'per_tensor', expected one of"),
        ({"quant_scheme": {"weight": 4}}, "config_list[0]['quant_scheme']['weight'] is 4, expected one of"),
        ({"quant_start_step": -1}, "config_list[0]['quant_start_step'] is -1, expected an integer >= 0"),
        ({"quant_start_step": True}, "config_list[0]['quant_start_step'] is True, expected an integer >= 0"),
        ({"ema_decay": 1.0}, "config_list[0]['ema_decay'] is 1.0, expected a float between 0 and 1"),
        ({"ema_decay": 0}, "config_list[0]['ema_decay'] is 0, expected a float between 0 and 1"),
        ({"axis": "1"}, "config_list[0]['axis'] is '1', expected an integer"),
        ({"axis": 1}, "expected a per-channel quant_scheme with it, not per_tensor_affine"),
        ({"axis": 4, "quant_scheme": "per_channel_affine"}, "axis 4 is out of range, its weight of shape [4, 1, 3, 3]"),
        ({"op_types": "Conv2d"}, "config_list[0]['op_types'] is 'Conv2d', expected a list of names, e.g. ['Conv2d']"),
        ({"op_types": [nn.Conv2d]}, "expected only strings in the list, got <class"),
        ({"op_names": None}, "config_list[0]['op_names'] is None, expected a list of names"),
        ({"exclude": "yes"}, "config_list[0]['exclude'] is 'yes', expected True or False"),
    ],
)
def test_one_wrong_value_is_named(rule: dict[str, Any], expected: str) -> None:
    found = problems([{**WEIGHT, "op_types": ["Conv2d"], "op_names": ["conv1"], **rule}])
    assert len(found) == 1 and expected in found[0], found
    assert found[0].startswith("config_list[0]")


@pytest.mark.parametrize("missing", ["quant_types", "quant_bits"])
def test_a_missing_key_is_named(missing: str) -> None:
    rule = {key: value for key, value in {**WEIGHT, "op_types": ["Conv2d"]}.items() if key != missing}
    (found,) = problems([rule])
    assert found.startswith(f"config_list[0]: '{missing}' is missing")
    assert names([{**WEIGHT, "op_types": ["Conv2d"]}, {"exclude": True, "op_names": ["conv1"]}]) == ["block.0"]


def test_a_rule_must_name_layers() -> None:
    (found,) = problems([WEIGHT])
    assert "neither 'op_types' nor 'op_names'" in found


@pytest.mark.parametrize(
    ("config_list", "expected"),
    [
        (None, "config_list is None, expected a list of dicts"),
        ("Conv2d", "config_list is 'Conv2d', expected a list of dicts"),
        ({**WEIGHT, "op_types": ["Conv2d"]}, "put it in brackets"),
        ([WEIGHT, 3], "config_list[1] is 3, expected a dict"),
        ([], "it selects no layer of the model"),
        ([{**WEIGHT, "op_types": []}], "it selects no layer of the model"),
        (
            [{**WEIGHT, "op_types": ["Conv1d"]}],
            "it selects no layer of the model; the model has the types Conv2d, Conv",
        ),
        ([{**WEIGHT, "op_types": ["Conv2d"]}, {"exclude": True, "op_types": ["Conv2d"]}], "it selects no layer"),
    ],
)
def test_a_config_list_that_is_none_or_selects_nothing(config_list: object, expected: str) -> None:
    assert any(expected in problem for problem in problems(config_list))


def test_all_problems_are_said_at_once_and_the_model_is_untouched() -> None:
    model = Net()
    before = {name: (type(module), dict(module.__dict__)) for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rules = [
        {"quant_types": ["weigth"], "quant_bits": 99, "op_type": ["Conv2d"]},
        {**WEIGHT, "op_names": ["relu1"]},
        {**WEIGHT, "op_types": ["Linear"], "quant_scheme": "per_channel_affine", "axis": 2},
    ]
    given = copy.deepcopy(rules)
    with pytest.raises(ConfigError) as error:
        QAT_Quantizer(model, rules)
    assert len(error.value.problems) == 6
    for part in ("6 problems", "  1. config_list[0]", "'op_types'", "weigth", "99", "'relu1' (ReLU6)", "axis 2 is out"):
        assert part in str(error.value), part
    assert rules == given
    assert all((type(m), dict(m.__dict__)) == before[name] for name, m in model.named_modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    assert isinstance(error.value, ValueError)


def test_a_module_without_weight_asked_for_weight_is_named() -> None:
    (found,) = problems([{**WEIGHT, "op_types": ["Conv2d", "ReLU6"]}])
    assert found.startswith("config_list[0]: layer 'relu1' (ReLU6) has no parameter 'weight'")
    (found,) = problems([{**WEIGHT, "op_types": ["BatchNorm1d"]}], nn.Sequential(nn.BatchNorm1d(2, affine=False)))
    assert "has no parameter 'weight'" in found
    (found,) = problems([{**WEIGHT, "op_types": ["LazyLinear"]}], nn.Sequential(nn.LazyLinear(2)))
    assert "run one batch through the model first" in found


def test_default_stands_for_layers_with_weights() -> None:
    assert names([{**WEIGHT, "op_types": ["default"]}]) == ["conv1", "block.0", "up", "fc"]


def test_types_and_names_must_both_match() -> None:
    assert names([{**WEIGHT, "op_types": ["Conv2d"], "op_names": ["conv1"]}]) == ["conv1"]
    assert names([{**OUTPUT, "op_types": ["LeakyReLU", "ReLU6"]}]) == ["relu1", "block.1"]
    with pytest.warns(UserWarning, match="selects no layer"):
        assert names([{**WEIGHT, "op_types": ["Linear"], "op_names": ["conv1"]}, {**WEIGHT, "op_names": ["fc"]}]) == [
            "fc"
        ]


def test_the_last_rule_wins_whole_with_a_warning() -> None:
    """L10: rules are not merged."""
    with pytest.warns(UserWarning, match=r"config_list\[1\] replaces config_list\[0\] for 'conv1', 'block.0'"):
        plans = plan([{**WEIGHT, "op_types": ["Conv2d", "Linear"]}, {**OUTPUT, "op_types": ["Conv2d"]}])
    assert {layer.name: list(layer.specs) for layer in plans} == {
        "conv1": ["output"],
        "block.0": ["output"],
        "fc": ["weight"],
    }


def test_exclude_false_is_no_exclusion_and_exclude_true_is() -> None:
    """L10: NNI takes ``exclude: False`` for an exclusion."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names([{**WEIGHT, "op_types": ["Conv2d"], "exclude": False}]) == ["conv1", "block.0"]
        rules = [{**WEIGHT, "op_types": ["Conv2d"]}, {"op_names": ["block.0"], "exclude": True}]
        assert names(rules) == ["conv1"]
        assert names([*rules, {**WEIGHT, "op_names": ["block.0"]}]) == ["conv1", "block.0"]


def test_unknown_names_and_types_are_warnings_with_the_nearest() -> None:
    with pytest.warns(UserWarning, match=r"config_list\[0\]\['op_names'\].*'conv_1'; did you mean 'conv1'\?"):
        assert names([{**WEIGHT, "op_names": ["conv_1", "fc"]}]) == ["fc"]
    with pytest.warns(UserWarning, match=r"\['op_types'\]: the model has no 'conv2d'; did you mean 'Conv2d'\?"):
        assert names([{**WEIGHT, "op_types": ["conv2d", "Linear"]}]) == ["fc"]


def test_quant_types_may_be_one_string() -> None:
    """L12"""
    (layer,) = plan([{"quant_types": "output", "quant_bits": 4, "op_names": ["relu1"]}])
    assert layer.specs == {"output": TensorSpec(4, "uint", "per_tensor_affine")}


def test_values_by_quant_type() -> None:
    rule = {
        "quant_types": ["weight", "input", "output"],
        "quant_bits": {"weight": 4, "input": 8, "output": 6},
        "quant_dtype": {"weight": "int"},
        "quant_scheme": {"weight": "per_channel_symmetric", "output": "per_channel_affine"},
        "axis": {"output": -1},
        "quant_start_step": 7,
        "ema_decay": 0.9,
        "op_names": ["conv1"],
    }
    (layer,) = plan([rule])
    assert layer.specs == {
        "weight": TensorSpec(4, "int", "per_channel_symmetric", 0, 7, 0.9),
        "input": TensorSpec(8, "uint", "per_tensor_affine", None, 7, 0.9),
        "output": TensorSpec(6, "uint", "per_channel_affine", -1, 7, 0.9),
    }


def test_default_axes() -> None:
    rule = {"quant_types": ["weight", "input"], "quant_bits": 8, "quant_scheme": "per_channel_affine"}
    specs = {p.name: {k: s.axis for k, s in p.specs.items()} for p in plan([{**rule, "op_types": ["default"]}])}
    assert specs["conv1"] == specs["fc"] == {"weight": 0, "input": 1}
    assert specs["up"] == {"weight": 1, "input": 1}


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_quant_ranges(bits: int) -> None:
    """L4: int is symmetric about 0."""
    top = 2 ** (bits - 1) - 1
    assert TensorSpec(bits, "int", "per_tensor_affine").quant_range == (-top, top)
    assert TensorSpec(bits, "uint", "per_tensor_affine").quant_range == (0, 2 * top + 1)


def test_one_bit_is_allowed_for_uint() -> None:
    (layer,) = plan([{**WEIGHT, "quant_bits": 1, "op_names": ["fc"]}])
    assert layer.specs["weight"].quant_range == (0, 1)


def test_a_shared_module_has_all_its_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.add_module("again", model[0])
    assert names([{**WEIGHT, "op_names": ["again"]}], model) == ["0"]


def test_a_model_of_one_layer_is_that_layer_and_a_container_is_not() -> None:
    assert names([{**WEIGHT, "op_types": ["Linear"]}], nn.Linear(2, 2)) == [""]
    assert names([{**OUTPUT, "op_types": ["Sequential"]}], nn.Sequential(nn.Sequential(nn.ReLU()))) == ["0"]


def test_defaults_are_settable_checked_and_read_at_construction() -> None:
    """L13: a quantizer keeps the defaults of its construction; reset takes every change back."""
    rule = [{**WEIGHT, "op_names": ["fc"]}]
    try:
        set_quant_scheme_dtype("weight", "per_channel_symmetric", "int")
        set_quant_scheme_dtype("output", new_dtype="int")
        model = Net()
        QAT_Quantizer(model, rule)
        before = repr(model)
        assert "8 bits, int, per_channel_symmetric, 2 channels on axis 0" in before
        assert default_settings()["output"] == ("per_tensor_affine", "int")
        for wrong in (("weights",), ("weight", "per_channel"), ("weight", None, "int8")):
            with pytest.raises(ValueError, match="expected one of"):
                set_quant_scheme_dtype(*wrong)
        assert default_settings()["weight"] == ("per_channel_symmetric", "int")
    finally:
        reset_quant_scheme_dtype()
    assert repr(model) == before
    assert set(default_settings().values()) == {("per_tensor_affine", "uint")}


def test_naive_rules_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="unknown key 'quant_scheme'"):
        NaiveQuantizer(Net(), [{**WEIGHT, "op_types": ["Conv2d"], "quant_scheme": "per_tensor_affine"}])
    with pytest.raises(ConfigError, match=r"only entries out of \['weight'\]"):
        NaiveQuantizer(Net(), [{**OUTPUT, "op_types": ["Conv2d"]}])
    with pytest.raises(ConfigError, match="selects no layer"):
        NaiveQuantizer(nn.Sequential(nn.ReLU()))


def test_a_layer_is_quantized_once() -> None:
    model = Net()
    NaiveQuantizer(model)
    with pytest.raises(ConfigError, match="layer 'conv1' has a quantizer already"):
        QAT_Quantizer(model, [{**WEIGHT, "op_names": ["conv1"]}])
    model = Net()
    QAT_Quantizer(model, [{**OUTPUT, "op_names": ["relu1"]}])
    with pytest.raises(ConfigError, match="layer 'relu1' has a quantizer already"):
        QAT_Quantizer(model, [{**OUTPUT, "op_names": ["relu1"]}])
