"""The scales that LsqQuantizer learns: where they start, that they stay positive, how they reach the optimizer."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from lsq_models import LAYERS, linear
from quantizer_checks import same_state, state_of
from small_quantized_net import batch, net, rule, train
from torch import Tensor, nn

from quantkern import reference
from quantkern.learned.initial_scale import initial_scale
from quantkern.learned.state import LearnedState
from quantkern.quantizers import LsqQuantizer

# ---------------------------------------------------------------- where scales start


def test_scales_start_as_in_the_paper_on_the_tensors_really_quantized() -> None:
    """D13: NNI takes a weight that is not the one it quantizes, and always a signed range for activations (D11)."""
    layer, _ = linear("weight input output", 4)
    weight = layer.parametrizations.weight.original
    with torch.no_grad():
        weight.mul_(3)
    x = torch.rand(9, 6)
    layer(x)
    own = layer.parametrizations.weight[0]
    torch.testing.assert_close(own.scale, 2 * weight.detach().abs().mean() / math.sqrt(7))
    assert own.spec.quant_range == (-8, 7)
    first = layer.quantkern.input
    assert first.spec.quant_range == (0, 15) and not first.signed
    torch.testing.assert_close(first.scale, 2 * x.mean() / math.sqrt(15))
    output = layer.quantkern.output
    assert output.spec.quant_range == (-8, 7) and output.signed
    quantized = reference.quantize(x, first.scale, torch.zeros(()), 0, 15)[0].detach()
    hidden = nn.functional.linear(quantized, layer.weight, layer.bias).detach()
    torch.testing.assert_close(output.scale, 2 * hidden.abs().mean() / math.sqrt(7))


@pytest.mark.parametrize(
    ("more", "quant_range"),
    [
        ({}, (0, 15)),
        ({"signed": True}, (-8, 7)),
        ({"signed": {"output": True}}, (0, 15)),
        ({"quant_dtype": "int"}, (-8, 7)),
        ({"quant_dtype": {"input": "int"}, "signed": False}, (-8, 7)),
        ({"offset": True}, (0, 15)),
        ({"offset": {"input": True}, "quant_dtype": "int"}, (-8, 7)),
    ],
)
def test_ranges_of_inputs(more: dict[str, Any], quant_range: tuple[int, int]) -> None:
    """D11"""
    layer, _ = linear("input", 4, **more)
    layer(torch.rand(9, 6))
    assert layer.quantkern.input.spec.quant_range == quant_range


def test_a_negative_value_later_does_not_change_the_range() -> None:
    layer, _ = linear("input")
    layer(torch.rand(4, 6))
    layer(torch.randn(4, 6))
    assert layer.quantkern.input.spec.quant_range == (0, 15)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_initial_scales(axis: int | None, symmetric: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 50) * torch.tensor([0.1, 1, 2, 5]).reshape(4, 1)
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)

    def error(grid: tuple[Tensor, Tensor]) -> Tensor:
        return (reference.quantize(rows, *grid, low, high, 0)[0] - rows).square().sum(1)

    low, high = (-4, 3) if symmetric else (0, 7)
    by_range = initial_scale(x, low, high, axis, "minmax", symmetric)
    best = initial_scale(x, low, high, axis, "mse", symmetric)
    paper = initial_scale(x, low, high, axis, "paper", symmetric)
    assert (error(best) < error(by_range)).all()
    if symmetric:
        assert (error(best) <= error(paper) * 1.05).all()
        expected = torch.maximum(rows.amax(1) / 3, rows.amin(1) / -4)
        assert torch.equal(by_range[0], expected) and not by_range[1].any()
        torch.testing.assert_close(paper[0], 2 * rows.abs().mean(1) / math.sqrt(3))
    else:
        assert torch.equal(paper[0], by_range[0]) and torch.equal(paper[1], by_range[1])
        assert by_range[1].min() > 0
    dirty = torch.cat([x, torch.full((3, 4, 1), torch.nan), torch.full((3, 4, 1), -torch.inf)], 2)
    for clean, method in ((by_range, "minmax"), (paper, "paper")):
        torch.testing.assert_close(initial_scale(dirty, low, high, axis, method, symmetric), clean)


@pytest.mark.parametrize("init", ["paper", "minmax", "mse"])
def test_choices_of_init(init: str) -> None:
    layer, _ = linear("weight input", 3, init=init, signed=True)
    x = torch.randn(20, 6)
    layer(x)
    weight = layer.parametrizations.weight
    assert torch.equal(weight[0].scale.detach(), initial_scale(weight.original, -4, 3, None, init)[0][0])
    assert torch.equal(layer.quantkern.input.scale.detach(), initial_scale(x, -4, 3, None, init)[0][0])


def test_a_dead_channel_gets_the_scale_of_the_whole_weight() -> None:
    layer, _ = linear("weight", 4, quant_scheme="per_channel_symmetric")
    with torch.no_grad():
        layer.parametrizations.weight.original[2] = 0
    output = layer(torch.randn(3, 6))
    scale = layer.parametrizations.weight[0].scale.detach()
    expected = 2 * layer.parametrizations.weight.original.detach().abs().mean() / math.sqrt(7)
    torch.testing.assert_close(scale[2], expected)
    assert output.isfinite().all()


def test_tensors_of_zeros_leave_the_choice_to_a_later_batch() -> None:
    """D6: a scale of 0 divides by it."""
    layer, _ = linear("weight input")
    with torch.no_grad():
        layer.parametrizations.weight.original.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(layer(torch.zeros(2, 6)), layer.bias.detach().expand(2, 5))
        layer(torch.empty(0, 6))
    assert not layer.quantkern.input.initialized and not layer.parametrizations.weight[0].initialized
    layer(torch.ones(2, 6)).sum().backward()
    assert layer.quantkern.input.initialized and layer.quantkern.input.scale.item() == pytest.approx(2 / 15**0.5)
    assert not layer.parametrizations.weight[0].initialized
    assert layer.parametrizations.weight.original.grad.abs().max() > 0


def test_micro_batches_evaluation_and_copies_do_not_initialise_again() -> None:
    """D12: NNI does so whenever its step counter stands at 1."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    LsqQuantizer(model, LAYERS, optimizer)
    model(batch(0)).sum().backward()
    scales = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("scale")}
    assert len(scales) == 6
    model(batch(1) * 9).sum().backward()
    model.eval()(batch(2) * 9)
    copy.deepcopy(model).train()(batch(3) * 9)
    model.train()(batch(4) * 9)
    for name, scale in scales.items():
        assert torch.equal(model.get_parameter(name), scale), name


