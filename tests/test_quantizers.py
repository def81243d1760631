"""NaiveQuantizer and QAT_Quantizer: one regression test for each thing NNI does wrong (its number in the docstring),
and what a training script may do with a quantized model."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizer_checks import NoReads, check_exact_resume
from torch import Tensor, nn
from torch.nn.utils import parametrize

import quantkern.functional as F
from quantkern import reference
from quantkern.current_range import WeightFakeQuant
from quantkern.quantizers import NaiveQuantizer, QAT_Quantizer

EVERY = {"quant_types": ["weight", "input", "output"], "quant_bits": 8}
EVERY_LAYER = [{**EVERY, "op_types": ["Conv2d", "Linear"]}]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.bn(self.conv(x))).flatten(1))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(seed: int = 0, size: int = 4) -> Tensor:
    return torch.randn(size, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def rule(kinds: str, layer: str, bits: int = 8, **more: Any) -> list[dict[str, Any]]:
    return [{"quant_types": kinds.split(), "quant_bits": bits, "op_names": [layer], **more}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None, seeds: range) -> list[Tensor]:
    model.train()
    outputs = []
    for seed in seeds:
        if optimizer is not None:
            optimizer.zero_grad()
        output = model(batch(seed))
        output.square().mean().backward()
        if optimizer is not None:
            optimizer.step()
        outputs.append(output.detach())
    return outputs


# ---------------------------------------------------------------- what NNI's QAT and Naive quantizers do wrong


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_gradients_pass_unchanged_during_the_delay(with_optimizer: bool) -> None:
    """D1: NNI's gradients upstream of a delayed tensor are zero."""
    model, floating = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if with_optimizer else None
    rules = [{**EVERY, "op_types": ["Conv2d", "Linear"], "quant_start_step": 2}]
    QAT_Quantizer(model, rules + rule("output", "relu", quant_start_step=2), optimizer)
    twin_optimizer = torch.optim.SGD(floating.parameters(), lr=0.1) if with_optimizer else None
    for seed in range(2):
        quantized_output = train(model, optimizer, range(seed, seed + 1))
        float_output = train(floating, twin_optimizer, range(seed, seed + 1))
        assert torch.equal(quantized_output[0], float_output[0])
        gradients = {name: parameter.grad for name, parameter in floating.named_parameters()}
        assert torch.equal(model.conv.parametrizations.weight.original.grad, gradients["conv.weight"])
        assert torch.equal(model.fc.parametrizations.weight.original.grad, gradients["fc.weight"])
        assert gradients["conv.weight"].abs().max() > 0
    assert not torch.equal(train(model, None, range(2, 3))[0], train(floating, None, range(2, 3))[0])


def test_evaluation_during_the_delay_is_float() -> None:
    """D5: NNI returns 0 or NaN."""
    model, floating = net(), net()
    QAT_Quantizer(model, [{**EVERY, "op_types": ["Conv2d", "Linear"], "quant_start_step": 3}])
    train(model, None, range(1))
    train(floating, None, range(1))
    assert torch.equal(model.eval()(batch(9)), floating.eval()(batch(9)))


def test_evaluation_before_any_training_is_float_with_one_warning_a_tensor() -> None:
    """D5"""
    model, floating = net().eval(), net().eval()
    QAT_Quantizer(model, rule("input output", "conv"))
    with pytest.warns(UserWarning, match="conv.input has no range yet and stays float") as found:
        assert torch.equal(model(batch()), floating(batch()))
    assert sum("has no range yet" in str(entry.message) for entry in found) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(batch())
        train(model, None, range(1))
        assert not torch.equal(model.eval()(batch()), floating(batch()))


@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_channel_symmetric"])
@pytest.mark.parametrize("dtype", ["int", "uint"])
def test_all_zero_tensors_stay_zero(scheme: str, dtype: str) -> None:
    """D6: NNI divides 0 by 0."""
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    QAT_Quantizer(model, rule("weight input output", "0", quant_scheme=scheme, quant_dtype=dtype))
    output = model(torch.zeros(4, 3))
    output.sum().backward()
    assert torch.equal(output, torch.zeros(4, 2))
    assert torch.equal(model.eval()(torch.zeros(4, 3)), torch.zeros(4, 2))
    assert model[0].parametrizations.weight.original.grad.isfinite().all()


