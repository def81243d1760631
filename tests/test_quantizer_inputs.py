"""What quantizers take: channels, axes, several inputs and outputs, dummy inputs."""

from __future__ import annotations

import copy
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from small_quantized_net import EVERY, EVERY_LAYER, Net, batch, net, rule, train
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantkern import reference
from quantkern.quantizers import QAT_Quantizer


def test_per_channel_activations_are_exported_whole(tmp_path: Path) -> None:
    """D15: NNI raises, and exports no scale."""
    model = net()
    quantizer = QAT_Quantizer(model, [{**EVERY, "op_names": ["conv"], "quant_scheme": "per_channel_symmetric"}])
    train(model, None, range(1))
    entry = quantizer.export_model(tmp_path / "model.pt", tmp_path / "calibration.pt")["conv"]
    assert {len(entry[key]) for key in ("tracked_min_output", "tracked_max_output", "output_scale")} == {4}
    assert entry["output_zero_point"] == [127] * 4
    assert entry["weight_scale"].shape == entry["weight_zero_point"].shape == (4,)
    assert len(entry["tracked_min_input"]) == 1
    for kind in ("weight", "input", "output"):
        settings = [entry[f"{kind}_{key}"] for key in ("bits", "dtype", "scheme", "qmin", "qmax")]
        assert settings == [8, "uint", "per_channel_symmetric", 0, 255]
    assert [entry[f"{kind}_axis"] for kind in ("weight", "input", "output")] == [0, 1, 1]
    with torch.no_grad():
        output = copy.deepcopy(model).conv(batch(0))
    assert entry["tracked_max_output"] == pytest.approx(output.amax((0, 2, 3)).tolist(), abs=0.1)


def test_unsigned_symmetric_convention() -> None:
    """L3: zero point 127 and scale absmax / 127.5, as NNI."""
    model = nn.Sequential(nn.Linear(4, 2))
    QAT_Quantizer(model, rule("weight", "0", quant_scheme="per_tensor_symmetric", quant_dtype="uint"))
    largest = model[0].parametrizations.weight.original.detach().abs().max()
    _ = model[0].weight
    assert model[0].parametrizations.weight[0].zero_point.item() == 127
    assert torch.equal(model[0].parametrizations.weight[0].scale, largest / 127.5)


def test_channel_axis_of_sequences() -> None:
    """L5: NNI takes axis 1 whatever it is; a Linear of 3-d tensors is skipped and then fails."""
    model = nn.Sequential(nn.Linear(5, 3))
    QAT_Quantizer(model, rule("input output", "0", quant_scheme="per_channel_affine", axis=-1))
    x = torch.randn(2, 7, 5)
    model(x)
    assert torch.equal(model[0].quantkern.input.running_max, x.amax((0, 1)) * 0.99 + x.amax((0, 1)) * 0.01)
    assert model[0].quantkern.output.scale.shape == (3,)
    model = nn.Sequential(nn.Linear(5, 3))
    QAT_Quantizer(model, rule("input output", "0", quant_scheme="per_channel_affine"))
    model(x)
    assert model[0].quantkern.input.scale.shape == model[0].quantkern.output.scale.shape == (7,)
    with pytest.raises(ValueError, match=r"0.input: a tensor of shape \[2, 6, 5\] has 6 channels on axis 1.*had 7"):
        model(torch.randn(2, 6, 5))


def test_axis_out_of_range_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    QAT_Quantizer(model, rule("output", "0", quant_scheme="per_channel_affine", axis=3))
    with pytest.raises(ValueError, match=r"0.output: axis 3 is out of range for a tensor of shape \[2, 3\]"):
        model(torch.randn(2, 5))


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_dummy_input_is_optional_takes_every_form_and_leaves_no_trace(kind: str) -> None:
    """L6, L7: mandatory in NNI, which calls model(tuple), with gradients, on a copy of the model."""

    class Uncopied(Net):
        def __deepcopy__(self, memo: object) -> Uncopied:
            raise AssertionError("the model was copied")

    model = Uncopied()
    model.bn.eval()
    before = model.bn.running_mean.clone()
    dummy = {"tensor": batch(), "tuple": (batch(),), "dict": {"x": batch()}}[kind]
    rules = [{**EVERY, "op_types": ["Conv2d", "ReLU"], "quant_types": ["output"], "quant_scheme": "per_channel_affine"}]
    QAT_Quantizer(model, rules, dummy_input=dummy)
    assert model.relu.quantkern.output.scale.shape == (4,)
    assert not model.relu.quantkern.output.is_observed()
    assert torch.equal(model.bn.running_mean, before)
    assert [name for name, module in model.named_children() if not module.training] == ["bn"]
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 4  # ranges, layers
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_dummy_input_that_does_not_fit_is_an_error_and_the_model_is_untouched() -> None:
    model = net()
    with pytest.raises(ValueError, match="the model does not run on dummy_input.*Expected a tensor, a tuple"):
        QAT_Quantizer(model, EVERY_LAYER, dummy_input=torch.randn(3, 3))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training and not parametrize.is_parametrized(model.conv)


