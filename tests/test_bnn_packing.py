"""Which layers BNNQuantizer runs on packed signs while it trains: those that only signs reach."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from binary_networks import BINARY, RULES, Net, SimulatedSign, batch, net
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantkern import BNNQuantizer, reference
from quantkern.nn import BinaryConv2d

pytestmark = pytest.mark.usefixtures("one_thread")


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
