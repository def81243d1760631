"""Batch norms folded into weights by QAT_Quantizer and LsqQuantizer. D2, D7, D13, L6 and L8 are what NNI does wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizer_checks import NoReads
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from quantkern import reference
from quantkern.bn_fold import find_pairs
from quantkern.current_range import WeightFakeQuant
from quantkern.lean_backward import keep_codes
from quantkern.learned import LearnedWeight
from quantkern.quantizers import LsqQuantizer, QAT_Quantizer

BOTH = pytest.mark.parametrize("kind", [QAT_Quantizer, LsqQuantizer])
LAYERS = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64, 8)
        self.bn1 = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.relu(self.bn1(self.fc(self.relu(self.bn(self.conv(x))).flatten(1)))))


def shake(model: nn.Module) -> nn.Module:
    """Batch norms as after some training: all of their numbers differ, some gammas are negative."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            size = module.num_features
            module.running_mean.copy_(torch.randn(size, generator=generator))
            module.running_var.copy_(torch.rand(size, generator=generator) * 3 + 0.1)
            if module.affine:
                with torch.no_grad():
                    sign = torch.tensor([1.0, -1.0]).repeat(size)[:size]
                    module.weight.copy_((torch.rand(size, generator=generator) + 0.3) * sign)
                    module.bias.copy_(torch.randn(size, generator=generator))
    return model


def net() -> Net:
    torch.manual_seed(0)
    return shake(Net())  # type: ignore[return-value]


def batch(seed: int = 0, size: int = 8) -> Tensor:
    return torch.randn(size, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def rules(bits: int = 8, types: str = "weight", layers: tuple[str, ...] = ("Conv2d", "Linear"), **more: Any) -> Any:
    return [{"quant_types": types.split(), "quant_bits": bits, "op_types": list(layers), **more}]


def fine(kind: type) -> dict[str, Any]:
    """Scales that lose little from the start: LSQ's own are meant for 2 to 4 bits."""
    return {"init": "minmax"} if kind is LsqQuantizer else {}


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None, seeds: range, call: Any = None) -> list[Tensor]:
    model.train()
    outputs = []
    for seed in seeds:
        model.zero_grad()
        output = (model if call is None else call)(batch(seed))
        output.square().mean().backward()
        if optimizer is not None:
            optimizer.step()
        outputs.append(output.detach())
    return outputs


def on_grid(weight: Tensor, quantizer: nn.Module, factor: Tensor) -> Tensor:
    """What the fake-quantizer on a weight makes of this folded one, by the reference."""
    low, high = quantizer.spec.quant_range
    zero_point = 0 if quantizer.zero_point is None else quantizer.zero_point
    scale = quantizer.scale.detach()
    if isinstance(quantizer, LearnedWeight):
        scale = scale * factor.abs().mean()
    return reference.quantize(weight, scale, torch.as_tensor(zero_point), low, high, None)[0]


class Convolutions(TorchDispatchMode):
    """Counts convolutions and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> object:
        self.count += any(word in str(func) for word in ("convolution.default", "mm.default", "matmul"))
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------- the numbers


@BOTH
def test_training_and_evaluation_equal_the_formulas(kind: type) -> None:
    """Unfolded statistics in training (D2), one folded convolution in evaluation."""
    model, twin = net(), net()
    kind(model, rules(), fold_bn=True)
    conv, bn = model.conv, twin.bn
    factor = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach().reshape(-1, 1, 1, 1)
    model.train()
    output = model.bn(model.conv(batch()))
    quantizer = conv.parametrizations.weight[0]
    weight = on_grid(twin.conv.weight.detach() * factor, quantizer, factor) / factor
    expected = bn(nn.functional.conv2d(batch(), weight))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.bn.running_mean, bn.running_mean)
    torch.testing.assert_close(model.bn.running_var, bn.running_var)

    model.eval()
    output = model.conv(batch())
    assert model.bn(output) is output
    factor = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach()
    weight = on_grid(twin.conv.weight.detach() * factor.reshape(-1, 1, 1, 1), quantizer, factor)
    expected = nn.functional.conv2d(batch(), weight, bn.bias - bn.running_mean * factor)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 3e-4), (8, 3e-2)])
def test_statistics_are_those_of_the_unfolded_layer(bits: int, tolerance: float) -> None:
    """D2: NNI's are those of the folded output, fed back into itself."""
    model, floating = net(), net()
    QAT_Quantizer(model, rules(bits), fold_bn=True)
    train(model, None, range(30))
    train(floating, None, range(30))
    for name in ("bn", "bn1"):
        for statistic in ("running_mean", "running_var"):
            expected = getattr(getattr(floating, name), statistic)
            difference = (getattr(getattr(model, name), statistic) - expected).abs().max()
            assert difference <= tolerance * expected.abs().max(), (name, statistic)
        folded = floating.bn.weight.square() * floating.bn.running_var
        assert ((folded - floating.bn.running_var).abs() / floating.bn.running_var).min() > 2 * tolerance


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_float_model(frozen: bool) -> None:
    """With 16 bits nothing is left of quantization; the divisor of the statistics takes no gradient."""
    model, floating = net(), net()
    QAT_Quantizer(model, rules(16), fold_bn=True, freeze_bn_step=0 if frozen else None)
    train(model, None, range(1))
    if frozen:
        floating.eval()
        floating(batch()).square().mean().backward()
    else:
        train(floating, None, range(1))
    own = {name.replace("parametrizations.weight.original", "weight"): p for name, p in model.named_parameters()}
    for name, parameter in floating.named_parameters():
        size = parameter.grad.abs().max().item()
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=0, atol=5e-3 * size + 1e-6, msg=name)