def test_batch_norm_stays_where_the_weight_is_not_quantized() -> None:
    """D7: NNI drops it."""
    model, floating = net(), net()
    QAT_Quantizer(model, rule("output", "relu"), dummy_input=batch())
    train(model, None, range(1))
    train(floating, None, range(1))
    assert torch.equal(model.bn.running_mean, floating.bn.running_mean)
    assert model.bn.running_mean.abs().max() > 0


def test_naive_rounds_to_nearest_even_without_bias() -> None:
    """D8: NNI truncates toward zero."""
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.7, -0.5, -1.5, -2.7, -126.7]])
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    NaiveQuantizer(model)
    assert model[0].weight.tolist() == [[127.0, 0.0, 2.0, 3.0, -0.0, -2.0, -3.0, -127.0]]


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


def test_per_channel_activations_are_exported_whole(tmp_path: Path) -> None:
    """D15: NNI raises, and exports no scale."""
    model = net()
    quantizer = QAT_Quantizer(model, [{**EVERY, "op_names": ["conv"], "quant_scheme": "per_channel_symmetric"}])
    train(model, None, range(1))
    entry = quantizer.export_model(tmp_path / "model.pt", tmp_path / "calibration.pt")["conv"]
    assert {len(entry[key]) for key in ("tracked_min_output", "tracked_max_output", "output_scale")} == {4}
    assert entry["output_zero_point"] == [127] * 4
    assert entry["weight_scale"].shape == entry["weight_zero_point"].shape == (4,)
    assert len(entry["tracked_min_input"]) == 1
    for kind in ("weight", "input", "output"):
        settings = [entry[f"{kind}_{key}"] for key in ("bits", "dtype", "scheme", "qmin", "qmax")]
        assert settings == [8, "uint", "per_channel_symmetric", 0, 255]
    assert [entry[f"{kind}_axis"] for kind in ("weight", "input", "output")] == [0, 1, 1]
    with torch.no_grad():
        output = copy.deepcopy(model).conv(batch(0))
    assert entry["tracked_max_output"] == pytest.approx(output.amax((0, 2, 3)).tolist(), abs=0.1)


def test_the_backward_leaves_the_incoming_gradient_alone() -> None:
    """L1: NNI edits it in place."""
    model = nn.Sequential(nn.ReLU())
    QAT_Quantizer(model, rule("output", "0", 2))
    x = torch.linspace(-4, 4, 50, requires_grad=True)
    model(x.detach() * 0.1)
    output = model(x)
    incoming = torch.linspace(1, 2, 50)
    kept = incoming.clone()
    (gradient,) = torch.autograd.grad(output, x, incoming)
    assert torch.equal(incoming, kept)
    assert (gradient == 0).any() and (gradient != 0).any()


def test_a_shared_module_keeps_the_range_of_each_call() -> None:
    """L2: NNI's backward sees the range of the last call."""
    shared = nn.Identity()
    model = nn.Sequential(shared)
    QAT_Quantizer(model, rule("output", "0", 4, ema_decay=0.5))
    small = torch.linspace(-1, 1, 41, requires_grad=True)
    large = torch.linspace(-9, 9, 41, requires_grad=True)
    state = [torch.tensor(v) for v in (float("inf"), -float("inf"), 1.0)]
    low, high, scale = state
    zero_point, on = torch.zeros((), dtype=torch.int32), torch.tensor(True)
    expected = []
    for x in (large, small):
        y = F.fake_quantize_activation(x, low, high, scale, zero_point, on, 0, 15, False, 0.5)
        expected += torch.autograd.grad(y.sum(), x)
    first, second = shared(large), shared(small)
    assert [*map(torch.Tensor.tolist, torch.autograd.grad(first.sum() + second.sum(), (large, small)))] == [
        gradient.tolist() for gradient in expected
    ]


def test_unsigned_symmetric_convention() -> None:
    """L3: zero point 127 and scale absmax / 127.5, as NNI."""
    model = nn.Sequential(nn.Linear(4, 2))
    QAT_Quantizer(model, rule("weight", "0", quant_scheme="per_tensor_symmetric", quant_dtype="uint"))
    largest = model[0].parametrizations.weight.original.detach().abs().max()
    _ = model[0].weight
    assert model[0].parametrizations.weight[0].zero_point.item() == 127
    assert torch.equal(model[0].parametrizations.weight[0].scale, largest / 127.5)


