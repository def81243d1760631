"""BNNQuantizer: the paper's training on packed kernels, rules, export, and what NNI's does wrong (its number)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from binary_networks import BINARY, RULES, batch, clip, net, simulate, target, train
from quantizer_checks import check_exact_resume
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantkern import BNNQuantizer, QAT_Quantizer, reference
from quantkern.config import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_gradients_equal_the_float_simulation(bias: bool) -> None:
    model, twin = net(bias=bias), net(bias=bias)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, twin)]
    quantizer = BNNQuantizer(model, RULES, optimizers[0])
    simulate(twin)
    assert quantizer.packed_layers == tuple(BINARY) and not quantizer.float_layers
    ours = train(model, optimizers[0], range(6))
    theirs = train(twin, optimizers[1], range(6), lambda: clip(twin))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[0] != ours[-1]
    for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-2, atol=1e-4, msg=name)
    model.eval(), twin.eval()
    assert torch.allclose(model(batch(9)), twin(batch(9)), rtol=1e-3, atol=1e-3)


def test_the_first_step_equals_the_simulation_to_rounding() -> None:
    model, twin = net(), net()
    BNNQuantizer(model, RULES)
    simulate(twin)
    x = batch().requires_grad_()
    other = batch().requires_grad_()
    for one, given in ((model, x), (twin, other)):
        nn.functional.cross_entropy(one(given), target()).backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-7)
    for (name, mine), his in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, his.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_weights_are_clipped_after_every_optimizer_step() -> None:
    """D16: NNI's script clips a local variable, and its constructor takes no optimizer."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e4)
    BNNQuantizer(model, RULES, optimizer)
    before = model.conv1.weight.detach().clone()
    train(model, optimizer, range(1))
    for name in BINARY:
        weight = model.get_submodule(name).parametrizations.weight.original
        assert weight.abs().max() == 1.0 and (weight.abs() < 1).any()
    assert model.conv1.weight.abs().max() > 1 and not torch.equal(before, model.conv1.weight)
    assert model.fc1.bias.abs().max() > 0


def test_step_clips_without_an_optimizer() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e4)
    quantizer = BNNQuantizer(model, RULES)
    train(model, optimizer, range(1))
    weights = [model.get_submodule(name).parametrizations.weight.original for name in BINARY]
    assert max(weight.abs().max().item() for weight in weights) > 1
    quantizer.step()
    assert all(weight.abs().max() == 1.0 for weight in weights)
    twin = copy.deepcopy(quantizer)
    with torch.no_grad():
        copied = twin.bound_model.fc1.parametrizations.weight.original  # type: ignore[union-attr, operator]
        copied.mul_(5)
        weights[2].mul_(5)
    twin.step()
    assert copied.abs().max() == 1.0 and weights[2].abs().max() > 1


def test_weights_outputs_and_inputs_are_signs() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    BNNQuantizer(model, [{"quant_types": ["weight", "input", "output"], "quant_bits": 1, "op_types": ["default"]}])
    layer, x = model[0], torch.randn(20, 6, requires_grad=True)
    assert set(layer.weight.unique().tolist()) <= {-1.0, 1.0}
    y = layer(x)
    sums = reference.binarize(x) @ layer.weight.t() + layer.bias
    assert torch.equal(y, reference.binarize(sums))
    y.backward(torch.ones_like(y))
    inner = ((sums.abs() <= 1).float() @ layer.weight) * (x.abs() <= 1)
    assert torch.equal(x.grad, inner) and x.grad.any()
    zeros = layer.parametrizations.weight.original
    with torch.no_grad():
        zeros.zero_()
    assert bool((layer.weight == 1).all())  # sign(0) = +1