@BOTH
def test_gamma_learns_from_the_batch_norm_alone(kind: type) -> None:
    """In the factor, which the batch norm makes up for, its gradient would be noise of the rounding."""
    model = net()
    kind(model, rules(4), fold_bn=True)
    model.train()
    between = model.conv(batch())
    model.bn(between).square().sum().backward()
    plain = net().bn
    plain(between.detach()).square().sum().backward()
    torch.testing.assert_close(model.bn.weight.grad, plain.weight.grad)


@BOTH
@pytest.mark.parametrize("scheme", ["per_tensor_symmetric", "per_channel_symmetric"])
@pytest.mark.parametrize("gammas", [[0.0, 0.7, -0.5, 1.0], [0.0] * 4, [1e-42, 1e-30, -1e-25, 0.0], [-1.0] * 4])
def test_any_gamma(kind: type, scheme: str, gammas: list[float]) -> None:
    model, floating = net(), net()
    for each in (model, floating):
        with torch.no_grad():
            each.bn.weight.copy_(torch.tensor(gammas))
    kind(model, rules(16, quant_scheme=scheme, quant_dtype="int", **fine(kind)), fold_bn=True)
    for each in (model, floating):
        each.train()
        each.first = each.bn(each.conv(batch()))
        each.first.mul(torch.linspace(-1, 1, 16).reshape(4, 4)).sum().backward()
    assert model.first.isfinite().all()
    torch.testing.assert_close(model.first, floating.first, rtol=1e-3, atol=1e-3)
    dead = [gamma == 0 for gamma in gammas]
    for channel, (found, expected) in enumerate(zip(model.bn.weight.grad, floating.bn.weight.grad, strict=True)):
        # A dead channel keeps 4 steps where it shares its scale with others: that much noise for its gamma.
        tolerance = 0.25 if dead[channel] and not all(dead) and "tensor" in scheme else 0.01
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=2e-2)
    own, expected = model.conv.parametrizations.weight.original.grad, floating.conv.weight.grad.clone()
    if kind is LsqQuantizer:  # no gradient where a weight lies on the end of its grid: the largest does
        expected[own == 0] = 0
        assert (own[[gamma != 0 for gamma in gammas]] == 0).sum() <= 4
    torch.testing.assert_close(own, expected, rtol=2e-2, atol=2e-2)
    for channel, gamma in enumerate(gammas):
        if gamma == 0:
            assert torch.equal(model.first[:, channel], model.bn.bias[channel].expand_as(model.first[:, channel]))
            assert own[channel].abs().max() == 0
    torch.testing.assert_close(model.bn.running_var, floating.bn.running_var, rtol=3e-3, atol=1e-5)
    model.eval()
    floating.eval()
    found, expected = model.bn(model.conv(batch())), floating.bn(floating.conv(batch()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(found[:, dead], expected[:, dead])


def test_a_channel_with_gamma_zero_leaves_the_range_to_the_others() -> None:
    """Pruned channels of small gamma elsewhere: an unscaled weight among them would cost the others their steps."""
    model = net()
    with torch.no_grad():
        model.bn.weight.copy_(torch.tensor([0.0, 0.01, 0.01, -0.01]))
        model.bn.running_var.fill_(1)
    QAT_Quantizer(model, rules(quant_scheme="per_tensor_symmetric", quant_dtype="int"), fold_bn=True)
    model.train()
    model(batch())
    largest = model.conv.parametrizations.weight.original.abs().max().item()
    assert model.conv.parametrizations.weight[0].scale.item() * 127 <= largest * 0.01


@BOTH
@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_channels_too_small_for_the_grid_keep_their_statistics(kind: type, name: str) -> None:
    """Those of zeros would make the factor grow until the weight comes back, and evaluation wrong."""
    torch.manual_seed(0)
    model = shake(nn.Sequential(getattr(nn, name)(4, 4, 3, groups=2 if "T" in name else 1), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, 1e-3, -1e-4, 0.0]))
        model[0].weight[3] *= 1e-3
    floating = copy.deepcopy(model)
    kind(model, rules(4, layers=(name,), **fine(kind)), fold_bn=True)
    generator = torch.Generator().manual_seed(1)
    for each in (model, floating):
        each.train()
    for _ in range(80):
        x = torch.randn(16, 4, 5, 5, generator=generator)
        model(x)
        floating(x)
    ratio = model[1].running_var / floating[1].running_var
    assert ratio.min() > 0.5 and ratio.max() < 2, ratio
    small = torch.tensor([False, True, True, True])
    difference = (model.eval()(x) - floating.eval()(x))[:, small]
    assert difference.abs().max() < 0.02


@BOTH
@pytest.mark.parametrize("frozen", [False, True])
def test_one_convolution_a_layer_and_step(kind: type, frozen: bool) -> None:
    """NNI takes two, in training and in evaluation."""
    model = net()
    kind(model, rules(8, "weight input output"), fold_bn=True, freeze_bn_step=0 if frozen else None)
    train(model, None, range(1))
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad(), Convolutions() as counted:
            model(batch())
        assert counted.count == 3


# ---------------------------------------------------------------- which layers


def layer_of(name: str, groups: int = 1, **more: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer, a batch norm for it and a batch."""
    torch.manual_seed(1)
    if name == "Linear":
        return nn.Linear(4, 6, **more), nn.BatchNorm1d(6), torch.randn(16, 4)
    dims = int(name[-2])
    layer = getattr(nn, name)(4, 6, 3, padding=1, groups=groups, **more)
    return layer, getattr(nn, f"BatchNorm{dims}d")(6), torch.randn(16, 4, *(5,) * dims)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "groups"), [(n, 1) for n in LAYERS] + [("Conv2d", 2), ("ConvTranspose2d", 2)])
def test_layers_of_every_kind(name: str, groups: int, bias: bool) -> None:
    """L8: NNI folds Conv2d alone."""
    layer, norm, x = layer_of(name, groups, bias=bias)
    model = shake(nn.Sequential(layer, norm))
    floating = copy.deepcopy(model)
    quantizer = QAT_Quantizer(model, rules(16, layers=(name,)), fold_bn=True)
    assert quantizer.folded_layers == {"0": "1"}
    assert type(model[0]).__bases__[0].__name__ == name and type(model[1]).__name__ == type(norm).__name__
    for mode in (True, False):
        model.train(mode)
        floating.train(mode)
        expected = floating(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    folded = quantizer.folded_model()
    torch.testing.assert_close(folded(x), floating(x), rtol=1e-5, atol=1e-5)
    assert type(folded[0]) is getattr(nn, name) and type(folded[1]) is nn.Identity and type(folded) is nn.Sequential
    assert not folded[0]._forward_hooks and not folded[0]._forward_pre_hooks
    (model(x).sum() + model.train()(x).sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_batch_norms_of_every_kind(kind: type, affine: bool) -> None:
    torch.manual_seed(0)
    model = shake(nn.Sequential(nn.Conv2d(1, 4, 3), kind(4, affine=affine, momentum=None, eps=1e-3)))
    floating = copy.deepcopy(model)
    quantizer = QAT_Quantizer(model, rules(16, layers=("Conv2d",)), fold_bn=True)
    assert quantizer.folded_layers == {"0": "1"} and isinstance(model[1], kind)
    for mode in (True, True, False):
        model.train(mode)
        floating.train(mode)
        torch.testing.assert_close(model(batch()), floating(batch()), rtol=1e-3, atol=1e-3)
    assert model[1].num_batches_tracked == 2


@BOTH
def test_batch_norms_stay_where_the_weight_is_not_quantized(kind: type) -> None:
    """D7: NNI drops them."""
    model, floating = net(), net()
    quantizer = kind(model, rules(8, "output", ("ReLU",)) + rules(8, "input", ("Conv2d",)), fold_bn=False)
    assert quantizer.folded_layers == {}
    model = net()
    with pytest.warns(UserWarning, match="fold_bn=True: no batch norm follows a layer with a quantized weight"):
        quantizer = kind(model, rules(8, "input", ("Conv2d",)), fold_bn=True)
    assert quantizer.folded_layers == {} and type(model.bn) is nn.BatchNorm2d
    with pytest.warns(UserWarning, match="has no (range|scale) yet"):
        assert torch.equal(model.eval()(batch()), floating.eval()(batch()))


class Strange(nn.Module):
    """One convolution and batch norm, used in a way that forbids folding."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        if way == "no statistics":
            self.bn = nn.BatchNorm2d(4, track_running_stats=False)
        if way == "subclass":
            self.conv = type("Own", (nn.Conv2d,), {"forward": lambda self, x: nn.Conv2d.forward(self, 2 * x)})(4, 4, 3)
        if way == "hook":
            self.conv.register_forward_hook(lambda module, args, output: output * 2)
        if way == "bias":
            parametrize.register_parametrization(self.conv, "bias", nn.Identity())

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.way == "read twice":
            return self.bn(y) + y
        if self.way == "two batch norms":
            return self.bn(y) + self.other(y)
        if self.way == "returned":
            return self.bn(y), [y]
        if self.way == "layer called twice":
            return self.bn(y) + self.conv(x + 1)
        if self.way == "batch norm called twice":
            return self.bn(y) + self.bn(y * 2)
        if self.way == "in place":
            y += 1
        if self.way == "parameters":
            return self.bn(y) + self.conv.weight.sum()
        if self.way == "training":
            return self.bn(y) if self.training else self.other(y)
        return self.bn(y)


STRANGE = {
    "read twice": "something else reads the layer's output too",
    "two batch norms": "something else reads",
    "returned": "something else reads",
    "in place": "something else reads",
    "layer called twice": "the layer is called 2 times in one forward",
    "batch norm called twice": "the batch norm is called 2 times",
    "parameters": "the model reads their parameters itself",
    "training": "called 0 times",
    "no statistics": "keeps no running statistics",
    "subclass": "its class is Own, expected one of torch.nn's",
    "hook": "a hook stands between them",
    "bias": "the layer's bias is parametrized",
}


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("way", STRANGE)
def test_batch_norms_that_must_stay(way: str, traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """L8: NNI does not look who else reads. Folded or not, the numbers are right."""
    if not traced:
        if way in ("parameters", "training"):
            pytest.skip("the run on dummy_input does not show this")
        no_tracing(monkeypatch)
    model, twin = Strange(way), Strange(way)
    x = torch.randn(2, 4, 5, 5)
    rule = {"quant_types": ["weight"], "quant_bits": 8, "op_names": ["conv"]}
    QAT_Quantizer(twin, [rule], fold_bn=False)
    if way == "subclass" or (way == "in place" and traced):  # nothing that could be folded, so nothing to say
        assert QAT_Quantizer(model, [rule], dummy_input=x).folded_layers == {}
    else:
        with pytest.warns(UserWarning, match=f"not folded stay layers of their own:\n  'conv': .*{STRANGE[way]}"):
            quantizer = QAT_Quantizer(model, [rule], dummy_input=x)
        assert quantizer.folded_layers == {} and list(quantizer.unfolded_layers) == ["conv"]
    for mode in (True, False):
        assert str(model.train(mode)(x)) == str(twin.train(mode)(x))


def no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkern.binarized import CannotTrace
    from quantkern.bn_fold import pairs

    def trace(*_: object) -> None:
        raise CannotTrace("torch.fx cannot trace the model (told so)")

    monkeypatch.setattr(pairs, "trace", trace)


class Untraceable(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 1e6:
            raise ValueError("too large")
        y = self.conv(x)
        assert y.shape[1] == 4 and y.dtype is x.dtype
        return self.out(self.relu(self.bn1(self.fc(self.relu(self.bn(y)).flatten(1)))))


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_models_that_cannot_be_traced_fold_by_dummy_input(form: str) -> None:
    torch.manual_seed(0)
    model = Untraceable()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="fold_bn=True: .*cannot trace.*give a dummy_input"):
        QAT_Quantizer(model, rules(), fold_bn=True)
    assert not parametrize.is_parametrized(model.conv)
    dummy = {"tensor": batch(), "tuple": (batch(),), "dict": {"x": batch()}}[form]
    quantizer = QAT_Quantizer(model, rules(), dummy_input=dummy)
    assert quantizer.folded_layers == {"conv": "bn", "fc": "bn1"} and not quantizer.unfolded_layers
    layers = [module for module in model.modules() if module is not model]
    assert not any(m._forward_pre_hooks or set(m._forward_hooks.values()) - {keep_codes} for m in layers)
    assert model.training and all(
        torch.equal(model.bn.state_dict()[key[3:]], before[key]) for key in before if key[:3] == "bn."
    )


def test_both_ways_of_looking_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
            self.bn, self.skip = nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn(self.body(x)) + self.skip(x))

    model = nn.Sequential(Block(), Block())
    layers = {module: None for module in model.modules() if isinstance(module, nn.Conv2d)}
    traced = find_pairs(model, layers)
    no_tracing(monkeypatch)
    watched = find_pairs(model, layers, torch.randn(1, 4, 5, 5))
    assert len(traced.folded) == 6 and traced == watched and not traced.reasons


def test_channels_of_sequences_are_not_those_of_the_batch_norm() -> None:
    model, x = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), torch.randn(3, 6, 5)
    with pytest.warns(UserWarning, match="channels are not the layer's"):
        assert QAT_Quantizer(copy.deepcopy(model), rules(layers=("Linear",)), dummy_input=x).folded_layers == {}
    QAT_Quantizer(model, rules(layers=("Linear",)), fold_bn=True)
    with pytest.raises(ValueError, match=r"0.weight: a tensor of shape \[3, 6, 6\] reaches the folded batch norm"):
        model(x)


def test_a_rule_about_the_batch_norm() -> None:
    about = {"quant_types": ["input"], "quant_bits": 8, "op_names": ["bn"]}
    with pytest.warns(UserWarning, match="'conv': 'bn' behind it: a rule quantizes the batch norm's own tensors"):
        quantizer = QAT_Quantizer(net(), [*rules(), about], fold_bn=True)
    assert quantizer.folded_layers == {"fc": "bn1"}
    model = net()
    assert len(QAT_Quantizer(model, [*rules(), {**about, "quant_types": ["output"]}], fold_bn=True).folded_layers) == 2
    train(model, None, range(1))
    assert model.bn.quantkern.output.is_observed()


def test_folding_is_asked_for_by_dummy_input_or_argument() -> None:
    """L6: with NNI it cannot be turned off."""
    assert QAT_Quantizer(net(), rules()).folded_layers == {}
    assert QAT_Quantizer(net(), rules(), dummy_input=batch(), fold_bn=False).folded_layers == {}
    for more in ({"fold_bn": True}, {"dummy_input": batch()}, {"dummy_input": batch(), "fold_bn": True}):
        assert QAT_Quantizer(net(), rules(), **more).folded_layers == {"conv": "bn", "fc": "bn1"}


@BOTH
@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"fold_bn": 1}, TypeError, "fold_bn must be True, False or None .*, got 1"),
        ({"fold_bn": True, "freeze_bn_step": -1}, ValueError, "freeze_bn_step must be an integer >= 0 or None, got -1"),
        ({"fold_bn": True, "freeze_bn_step": True}, ValueError, "freeze_bn_step must be .*, got True"),
        ({"freeze_bn_step": 3}, ValueError, "freeze_bn_step=3 is about folded batch norms, and none is folded"),
    ],
)
def test_wrong_arguments(kind: type, more: dict[str, Any], error: type[Exception], message: str) -> None:
    model = net()
    with pytest.raises(error, match=message):
        kind(model, rules(), **more)
    assert not parametrize.is_parametrized(model.conv)
    with pytest.raises(TypeError, match="positional"):
        kind(model, rules(), None, None, True)


