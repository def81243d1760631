"""Packed inference layers: equal to the float layers of signs, small, and particular about what is loaded into them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantkern
import quantkern.functional as F
from quantkern.nn import BinaryConv2d, BinaryLinear, Pool
from quantkern.nn.packed import check_all_states, find_thresholds


def signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def linear(k: int = 70, n: int = 45, bias: bool = True) -> nn.Linear:
    torch.manual_seed(k + n)
    return nn.Linear(k, n, bias)


def conv(c: int = 40, o: int = 45, kernel: int = 3, **more: Any) -> nn.Conv2d:
    torch.manual_seed(c + o)
    return nn.Conv2d(c, o, kernel, **more)


def expected(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """The float layer on signs, the bias added to the exact sum."""
    if isinstance(layer, nn.Linear):
        y = nn.functional.linear(signs(x), signs(layer.weight.detach()))
        return y if layer.bias is None else y + layer.bias.detach()
    padding = layer.padding
    y = nn.functional.conv2d(signs(x), signs(layer.weight.detach()), None, layer.stride, padding, layer.dilation)
    return y if layer.bias is None else y + layer.bias.detach().view(-1, 1, 1)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("n", [1, 32, 45])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_float_layer_of_signs(k: int, n: int, bias: bool) -> None:
    layer = linear(k, n, bias)
    packed = BinaryLinear.from_float(layer)
    for shape in ((5, k), (k,), (0, k), (1, k), (2, 3, k)):
        x = torch.randn(shape)
        assert torch.equal(packed(x), expected(layer, x))
        words = F.pack_signs(x)
        assert isinstance(words, Tensor) and torch.equal(packed(words), expected(layer, x))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"padding": 1},
        {"padding": (2, 0), "stride": (1, 2)},
        {"dilation": 2, "padding": 2, "bias": False},
        {"padding": "same"},
        {"padding": "same", "kernel": 5, "dilation": (1, 2)},
        {"padding": "valid", "stride": 2},
        {"kernel": 1},
        {"c": 3, "o": 1},
    ],
)
def test_conv_is_the_float_layer_of_signs(more: dict[str, Any]) -> None:
    layer = conv(**more)
    packed = BinaryConv2d.from_float(layer)
    for size in (2, 1, 0):
        x = torch.randn(size, layer.in_channels, 9, 11)
        assert torch.equal(packed(x), expected(layer, x))
        words = F.pack_signs(x, axis=1)
        assert isinstance(words, Tensor) and torch.equal(packed(words), expected(layer, x))
    assert torch.equal(packed(x := torch.randn(layer.in_channels, 9, 11)), expected(layer, x))
    last = torch.randn(2, layer.in_channels, 9, 11).contiguous(memory_format=torch.channels_last)
    assert torch.equal(packed(last), expected(layer, last))


def test_images_of_one_pixel() -> None:
    layer = conv(33, 5, padding=1)
    x = torch.randn(2, 33, 1, 1)
    assert torch.equal(BinaryConv2d.from_float(layer)(x), expected(layer, x))


def test_signs_come_packed_or_real() -> None:
    layer, x = linear(), torch.randn(4, 70)
    truth = signs(expected(layer, x))
    real = BinaryLinear.from_float(layer, sign=True)(x)
    packed = BinaryLinear.from_float(layer, sign=True, packed_output=True)(x)
    assert torch.equal(real, truth) and torch.equal(F.unpack_signs(packed, 45), truth)
    image, x = conv(padding=1), torch.randn(2, 40, 6, 6)
    truth = signs(expected(image, x))
    real = BinaryConv2d.from_float(image, sign=True)(x)
    assert real.is_contiguous() and torch.equal(real, truth)
    packed = BinaryConv2d.from_float(image, sign=True, packed_output=True)(x)
    assert packed.shape == (2, 6, 6, 2) and torch.equal(F.unpack_signs(packed, 45).permute(0, 3, 1, 2), truth)


@pytest.mark.parametrize("before", [True, False])
def test_pooling(before: bool) -> None:
    """Where the batch norm behind it turns signs, the largest sum is the smallest sign."""
    layer, x = conv(padding=1), torch.randn(2, 40, 7, 7)
    torch.manual_seed(3)
    factor = torch.randn(45)
    packed = BinaryConv2d.from_float(layer, sign=True, pool=Pool((3, 3), (2, 2), (1, 1), before))
    follow = find_thresholds(lambda y: y * factor, layer.bias, 45, packed.longest_sum, layer.weight)
    packed.take_threshold(*follow)
    assert 0 < int(follow[1].sum()) < 45
    y, by = expected(layer, x), factor.view(-1, 1, 1)
    pooled = nn.functional.max_pool2d(y, 3, 2, 1) * by if before else nn.functional.max_pool2d(signs(y * by), 3, 2, 1)
    assert torch.equal(packed(x), signs(pooled))


@pytest.mark.parametrize("bias", [True, False])
def test_thresholds_decide_as_the_batch_norm_does_for_every_sum(bias: bool) -> None:
    torch.manual_seed(1)
    longest, norm = 57, nn.BatchNorm1d(300).eval()
    with torch.no_grad():
        norm.weight.normal_()
        norm.weight[:20] = 0.0
        norm.bias.normal_()
        norm.bias[10:30] = 0.0
        norm.running_mean.normal_().mul_(20)  # type: ignore[union-attr]
        norm.running_mean[30:60] = torch.arange(-15.0, 15.0)  # type: ignore[index]
        norm.bias[30:60] = 0.0  # exactly 0 at a sum
        norm.running_mean[60:70] = 1000.0  # type: ignore[index]
        norm.running_var.uniform_(0, 900)  # type: ignore[union-attr]
    given = torch.randn(300) if bias else None
    threshold, flip = find_thresholds(norm, given, 300, longest, norm.weight)
    for total in range(-longest, longest + 1):
        y = torch.full((1, 300), float(total))
        y = y if given is None else y + given
        with torch.no_grad():
            assert torch.equal((norm(y) >= 0)[0], (total >= threshold) ^ flip)


def test_a_state_dict_is_32_times_smaller_and_loads_strictly() -> None:
    layer = conv(256, 256, bias=False)
    packed = BinaryConv2d.from_float(layer)
    sizes = []
    for model in (layer, packed):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        sizes.append(file.tell())
    assert sizes[0] / sizes[1] > 31
    assert list(packed.state_dict()) == ["weight_packed"]
    new = BinaryConv2d(256, 256, 3, bias=False)
    x = torch.randn(1, 256, 5, 5)
    assert not torch.equal(new(x), packed(x))  # and the weights are in this device's order now
    new.load_state_dict(torch.load(io.BytesIO(_saved(packed)), weights_only=True), strict=True)
    assert torch.equal(new(x), packed(x))


def _saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getvalue()


def test_copies_pickles_and_dtypes() -> None:
    layer = linear()
    packed, x = BinaryLinear.from_float(layer), torch.randn(3, 70)
    truth = packed(x)
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.arranged is None and packed.arranged is not None
    assert torch.equal(loaded(x), truth) and torch.equal(copy.deepcopy(packed)(x), truth)
    half = copy.deepcopy(packed).half()
    assert half.bias.dtype is torch.float32 and half(x.half()).dtype is torch.float16
    words = F.pack_signs(x)
    assert half(words).dtype is torch.float16 and torch.equal(half(words), truth.half())
    assert torch.equal(half(x), truth)  # real results follow the input
    moved = copy.deepcopy(packed).to("meta")
    assert moved.weight_packed.is_meta and moved.arranged is None


def test_extra_repr() -> None:
    pool = Pool((2, 2), (2, 2), (0, 0), True)
    layer = BinaryConv2d(3, 8, 3, padding=1, bias=False, sign=True, packed_output=True, pool=pool)
    text = "BinaryConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), sign, packed output"
    assert repr(layer) == text + ", max_pool2d=(2, 2), stride=(2, 2))"
    assert repr(BinaryLinear(3, 8)) == "BinaryLinear(in_features=3, out_features=8, bias=True)"
    assert quantkern.nn.BinaryLinear is BinaryLinear


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.int64)[:, :2], r"is torch.int64 of shape \[45, 2\], expected torch.int32 of shape \[45,"),
        (lambda t: t.view(torch.uint8), r"is torch.uint8 of shape \[45, 12\], expected torch.int32 of shape \[45, 3\]"),
        (lambda t: t[:, :2], r"of shape \[45, 2\], expected torch.int32 of shape \[45, 3\] \(70 signs, 32 a word\)"),
        (lambda t: t[:40], r"of shape \[40, 3\], expected .*; convert\(\) the trained quantizer again, or pack"),
        (lambda t: t.flatten()[:-1], r"of shape \[134\]"),
        (lambda t: t | (1 << 30), "padding bits that are not 0 behind its 70 signs"),
        (lambda t: t.tolist(), "is list, expected a tensor"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error_and_nothing_is_loaded(change: Any, message: str) -> None:
    good, other = BinaryLinear.from_float(linear()), BinaryLinear.from_float(linear(bias=True))
    with torch.no_grad():
        good.bias.add_(1.0)  # type: ignore[union-attr]
    state = dict(good.state_dict())
    state["weight_packed"] = change(state["weight_packed"])
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    with pytest.raises(RuntimeError, match="weight_packed"):
        other.load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match="Unexpected key.*weight"):
        other.load_state_dict(linear().state_dict())
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_a_model_is_loaded_whole_or_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(4, 70), BinaryLinear.from_float(linear()))
    model.register_load_state_dict_pre_hook(check_all_states)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    state["1.weight_packed"] = before["1.weight_packed"][:-1]
    with pytest.raises(ValueError, match=r"nothing was loaded:\n  1. 1.weight_packed is torch.int32 of shape \[44"):
        model.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(4, 4, 2, padding="same"), "padding='same' pads its two sides differently"),
    ],
)
def test_layers_that_cannot_be_packed(layer: nn.Conv2d, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BinaryConv2d.from_float(layer)


def test_wrong_layers_and_options() -> None:
    with pytest.raises(TypeError, match=r"layer must be a torch.nn.Conv2d, got Linear"):
        BinaryConv2d.from_float(linear())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"layer must be a torch.nn.Linear, got Conv1d"):
        BinaryLinear.from_float(nn.Conv1d(2, 2, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="packed_output needs sign=True"):
        BinaryLinear(3, 4, packed_output=True)
    with pytest.raises(ValueError, match="pass bias=False"):
        BinaryLinear(3, 4, sign=True)
    with pytest.raises(ValueError, match="only signs are pooled"):
        BinaryConv2d(3, 4, 3, pool=Pool((2, 2), (2, 2), (0, 0), True))
    with pytest.raises(ValueError, match="stride must be"):
        BinaryConv2d(3, 4, 3, stride=0)


def test_wrong_inputs() -> None:
    packed, image = BinaryLinear.from_float(linear()), BinaryConv2d.from_float(conv())
    with pytest.raises(ValueError, match=r"x must have 70 channels or features, got 66 in shape \[2, 66\]"):
        packed(torch.randn(2, 66))
    with pytest.raises(TypeError, match="packed signs in int32, got torch.int64"):
        packed(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="words"):
        packed(torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="contiguous"):
        packed(torch.zeros(2, 6, dtype=torch.int32)[:, ::2])
    with pytest.raises(ValueError, match="padding bits"):
        packed(torch.full((2, 3), -1, dtype=torch.int32))
    with pytest.raises(ValueError, match="x must have 40 channels or features, got 39"):
        image(torch.randn(1, 39, 5, 5))
    with pytest.raises(ValueError, match=r"x must be images \[N, 40, H, W\], or packed \[N, H, W, 2\]"):
        image(torch.zeros(5, 5, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="larger than"):
        image(torch.randn(1, 40, 2, 2))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = BinaryConv2d.from_float(conv(padding=1), sign=True, packed_output=True)
        self.second = BinaryConv2d.from_float(conv(45, 8), sign=True, pool=Pool((2, 2), (2, 2), (0, 0), True))
        self.last = BinaryLinear.from_float(linear(32, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.image(x)).flatten(1))


@pytest.mark.parametrize("warm", [True, False])
def test_compiles_and_exports(warm: bool) -> None:
    model, x = Stack().eval(), torch.randn(2, 40, 6, 6)
    truth = Stack().eval()(x)
    if warm:
        model(x)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), truth)
        program = torch.export.export(model, (x,))
        assert torch.equal(program.module()(x), truth)
