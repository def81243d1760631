"""ONNX files: what is in them, and that onnxruntime gives the model's numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_networks import (
    PER_CHANNEL,
    QUANTIZERS,
    Net,
    X,
    bnn,
    dorefa,
    graph_of,
    initializers,
    kinds,
    lsq,
    net,
    observer,
    optimized,
    qat,
    rules,
    run,
    unrounded,
)
from torch import Tensor, nn

import quantkern.functional as F
from quantkern import LsqQuantizer, NaiveQuantizer, ObserverQuantizer, QAT_Quantizer
from quantkern.export.integers import encode, finer_by, may_saturate

onnx = pytest.importorskip("onnx", reason="pip install '.[onnx]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("one_table_of_translations"),
]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantizer = QUANTIZERS[name]()
    model = quantizer.bound_model
    before, mode = copy.deepcopy(model.state_dict()), model.training
    result = quantizer.export_onnx(tmp_path / "model.onnx", X)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert model.training is mode and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    (check,) = result.outputs
    assert check.mean_steps < 0.4 and check.shape == (6, 5) and check.step_of == "range"
    assert str(check) in capsys.readouterr().out and str(check) in str(result)
    other = torch.randn(3, 2, 8, 8)  # another batch size
    expected = model.eval()(other).detach().numpy()
    found = run(result.path, other)
    assert np.abs(found - expected).mean() < 0.4 * check.step
    kind = kinds(graph_of(result.path))
    assert kind["QuantizeLinear"] == (0 if name in ("naive", "bnn") else 3)
    assert set(result.floats) == ({"3.weight", "7.weight", "2.output", "5.output"} if name == "bnn" else set())
    assert ("real arithmetic" in str(result)) is (name == "bnn")
    quantizer.export_model(tmp_path / "model.pt")  # still attached


def test_the_figures_of_a_result_are_those_of_the_arrays(tmp_path: Path) -> None:
    quantizer = qat(bits=3)
    result = quantizer.export_onnx(tmp_path / "model.onnx", X)
    y, z = quantizer.bound_model.eval()(X).detach().numpy(), run(result.path, X)
    (check,) = result.outputs
    assert check.step == pytest.approx(np.ptp(y) / 15)  # the coarsest activation has 3 bits, 4 count
    assert check.max_steps == pytest.approx(np.abs(y - z).max() / check.step, rel=1e-4)
    assert check.mean_steps == pytest.approx(np.abs(y - z).mean() / check.step, rel=1e-4)
    assert check.sqnr_db == pytest.approx(10 * np.log10((y**2).sum() / ((y - z) ** 2).sum()), rel=1e-3)


def test_integers_stand_in_the_file_with_the_models_scales(tmp_path: Path) -> None:
    quantizer = qat(**PER_CHANNEL)
    path = quantizer.export_onnx(tmp_path / "model.onnx", X).path
    graph, model = graph_of(path), quantizer.bound_model.eval()
    arrays = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    assert not any(a.dtype == np.float32 and a.ndim > 1 for a in arrays.values())
    stem = "conv2.parametrizations.weight.0.value_"
    q, scale, zero = (arrays[stem + part] for part in ("quantized", "scale", "zero_point"))
    assert q.dtype == np.uint8 and set(zero.tolist()) == {128}  # 255 * 127 * 2 leaves 16 bits
    along = (-1, 1, 1, 1)
    y = (q.astype(np.float32) - zero.reshape(along).astype(np.float32)) * scale.reshape(along)
    assert np.array_equal(y, model.conv2.weight.detach().numpy())
    (node,) = (n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] == stem + "quantized")
    assert onnx.helper.get_node_attr_value(node, "axis") == 0
    bias, step = arrays["conv2.bias_quantized"], arrays["conv2.bias_scale"]
    assert bias.dtype == np.int32
    assert np.array_equal(step, model.conv2.quantkern.input.scale.numpy() * scale)
    assert np.abs(bias * step - model.conv2.bias.detach().numpy()).max() <= step.max() / 2 + 1e-7
    made = optimized(path)
    assert made["QLinearConv"] == 2 and made["QGemm"] == 1 and made["Conv"] == made["Clip"] == made["Relu"] == 0


def test_options_for_biases_and_signed_weights(tmp_path: Path) -> None:
    quantizer = qat()
    path = quantizer.export_onnx(tmp_path / "a.onnx", X, int32_bias=False, signed_weights=True).path
    types = initializers(graph_of(path))
    assert types["conv1.bias"] == "FLOAT" and "INT32" not in types.values()
    assert types["fc.parametrizations.weight.0.value_quantized"] == "INT8"
    exact = run(path, X, exact_products=True)
    assert np.abs(exact - quantizer.bound_model.eval()(X).detach().numpy()).max() < np.ptp(exact) / 50


def test_weights_that_cannot_saturate_stay_int8(tmp_path: Path) -> None:
    path = qat(bits={"weight": 7, "input": 8}, **PER_CHANNEL).export_onnx(tmp_path / "a.onnx", X).path
    types = initializers(graph_of(path))
    assert types["conv2.parametrizations.weight.0.value_quantized"] == "INT8"


@pytest.mark.parametrize(("int4", "dtype", "kernel"), [(None, "INT8", "QLinearConv"), (True, "INT4", "Conv")])
def test_four_bits(int4: bool | None, dtype: str, kernel: str, tmp_path: Path) -> None:
    quantizer = lsq(bits=4)
    path = quantizer.export_onnx(tmp_path / "a.onnx", X, int4=int4).path
    assert initializers(graph_of(path))["conv2.parametrizations.weight.0.value_quantized"] == dtype
    made = optimized(path)
    assert made[kernel] + made[f"Fused{kernel}"] == 2


def test_weights_alone_take_four_bits_each(tmp_path: Path) -> None:
    quantizer = qat(bits=4, types=("weight",), quant_dtype="uint")
    path = quantizer.export_onnx(tmp_path / "a.onnx", X).path
    assert initializers(graph_of(path))["conv2.parametrizations.weight.0.value_quantized"] == "UINT4"
    assert np.allclose(run(path, X), quantizer.bound_model.eval()(X).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 16},
        {"bits": 12, "quant_dtype": "int", "quant_scheme": "per_tensor_symmetric"},
        {"bits": 8, "quant_scheme": "per_channel_affine"},
        {"bits": 5, "quant_scheme": "per_channel_symmetric", "quant_dtype": "int"},
        {"bits": 2, "quant_dtype": "uint"},
        {"bits": 3, "types": ("output",)},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_grids(settings: dict[str, Any], tmp_path: Path) -> None:
    """Ranges that integers of 8 or 16 bits go beyond are kept: the inputs of this batch leave them on both sides."""
    quantizer = qat(**settings)
    wide = 3 * X
    assert unrounded(quantizer, tmp_path / "a.onnx", wide) < 1e-5
    assert np.abs(run(tmp_path / "a.onnx", 100 * X)).max() < 100  # saturated, not wrapped


def test_the_step_of_an_output_is_its_scale(tmp_path: Path) -> None:
    quantizer = qat(types=("weight", "input", "output"))
    result = quantizer.export_onnx(tmp_path / "a.onnx", 3 * X)
    (check,) = result.outputs
    grid = quantizer.bound_model.fc.quantkern.output
    assert check.step_of == "grid" and check.step == float(grid.scale)
    low, high = ((end - grid.zero_point) * grid.scale for end in grid.spec.quant_range)
    found = run(result.path, 3 * X)
    assert found.min() >= float(low) - 1e-6 and found.max() <= float(high) + 1e-6


def test_clips_are_integers_and_only_where_they_are_needed(tmp_path: Path) -> None:
    """The observer's 0..127: the float image may leave it, and so may sums of which the graph knows no bound."""
    path = observer().export_onnx(tmp_path / "a.onnx", X).path
    made = optimized(path)
    assert made["QLinearConv"] == 2 and made["Clip"] == 3
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3)).eval()
    quantizer = ObserverQuantizer(model, rules(types=("input",)))
    quantizer.calibrate([X], progress=False)
    quantizer.compress()
    model[2].quantkern.input.scale.fill_(1 / 127)
    path = quantizer.export_onnx(tmp_path / "b.onnx", X).path
    assert kinds(graph_of(path))["Clip"] == 1  # none behind the sigmoid


