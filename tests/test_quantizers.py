"""NaiveQuantizer and QAT_Quantizer: one regression test for each thing NNI does wrong (its number in the docstring),
and what a training script may do with a quantized model."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from quantizer_checks import check_exact_resume
from small_quantized_net import EVERY, EVERY_LAYER, batch, net, rule, train
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantkern.current_range import WeightFakeQuant
from quantkern.quantizers import QAT_Quantizer


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


def test_the_state_holds_each_weight_once() -> None:
    """L16: NNI stores weights twice and DistributedDataParallel sends them at every forward."""
    model, floating = net(), net()
    QAT_Quantizer(model, EVERY_LAYER)
    floats = sum(parameter.numel() for parameter in floating.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == floats
    extra = {name: buffer.numel() for name, buffer in model.named_buffers() if "bn" not in name}
    assert max(extra.values()) == 1


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


def test_wrong_constructor_arguments() -> None:
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer or None, got Tensor"):
        QAT_Quantizer(net(), EVERY_LAYER, batch())
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        QAT_Quantizer([net()], EVERY_LAYER)  # type: ignore[arg-type]


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
