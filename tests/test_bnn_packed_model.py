"""The packed model that BNNQuantizer converts to: the same answers, its size, what cannot be folded, the VGG."""

from __future__ import annotations

import copy
import io
import sys
import warnings
from pathlib import Path

import pytest
import torch
from binary_networks import BINARY, RULES, Net, batch, net, trained
from quantizer_checks import state_of
from torch import Tensor, nn

from quantkern import BNNQuantizer
from quantkern.nn import BinaryConv2d, BinaryLinear

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import bnn_vgg  # noqa: E402
import models  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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
