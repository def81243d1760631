"""DoReFaQuantizer: what NNI's does wrong (its number in the docstring), and the numbers of the paper."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizer_checks import check_exact_resume, state_of
from small_quantized_net import batch, net, rule, train
from torch import Tensor, nn

import quantkern.functional as F
from quantkern import reference
from quantkern.config import ConfigError
from quantkern.quantizers import DoReFaQuantizer

KINDS = ["weight", "input", "output", "gradient"]
BITS = {"weight": 2, "input": 3, "output": 4, "gradient": 6}
LAYERS = [{"quant_types": KINDS, "quant_bits": BITS, "op_types": ["Conv2d", "Linear"], "seed": 5}]


def linear(quant_types: str, bits: Any, **more: Any) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    DoReFaQuantizer(model, rule(quant_types, "0", bits, **more))
    return model[0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_weights_and_their_gradients_equal_the_formula(bits: int) -> None:
    """D10: NNI's gradient goes neither through tanh nor through the maximum, and one bit divides by it."""
    layer = linear("weight", bits)
    original = layer.parametrizations.weight.original
    twin = original.detach().double().requires_grad_()
    expected = reference.dorefa_weight(twin, bits)
    torch.testing.assert_close(layer.weight.double(), expected, atol=1e-6, rtol=1e-6)
    upstream = torch.linspace(-1, 2, 30).reshape(5, 6)
    layer.weight.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(original.grad.double(), twin.grad, atol=1e-5, rtol=1e-5)
    assert layer.weight.unique().numel() <= 2**bits


def test_a_weight_of_zeros_stays_finite() -> None:
    """D10: NNI divides by 0."""
    layer = linear("weight", 4)
    with torch.no_grad():
        layer.parametrizations.weight.original.zero_()
    layer(torch.randn(2, 6)).sum().backward()
    assert layer.weight.isfinite().all() and not layer.parametrizations.weight.original.grad.any()


def test_inputs_and_outputs_are_clipped_and_rounded() -> None:
    """2.4: missing in NNI, though documented."""
    layer = linear("input output", {"input": 2, "output": 3})
    x = torch.randn(20, 6, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    output = layer(x)
    hidden = reference.dorefa_activation(twin, 2)
    expected = reference.dorefa_activation(nn.functional.linear(hidden, layer.weight, layer.bias), 3)
    assert torch.equal(output, expected)
    assert set((output.detach() * 7).round().int().reshape(-1).tolist()) <= set(range(8))
    upstream = torch.randn(20, 5)
    output.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(x.grad, twin.grad) and (x.grad == 0).any() and (x.grad != 0).any()
    assert torch.equal(layer.eval()(x), output)


def test_the_gradient_enters_the_layer_quantized() -> None:
    """Behind an output that is quantized too: the mask first, then the gradient on its grid."""
    layer = linear("output gradient", {"output": 4, "gradient": 3}, seed=11)
    quantizer = layer.quantkern.gradient
    x, upstream = torch.randn(8, 6), torch.randn(8, 5)
    seed = quantizer.first_seed
    output = layer(x)
    output.backward(upstream)
    hidden = nn.functional.linear(x, layer.weight, layer.bias).detach()
    inner = torch.where((hidden >= 0) & (hidden <= 1), upstream, 0.0)
    expected = reference.dorefa_gradient(inner, 3, seed)
    assert torch.equal(layer.bias.grad, expected.sum(0))
    assert not torch.equal(expected, inner)
    torch.testing.assert_close(layer.weight.grad, expected.t() @ x)
    assert quantizer.calls.item() == 1
    layer.eval()
    layer.zero_grad()
    layer(x).backward(upstream)
    assert torch.equal(layer.bias.grad, inner.sum(0)) and quantizer.calls.item() == 1
    layer.train()
    with torch.no_grad():
        layer(x)
    assert quantizer.calls.item() == 1


def test_every_weight_gets_a_gradient() -> None:
    """D3, D10"""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    groups = [id(p) for p in optimizer.param_groups[0]["params"]]
    DoReFaQuantizer(model, [{**LAYERS[0], "quant_types": ["weight", "gradient"]}], optimizer)
    before = state_of(model)
    train(model, optimizer, range(2))
    for name in ("conv", "fc"):
        assert model.get_submodule(name).parametrizations.weight.original.grad.abs().max() > 0
        key = f"{name}.parametrizations.weight.original"
        assert not torch.equal(model.state_dict()[key], before[key])
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == groups


def test_noise_is_reproducible_with_a_seed_and_other_for_every_layer_and_call() -> None:
    noisy = [{**LAYERS[0], "quant_types": ["gradient"]}]

    def gradients(model: nn.Module, disturb: bool) -> list[Tensor]:
        found = []
        for _ in range(2):
            model.zero_grad()
            if disturb:
                torch.randn(7)
            model(batch()).square().sum().backward()
            found.append(model.fc.weight.grad.clone())
        return found

    models = [net() for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        model.bn.eval()
        DoReFaQuantizer(model, [{**noisy[0], "seed": seed}])
        model.bn.momentum = 0.0
    first, second, third = (gradients(model, index == 1) for index, model in enumerate(models))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], third[0])
    assert models[0].fc.quantkern.gradient.first_seed != models[0].conv.quantkern.gradient.first_seed


