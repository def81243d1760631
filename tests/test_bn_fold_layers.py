"""Which batch norms are folded: layers of every kind, those that must stay, models that cannot be traced.

D7, L6 and L8 are what NNI does wrong.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from folded_networks import BOTH, LAYERS, Untraceable, batch, layer_of, net, rules, shake, train
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantkern.bn_fold import find_pairs
from quantkern.lean_backward import keep_codes
from quantkern.quantizers import QAT_Quantizer


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