# ---------------------------------------------------------------- outputs, scales, calibration


@BOTH
def test_the_output_of_a_folded_layer_is_its_batch_norms(kind: type) -> None:
    model = net()
    quantizer = kind(model, rules(4, "weight output"), fold_bn=True)
    for mode in (True, False):
        model.train(mode)
        between = model.conv(batch())
        output = model.bn(between)
        assert output[:, 0].unique().numel() <= 16 and output.unique().numel() <= 16
        if mode:
            assert between.unique().numel() > 16
    assert set(dict(model.named_children())) == set(dict(net().named_children()))
    assert "output_bits" in quantizer._attachments[0].calibration()


def test_a_learned_scale_starts_on_the_folded_weight() -> None:
    """D13: NNI's starts on the unfolded one."""
    model, twin = net(), net()
    quantizer = LsqQuantizer(model, rules(4), fold_bn=True)
    model.train()(batch())
    for module in (model.bn, twin.bn):
        module.load_state_dict(net().bn.state_dict())
    folded = twin.conv.weight * (twin.bn.weight / (twin.bn.running_var + 1e-5).sqrt()).reshape(-1, 1, 1, 1)
    expected = 2 * folded.abs().mean() / math.sqrt(7)
    scale = quantizer._attachments[0].calibration()["weight_scale"]
    torch.testing.assert_close(scale, expected.detach().reshape(1))


