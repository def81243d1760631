"""LsqQuantizer: one regression test for each thing NNI's does wrong (its number in the docstring), and what a training
script may do with a model whose scales learn."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizer_checks import NoReads, check_exact_resume
from small_quantized_net import EVERY, batch, net, rule, train
from torch import Tensor, nn

from quantkern import reference
from quantkern.config import ConfigError
from quantkern.learned.initial_scale import initial_scale
from quantkern.learned.state import LearnedState
from quantkern.quantizers import LsqQuantizer, QAT_Quantizer
from quantkern.settings import reset_quant_scheme_dtype, set_quant_scheme_dtype

LAYERS = [{**EVERY, "quant_bits": 4, "op_types": ["Conv2d", "Linear"]}]


def linear(quant_types: str, bits: int = 4, **more: Any) -> tuple[nn.Linear, LsqQuantizer]:
    """A model of one linear layer, 6 -> 5."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    quantizer = LsqQuantizer(model, rule(quant_types, "0", bits, **more))
    return model[0], quantizer


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in mine.items())


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_weight_and_every_scale_gets_a_gradient(bits: int) -> None:
    """D3: the gradient of NNI's weights is None."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    quantizer = LsqQuantizer(model, [{**EVERY, "quant_bits": bits, "op_types": ["Conv2d", "Linear"]}], optimizer)
    before = state_of(model)
    train(model, optimizer, range(2))
    for layer in (model.conv, model.fc):
        assert layer.parametrizations.weight.original.grad.abs().max() > 0
    scales = list(quantizer.scale_parameters())
    assert len(scales) == 6 and all(scale.grad.abs() > 0 for scale in scales)
    after = state_of(model)
    assert not any(torch.equal(before[key], after[key]) for key in after if key.endswith(("original", ".scale")))


@pytest.mark.parametrize("scheme", ["per_tensor_symmetric", "per_channel_symmetric"])
@pytest.mark.parametrize("offset", [False, True])
def test_outputs_and_gradients_equal_the_reference(scheme: str, offset: bool) -> None:
    axis = 1 if scheme.startswith("per_channel") else None
    layer, _ = linear("weight input output", 3, quant_scheme=scheme, offset=offset)
    x = torch.randn(7, 6).requires_grad_()
    layer(x)  # initialises
    weight, bias = layer.parametrizations.weight.original, layer.bias
    with torch.no_grad():
        weight.mul_(1.3)
    quants = {"weight": layer.parametrizations.weight[0], **dict(layer.quantkern.named_children())}
    twins = {
        name: [None if p is None else p.detach().clone().requires_grad_() for p in (module.scale, module.zero_point)]
        for name, module in quants.items()
    }

    def quantize(name: str, value: Tensor, low: int, high: int, axis: int | None, count: int) -> Tensor:
        scale, zero_point = twins[name]
        assert quants[name].spec.quant_range == (low, high)
        return reference.lsq(value, scale, low, high, axis, 1 / math.sqrt(count * high), zero_point)

    twin_x, twin_w = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    span = (0, 7) if offset else (-4, 3)
    channel = axis is not None
    hidden = quantize("input", twin_x, *span, axis, 1 if channel else 6)
    w = quantize("weight", twin_w, -4, 3, 0 if channel else None, 6 if channel else 30)
    expected = quantize("output", nn.functional.linear(hidden, w, bias), *span, axis, 1 if channel else 5)
    output = layer(x)
    assert torch.equal(output, expected)
    upstream = torch.linspace(-1, 2, output.numel()).reshape(output.shape)
    x.grad = None
    layer.zero_grad()
    output.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(x.grad, twin_x.grad) and torch.equal(weight.grad, twin_w.grad)
    for name, module in quants.items():
        for mine, theirs in zip((module.scale, module.zero_point), twins[name], strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert (quants["input"].zero_point is None) is (not offset)
    assert quants["weight"].zero_point is None


@pytest.mark.parametrize(
    ("choice", "counts"),
    [("paper", (30, 6, 5)), ("numel", (30, 6 * 8, 5 * 8)), ("none", (None, None, None))],
)
def test_factors_of_the_scale_gradients(choice: str, counts: tuple[int | None, ...]) -> None:
    """2.4: N is the number of weights, or of features without the batch; NNI counts the batch too."""
    layer, _ = linear("weight input output", 4, grad_scale=choice, signed=True)
    one, _ = linear("weight input output", 4, grad_scale="none", signed=True)
    x = torch.randn(8, 6)
    for candidate in (layer, one):
        candidate(x).square().sum().backward()
    for kind, count in zip(("weight", "input", "output"), counts, strict=True):
        mine, plain = (
            (c.parametrizations.weight[0] if kind == "weight" else c.quantkern.get_submodule(kind)).scale.grad
            for c in (layer, one)
        )
        factor = 1.0 if count is None else 1 / math.sqrt(count * 7)
        assert mine.item() == pytest.approx(plain.item() * factor, rel=1e-5)


def test_features_of_images_per_channel_leave_out_batch_and_channels() -> None:
    model = net()
    LsqQuantizer(model, [{**EVERY, "op_types": ["Conv2d"], "quant_scheme": "per_channel_symmetric", "signed": True}])
    quant = model.conv.quantkern.output
    assert quant.grad_scale(torch.empty(32, 4, 5, 7), 1) == 1 / math.sqrt(5 * 7 * 127)
    assert model.conv.parametrizations.weight[0].grad_scale(torch.empty(4, 1, 3, 3), 0) is None


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_half_and_double_models_keep_float32_scales(dtype: torch.dtype) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    quantizer = LsqQuantizer(model, LAYERS, optimizer)
    train(model, optimizer, range(1))
    before = [scale.detach().clone() for scale in quantizer.scale_parameters()]
    held = [id(scale) for scale in quantizer.scale_parameters()]
    model.to(dtype)
    assert [id(scale) for scale in quantizer.scale_parameters()] == held
    for old, new in zip(before, quantizer.scale_parameters(), strict=True):
        assert new.dtype is new.grad.dtype is torch.float32 and torch.equal(old, new)
    optimizer.zero_grad()
    output = model(batch().to(dtype))
    output.sum().backward()
    optimizer.step()
    assert output.dtype is dtype and model.conv.parametrizations.weight.original.grad.dtype is dtype
    assert model.eval()(batch().to(dtype)).isfinite().all()


def test_autocast() -> None:
    model = net()
    quantizer = LsqQuantizer(model, LAYERS)
    with torch.autocast("cpu", torch.bfloat16):
        model(batch())
        output = model(batch())
    output.float().sum().backward()
    assert output.dtype is torch.bfloat16
    assert all(scale.dtype is torch.float32 and scale.grad.isfinite().all() for scale in quantizer.scale_parameters())


def test_a_training_step_never_waits_for_the_device() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rules = [{**LAYERS[0], "quant_start_step": 1}, *rule("output", "relu", quant_scheme="per_channel_affine")]
    LsqQuantizer(model, rules, optimizer)
    train(model, optimizer, range(2))  # the delay, and the first quantized step
    with NoReads():
        train(model, optimizer, range(3))
    model.eval()
    with NoReads():
        model(batch())


@pytest.mark.parametrize("delayed", [False, True])
def test_compiled_training_equals_eager(delayed: bool) -> None:
    rules = [{**LAYERS[0], "quant_start_step": int(delayed)}]
    rules += rule("output", "relu", quant_scheme="per_channel_symmetric", offset=True)
    eager, compiled = net(), net()
    for model in (eager, compiled):
        LsqQuantizer(model, rules)
        train(model, None, range(1 + delayed))
    torch._dynamo.reset()
    fast = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (eager, compiled)]
    with torch.no_grad():  # below the floor: the compiled step must lift it too
        for model in (eager, compiled):
            model.fc.quantkern.input.scale.zero_()
    for seed in range(3):
        (mine,), (theirs,) = train(eager, optimizers[0], [seed]), train(fast, optimizers[1], [seed])
        assert torch.equal(mine, theirs)
        for (name, parameter), twin in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            assert torch.equal(parameter.grad, twin.grad), name
    assert same_state(state_of(eager), state_of(compiled))
    assert eager.fc.quantkern.input.scale > 0
    assert torch.equal(fast.eval()(batch(8)), eager.eval()(batch(8)))


def test_compiling_an_uninitialised_model_says_what_to_do() -> None:
    model = net()
    LsqQuantizer(model, LAYERS)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run one training step before compiling"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(batch())


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


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quant_bits": 1}, r"\['quant_bits'\] is 1, expected an integer from 2 to 16"),
        (
            {"quant_bits": {"weight": 1, "input": 8}},
            r"\['quant_bits'\]\['weight'\] is 1, expected an integer from 2 to 16",
        ),
        ({"init": "papr"}, r"\['init'\] is 'papr', expected one of 'paper', 'minmax', 'mse'"),
        ({"grad_scale": 1.0}, r"\['grad_scale'\] is 1.0, expected one of 'paper', 'numel', 'none'"),
        ({"signed": 1}, r"\['signed'\] is 1, expected one of 'auto', True, False"),
        ({"offset": {"input": "yes"}}, r"\['offset'\]\['input'\] is 'yes', expected one of True, False"),
        ({"quant_dtype": "uint"}, "quant_dtype of 'weight' is 'uint', expected 'int'"),
        (
            {"quant_scheme": "per_channel_affine"},
            "quant_scheme of 'weight' is 'per_channel_affine', expected a symmetric",
        ),
        ({"ema_decay": 0.9}, "unknown key 'ema_decay'"),
        ({"ofset": True}, "unknown key 'ofset'; did you mean 'offset'?"),
        ({"quant_types": ["gradient"]}, r"only entries out of \['input', 'weight', 'output'\]"),
    ],
)
def test_wrong_rules(more: dict[str, Any], message: str) -> None:
    """D11, L12"""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=message):
        LsqQuantizer(
            model, [{"quant_types": ["weight", "input"], "quant_bits": 4, "op_types": ["Conv2d"], **more}], optimizer
        )
    assert len(optimizer.param_groups) == 1 and list(model.state_dict()) == list(net().state_dict())


def test_defaults_come_from_set_quant_scheme_dtype_where_it_was_called() -> None:
    try:
        set_quant_scheme_dtype("weight", "per_channel_symmetric")
        set_quant_scheme_dtype("input", new_dtype="int")
        layer, _ = linear("weight input")
    finally:
        reset_quant_scheme_dtype()
    assert layer.parametrizations.weight[0].scale.shape == (5,)
    assert layer.quantkern.input.spec.dtype == "int"


def test_bits_of_sixteen() -> None:
    layer, _ = linear("weight input", 16)
    x = torch.randn(3, 6)
    layer(x).sum().backward()
    assert layer.quantkern.input.spec.quant_range == (-32768, 32767)
    expected = nn.functional.linear(x, layer.parametrizations.weight.original, layer.bias)
    assert torch.allclose(layer(x), expected, atol=0.2)


def test_layers_of_every_kind() -> None:
    """L11"""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(7, 4), nn.ConvTranspose1d(5, 3, 2), nn.PReLU(), nn.Conv1d(3, 2, 2), nn.LeakyReLU()
    )
    rules = [{**EVERY, "op_types": ["default"], "quant_scheme": {"weight": "per_channel_symmetric"}}]
    LsqQuantizer(model, [*rules, *rule("output", "4")])
    model(torch.arange(5).repeat(2, 1)).square().sum().backward()
    for index in (0, 1, 2, 3):
        weight = model[index].parametrizations.weight
        assert weight.original.grad.abs().max() > 0 and weight[0].scale.grad.abs().max() > 0
    assert model[1].parametrizations.weight[0].scale.shape == (3,)
    assert model[4].quantkern.output.signed


def _one_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(f"{folder}/store", 2), rank=rank, world_size=2
    )
    try:
        model = net()
        parallel = nn.parallel.DistributedDataParallel(LsqQuantizer(model, LAYERS))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        # Only rank 1 sees negative inputs, and both see other magnitudes.
        train(nn.Sequential(_Shifted(parallel, rank)), optimizer, range(3))
        torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


class _Shifted(nn.Module):
    def __init__(self, model: nn.Module, rank: int) -> None:
        super().__init__()
        self.model, self.rank = model, rank

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x * 3 if self.rank else x.abs())


def test_ranks_of_distributed_training_share_their_scales(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    own = [key for key in first if "running" not in key]
    assert all(torch.equal(first[key], second[key]) for key in own)
    assert first["conv.quantkern.input.signed"]