def test_without_a_seed_torch_draws_the_noise() -> None:
    layer = linear("gradient", 4)
    x, upstream = torch.randn(9, 6), torch.randn(9, 5)

    def gradient(seed: int) -> Tensor:
        torch.manual_seed(seed)
        layer.zero_grad()
        layer(x).backward(upstream)
        return layer.weight.grad.clone()

    assert torch.equal(gradient(1), gradient(1)) and not torch.equal(gradient(1), gradient(2))
    assert [*layer.state_dict()] == ["weight", "bias"]


def test_resuming_from_a_state_dict_is_exact() -> None:
    check_exact_resume(net, lambda model, optimizer: DoReFaQuantizer(model, LAYERS, optimizer), train, 3, 3)


def test_copies_live_on_their_own(tmp_path: Path) -> None:
    model = net()
    quantizer = DoReFaQuantizer(model, LAYERS)
    train(model, None, range(1))
    twin, whole = copy.deepcopy(model), copy.deepcopy(quantizer)
    train(twin, None, range(2))
    assert model.fc.quantkern.gradient.calls.item() == 1 and twin.fc.quantkern.gradient.calls.item() == 3
    expected = twin.eval()(batch(3))
    quantizer.export_model(tmp_path / "model.pt")
    assert torch.equal(twin(batch(3)), expected)
    assert whole.export_model(tmp_path / "copy.pt")["conv"]["weight_bits"] == 2


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_compiled_training_equals_eager(backend: str) -> None:
    """The second one decides by itself what the backward computes again; the noise must not change by that."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    torch.manual_seed(0)
    eager = Plain()
    DoReFaQuantizer(eager, [{**LAYERS[0], "op_types": ["Linear"]}])
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    fast = torch.compile(compiled, fullgraph=True, backend=backend)
    for _ in range(3):
        x, upstream = torch.rand(7, 6), torch.randn(7, 3)
        outputs = []
        for model, call in ((eager, eager), (compiled, fast)):
            model.zero_grad()
            outputs.append(call(x))
            outputs[-1].backward(upstream)
        assert torch.equal(*outputs)
        for (name, mine), theirs in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, msg=name, rtol=1e-6, atol=1e-6)
    assert compiled.first.quantkern.gradient.calls.item() == eager.first.quantkern.gradient.calls.item() == 3


def test_export_and_calibration(tmp_path: Path) -> None:
    """L19, L24"""
    model, floating = net(), net()
    parameters = dict(model.named_parameters())
    quantizer = DoReFaQuantizer(model, LAYERS)
    train(model, None, range(1))
    calibration = quantizer.export_model(tmp_path / "model.pt", tmp_path / "calibration.pt")
    floating.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    bits = {f"{kind}_bits": bits for kind, bits in BITS.items()}
    assert calibration == {"conv": bits, "fc": bits}
    assert torch.load(tmp_path / "calibration.pt", weights_only=True) == calibration
    again = DoReFaQuantizer(floating, LAYERS)
    again.load_calibration_config(calibration)
    wrong = {"conv": {**bits, "gradient_bits": 4}, "fc": {key: bits[key] for key in bits if key != "gradient_bits"}}
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        again.load_calibration_config(wrong)
    assert "conv.gradient: gradient_bits is 4, this quantizer's rule says 6" in str(error.value)
    assert "fc.gradient: gradient_bits is missing, expected 6" in str(error.value)


def test_layers_of_every_kind() -> None:
    """L11, L12: 'default' holds embeddings and PReLU; structured outputs have a quantized gradient each."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(7, 4), nn.ConvTranspose1d(5, 3, 2), nn.PReLU(), nn.Conv1d(3, 2, 2), nn.LSTM(4, 3)
    )
    rules = [
        {"quant_types": ["weight", "gradient"], "quant_bits": 4, "op_types": ["default"]},
        *rule("gradient", "4", 4),
    ]
    DoReFaQuantizer(model, rules)
    output, (hidden, _) = model(torch.arange(5).repeat(2, 1))
    (output.square().sum() + hidden.square().sum()).backward()
    gradients = [model[index].parametrizations.weight.original.grad.abs().max().item() for index in range(4)]
    assert all(value > 0 for index, value in enumerate(gradients) if index != 2)
    assert gradients[2] == 0 and model[2].weight.item() == 1  # PReLU's one weight is its own maximum
    assert {name for name, _ in model[4].quantkern.named_children()} == {"gradient", "gradient_1", "gradient_2"}