def test_channel_axis_of_sequences() -> None:
    """L5: NNI takes axis 1 whatever it is; a Linear of 3-d tensors is skipped and then fails."""
    model = nn.Sequential(nn.Linear(5, 3))
    QAT_Quantizer(model, rule("input output", "0", quant_scheme="per_channel_affine", axis=-1))
    x = torch.randn(2, 7, 5)
    model(x)
    assert torch.equal(model[0].quantkern.input.running_max, x.amax((0, 1)) * 0.99 + x.amax((0, 1)) * 0.01)
    assert model[0].quantkern.output.scale.shape == (3,)
    model = nn.Sequential(nn.Linear(5, 3))
    QAT_Quantizer(model, rule("input output", "0", quant_scheme="per_channel_affine"))
    model(x)
    assert model[0].quantkern.input.scale.shape == model[0].quantkern.output.scale.shape == (7,)
    with pytest.raises(ValueError, match=r"0.input: a tensor of shape \[2, 6, 5\] has 6 channels on axis 1.*had 7"):
        model(torch.randn(2, 6, 5))


def test_axis_out_of_range_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    QAT_Quantizer(model, rule("output", "0", quant_scheme="per_channel_affine", axis=3))
    with pytest.raises(ValueError, match=r"0.output: axis 3 is out of range for a tensor of shape \[2, 3\]"):
        model(torch.randn(2, 5))


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_dummy_input_is_optional_takes_every_form_and_leaves_no_trace(kind: str) -> None:
    """L6, L7: mandatory in NNI, which calls model(tuple), with gradients, on a copy of the model."""

    class Uncopied(Net):
        def __deepcopy__(self, memo: object) -> Uncopied:
            raise AssertionError("the model was copied")

    model = Uncopied()
    model.bn.eval()
    before = model.bn.running_mean.clone()
    dummy = {"tensor": batch(), "tuple": (batch(),), "dict": {"x": batch()}}[kind]
    rules = [{**EVERY, "op_types": ["Conv2d", "ReLU"], "quant_types": ["output"], "quant_scheme": "per_channel_affine"}]
    QAT_Quantizer(model, rules, dummy_input=dummy)
    assert model.relu.quantkern.output.scale.shape == (4,)
    assert not model.relu.quantkern.output.is_observed()
    assert torch.equal(model.bn.running_mean, before)
    assert [name for name, module in model.named_children() if not module.training] == ["bn"]
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 4  # ranges, layers
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_dummy_input_that_does_not_fit_is_an_error_and_the_model_is_untouched() -> None:
    model = net()
    with pytest.raises(ValueError, match="the model does not run on dummy_input.*Expected a tensor, a tuple"):
        QAT_Quantizer(model, EVERY_LAYER, dummy_input=torch.randn(3, 3))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training and not parametrize.is_parametrized(model.conv)


def test_keyword_arguments_and_several_inputs() -> None:
    """L9: NNI's layers take one positional tensor."""

    class Mix(nn.Module):
        def forward(self, a: Tensor, b: Tensor, *, scale: Tensor | None = None, flag: bool = False) -> Tensor:
            return a + b if scale is None else (a + b) * scale

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = Mix()

        def forward(self, a: Tensor, b: Tensor, **more: Any) -> Tensor:
            return self.mix(a, b=b, **more)

    model = Outer()
    quantizer = QAT_Quantizer(model, rule("input", "mix", 2))
    assert [name for name, _ in model.mix.quantkern.named_children()] == ["input", "input_1"]
    a, b = torch.linspace(0, 3, 31), torch.linspace(-6, 6, 31)
    output = quantizer(a, b=b, scale=torch.tensor(0.5), flag=True)
    assert [name for name, _ in model.mix.quantkern.named_children()] == ["input", "input_1", "input_scale"]
    grids = [reference.fake_quantize_weight(x, 0, 3, False)[0] for x in (a, b, torch.tensor(0.5))]
    assert torch.equal(output, (grids[0] + grids[1]) * grids[2])
    integers = torch.arange(3)
    assert torch.equal(model(integers, b=integers), integers + integers)


