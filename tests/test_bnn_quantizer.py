"""BNNQuantizer: the paper's training on packed kernels, what NNI's does wrong (its number), and the packed model."""

from __future__ import annotations

import copy
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from quantizer_checks import check_exact_resume
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantkern import BNNQuantizer, QAT_Quantizer, reference
from quantkern.config import ConfigError
from quantkern.nn import BinaryConv2d, BinaryLinear

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import bnn_vgg  # noqa: E402
import models  # noqa: E402


class Net(nn.Module):
    """A real first and last layer, two binary ones between them, pooling before the batch norm as in the paper."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.Hardtanh()
        self.conv2 = nn.Conv2d(16, 40, 3, padding=1, bias=bias)
        self.pool = nn.MaxPool2d(2)
        self.bn2 = nn.BatchNorm2d(40)
        self.act2 = nn.Hardtanh(inplace=True)
        self.conv3 = nn.Conv2d(40, 36, 3, padding=1, bias=bias)
        self.bn3 = nn.BatchNorm2d(36)
        self.act3 = nn.Hardtanh(inplace=True)
        self.fc1 = nn.Linear(36 * 9, 24, bias=bias)
        self.bn4 = nn.BatchNorm1d(24)
        self.act4 = nn.Hardtanh()
        self.fc2 = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.pool(self.conv2(x))))
        x = self.act3(self.bn3(self.conv3(x)))
        x = self.act4(self.bn4(self.fc1(x.view(-1, 36 * 9))))
        return self.fc2(x)


BINARY = ["conv2", "conv3", "fc1"]
RULES = [
    {"quant_types": ["weight"], "quant_bits": 1, "op_names": BINARY},
    {"quant_types": ["output"], "quant_bits": 1, "op_types": ["Hardtanh"]},
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These networks are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net(**more: Any) -> Net:
    torch.manual_seed(0)
    return Net(**more)


def batch(seed: int = 0, size: int = 8) -> Tensor:
    return torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def target(seed: int = 0, size: int = 8) -> Tensor:
    return torch.randint(0, 3, (size,), generator=torch.Generator().manual_seed(seed))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range, after: Callable[[], None] | None = None
) -> list[float]:
    model.train()
    losses = []
    for seed in seeds:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch(seed)), target(seed))
        loss.backward()
        optimizer.step()
        if after is not None:
            after()
        losses.append(loss.item())
    return losses


def trained(rules: list[dict[str, Any]] = RULES, steps: int = 4, **more: Any) -> tuple[Net, BNNQuantizer]:
    """A network away from its start, with batch norms of either sign."""
    model = net(**more)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    quantizer = BNNQuantizer(model, rules, optimizer)
    train(model, optimizer, range(steps))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight[::3] *= -1
                module.weight[1] = 0
                module.bias.add_(torch.linspace(-0.3, 0.3, len(module.bias)))
    return model, quantizer


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


class SimulatedSign(nn.Module):
    """Float simulation of a binary weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return reference.binarize(weight, clip_gradient=False)


def simulate(model: Net) -> None:
    """The same network in plain PyTorch: float layers over +1 and -1, the bias added to the exact sums.

    Behind a batch norm an exact 0 is common: where a sum is just the mean of its channel. Which sign that gets is up
    to the last bit, so the simulation must not add the bias in the middle of a sum.
    """
    for name in BINARY:
        layer = model.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", SimulatedSign())
        layer.forward = partial(simulated, layer)
    for name in ("act1", "act2", "act3", "act4"):
        model.get_submodule(name).register_forward_hook(lambda _, __, y: reference.binarize(y))