def test_half_precision_models() -> None:
    model = net().to(torch.bfloat16)
    DoReFaQuantizer(model, LAYERS)
    output = model(batch().to(torch.bfloat16))
    output.float().square().sum().backward()
    assert output.dtype is torch.bfloat16
    assert model.conv.parametrizations.weight.original.grad.isfinite().all()
    with pytest.raises((TypeError, RuntimeError, NotImplementedError), match="(?i)float64|double"):
        model.double()(batch().double())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quant_bits": 17}, r"\['quant_bits'\] is 17, expected an integer from 1 to 16"),
        ({"quant_bits": {"weight": 2}}, "bits for every quant type, 'gradient' too"),
        ({"quant_types": ["gradients"]}, "did you mean 'gradient'?"),
        ({"seed": -1}, r"\['seed'\] is -1, expected an integer from 0 to"),
        ({"seed": True}, r"\['seed'\] is True, expected an integer from 0 to"),
        ({"quant_scheme": "per_channel_symmetric"}, "unknown key 'quant_scheme'"),
    ],
)
def test_wrong_rules(more: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(ConfigError, match=message):
        DoReFaQuantizer(
            model, [{"quant_types": ["weight", "gradient"], "quant_bits": 4, "op_types": ["default"], **more}]
        )
    assert list(model.state_dict()) == list(net().state_dict())


def test_an_optimizer_of_another_model_is_an_error() -> None:
    model = net()
    with pytest.raises(ValueError, match="optimizer holds none of the model's parameters"):
        DoReFaQuantizer(model, LAYERS, torch.optim.SGD(net().parameters(), lr=0.1))
    assert list(model.state_dict()) == list(net().state_dict())


def test_functional_and_module_agree() -> None:
    layer = linear("weight", 3)
    assert torch.equal(layer.weight, F.dorefa_weight(layer.parametrizations.weight.original, 3))
