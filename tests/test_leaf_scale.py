"""The scale of a first layer's input learns without the gradient of that input being made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantkern import LsqQuantizer, layer_quantizers

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1, stride=2), (4, 3, 20, 20)),
    "reflecting": (lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect", bias=False), (4, 3, 12, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3, groups=2, dilation=2), (4, 4, 20)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (3, 2, 5, 6, 7)),
    "linear": (lambda: nn.Linear(30, 20), (16, 30)),
    "without_bias": (lambda: nn.Linear(30, 20, bias=False), (16, 30)),
    "three_dimensions": (lambda: nn.Linear(30, 20), (4, 5, 30)),
}
RULE = {
    "quant_types": ["weight", "input"],
    "quant_bits": 4,
    "op_types": ["Conv1d", "Conv2d", "Conv3d", "Linear"],
}


def quantized(make: Callable[[], nn.Module], **settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.ReLU(inplace=True))
    LsqQuantizer(model, [{**RULE, "op_types": [type(model[0]).__name__], **settings}])
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the second forward: scales start in the first."""
    model(x)
    model(x * 3).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def plainly(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_quantizers, "quantize_leaf", lambda *_: None)
        return gradients(model, x)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_long_way(name: str) -> None:
    make, shape = MODELS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x.view(-1)[:3] = torch.tensor([0.0, 100.0, -100.0])
    ours, expected = gradients(quantized(make), x), plainly(quantized(make), x)
    assert ours.keys() == expected.keys() and "0.quantkern.input.scale" in ours
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=2e-5, atol=1e-7 * float(value.abs().max()), msg=key)


class Products(TorchDispatchMode):
    """Whether a convolution or matrix product made the gradient of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.input_gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.input_gradients += bool(args[10][0])
        return func(*args, **(kwargs or {}))


def test_no_gradient_of_the_images_is_made() -> None:
    model, x = quantized(*MODELS["conv2d"][:1]), torch.randn(4, 3, 20, 20)
    for start, expected in ((x, 0), (x.clone().requires_grad_(), 1)):
        with Products() as products:
            gradients(model, start)
        assert products.input_gradients == expected


def test_what_stands_between_quantizer_and_layer_takes_part_in_the_gradient() -> None:
    def halve(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * 0.5,)

    def negate(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return -2 * output

    make, shape = MODELS["conv2d"]
    x = torch.randn(shape)
    whole = gradients(quantized(make), x)["0.quantkern.input.scale"]
    for hook, prepend in ((halve, False), (negate, True), (negate, False)):
        results = []
        for run in (gradients, plainly):
            model = quantized(make)
            if hook is halve:
                model[0].register_forward_pre_hook(halve)
            else:
                model[0].register_forward_hook(negate, prepend=prepend)
            results.append(run(model, x)["0.quantkern.input.scale"])
        torch.testing.assert_close(*results, rtol=2e-5, atol=1e-8)
        assert not torch.isclose(results[0], whole, rtol=1e-2)


@pytest.mark.parametrize("case", ["frozen weight", "offset", "per channel"])
def test_where_the_short_way_does_not_serve(case: str) -> None:
    settings: dict[str, Any] = {"offset": True} if case == "offset" else {}
    if case == "per channel":
        settings = {"quant_scheme": {"input": "per_channel_symmetric"}, "axis": {"input": 1}}
    make, shape = MODELS["conv2d"]
    results = []
    for run in (gradients, plainly):
        model = quantized(make, **settings)
        if case == "frozen weight":
            model[0].parametrizations.weight.original.requires_grad_(False)
        results.append(run(model, torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert results[0].keys() == results[1].keys() and "0.quantkern.input.scale" in results[0]
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_evaluation_with_gradients_and_failing_forwards_leave_nothing_behind() -> None:
    model = quantized(MODELS["conv2d"][0])
    x = torch.randn(4, 3, 20, 20)
    gradients(model, x)
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(4, 5, 20, 20))
    with torch.no_grad():
        model(x)
    model.eval()
    model.zero_grad()
    model(x).sum().backward()
    scale = model[0].quantkern.input.scale
    assert scale.grad is not None and bool(scale.grad != 0) and "pending" not in vars(model[0].quantkern.input)