def test_lists_of_inputs_and_structured_outputs() -> None:
    """L9"""
    Pair = namedtuple("Pair", ["left", "right"])

    class Structured(nn.Module):
        def forward(self, parts: list[Tensor]) -> dict[str, Any]:
            return {"sum": sum(parts), "index": torch.arange(2), "pair": Pair(parts[0], None), "rest": (parts[1], 3)}

    model = nn.Sequential(Structured())
    QAT_Quantizer(model, rule("input output", "0", 3))
    found = model([torch.linspace(-1, 1, 20), torch.linspace(-2, 4, 20)])
    assert [name for name, _ in model[0].quantkern.named_children()] == [
        *("input", "output", "input_item1", "output_1", "output_2")
    ]
    assert found["index"].tolist() == [0, 1] and found["rest"][1] == 3 and found["pair"].right is None
    assert type(found["pair"]) is Pair
    assert found["rest"][0].unique().numel() <= 8 and found["pair"].left.unique().numel() <= 8


def test_layers_of_torch_with_several_tensors() -> None:
    """L9, L11: bilinear layers, LSTMs, attention, embeddings, leaky rectifiers."""
    torch.manual_seed(0)
    model = nn.ModuleDict({
        "bilinear": nn.Bilinear(3, 4, 2), "lstm": nn.LSTM(3, 4), "attention": nn.MultiheadAttention(4, 2),
        "embedding": nn.Embedding(5, 3), "leaky": nn.LeakyReLU(), "prelu": nn.PReLU(),
    })  # fmt: skip
    QAT_Quantizer(
        model,
        [
            {**EVERY, "op_types": ["Bilinear", "Embedding", "PReLU"]},
            {
                "quant_types": ["input", "output"],
                "quant_bits": 8,
                "op_types": ["LSTM", "LeakyReLU", "MultiheadAttention"],
            },
        ],
    )
    model["bilinear"](torch.randn(2, 3), torch.randn(2, 4)).sum().backward()
    output, (hidden, cell) = model["lstm"](torch.randn(5, 2, 3))
    output, weights = model["attention"](output, hidden, cell)
    model["leaky"](model["prelu"](output)).sum().backward()
    model["embedding"](torch.tensor([1, 4])).sum().backward()
    children = {name: {child for child, _ in module.quantkern.named_children()} for name, module in model.items()}
    assert children["bilinear"] == {"input", "input_1", "output"}
    assert children["attention"] == {"input", "input_1", "input_2", "output", "output_1"}
    assert children["lstm"] == {"input", "output", "output_1", "output_2"}
    assert not model["embedding"].quantkern.input.is_observed() and model["embedding"].quantkern.output.is_observed()
    assert model["bilinear"].parametrizations.weight.original.grad.abs().max() > 0


def test_a_quantized_sequential_still_runs() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    QAT_Quantizer(model, rule("output", "0", 2))
    assert model(torch.randn(9, 3)).unique().numel() <= 4


def test_the_optimizer_keeps_parameters_groups_and_its_step() -> None:
    """L14, L15: NNI adds a second Parameter on the same storage in a new group, and patches optimizer.step."""
    model = net()
    weights = dict(model.named_parameters())
    optimizer = torch.optim.SGD(
        [{"params": [model.conv.weight], "lr": 0.1, "weight_decay": 0.5}, {"params": [model.fc.weight]}], lr=0.01
    )
    step = optimizer.step
    groups = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    QAT_Quantizer(model, [{**EVERY, "op_types": ["Conv2d", "Linear"], "quant_start_step": 1}], optimizer)
    assert [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups] == groups
    assert optimizer.step == step and "step" not in vars(optimizer)
    assert model.conv.parametrizations.weight.original is weights["conv.weight"]
    assert {id(parameter) for parameter in model.parameters()} == {id(parameter) for parameter in weights.values()}
    before = weights["conv.weight"].detach().clone()
    train(model, optimizer, range(1))
    expected = before - 0.1 * (weights["conv.weight"].grad + 0.5 * before)
    assert torch.allclose(weights["conv.weight"], expected, atol=1e-7)


