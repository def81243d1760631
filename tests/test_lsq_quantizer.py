"""LsqQuantizer: its numbers and rules, and what a training script may do with a model whose scales learn.

A number in a docstring (D3) is that of something NNI's does wrong; so it is in test_lsq_scales and test_lsq_state.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lsq_models import LAYERS, linear
from quantizer_checks import NoReads, same_state, state_of
from small_quantized_net import EVERY, batch, net, rule, train
from torch import Tensor, nn

from quantkern import reference
from quantkern.config import ConfigError
from quantkern.quantizers import LsqQuantizer
from quantkern.settings import reset_quant_scheme_dtype, set_quant_scheme_dtype

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


# ---------------------------------------------------------------- living with a quantized model


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