def simulated(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        y = nn.functional.linear(x, layer.weight)
        return y if layer.bias is None else y + layer.bias
    y = nn.functional.conv2d(x, layer.weight, None, layer.stride, layer.padding)
    return y if layer.bias is None else y + layer.bias.view(-1, 1, 1)


def clip(model: Net) -> None:
    with torch.no_grad():
        for name in BINARY:
            model.get_submodule(name).parametrizations.weight.original.clamp_(-1, 1)


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


# ---------------------------------------------------------------- which layers run packed


class Around(nn.Module):
    """A sign, something, and a layer."""

    def __init__(self, between: Any, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.act = nn.Hardtanh()
        self.between = between
        self.layer = nn.Conv2d(4, 6, 3) if layer is None else layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.between(self.act(x)))


AROUND = [
    {"quant_types": ["output"], "quant_bits": 1, "op_names": ["act"]},
    {"quant_types": ["weight"], "quant_bits": 1, "op_names": ["layer"]},
]


def added(x: Tensor) -> Tensor:
    return x + 1


def written(x: Tensor) -> Tensor:
    x.view(-1).mul_(2)
    return x


def written_by_module(x: Tensor) -> Tensor:
    nn.functional.relu(x, inplace=True)
    return x


@pytest.mark.parametrize(
    ("between", "packed"),
    [
        (nn.Identity(), True),
        (nn.MaxPool2d(2, padding=1), True),
        (nn.Dropout(0.0), True),
        (nn.Hardtanh(inplace=True), True),
        (lambda x: nn.functional.max_pool2d(x, 2), True),
        (lambda x: torch.cat([x[:, :2], x[:, 2:]], 1), True),
        (lambda x: x.permute(0, 1, 3, 2).contiguous().view(x.shape[0], 4, 8, 8), True),
        (nn.Dropout(0.5), False),
        (nn.ReLU(), False),
        (nn.ReLU(inplace=True), False),
        (nn.AvgPool2d(2), False),
        (nn.ZeroPad2d(1), False),
        (nn.Hardtanh(-0.5, 0.5), False),
        (added, False),
        (written, False),
        (written_by_module, False),
        (lambda x: torch.cat([x[:, :2], x[:, 2:] * 0.5], 1), False),
        (lambda x: x[:, torch.randperm(4)] if x.sum() > 0 else x, False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*run in real arithmetic")
def test_a_layer_runs_packed_where_only_signs_reach_it(between: Any, packed: bool) -> None:
    torch.manual_seed(0)
    model = Around(between)
    twin = copy.deepcopy(model)
    quantizer = BNNQuantizer(model, AROUND)
    assert (quantizer.packed_layers == ("layer",)) is packed
    assert (list(quantizer.float_layers) == ["layer"]) is not packed
    parametrize.register_parametrization(twin.layer, "weight", SimulatedSign())
    twin.act.register_forward_hook(lambda _, __, y: reference.binarize(y))
    model.eval(), twin.eval()
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(model(x), twin(x))


class Mixed(nn.Module):
    """One layer that gets signs in one way of running the model and reals in another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.act, self.layer = how, nn.Hardtanh(), nn.Linear(4, 4)

    def forward(self, x: Tensor, noise: Tensor | None = None, twice: bool = False) -> Tensor:
        y = self.act(x)
        if self.how == "mode" and not self.training:
            y = y * 0.5
        if self.how == "optional" and noise is not None:
            y = y + noise
        y = self.layer(y)
        return self.layer(y) if self.how == "switch" and twice else y


@pytest.mark.parametrize(("how", "packed"), [("same", True), ("mode", False), ("optional", False), ("switch", False)])
def test_every_way_of_running_a_model_counts(how: str, packed: bool) -> None:
    model = Mixed(how)
    modes = [module.training for module in model.modules()]
    assert bool(BNNQuantizer(model, AROUND).packed_layers) is packed
    assert [module.training for module in model.modules() if "quantkern" not in type(module).__module__][:3] == modes


class Remembering(Around):
    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.register_buffer("count", torch.zeros(()))
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.last = x
        return super().forward(x) + 0 * torch.rand(1)


def test_finding_out_leaves_nothing_behind() -> None:
    torch.manual_seed(0)
    model, state = Remembering(), torch.get_rng_state()
    parameters = list(model.parameters())
    quantizer = BNNQuantizer(model, AROUND)
    assert quantizer.packed_layers == ("layer",)
    assert model.count.item() == 0 and model.last is None and torch.equal(torch.get_rng_state(), state)
    assert {id(parameter) for parameter in parameters} == {id(parameter) for parameter in model.parameters()}


def test_a_layer_with_hooks_of_others_is_left_alone() -> None:
    model = Around(nn.Identity())
    model.layer.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
    assert BNNQuantizer(model, AROUND).float_layers == {"layer": "a hook may change its input"}


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), "groups=2"),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (nn.Conv2d(4, 6, 2, padding="same"), "pads its two sides differently"),
        (nn.ConvTranspose2d(4, 6, 3), "it is a ConvTranspose2d"),
    ],
)
def test_layers_that_the_kernels_do_not_know_stay_float(layer: nn.Module, why: str) -> None:
    model = Around(nn.Identity(), layer)
    quantizer = BNNQuantizer(model, AROUND)
    assert why in quantizer.float_layers["layer"]
    x, weight = torch.randn(2, 4, 8, 8), layer.weight
    assert type(layer).__bases__[0].__module__.startswith("torch.") and set(weight.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(quantizer.convert()(x), model.eval()(x))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_paddings_in_words(padding: str) -> None:
    model = Around(nn.Identity(), nn.Conv2d(4, 6, 3, padding=padding))
    quantizer = BNNQuantizer(model, AROUND)
    x = torch.randn(2, 4, 8, 8)
    weight, bias = model.layer.weight, model.layer.bias
    truth = nn.functional.conv2d(reference.binarize(x), weight, bias, padding=padding)
    assert quantizer.packed_layers == ("layer",)
    torch.testing.assert_close(model(x), truth)
    assert torch.equal(quantizer.convert()(x), model.eval()(x))


class Untraceable(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) else x


def test_a_model_that_cannot_be_traced_warns_once_and_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    model, twin = Untraceable(), net()
    with pytest.warns(UserWarning, match="'conv2', 'conv3', 'fc1' run in real arithmetic.*'input' among") as found:
        quantizer = BNNQuantizer(model, RULES)
    assert len(found) == 1 and quantizer.packed_layers == () and set(quantizer.float_layers) == set(BINARY)
    assert found[0].filename == __file__
    BNNQuantizer(twin, RULES)
    torch.testing.assert_close(model(batch()), twin(batch()))
    assert torch.equal(quantizer.convert()(batch()), model.eval()(batch()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rules = [{**RULES[0], "quant_types": ["weight", "input"]}, RULES[1]]
        packed = BNNQuantizer(Untraceable(), rules)
    assert packed.packed_layers == tuple(BINARY)
    model = packed.bound_model.eval()
    converted = packed.convert()
    assert isinstance(converted.conv2, BinaryConv2d) and not converted.conv2.sign
    assert torch.equal(converted(batch()), model(batch()))


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


# ---------------------------------------------------------------- the packed model


@pytest.mark.parametrize("bias", [True, False])
def test_the_packed_model_is_equal_small_and_loads(bias: bool) -> None:
    model, quantizer = trained(bias=bias)
    before = state_of(model)
    packed = quantizer.convert()
    assert type(packed) is Net and not packed.training and model.training
    assert isinstance(packed.conv2, BinaryConv2d) and packed.conv2.packed_output and packed.conv2.pool is not None
    assert isinstance(packed.conv3, BinaryConv2d) and packed.conv3.sign and not packed.conv3.packed_output
    assert isinstance(packed.fc1, BinaryLinear) and packed.fc1.sign and packed.conv3.bias is None
    assert all(isinstance(getattr(packed, name), nn.Identity) for name in ("pool", "bn2", "act2", "bn3", "act3", "bn4"))
    model.eval()
    with torch.no_grad():
        for seed in range(20):
            assert torch.equal(packed(batch(seed, 32)), model(batch(seed, 32)))
    model.train()
    assert all(torch.equal(value, before[key]) for key, value in state_of(model).items())
    state = packed.state_dict()
    assert {key for key in state if key.startswith("conv2")} == {"conv2.weight_packed", "conv2.threshold", "conv2.flip"}
    ratio = model.fc1.weight.numel() * 4 / (state["fc1.weight_packed"].numel() * 4)
    assert ratio > 29  # 324 signs in 11 words
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    fresh = BNNQuantizer(net(bias=bias), RULES).convert()
    assert not torch.equal(fresh(batch()), packed(batch()))
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(fresh(batch()), packed(batch()))
    other = {**state, "fc1.weight_packed": state["fc1.weight_packed"].to(torch.int64)}
    changed = state_of(fresh)
    with pytest.raises(ValueError, match="nothing was loaded:\n  1. fc1.weight_packed is torch.int64 of shape"):
        copy.deepcopy(fresh).load_state_dict(other)
    with pytest.raises(ValueError, match="nothing was loaded"):
        fresh.load_state_dict({key: value.clone() + 0 for key, value in other.items()})
    assert all(torch.equal(value, changed[key]) for key, value in state_of(fresh).items())


def test_the_whole_state_of_wide_layers_is_32_times_smaller() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.Hardtanh(), nn.Linear(512, 512, bias=False))
    rules = [
        {"quant_types": ["weight", "input"], "quant_bits": 1, "op_types": ["Linear"]},
        {"quant_types": ["output"], "quant_bits": 1, "op_types": ["Hardtanh"]},
    ]
    packed = BNNQuantizer(model, rules).convert()
    sizes = [sum(t.numel() * t.element_size() for t in m.state_dict().values()) for m in (model, packed)]
    assert sizes[0] / sizes[1] > 30


def test_a_batch_norm_that_is_not_followed_by_a_sign_stays() -> None:
    model, quantizer = trained([RULES[0], {**RULES[1], "op_names": ["act1", "act2", "act3"]}])
    packed = quantizer.convert()
    assert isinstance(packed.fc1, BinaryLinear) and not packed.fc1.sign and isinstance(packed.bn4, nn.BatchNorm1d)
    assert torch.equal(packed(batch(5)), model.eval()(batch(5)))


def test_layers_with_a_real_input_become_layers_of_signs() -> None:
    """D17: NNI's lists leave features.2 real, so features.3 reads real numbers."""
    model, quantizer = trained([RULES[0], {**RULES[1], "op_names": ["act2", "act3", "act4"]}])
    assert quantizer.float_layers == {"conv2": "its input, the output of 'act1', is not binary"}
    packed = quantizer.convert()
    assert type(packed.conv2) is nn.Conv2d and set(packed.conv2.weight.unique().tolist()) == {-1.0, 1.0}
    assert model.conv2.parametrizations.weight.original.unique().numel() > 2
    assert torch.equal(packed(batch(5)), model.eval()(batch(5)))


def test_inputs_instead_of_outputs() -> None:
    """The sign is taken where the next layer reads; batch norms fold all the same."""
    rules = [{"quant_types": ["weight", "input"], "quant_bits": 1, "op_names": BINARY}]
    model, quantizer = trained(rules)
    packed = quantizer.convert()
    assert packed.conv2.packed_output and packed.conv2.pool is not None and isinstance(packed.bn2, nn.Identity)
    assert not packed.conv3.sign and isinstance(packed.bn3, nn.BatchNorm2d)  # view comes before the sign
    assert torch.equal(packed(batch(5)), model.eval()(batch(5)))


class Branches(nn.Module):
    """Chains that must not be folded: read twice, used twice; and one that is, behind a pooling of signs."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.act = nn.Conv2d(2, 8, 3, padding=1), nn.Hardtanh()
        self.one, self.bn_one, self.act_one = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardtanh()
        self.two, self.bn_two, self.act_two = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardtanh()
        self.three = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.pool, self.same = nn.MaxPool2d(3, 2, 1), nn.Identity()
        self.four = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.start(x))
        y = self.bn_one(self.one(x))
        z = self.act_one(y)
        again = self.act_one(self.bn_two(self.two(z)))
        pooled = self.pool(self.act_two(self.three(again)))
        return self.four(self.same(pooled)) + self.four(pooled) + y.mean()


def test_chains_with_other_readers_are_left_alone() -> None:
    torch.manual_seed(0)
    model = Branches()
    rules = [
        {"quant_types": ["output"], "quant_bits": 1, "op_types": ["Hardtanh"]},
        {"quant_types": ["weight"], "quant_bits": 1, "op_names": ["one", "two", "three", "four"]},
    ]
    quantizer = BNNQuantizer(model, rules)
    assert quantizer.packed_layers == ("one", "two", "three", "four")
    x = torch.randn(2, 2, 16, 16)
    for _ in range(2):
        model(x)
    packed = quantizer.convert()
    assert [getattr(packed, name).sign for name in ("one", "two", "three", "four")] == [False, False, True, False]
    assert packed.three.packed_output and packed.three.pool is not None and not packed.three.pool.before_sign
    assert torch.equal(packed(x), model.eval()(x))


@pytest.mark.parametrize("change", ["ceil_mode", "no statistics", "silu", "hooked", "nan"])
def test_what_cannot_be_folded_still_gives_the_same_answers(change: str) -> None:
    model = net()
    if change == "ceil_mode":
        model.pool = nn.MaxPool2d(2, ceil_mode=True)
    elif change == "no statistics":
        model.bn2 = nn.BatchNorm2d(40, track_running_stats=False)
    elif change == "silu":
        model.act2 = nn.SiLU()
    elif change == "hooked":
        model.bn2.register_forward_hook(lambda _, __, y: y + 0.3)
    rules = [RULES[0], {"quant_types": ["output"], "quant_bits": 1, "op_names": ["act1", "act2", "act3", "act4"]}]
    quantizer = BNNQuantizer(model, rules)
    model(batch())
    if change == "nan":
        with torch.no_grad():
            model.bn2.weight[0] = torch.nan
    packed = quantizer.convert()
    assert isinstance(packed.conv2, BinaryConv2d) and not packed.conv2.sign
    assert torch.equal(packed(batch(5)), model.eval()(batch(5)))


def test_an_output_of_a_layer_itself_and_a_single_layer_model() -> None:
    rules = [{"quant_types": ["weight", "input", "output"], "quant_bits": 1, "op_types": ["Linear"]}]
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 3))
    quantizer = BNNQuantizer(model, rules)
    packed, x = quantizer.convert(), torch.randn(9, 40)
    assert packed[0].packed_output and packed[1].sign and not packed[1].packed_output
    assert torch.equal(packed(x), model(x))
    layer = nn.Linear(40, 50)
    quantizer = BNNQuantizer(layer, rules)
    alone = quantizer.convert()
    assert isinstance(alone, BinaryLinear) and torch.equal(alone(x), layer(x))


@pytest.mark.parametrize("own", [True, False])
def test_hooks_of_others_on_a_packed_layer_stay(own: bool) -> None:
    kinds = ["weight", "input", "output"] if own else ["weight", "input"]
    model = nn.Sequential(nn.Linear(40, 50), nn.Hardtanh(), nn.Linear(50, 8))
    model[0].register_forward_hook(lambda _, __, y: -y)
    seen = []
    model[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    quantizer = BNNQuantizer(model, [{"quant_types": kinds, "quant_bits": 1, "op_types": ["Linear"]}])
    packed, x = quantizer.convert(), torch.randn(9, 40)
    assert isinstance(packed[0], BinaryLinear) and torch.equal(packed(x), model.eval()(x))
    assert seen == [torch.float32] * 2


def test_a_batch_norm_over_rows_wants_rows() -> None:
    model = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Hardtanh())
    rules = [
        {"quant_types": ["weight", "input"], "quant_bits": 1, "op_names": ["0"]},
        {"quant_types": ["output"], "quant_bits": 1, "op_names": ["2"]},
    ]
    packed = BNNQuantizer(model, rules).convert()
    x = torch.randn(4, 8)
    assert torch.equal(packed(x), model.eval()(x))
    with pytest.raises(ValueError, match="x must have 2 dimensions"):
        packed(torch.randn(4, 5, 8))


def test_half_precision_packed_model() -> None:
    model, quantizer = trained()
    model.to(torch.bfloat16)
    x = batch(3).to(torch.bfloat16)
    packed = quantizer.convert()
    assert torch.equal(packed(x), model.eval()(x))


def test_the_packed_model_compiles_and_exports() -> None:
    model, quantizer = trained()
    packed, x = quantizer.convert(), batch(2)
    truth = packed(x)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), truth)
        assert torch.equal(torch.export.export(packed, (x,)).module()(x), truth)


# ---------------------------------------------------------------- the VGG of NNI's experiment


@pytest.mark.parametrize(("config", "packed"), [("nni", 6), ("nni-script", 5), ("full", 7)])
def test_vgg_with_every_list_of_layers(config: str, packed: int) -> None:
    torch.manual_seed(0)
    model = models.BinaryVGG(3, 10, 0.0625)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer = BNNQuantizer(model, bnn_vgg.config_list(config), optimizer)
    assert len(quantizer.packed_layers) == packed
    assert ("features.3" in quantizer.float_layers) is (config != "full")
    x = torch.randn(6, 3, 32, 32)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(6)).backward()
        optimizer.step()
    assert torch.equal(quantizer.convert()(x), model.eval()(x))


def test_digits_within_five_points_of_float() -> None:
    """Same sizes of layers, same epochs: 99% as float, at least 94% with two layers of one bit."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install scikit-learn)")
    import data
    import train as training
    from recipes import RECIPES

    setting = training.Setting(models.DigitsNet, 10, 64, learning_rate=3e-3)
    runs = training.compare(data.digits(), setting, ["float", "bnn"], [0])
    assert RECIPES["bnn"].weights == 1
    assert runs[0].accuracy > 98 and runs[1].accuracy > runs[0].accuracy - 5, runs