@pytest.mark.parametrize("scheme", ["per_tensor_symmetric", "per_channel_symmetric"])
def test_a_learned_scale_is_exported_as_that_of_the_folded_weight(scheme: str, tmp_path: Path) -> None:
    """And read as that, by either quantizer."""
    model = net()
    config = rules(4, quant_scheme=scheme, quant_dtype="int")
    quantizer = LsqQuantizer(model, config, fold_bn=True)
    train(model, None, range(3))
    model.eval()
    with torch.no_grad():
        steps = model.conv.weight / quantizer._attachments[0].calibration()["weight_scale"].reshape(-1, 1, 1, 1)
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert steps.abs().max() > 2
        expected = model(batch())
    calibration = quantizer.export_model(tmp_path / "m.pt")
    again = LsqQuantizer(model, config, fold_bn=True)
    again.load_calibration_config(calibration)
    torch.testing.assert_close(model(batch()), expected, rtol=1e-4, atol=1e-4)


def test_a_learned_scale_follows_the_factor() -> None:
    """From statistics of a new batch norm to its own: a scale left behind would clip all weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    LsqQuantizer(model, rules(4, layers=("Conv2d",)), fold_bn=True)
    model.train()
    for seed in range(120):
        model(batch(seed) * 0.1)
    floating = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    floating.load_state_dict(
        {
            key.replace("parametrizations.weight.original", "weight"): value
            for key, value in model.state_dict().items()
            if "weight.0" not in key
        }
    )
    floating[1].reset_running_stats()
    floating.train()
    for seed in range(120):
        floating(batch(seed) * 0.1)
    ratio = model[1].running_var / floating[1].running_var
    assert floating[1].running_var.max() < 0.02
    assert ratio.min() > 0.7 and ratio.max() < 1.4, ratio
    difference = model.eval()(batch() * 0.1) - floating.eval()(batch() * 0.1)
    assert difference.abs().mean() < 0.25


def test_calibration_says_the_scale_of_the_folded_weight(tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        model.bn.weight[1] = 0
    quantizer = QAT_Quantizer(model, rules(quant_scheme="per_channel_symmetric", quant_dtype="int"), fold_bn=True)
    train(model, None, range(2))
    folded = quantizer.folded_model().conv.weight.detach()
    calibration = quantizer.export_model(tmp_path / "m.pt", tmp_path / "c.pt")
    torch.testing.assert_close(calibration["conv"]["weight_scale"] * 127, folded.abs().amax((1, 2, 3)))
    again = QAT_Quantizer(model, rules(quant_scheme="per_channel_symmetric", quant_dtype="int"), fold_bn=True)
    again.load_calibration_config(torch.load(tmp_path / "c.pt"))
    assert torch.equal(again._attachments[0].calibration()["weight_scale"], calibration["conv"]["weight_scale"])


@BOTH
def test_export_restores_the_plain_model(kind: type, tmp_path: Path) -> None:
    model, plain = net(), net()
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    quantizer = kind(model, rules(8, "weight", **fine(kind)), optimizer, fold_bn=True, freeze_bn_step=2)
    held = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    assert held == list(parameters.values())
    train(model, optimizer, range(3))
    model.eval()
    folded, outputs = quantizer.folded_model(), model(batch(9))
    quantizer.export_model(tmp_path / "m.pt")
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    for (name, module), expected in zip(model.named_modules(), plain.modules(), strict=True):
        assert type(module) is type(expected), name
        assert not module._forward_hooks and not module._forward_pre_hooks and "folding" not in vars(module)
    plain.load_state_dict(torch.load(tmp_path / "m.pt"), strict=True)
    float_outputs = plain.eval()(batch(9))
    torch.testing.assert_close(folded(batch(9)), float_outputs, rtol=1e-4, atol=1e-5)
    assert (outputs - float_outputs).abs().max() < 0.1 * float_outputs.abs().max()
    with pytest.raises(RuntimeError, match="folded_model\\(\\): export_model\\(\\) has taken the quantizers off"):
        quantizer.folded_model()


def test_a_failing_export_leaves_the_folded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    quantizer = QAT_Quantizer(model, rules(8, "weight output"), fold_bn=True)
    train(model, None, range(1))
    before = model.eval()(batch())

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        quantizer.export_model(tmp_path / "m.pt")
    assert torch.equal(model(batch()), before) and torch.equal(copy.deepcopy(model)(batch()), before)


# ---------------------------------------------------------------- training


@BOTH
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_freezing_after_so_many_steps(kind: type, with_optimizer: bool) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01) if with_optimizer else None
    quantizer = kind(model, rules(8, "weight", **fine(kind)), optimizer, fold_bn=True, freeze_bn_step=3)
    seen = []
    for seed in range(5):
        train(model, optimizer, range(seed, seed + 1))
        seen.append((model.bn.running_mean.clone(), model.bn.running_var.clone()))
    moves = [not torch.equal(before[0], after[0]) for before, after in zip(seen, seen[1:], strict=False)]
    assert moves == [True, True, False, False]
    assert model.bn.num_batches_tracked == 3
    model.train()
    training = model(batch(9))
    gradients = torch.autograd.grad(training.square().sum(), list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(g.abs().max() > 0 for (n, _), g in zip(model.named_parameters(), gradients, strict=True) if "bn" in n)
    assert torch.equal(training, model.eval()(batch(9)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # The folded model is the same function without rounding: 8-bit weights of at most 72 terms.
    difference = quantizer.folded_model()(batch(9)) - training
    assert difference.abs().max() < 0.05 * training.abs().max()


def test_after_freezing_the_folded_model_is_the_quantized_one_up_to_rounding() -> None:
    model = net()
    quantizer = QAT_Quantizer(model, rules(16, "weight input output", ema_decay=1e-3), fold_bn=True, freeze_bn_step=2)
    train(model, None, range(4))
    model.eval()
    torch.testing.assert_close(quantizer.folded_model()(batch(3)), model(batch(3)), rtol=0, atol=2e-4)


def test_a_batch_norm_in_evaluation_mode_is_folded_in_training_too() -> None:
    """As is usual when a trained network is tuned with its statistics kept."""
    model = net()
    QAT_Quantizer(model, rules(8), fold_bn=True)
    model.train()
    model.bn.eval()
    output = model.conv(batch())
    assert model.bn(output) is output and model.bn.num_batches_tracked == 0
    assert torch.equal(output, model.eval().conv(batch()))


def test_a_training_step_never_waits_for_the_device() -> None:
    for with_optimizer in (True, False):
        model = net().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        given = optimizer if with_optimizer else None
        QAT_Quantizer(model, rules(8, "weight input output"), given, fold_bn=True, freeze_bn_step=2)
        with NoReads():
            for seed in range(4):
                optimizer.zero_grad()
                model(batch(seed)).square().mean().backward()
                optimizer.step()
        assert model.conv.parametrizations.weight[0].keeps_statistics


@BOTH
@pytest.mark.parametrize("at", [1, 3])
def test_resuming_from_a_state_dict_is_exact(kind: type, at: int) -> None:
    """Before and after the batch norms freeze at step 2."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        kind(model, rules(8, "weight input output"), optimizer, fold_bn=True, freeze_bn_step=2)
        return model, optimizer

    model, optimizer = build()
    train(model, optimizer, range(at))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, other_optimizer = build()
    train(other, other_optimizer, range(50, 50 + 4 - at))
    other.load_state_dict(state[0])
    other_optimizer.load_state_dict(state[1])
    expected = train(model, optimizer, range(at, 6))
    found = train(other, other_optimizer, range(at, 6))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    states = other.state_dict()
    assert all(torch.equal(value, states[key]) for key, value in model.state_dict().items())