def test_the_optimizer_counts_steps_and_forwards_do_not() -> None:
    """L15"""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rules = [{**EVERY, "op_types": ["Conv2d"], "quant_start_step": 5}, *rule("output", "relu", quant_start_step=2)]
    quantizer = QAT_Quantizer(model, rules, optimizer)
    for _ in range(3):
        model(batch()).sum().backward()
    optimizer.step()
    optimizer.step()
    counters = [model.conv.parametrizations.weight[0].step, model.conv.quantkern.input.step]
    counters += [model.conv.quantkern.output.step, model.relu.quantkern.output.step]
    assert [counter.item() for counter in counters] == [2] * 4
    assert quantizer.compress() is model
    dropped = net()
    optimizer = torch.optim.SGD(dropped.parameters(), lr=0.1)
    QAT_Quantizer(dropped, rules, optimizer)
    train(dropped, optimizer, range(3))
    assert dropped.relu.quantkern.output.step.item() == 3


def test_without_an_optimizer_training_forwards_count() -> None:
    model = net()
    QAT_Quantizer(model, rule("weight output", "conv", quant_start_step=2))
    train(model, None, range(1))
    model.eval()(batch())
    model.train()
    model(batch())
    assert model.conv.quantkern.output.step.item() == model.conv.parametrizations.weight[0].step.item() == 2
    weight = model.conv.parametrizations.weight.original
    assert not torch.equal(model.conv.weight, weight)