def test_the_first_of_two_forwards_can_still_go_backward() -> None:
    model = net()
    LsqQuantizer(model, LAYERS)
    first, second = model(batch(0)), model(batch(1))
    (first.sum() + second.sum()).backward()
    shared = nn.Sequential(nn.Linear(6, 6))
    LsqQuantizer(shared, rule("weight input", "0"))
    shared(shared(torch.randn(2, 6))).sum().backward()
    assert shared[0].quantkern.input.scale.grad.abs() > 0


def test_evaluation_before_any_training_is_float_with_one_warning_a_tensor() -> None:
    """D5"""
    model, floating = net().eval(), net().eval()
    LsqQuantizer(model, rule("weight input", "conv"))
    with pytest.warns(UserWarning, match="has no scale yet and stays float") as found:
        assert torch.equal(model(batch()), floating(batch()))
        model(batch())
    assert sorted(str(entry.message).split()[0] for entry in found) == ["conv.input", "conv.weight"]
    assert not model.conv.quantkern.input.initialized
    train(model, None, range(1))
    assert not torch.equal(model.eval()(batch()), floating(batch()))


@pytest.mark.filterwarnings("ignore:.*has no scale yet")
@pytest.mark.parametrize("counted", [False, True])
def test_the_delay_is_float_and_scales_start_after_it(counted: bool) -> None:
    """D1"""
    model, floating = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin_optimizer = torch.optim.SGD(floating.parameters(), lr=0.1)
    LsqQuantizer(model, [{**LAYERS[0], "quant_start_step": 2}], optimizer if counted else None)
    for seed in range(2):
        outputs = train(model, optimizer, range(seed, seed + 1))
        assert torch.equal(outputs[0], train(floating, twin_optimizer, range(seed, seed + 1))[0])
        assert torch.equal(model.eval()(batch(8)), floating.eval()(batch(8)))
    assert not any(m.initialized for m in model.modules() if isinstance(m, LearnedState))
    weight = model.conv.parametrizations.weight.original.detach().clone()
    assert not torch.equal(train(model, optimizer, range(2, 3))[0], train(floating, twin_optimizer, range(2, 3))[0])
    own = model.conv.parametrizations.weight[0]
    assert torch.equal(own.floor, initial_scale(weight, -8, 7)[0][0] * 1e-3)
    assert all(m.initialized for m in model.modules() if isinstance(m, LearnedState))


# ---------------------------------------------------------------- scales stay positive