@BOTH
def test_copies_live_on_their_own(kind: type) -> None:
    model = net()
    kind(model, rules(8, "weight input output"), fold_bn=True, freeze_bn_step=3)
    train(model, None, range(1))
    twin = copy.deepcopy(model)
    assert twin.bn.folding.layer is twin.conv and twin.conv.folding.norm is twin.bn
    kept = copy.deepcopy(model.state_dict())
    expected = train(twin, None, range(1, 5))
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(train(model, None, range(1, 5)), expected, strict=True))
    assert torch.equal(model.eval()(batch()), twin.eval()(batch()))


@pytest.mark.usefixtures("scales_the_long_way")
@BOTH
@pytest.mark.parametrize("scheme", ["per_tensor_symmetric", "per_channel_symmetric"])
def test_compiled_training_equals_eager(kind: type, scheme: str) -> None:
    """torch.compile recomputes what it can in the backward, and the batch norm has renewed its statistics by then."""
    eager, compiled = net(), net()
    calls = []
    for model in (eager, compiled):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        config = rules(4, "weight input output", quant_scheme={"weight": scheme}, quant_dtype={"weight": "int"})
        kind(model, config, optimizer, fold_bn=True, freeze_bn_step=3)
        train(model, optimizer, range(1))
        calls.append(optimizer)
    torch._dynamo.reset()
    fast = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(1, 6):
        first = train(eager, calls[0], range(seed, seed + 1))[0]
        second = train(compiled, calls[1], range(seed, seed + 1), fast)[0]
        assert torch.equal(first, second)
        for (name, mine), theirs in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad), (seed, name)
    assert eager.bn.num_batches_tracked == compiled.bn.num_batches_tracked == 3
    state = compiled.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in eager.state_dict().items())
    assert torch.equal(fast.eval()(batch(8)), eager.eval()(batch(8)))