def test_keyword_arguments_and_several_inputs() -> None:
    """L9: NNI's layers take one positional tensor."""

    class Mix(nn.Module):
        def forward(self, a: Tensor, b: Tensor, *, scale: Tensor | None = None, flag: bool = False) -> Tensor:
            return a + b if scale is None else (a + b) * scale

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = Mix()

        def forward(self, a: Tensor, b: Tensor, **more: Any) -> Tensor:
            return self.mix(a, b=b, **more)

    model = Outer()
    quantizer = QAT_Quantizer(model, rule("input", "mix", 2))
    assert [name for name, _ in model.mix.quantkern.named_children()] == ["input", "input_1"]
    a, b = torch.linspace(0, 3, 31), torch.linspace(-6, 6, 31)
    output = quantizer(a, b=b, scale=torch.tensor(0.5), flag=True)
    assert [name for name, _ in model.mix.quantkern.named_children()] == ["input", "input_1", "input_scale"]
    grids = [reference.fake_quantize_weight(x, 0, 3, False)[0] for x in (a, b, torch.tensor(0.5))]
    assert torch.equal(output, (grids[0] + grids[1]) * grids[2])
    integers = torch.arange(3)
    assert torch.equal(model(integers, b=integers), integers + integers)


def test_lists_of_inputs_and_structured_outputs() -> None:
    """L9"""
    Pair = namedtuple("Pair", ["left", "right"])

    class Structured(nn.Module):
        def forward(self, parts: list[Tensor]) -> dict[str, Any]:
            return {"sum": sum(parts), "index": torch.arange(2), "pair": Pair(parts[0], None), "rest": (parts[1], 3)}

    model = nn.Sequential(Structured())
    QAT_Quantizer(model, rule("input output", "0", 3))
    found = model([torch.linspace(-1, 1, 20), torch.linspace(-2, 4, 20)])
    assert [name for name, _ in model[0].quantkern.named_children()] == [
        *("input", "output", "input_item1", "output_1", "output_2")
    ]
    assert found["index"].tolist() == [0, 1] and found["rest"][1] == 3 and found["pair"].right is None
    assert type(found["pair"]) is Pair
    assert found["rest"][0].unique().numel() <= 8 and found["pair"].left.unique().numel() <= 8


def test_layers_of_torch_with_several_tensors() -> None:
    """L9, L11: bilinear layers, LSTMs, attention, embeddings, leaky rectifiers."""
    torch.manual_seed(0)
    model = nn.ModuleDict({
        "bilinear": nn.Bilinear(3, 4, 2), "lstm": nn.LSTM(3, 4), "attention": nn.MultiheadAttention(4, 2),
        "embedding": nn.Embedding(5, 3), "leaky": nn.LeakyReLU(), "prelu": nn.PReLU(),
    })  # fmt: skip
    QAT_Quantizer(
        model,
        [
            {**EVERY, "op_types": ["Bilinear", "Embedding", "PReLU"]},
            {
                "quant_types": ["input", "output"],
                "quant_bits": 8,
                "op_types": ["LSTM", "LeakyReLU", "MultiheadAttention"],
            },
        ],
    )
    model["bilinear"](torch.randn(2, 3), torch.randn(2, 4)).sum().backward()
    output, (hidden, cell) = model["lstm"](torch.randn(5, 2, 3))
    output, weights = model["attention"](output, hidden, cell)
    model["leaky"](model["prelu"](output)).sum().backward()
    model["embedding"](torch.tensor([1, 4])).sum().backward()
    children = {name: {child for child, _ in module.quantkern.named_children()} for name, module in model.items()}
    assert children["bilinear"] == {"input", "input_1", "output"}
    assert children["attention"] == {"input", "input_1", "input_2", "output", "output_1"}
    assert children["lstm"] == {"input", "output", "output_1", "output_2"}
    assert not model["embedding"].quantkern.input.is_observed() and model["embedding"].quantkern.output.is_observed()
    assert model["bilinear"].parametrizations.weight.original.grad.abs().max() > 0


def test_a_quantized_sequential_still_runs() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    QAT_Quantizer(model, rule("output", "0", 2))
    assert model(torch.randn(9, 3)).unique().numel() <= 4
