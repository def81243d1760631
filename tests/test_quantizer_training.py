"""Quantizers in training: delays, gradients, counting, precision."""

from __future__ import annotations

import warnings

import pytest
import torch
from quantizer_checks import NoReads
from small_quantized_net import EVERY, EVERY_LAYER, batch, net, rule, train
from torch import nn

import quantkern.functional as F
from quantkern import reference
from quantkern.quantizers import NaiveQuantizer, QAT_Quantizer


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