def test_compiled_forwards_that_count_steps_freeze_with_the_next_train() -> None:
    model = net().train()
    QAT_Quantizer(model, rules(), fold_bn=True, freeze_bn_step=2)
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        fast(batch(seed))
    assert model.bn.num_batches_tracked == 3 and not model.conv.folding.keeps_statistics
    model.train()
    fast(batch(3))
    assert model.bn.num_batches_tracked == 3 and model.conv.folding.keeps_statistics


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_types(dtype: torch.dtype) -> None:
    model = net()
    QAT_Quantizer(model, rules(8, "weight"), fold_bn=True)
    model.to(dtype)
    for mode in (True, False):
        output = model.train(mode)(batch().to(dtype))
        assert output.dtype is dtype and output.isfinite().all()
    model.train()(batch().to(dtype)).sum().backward()
    assert model.conv.parametrizations.weight.original.grad.dtype is dtype


def test_autocast() -> None:
    model = net()
    QAT_Quantizer(model, rules(8, "weight input output"), fold_bn=True)
    for mode in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            output = model.train(mode)(batch())
        assert output.isfinite().all() and output.dtype is torch.bfloat16


def test_other_parametrizations_of_the_weight(tmp_path: Path) -> None:
    model = net()
    nn.utils.parametrizations.weight_norm(model.conv)
    floating = copy.deepcopy(model)
    quantizer = QAT_Quantizer(model, rules(16), fold_bn=True)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(batch()), floating.train(mode)(batch()), rtol=1e-2, atol=1e-2)
    folded = quantizer.folded_model()
    torch.testing.assert_close(folded(batch()), floating(batch()), rtol=1e-4, atol=1e-4)
    assert type(folded.conv) is nn.Conv2d and set(folded.state_dict()) >= {"conv.weight", "conv.bias"}
    quantizer.export_model(tmp_path / "m.pt")
    floating.load_state_dict(torch.load(tmp_path / "m.pt"), strict=True)
    assert torch.equal(model(batch()), floating(batch()))