def test_every_kind_of_weight() -> None:
    """Layers that no packed kernel knows are simulated."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.ConvTranspose1d(5, 3, 2), nn.PReLU(), nn.Conv1d(3, 2, 2))
    quantizer = BNNQuantizer(model, [{"quant_types": ["weight"], "quant_bits": 1, "op_types": ["default"]}])
    model(torch.arange(5)).square().sum().backward()
    for index in range(4):
        assert model[index].parametrizations.weight.original.grad is not None
        assert model[index].weight.abs().min() == 1
    assert quantizer.packed_layers == ()
    assert "ConvTranspose1d" in quantizer.float_layers["1"]


def saved_bytes(run: Callable[[], Tensor]) -> int:
    total = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return total


@pytest.mark.parametrize("layer", [nn.Conv2d(128, 128, 3, padding=1, bias=False), nn.Linear(2048, 512)])
def test_saved_for_backward(layer: nn.Module) -> None:
    """The activation, its mask and the weight: one bit an element each."""
    shape = (8, 128, 16, 16) if isinstance(layer, nn.Conv2d) else (256, 2048)
    plain, model = copy.deepcopy(layer), nn.Sequential(layer)
    rules = [{"quant_types": ["weight", "input"], "quant_bits": 1, "op_names": ["0"]}]
    x = torch.randn(shape, requires_grad=True)
    floats = saved_bytes(lambda: plain(x))
    assert floats >= 4 * x.numel()
    BNNQuantizer(model, rules)
    binary = saved_bytes(lambda: model(x))
    assert 0 < binary <= floats / 16


def test_half_precision_autocast_and_unbatched_images() -> None:
    model = net().to(torch.bfloat16)
    BNNQuantizer(model, RULES)
    output = model(batch().to(torch.bfloat16))
    output.float().square().sum().backward()
    assert output.dtype is torch.bfloat16
    assert model.conv2.parametrizations.weight.original.grad.isfinite().all()
    model = net()
    BNNQuantizer(model, RULES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch())
        output.float().square().sum().backward()
    assert model.conv2.parametrizations.weight.original.grad.dtype is torch.float32
    single = nn.Sequential(nn.Conv2d(3, 4, 3))
    BNNQuantizer(single, [{"quant_types": ["weight", "input"], "quant_bits": 1, "op_names": ["0"]}])
    image = torch.randn(3, 6, 6)
    assert torch.equal(single(image), single(image[None])[0])


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_compiled_training_equals_eager(backend: str) -> None:
    eager = net()
    BNNQuantizer(eager, RULES)
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    fast = torch.compile(compiled, fullgraph=True, backend=backend)
    for seed in range(2):
        for model, call in ((eager, eager), (compiled, fast)):
            model.zero_grad()
            nn.functional.cross_entropy(call(batch(seed)), target(seed)).backward()
        for (name, mine), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, msg=name, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- config_list, export, copies


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quant_bits": 8}, r"\['quant_bits'\] is 8, expected 1"),
        ({"quant_bits": {"weight": 1, "output": 2}}, r"\['quant_bits'\]\['output'\] is 2, expected 1"),
        ({"quant_bits": {"weight": 1}}, "bits for every quant type, 'output' too"),
        ({"quant_bits": 1.0}, "is 1.0, expected 1"),
        ({"quant_bits": True}, "is True, expected 1"),
        ({"quant_types": ["weights"]}, "did you mean 'weight'?"),
        ({"quant_dtype": "int"}, "unknown key 'quant_dtype'"),
        ({"quant_start_step": 3}, "unknown key 'quant_start_step'"),
    ],
)
def test_wrong_rules(more: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(ConfigError, match=message):
        BNNQuantizer(model, [{"quant_types": ["weight", "output"], "quant_bits": 1, "op_types": ["default"], **more}])
    assert list(model.state_dict()) == list(net().state_dict()) and type(model.conv2) is nn.Conv2d


def test_an_optimizer_of_another_model_is_an_error() -> None:
    model = net()
    with pytest.raises(ValueError, match="optimizer holds none of the model's parameters"):
        BNNQuantizer(model, RULES, torch.optim.SGD(net().parameters(), lr=0.1))
    assert type(model.conv2) is nn.Conv2d


def test_rules_of_another_quantizer_still_know_the_layers() -> None:
    model = net()
    BNNQuantizer(model, RULES)
    with pytest.raises(ConfigError, match="layer 'conv2' has a quantizer already"):
        QAT_Quantizer(model, [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Conv2d"]}])


def test_export_restores_classes_and_saves_real_weights(tmp_path: Path) -> None:
    """L18: bits are Python numbers. L24: NNI exports the signs of the forward before the last step."""
    model, floating = net(), net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    parameters = dict(model.named_parameters())
    kinds = {name: type(module) for name, module in model.named_modules()}
    quantizer = BNNQuantizer(model, RULES, optimizer)
    assert quantizer.compress() is model
    train(model, optimizer, range(2))
    calibration = quantizer.export_model(tmp_path / "model.pt", tmp_path / "calibration.pt")
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    floating.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    assert floating.conv2.weight.unique().numel() > 2
    assert calibration["conv2"] == {"weight_bits": 1} and calibration["act1"] == {"output_bits": 1}
    assert type(calibration["conv2"]["weight_bits"]) is int
    assert torch.load(tmp_path / "calibration.pt", weights_only=True) == calibration
    again = BNNQuantizer(floating, RULES)
    again.load_calibration_config(calibration)
    model.train(), floating.train()
    with pytest.raises(ValueError, match="conv2.weight: weight_bits is 8"):
        again.load_calibration_config({**calibration, "conv2": {"weight_bits": 8}})
    train(model, torch.optim.SGD(model.parameters(), lr=1e4), range(1))
    assert model.conv2.weight.abs().max() > 1  # nothing clips a float model
    for method in (quantizer.step, quantizer.convert):
        with pytest.raises(RuntimeError, match="export_model"):
            method()


def test_resuming_from_a_state_dict_is_exact() -> None:
    check_exact_resume(net, lambda model, optimizer: BNNQuantizer(model, RULES, optimizer), train, 3, 3)


def test_copies_live_on_their_own(tmp_path: Path) -> None:
    model = net()
    quantizer = BNNQuantizer(model, RULES)
    twin, whole = copy.deepcopy(model), copy.deepcopy(quantizer)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), range(2))
    assert not torch.equal(twin.conv2.parametrizations.weight.original, model.conv2.parametrizations.weight.original)
    expected = twin.eval()(batch(3))
    quantizer.export_model(tmp_path / "model.pt")
    assert torch.equal(twin(batch(3)), expected)
    assert whole.export_model(tmp_path / "copy.pt")["conv2"] == {"weight_bits": 1}
    assert type(whole.bound_model.conv2) is nn.Conv2d


def test_distributed_data_parallel_around_the_quantizer(tmp_path: Path) -> None:
    """L18: NNI keeps a CPU tensor among the buffers that are broadcast."""
    inner = net()
    quantizer = BNNQuantizer(inner, RULES)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(quantizer)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e4)
        train(model, optimizer, range(2), quantizer.step)
        assert inner.conv2.parametrizations.weight.original.abs().max() == 1.0
    finally:
        torch.distributed.destroy_process_group()
    assert not any("act" in name or "parametrizations" in name for name, _ in inner.named_buffers())


def test_another_parametrization_on_the_layer_survives(tmp_path: Path) -> None:
    model = net()
    quantizer = BNNQuantizer(model, RULES)
    parametrize.register_parametrization(model.fc1, "bias", nn.Tanh())
    quantizer.export_model(tmp_path / "model.pt")
    assert parametrize.is_parametrized(model.fc1, "bias") and not parametrize.is_parametrized(model.fc1, "weight")
    x = torch.randn(2, 36 * 9)
    assert torch.equal(model.fc1(x), nn.functional.linear(x, model.fc1.weight, model.fc1.bias))
    assert isinstance(model.fc1.weight, nn.Parameter)