def test_the_state_holds_each_weight_once() -> None:
    """L16: NNI stores weights twice and DistributedDataParallel sends them at every forward."""
    model, floating = net(), net()
    QAT_Quantizer(model, EVERY_LAYER)
    floats = sum(parameter.numel() for parameter in floating.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == floats
    extra = {name: buffer.numel() for name, buffer in model.named_buffers() if "bn" not in name}
    assert max(extra.values()) == 1


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


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_channel_symmetric"])
@pytest.mark.parametrize("dtype", ["int", "uint"])
def test_training_and_evaluation_equal_the_reference(scheme: str, dtype: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in model.parameters())
    rules = rule("weight input output", "0", 4, quant_scheme=scheme, quant_dtype=dtype, ema_decay=0.7)
    QAT_Quantizer(model, rules)
    channel = scheme.startswith("per_channel")
    low, high = (0, 15) if dtype == "uint" else (-7, 7)
    symmetric, axis = scheme.endswith("symmetric"), 1 if channel else None
    state = {name: [torch.full((size,) if channel else (), value) for value in (float("inf"), -float("inf"), 1.0, 0.0)]
             for name, size in (("input", 6), ("output", 4))}  # fmt: skip
    for seed in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
        q, *state["input"] = reference.fake_quantize_activation(
            x, *state["input"], low, high, symmetric, 0.7, axis, observing=True
        )
        w, scale, zero_point = reference.fake_quantize_weight(weight, low, high, symmetric, 0 if channel else None)
        expected = torch.nn.functional.linear(q, w, bias)
        expected, *state["output"] = reference.fake_quantize_activation(
            expected, *state["output"], low, high, symmetric, 0.7, axis, observing=True
        )
        output = model(x)
        assert torch.equal(output, expected)
        expected.square().sum().backward()
        output.square().sum().backward()
        assert torch.equal(model[0].parametrizations.weight.original.grad, weight.grad)
        assert torch.equal(model[0].bias.grad, bias.grad)
    x = torch.randn(8, 6)
    hidden = reference.fake_quantize(x, *state["input"][2:], low, high, axis)
    hidden = torch.nn.functional.linear(hidden, reference.fake_quantize_weight(
        weight, low, high, symmetric, 0 if channel else None)[0], bias)  # fmt: skip
    expected = reference.fake_quantize(hidden, *state["output"][2:], low, high, axis)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert torch.equal(model.eval()(x), expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_freezing_ranges() -> None:
    model = net()
    quantizer = QAT_Quantizer(model, EVERY_LAYER)
    train(model, None, range(1))
    frozen = model.conv.quantkern.input.running_max.clone()
    quantizer.freeze_ranges()
    model(batch(1) * 5)
    assert torch.equal(model.conv.quantkern.input.running_max, frozen)
    quantizer.freeze_ranges(False)
    model(batch(1) * 5)
    assert model.conv.quantkern.input.running_max > frozen


def test_gradients_accumulate_over_micro_batches() -> None:
    """The weight's gradient over two calls is the sum of theirs; only the activation ranges move in between."""
    model = net()
    QAT_Quantizer(model, [{"quant_types": ["weight"], "quant_bits": 4, "op_types": ["default"]}])
    model.bn.eval()
    weight = model.conv.parametrizations.weight.original
    gradients = []
    for seed in range(2):
        model.zero_grad()
        model(batch(seed)).square().sum().backward()
        gradients.append(weight.grad.clone())
    model.zero_grad()
    for seed in range(2):
        model(batch(seed)).square().sum().backward()
    assert torch.allclose(weight.grad, gradients[0] + gradients[1], rtol=1e-5)


# ---------------------------------------------------------------- living with a quantized model


def test_resuming_from_a_state_dict_is_exact() -> None:
    rules = [{**EVERY, "op_types": ["Conv2d", "Linear"], "quant_start_step": 2}]
    rules += rule("output", "relu", quant_scheme="per_channel_affine")

    check_exact_resume(net, lambda model, optimizer: QAT_Quantizer(model, rules, optimizer), train, 2, 3)


def test_a_state_dict_brings_quantizers_made_on_first_use_and_unknown_sizes() -> None:
    class Outputs(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x * 2

    rules = rule("input output", "0", quant_scheme="per_channel_affine")
    trained, fresh = (nn.Sequential(Outputs()) for _ in range(2))
    for model in (trained, fresh):
        QAT_Quantizer(model, rules)
    trained(torch.randn(2, 6))
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert fresh[0].quantkern.output_1.scale.shape == (6,)
    x = torch.randn(3, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fresh.eval()(x)[1], trained.eval()(x)[1])


def test_copies_live_on_their_own(tmp_path: Path) -> None:
    model = net()
    quantizer = QAT_Quantizer(model, [{**EVERY, "op_types": ["Conv2d", "Linear"], "quant_start_step": 1}])
    train(model, None, range(2))
    twin, whole = copy.deepcopy(model), copy.deepcopy(quantizer)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    train(twin, None, range(2))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert twin.conv.quantkern.input.step.item() == 4
    expected = copy.deepcopy(twin).eval()(batch(5))
    quantizer.export_model(tmp_path / "model.pt")
    assert torch.equal(twin.eval()(batch(5)), expected)
    assert "Parametrized" in type(whole.bound_model.conv).__name__
    whole.export_model(tmp_path / "copy.pt")
    assert type(whole.bound_model.conv) is nn.Conv2d
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("model.pt", "copy.pt"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_models_with_quantized_activations_pickle() -> None:
    """torch does not pickle parametrized modules; a model without quantized weights pickles."""
    model = net()
    QAT_Quantizer(model, [{**EVERY, "quant_types": ["input", "output"], "op_types": ["Conv2d", "ReLU"]}])
    train(model, None, range(1))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.eval()(batch(3)), model.eval()(batch(3)))


def test_the_quantizer_is_the_model() -> None:
    model = net()
    quantizer = QAT_Quantizer(model, EVERY_LAYER)
    assert quantizer.compress() is quantizer.compress() is quantizer.bound_model is model
    assert {id(parameter) for parameter in quantizer.parameters()} == {
        id(parameter) for parameter in model.parameters()
    }
    quantizer.eval()
    assert not model.training and not model.conv.quantkern.input.training
    quantizer.train()
    assert torch.equal(quantizer(x=batch()), copy.deepcopy(model)(batch()))
    wrapped = nn.DataParallel(net())
    assert QAT_Quantizer(wrapped, EVERY_LAYER).compress() is wrapped.module


def test_half_and_double_models_keep_float32_state() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model = net()
        QAT_Quantizer(model, EVERY_LAYER)
        train(model, None, range(1))
        before = model.conv.quantkern.input.running_max.clone()
        model.to(dtype)
        assert model.conv.quantkern.input.running_max.dtype is torch.float32
        assert torch.equal(model.conv.quantkern.input.running_max, before)
        output = model(batch().to(dtype))
        output.sum().backward()
        assert output.dtype is dtype and model.conv.parametrizations.weight.original.grad.dtype is dtype
        assert model.eval()(batch().to(dtype)).isfinite().all()


def test_autocast() -> None:
    model = net()
    QAT_Quantizer(model, EVERY_LAYER)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch())
    output.float().sum().backward()
    assert output.dtype is torch.bfloat16
    assert model.conv.parametrizations.weight.original.grad.isfinite().all()
    assert model.fc.quantkern.output.is_observed()


def test_a_training_step_never_waits_for_the_device() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rules = [{**EVERY, "op_types": ["Conv2d", "Linear"], "quant_start_step": 1}]
    rules += rule("output", "relu", quant_scheme="per_channel_affine")
    QAT_Quantizer(model, rules, optimizer, dummy_input=(batch(),))
    with NoReads():
        train(model, optimizer, range(3))
    model.eval()
    with NoReads():
        model(batch())
    with pytest.raises(AssertionError, match="read back"), NoReads():
        model.conv.quantkern.input.is_observed()


@pytest.mark.parametrize("delayed", [False, True])
def test_compiled_training_equals_eager(delayed: bool) -> None:
    rules = [{**EVERY, "op_types": ["Conv2d", "Linear"], "quant_start_step": int(delayed)}]
    rules += rule("output", "relu", quant_scheme="per_channel_affine", quant_bits=4)
    eager, compiled = net(), net()
    for model in (eager, compiled):
        QAT_Quantizer(model, rules, dummy_input=batch())
    torch._dynamo.reset()
    fast = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        for model, call in ((eager, eager), (compiled, fast)):
            model.train()
            model.zero_grad()
            output = call(batch(seed))
            output.square().mean().backward()
            model.last = output.detach()
        assert torch.equal(eager.last, compiled.last)
        for (name, mine), theirs in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad), name
    state = compiled.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in eager.state_dict().items())
    assert torch.equal(fast.eval()(batch(8)), eager.eval()(batch(8)))