def test_data_parallel_says_what_to_do() -> None:
    model = net()
    QAT_Quantizer(model, rules(), fold_bn=True)
    with pytest.raises(RuntimeError, match="DataParallel cannot replicate a layer with a folded batch norm"):
        model.conv._replicate_for_data_parallel()


def _one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(f"{folder}/store", 2), rank=rank, world_size=2
    )
    try:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        LsqQuantizer(model, rules(8, "weight input output"), optimizer, fold_bn=True, freeze_bn_step=2)
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel.train()
        for seed in range(4):
            optimizer.zero_grad()
            parallel(batch(10 * rank + seed)).square().mean().backward()
            optimizer.step()
        parallel(batch(0))  # broadcasts the statistics of the first rank once more
        torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ranks_of_distributed_training_stay_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["bn.num_batches_tracked"] == 2
    assert all(torch.equal(value, second[key]) for key, value in first.items())


# ---------------------------------------------------------------- does it train


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def train_on_digits(fold: bool, bits: int, kind: type) -> tuple[list[float], float]:
    """Mean loss of every epoch, and the accuracy on the last third."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(3)
    model = Digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    delay = {"quant_start_step": 20} if kind is LsqQuantizer else {}
    config = rules(bits, "weight input output", **delay)
    quantizer = kind(model, config, optimizer, fold_bn=fold, freeze_bn_step=114 if fold else None)
    assert len(quantizer.folded_layers) == 2 * fold
    count, losses = 1200, []
    for epoch in range(8):
        if epoch == 6:  # step 114: fixed statistics bear a smaller learning rate only, without quantization too
            for group in optimizer.param_groups:
                group["lr"] /= 10
        model.train()
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch)).split(64)
        total = 0.0
        for picked in order:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[picked]), labels[picked])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(picked)
        losses.append(total / count)
    model.eval()
    with torch.no_grad():
        return losses, (model(images[count:]).argmax(1) == labels[count:]).float().mean().item()


@pytest.mark.parametrize(("bits", "kind"), [(8, QAT_Quantizer), (4, QAT_Quantizer), (4, LsqQuantizer)])
def test_training_with_folding_is_as_good_as_without(bits: int, kind: type) -> None:
    """Every epoch's loss within 0.05 + 10 % and the accuracy within 2 points: between seeds they differ by more."""
    plain, plain_accuracy = train_on_digits(False, bits, kind)
    folded, accuracy = train_on_digits(True, bits, kind)
    for epoch, (loss, other) in enumerate(zip(folded, plain, strict=True)):
        assert loss < other * 1.1 + 0.05, (epoch, loss, other)
    assert folded[-1] < 0.1 and accuracy > plain_accuracy - 0.02, (plain, plain_accuracy, folded, accuracy)


def test_the_state_of_a_folded_weight_is_an_ordinary_one() -> None:
    model = net()
    QAT_Quantizer(model, rules(), fold_bn=True)
    assert isinstance(model.conv.parametrizations.weight[0], WeightFakeQuant)
    assert set(model.conv.state_dict()) == {"parametrizations.weight.original"} | {
        f"parametrizations.weight.0.{name}" for name in ("scale", "zero_point")
    }
    learned = net()
    LsqQuantizer(learned, rules(), fold_bn=True)
    assert isinstance(learned.conv.parametrizations.weight[0], LearnedWeight)