def test_learned_offsets_become_integers(tmp_path: Path) -> None:
    quantizer = lsq(bits=4, offset=True)
    for module in quantizer.bound_model.modules():
        if getattr(module, "zero_point", None) is not None:
            module.zero_point.data += 0.3
    assert unrounded(quantizer, tmp_path / "a.onnx", X) < 0.05  # at most half a step, where values are clipped


@pytest.mark.parametrize("bits", [1, 9])
def test_dorefa(bits: int, tmp_path: Path) -> None:
    assert unrounded(dorefa(bits), tmp_path / "a.onnx", X) < 1e-5


@pytest.mark.parametrize(("kind", "scheme"), [(qat, "per_channel_symmetric"), (lsq, "per_tensor_symmetric")])
def test_folded_batch_norms(kind: Any, scheme: str, tmp_path: Path) -> None:
    schemes = {"weight": scheme, "input": "per_tensor_affine" if kind is qat else "per_tensor_symmetric"}
    dtypes = {"quant_dtype": {"weight": "int", "input": "uint"}} if kind is qat else {}
    quantizer = kind(True, {"dummy_input": X}, quant_scheme=schemes, **dtypes)
    with torch.no_grad():
        for norm in (quantizer.bound_model.bn1, quantizer.bound_model.bn2):
            norm.weight.uniform_(0.3, 2).mul_(torch.tensor([1, -1] * 4))
            norm.bias.normal_()
            norm.running_mean.normal_()
    quantizer.bound_model(X)
    result = quantizer.export_onnx(tmp_path / "a.onnx", X)
    graph = graph_of(result.path)
    assert kinds(graph)["BatchNormalization"] == 0
    arrays = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    bias = arrays["conv1.bias_quantized"] * arrays["conv1.bias_scale"]
    folded = quantizer.folded_model()
    np.testing.assert_allclose(bias, folded.conv1.bias.detach(), atol=float(arrays["conv1.bias_scale"].max()))
    entry = quantizer._attachments[0].calibration()
    found, true = arrays["conv1.parametrizations.weight.0.value_scale"].reshape(-1), entry["weight_scale"].numpy()
    factors = true / found
    np.testing.assert_allclose(factors, np.exp2(np.rint(np.log2(factors))), rtol=1e-6)  # finer by a power of two
    assert optimized(result.path)["QLinearConv"] == 2