@pytest.mark.parametrize("value", [0.0, -5.0])
def test_scales_stay_positive_and_recover(value: float) -> None:
    layer, quantizer = linear("weight input", 4, signed=True)
    x = torch.randn(8, 6)
    layer(x)
    scales = list(quantizer.scale_parameters())
    floors = [scale.detach() * 1e-3 for scale in scales]
    optimizer = torch.optim.SGD(scales, lr=1.0)
    with torch.no_grad():
        for scale in scales:
            scale.fill_(value)
    layer.eval()
    assert layer(x).isfinite().all()
    assert all(scale.item() == value for scale in scales)  # evaluation changes nothing
    layer.train()
    output = layer(x)
    assert output.isfinite().all()
    assert [scale.item() for scale in scales] == [floor.item() for floor in floors]
    nn.functional.mse_loss(output, nn.functional.linear(x, layer.parametrizations.weight.original)).backward()
    optimizer.step()
    assert all(scale > floor for scale, floor in zip(scales, floors, strict=True))


def test_zero_points_stay_on_the_grid() -> None:
    layer, _ = linear("input", 4, offset=True)
    layer(torch.randn(8, 6))
    zero_point = layer.quantkern.input.zero_point
    with torch.no_grad():
        zero_point.fill_(99.0)
    assert torch.equal(layer.quantkern.input(torch.zeros(3)), torch.zeros(3))
    assert zero_point.item() == 15


# ---------------------------------------------------------------- the optimizer


def test_a_given_optimizer_gets_one_group_without_weight_decay() -> None:
    """L14"""
    model = net()
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [model.conv.weight], "lr": 0.2}, {"params": [model.fc.weight], "lr": 0.3}], weight_decay=0.5
    )
    groups = [(id(group), [id(p) for p in group["params"]], group["lr"]) for group in optimizer.param_groups]
    quantizer = LsqQuantizer(model, LAYERS, optimizer)
    *old, new = optimizer.param_groups
    assert [(id(group), [id(p) for p in group["params"]], group["lr"]) for group in old] == groups
    assert [id(p) for p in new["params"]] == [id(p) for p in quantizer.scale_parameters()]
    assert (len(new["params"]), new["weight_decay"], new["lr"]) == (6, 0.0, 0.2)
    assert old[0]["weight_decay"] == 0.5
    assert model.conv.parametrizations.weight.original is weights["conv.weight"]
    train(model, optimizer, range(2))
    assert len(optimizer.param_groups) == 3 and len(new["params"]) == 6


def test_an_optimizer_built_afterwards_has_the_scales_once() -> None:
    model = net()
    quantizer = LsqQuantizer(model, LAYERS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert {id(p) for p in quantizer.scale_parameters()} <= set(held) and len(held) == len(set(held)) == 12


def test_scales_that_appear_in_the_first_forward_reach_the_optimizer() -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.LSTM(3, 4))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        LsqQuantizer(model, rule("output", "0"), optimizer)
        return model, optimizer

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        output, (hidden, _) = model(torch.linspace(-1, 1, 30).reshape(5, 2, 3))
        (output.square().sum() + hidden.sum()).backward()
        optimizer.step()

    model, optimizer = start()
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 1]
    step(model, optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 3]
    moved = model[0].quantkern.output_1.scale.detach().clone()
    state, optimizer_state = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    step(model, optimizer)
    assert not torch.equal(model[0].quantkern.output_1.scale, moved)
    resumed, resumed_optimizer = start()
    resumed.load_state_dict(state, strict=True)
    resumed_optimizer.load_state_dict(optimizer_state)
    step(resumed, resumed_optimizer)
    assert same_state(state_of(resumed), state_of(model))


def test_an_optimizer_of_another_model_is_an_error_and_nothing_is_changed() -> None:
    model, other = net(), net()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="optimizer holds none of the model's parameters; build it from"):
        LsqQuantizer(model, LAYERS, optimizer)
    assert len(optimizer.param_groups) == 1 and list(model.state_dict()) == keys
    assert not model._load_state_dict_pre_hooks and not optimizer._optimizer_step_pre_hooks


def test_freezing_the_scales() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantizer = LsqQuantizer(model, LAYERS, optimizer)
    train(model, optimizer, range(1))
    quantizer.freeze_ranges()
    before = [scale.detach().clone() for scale in quantizer.scale_parameters()]
    train(model, optimizer, range(1))
    assert all(torch.equal(a, b) for a, b in zip(before, quantizer.scale_parameters(), strict=True))
    quantizer.freeze_ranges(False)
    train(model, optimizer, range(1))
    assert not any(torch.equal(a, b) for a, b in zip(before, quantizer.scale_parameters(), strict=True))