def test_other_parametrizations_of_a_weight_survive(tmp_path: Path) -> None:
    model, plain = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
    for candidate in (model, plain):
        nn.utils.parametrizations.weight_norm(candidate[0])
    keys = list(plain.state_dict())
    quantizer = QAT_Quantizer(model, rule("weight", "0", 2))
    assert model[0].weight.unique().numel() <= 4
    quantizer.export_model(tmp_path / "model.pt")
    assert list(model.state_dict()) == keys and model[0].weight.unique().numel() > 4

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    model = nn.Sequential(nn.Linear(3, 2))
    parametrize.register_parametrization(model[0], "bias", Half())
    weight = model[0].weight
    quantizer = QAT_Quantizer(model, rule("weight", "0", 2))
    quantizer.export_model(tmp_path / "model.pt")
    assert model[0].weight is weight and parametrize.is_parametrized(model[0], "bias")
    assert torch.equal(model[0].bias, model[0].parametrizations.bias.original / 2)


def test_tied_weights_and_shared_modules(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight
            self.alias = self.head

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(self.embedding(x)) + self.head(self.embedding(x))

    model = Tied()
    quantizer = QAT_Quantizer(model, [{**EVERY, "quant_types": ["weight", "output"], "op_types": ["default"]}])
    model(torch.tensor([1, 2])).sum().backward()
    assert len(list(model.parameters())) == 1
    calibration = quantizer.export_model(tmp_path / "model.pt")
    assert list(calibration) == ["embedding", "head"]
    assert model.head.weight is model.embedding.weight and model.alias is model.head
    Tied().load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)


def test_assigning_a_weight_sets_the_float_weight() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    QAT_Quantizer(model, rule("weight", "0"))
    model[0].weight = torch.full((2, 3), 0.5)
    assert torch.equal(model[0].parametrizations.weight.original, torch.full((2, 3), 0.5))
    assert isinstance(model[0].parametrizations.weight[0], WeightFakeQuant)


# ---------------------------------------------------------------- bad input


def test_wrong_constructor_arguments() -> None:
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer or None, got Tensor"):
        QAT_Quantizer(net(), EVERY_LAYER, batch())
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        QAT_Quantizer([net()], EVERY_LAYER)  # type: ignore[arg-type]


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

    def fail_at_second(value: object, path: Path) -> None:
        Path(path).write_text("half")
        saved.append(path)
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
    with pytest.raises(TypeError, match="calibration_config must be a dict of layer name -> dict, got str"):
        quantizer.load_calibration_config("calibration.pt")  # type: ignore[arg-type]


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


def test_a_quantizer_made_later_has_counted_the_same_steps() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    QAT_Quantizer(model, rule("output", "0", quant_start_step=2))
    model[0].quantkern.output.step.fill_(7)
    model(torch.randn(2, 3))
    assert {name: child.step.item() for name, child in model[0].quantkern.named_children()} == {
        "output": 8,
        "output_1": 8,
        "output_2": 8,
    }