@pytest.mark.parametrize("kind", [qat, lsq, dorefa, observer])
def test_rounded_biases_are_those_of_the_file(kind: Any, tmp_path: Path) -> None:
    """Nothing but roundings at ties remains, whatever onnxruntime merges."""
    quantizer = kind()
    model = quantizer.bound_model
    before = {name: value.clone() for name, value in model.named_parameters()}
    changed = quantizer.round_biases()
    assert set(changed) == {"conv1", "conv2", "fc"}
    for name, value in model.named_parameters():
        layer, _, what = name.rpartition(".")
        difference = float((value - before[name]).detach().abs().max())
        assert difference == pytest.approx(changed[layer], rel=1e-3, abs=1e-7) if what == "bias" else difference == 0
    assert max(quantizer.round_biases().values()) < 1e-6
    result = quantizer.export_onnx(tmp_path / "a.onnx", X)
    assert result.outputs[0].mean_steps < 0.005
    assert model.training is (kind is not observer)


@pytest.mark.parametrize("kind", [qat, lsq])
def test_rounded_biases_of_folded_batch_norms(kind: Any, tmp_path: Path) -> None:
    quantizer = kind(True, {"dummy_input": X})
    with torch.no_grad():
        quantizer.bound_model.bn1.weight[2] = 0  # a channel of zeros
    beta = quantizer.bound_model.bn1.bias.clone()
    changed = quantizer.round_biases()
    found = float((quantizer.bound_model.bn1.bias - beta).detach().abs().max())
    assert found == pytest.approx(changed["conv1"], rel=1e-3) and found > 0
    (check,) = quantizer.export_onnx(tmp_path / "a.onnx", X).outputs
    assert check.mean_steps < 0.005


def test_biases_without_a_scale_stay() -> None:
    weights_alone, unseen = NaiveQuantizer(net()), QAT_Quantizer(net(), rules())
    assert weights_alone.round_biases() == unseen.round_biases() == bnn().round_biases() == {}


def test_batch_norms_that_are_not_folded_stay(tmp_path: Path) -> None:
    path = qat(True).export_onnx(tmp_path / "a.onnx", X).path
    assert kinds(graph_of(path))["BatchNormalization"] == 2


class Strange(nn.Module):
    """Several inputs, an embedding, a linear layer on 3 dimensions that is used twice, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.linear = nn.Linear(6, 6)
        self.up = nn.ConvTranspose1d(4, 3, 2)

    def forward(self, words: Tensor, extra: Tensor) -> dict[str, Tensor]:
        x = self.linear(torch.relu(self.linear(self.table(words) + extra)))
        return {"x": x, "up": self.up(x)}


@pytest.mark.parametrize("as_dict", [False, True])
def test_several_inputs_and_outputs(as_dict: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Strange()
    quantizer = QAT_Quantizer(model, [{**rules(**PER_CHANNEL)[0], "op_types": ["default"]}])
    words, extra = torch.randint(10, (3, 4)), torch.randn(3, 4, 6)
    model(words, extra)
    example = {"words": words, "extra": extra} if as_dict else (words, extra)
    result = quantizer.export_onnx(tmp_path / "a.onnx", example)
    assert [check.shape for check in result.outputs] == [(3, 4, 6), (3, 3, 7)]
    assert all(check.mean_steps < 0.4 for check in result.outputs)
    types = initializers(graph_of(result.path))
    assert {types[name] for name in types if name.endswith("value_quantized")} <= {"INT8", "UINT8"}
    assert "Transpose" not in {  # the constant itself is transposed
        node.op_type for node in graph_of(result.path).node if any("value_quantized" in name for name in node.input)
    }
    assert run(result.path, words[:1], extra[:1]).shape == (1, 4, 6)


def test_functions_of_the_library_in_a_forward(tmp_path: Path) -> None:
    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = F.fake_quantize(x, 0.1, 3, 0, 15)
            return F.dorefa_activation(super().forward(x), 3)

    torch.manual_seed(0)
    quantizer = NaiveQuantizer(Own())
    (check,) = quantizer.export_onnx(tmp_path / "a.onnx", X).outputs
    assert check.mean_steps < 0.01


def test_a_fixed_batch_and_a_batch_of_one(tmp_path: Path) -> None:
    quantizer = qat()
    fixed = quantizer.export_onnx(tmp_path / "a.onnx", X, dynamic_batch=False).path
    assert graph_of(fixed).input[0].type.tensor_type.shape.dim[0].dim_value == 6
    free = quantizer.export_onnx(tmp_path / "b.onnx", X[:1]).path
    assert graph_of(free).input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert run(free, X).shape == (6, 5)


def test_what_has_no_scale_stays_float_with_a_warning(tmp_path: Path) -> None:
    quantizer = QAT_Quantizer(net(), rules())
    with pytest.warns(UserWarning, match=r"stays float in the ONNX graph:\n  conv1.input: it has no scale yet"):
        result = quantizer.export_onnx(tmp_path / "a.onnx", X)
    assert set(result.floats) == {"conv1.input", "conv2.input", "fc.input"}
    delayed = qat(quant_start_step=100)
    with pytest.warns(UserWarning, match="quant_start_step 100 is not reached"):
        result = delayed.export_onnx(tmp_path / "b.onnx", X)
    assert len(result.floats) == 6 and "DequantizeLinear" not in kinds(graph_of(result.path))
    learned = LsqQuantizer(net(), rules())
    with pytest.warns(UserWarning, match="conv1.weight: it has no scale yet"):
        learned.export_onnx(tmp_path / "c.onnx", X)


# ---------------------------------------------------------------- integers


@pytest.mark.parametrize(("first", "last"), [(0, 127), (-127, 127), (-128, 127), (0, 255), (-3, 4), (-4000, 4000)])
@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (0.0, np.inf), (-np.inf, 1.0), (0.0, 1.0)])
def test_encodings_saturate_where_the_grid_does(first: int, last: int, zero: int, bounds: tuple[float, float]) -> None:
    code = encode(first, last, np.array(zero), (np.array(bounds[0]), np.array(bounds[1])))
    end = {"UINT8": 255, "UINT16": 65535}[code.dtype]
    assert 0 <= zero + code.shift <= end and code.largest <= end
    for q in range(first - 300, last + 300, 7):
        if bounds[0] <= q <= bounds[1]:
            stored = min(max(q + code.shift, 0), end)
            stored = min(max(stored, code.least or 0), end if code.most is None else code.most)
            assert stored - code.shift == min(max(q, first), last)


def test_finer_weights_stay_in_8_bits_and_fast() -> None:
    for largest, bits in [(255, 8), (255, 7), (255, 4), (15, 4), (127, 8), (15, 2)]:
        q = np.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
        factor = finer_by(q, np.array(0), largest)
        assert np.abs(q * factor).max() <= 127
        assert may_saturate(q * factor, largest) == may_saturate(q, largest)
    assert finer_by(np.zeros(3, np.int64), np.array(0), 255) == 64
