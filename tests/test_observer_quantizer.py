"""ObserverQuantizer: calibration, what compress() does, and what NNI's does wrong (its number in the docstring)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from calibrated_networks import LAYERS, batches, calibrated, compressed, linear
from quantizer_checks import same_state, state_of
from small_quantized_net import EVERY, batch, net, rule
from torch import Tensor, nn

from quantkern import reference
from quantkern.config import ConfigError
from quantkern.observers import OBSERVERS
from quantkern.quantizers import ObserverQuantizer
from quantkern.settings import reset_quant_scheme_dtype, set_quant_scheme_dtype

# ---------------------------------------------------------------- what compress() does


def test_the_compressed_model_computes_with_quantized_tensors() -> None:
    """D4: NNI's layers go on with float weights. Everything by hand, with NNI's settings."""
    layer, quantizer = linear("weight input output", observer="minmax")
    weight, bias = layer.parametrizations.weight.original.detach().clone(), layer.bias.detach()
    seen = [torch.randn(7, 6) for _ in range(3)]
    with torch.no_grad():
        outputs = [quantizer(x) for x in seen]
        assert all(torch.equal(y, nn.functional.linear(x, weight, bias)) for x, y in zip(seen, outputs, strict=True))
    quantizer.compress()

    def affine(values: list[Tensor]) -> tuple[float, int]:
        low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
        return (high - low) / 127, round(-low / ((high - low) / 127))

    def fake(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
        return ((x / scale).round() + zero_point).clamp(low, high).sub(zero_point) * scale

    grid = weight.abs().max().item() / 127
    w = fake(weight, grid, 0, -127, 127)
    torch.testing.assert_close(layer.weight, w)
    assert not torch.allclose(layer.weight, weight, atol=grid / 50)
    x = torch.randn(9, 6)
    expected = fake(nn.functional.linear(fake(x, *affine(seen), 0, 127), w, bias), *affine(outputs), 0, 127)
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer.parametrizations.weight.original, weight)


def test_the_defaults_are_those_of_nni() -> None:
    model, _ = compressed()
    assert model.conv.parametrizations.weight[0].spec.quant_range == (-127, 127)
    assert model.conv.parametrizations.weight[0].spec.scheme == "per_tensor_symmetric"
    for name in ("input", "output"):
        spec = model.conv.quantkern.get_submodule(name).spec
        assert (spec.quant_range, spec.scheme, spec.observer) == ((0, 127), "per_tensor_affine", "histogram")


def test_nothing_is_quantized_before_compress_and_nothing_observed_after() -> None:
    model, floating = net().eval(), net().eval()
    quantizer = ObserverQuantizer(model, LAYERS)
    assert all(torch.equal(model(x), floating(x)) for x in batches())
    assert torch.equal(model.conv.weight, floating.conv.weight)
    quantizer.compress()
    state = state_of(model)
    quantized = model(batch(9) * 100)
    assert not torch.equal(quantized, floating(batch(9) * 100))
    assert same_state(state_of(model), state)
    assert quantizer.compress() is model and same_state(state_of(model), state)
    assert not model.training


def test_int8_is_close_to_float() -> None:
    model, _ = compressed()
    x = batch(1)
    expected = net().eval()(x)
    assert (model(x) - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_tensor_symmetric", "per_channel_affine",
                                    "per_channel_symmetric"])  # fmt: skip
@pytest.mark.parametrize(("bits", "dtype"), [(4, "int"), (8, "uint"), (16, "int")])
def test_every_observer_takes_every_rule(observer: str, scheme: str, bits: int, dtype: str) -> None:
    """L21: NNI has 8 bits per tensor."""
    rules = [{**EVERY, "quant_bits": bits, "op_types": ["Conv2d", "Linear"], "quant_dtype": dtype,
              "quant_scheme": scheme, "observer": observer}]  # fmt: skip
    model, _ = compressed(rules)
    x, expected = batch(1), net().eval()(batch(1))
    # Percentiles clip a little at any number of bits, averages of three small batches more.
    bound = 0.8 if bits == 4 or observer == "moving_average" else {8: 0.08, 16: 0.02}[bits]
    assert (model(x) - expected).abs().mean() < bound * expected.abs().mean()
    weight = model.conv.parametrizations.weight
    assert weight[0].scale.shape == ((4,) if "channel" in scheme else ())
    low, high = weight[0].spec.quant_range
    assert model.fc.weight.unique().numel() <= (high - low + 1) * weight[0].scale.numel() * 16


def test_observers_by_quant_type_and_their_settings() -> None:
    layer, quantizer = linear(
        "weight input output", 8, observer={"weight": "mse", "input": "percentile"}, percentile=75.0,
        reduce_range={"input": False}, quant_scheme={"input": "per_tensor_affine"},
    )  # fmt: skip
    assert layer.parametrizations.weight[0].spec.observer == "mse"
    assert layer.quantkern.input.spec.quant_range == (0, 255)
    assert layer.quantkern.output.spec.quant_range == (0, 127)
    quantizer.calibrate([torch.linspace(0, 1, 600).reshape(100, 6)], progress=False)
    quantizer.compress()
    assert layer.quantkern.input.running_max.item() == pytest.approx(0.75, abs=2e-3)
    assert layer.quantkern.input.scale.item() == pytest.approx(0.75 / 255, rel=0.01)


@pytest.mark.parametrize(("bits", "dtype", "quant_range"), [(8, "uint", (0, 127)), (4, "uint", (0, 15)),
                                                             (8, "int", (-127, 127))])  # fmt: skip
def test_the_range_is_reduced_where_nni_does(bits: int, dtype: str, quant_range: tuple[int, int]) -> None:
    layer, _ = linear("input", bits, quant_dtype=dtype)
    assert layer.quantkern.input.spec.quant_range == quant_range


def test_moving_averages_follow_ema_decay() -> None:
    layer, quantizer = linear("input", observer="moving_average", ema_decay=0.5, reduce_range=False)
    quantizer.calibrate([torch.full((2, 6), 1.0), torch.full((2, 6), 3.0)], progress=False)
    quantizer.compress()
    assert layer.quantkern.input.scale.item() == pytest.approx(2 / 255)


def test_defaults_of_dtype_and_scheme() -> None:
    try:
        set_quant_scheme_dtype("weight", "per_channel_symmetric")
        set_quant_scheme_dtype("input", "per_tensor_symmetric", "int")
        layer, _ = linear("weight input")
    finally:
        reset_quant_scheme_dtype()
    assert layer.parametrizations.weight[0].scale.shape == (5,)
    assert layer.quantkern.input.spec.quant_range == (-127, 127)


def test_gradients_pass_after_compress() -> None:
    model, _ = compressed()
    model.train()(batch(0)).sum().backward()
    assert model.conv.parametrizations.weight.original.grad.abs().max() > 0
    scale = model.conv.quantkern.input.scale.clone()
    model(batch(1) * 50)
    assert torch.equal(model.conv.quantkern.input.scale, scale)


# ---------------------------------------------------------------- calibration


def test_the_ways_to_calibrate_agree() -> None:
    def scale(calibrate: Any) -> Tensor:
        model = net().eval()
        quantizer = ObserverQuantizer(model, LAYERS)
        assert calibrate(quantizer) in (3, None)
        return quantizer.compress().conv.quantkern.output.scale.clone()

    def generator() -> Iterator[tuple[Tensor, int]]:
        while True:
            for x in batches():
                yield x, 7

    def by_hand(quantizer: ObserverQuantizer) -> None:
        with torch.no_grad():
            for x in batches():
                quantizer(x)

    expected = scale(by_hand)
    pairs = torch.utils.data.TensorDataset(torch.cat(batches()), torch.zeros(12))
    for calibrate in (
        lambda q: q.calibrate(batches()),
        lambda q: q.calibrate(torch.utils.data.DataLoader(pairs, 4), progress=False),
        lambda q: q.calibrate(generator(), steps=3),
        lambda q: q.calibrate([{"x": x} for x in batches()], steps=10),
        lambda q: q.calibrate([(1, x) for x in batches()], forward=lambda model, pair: model(pair[1])),
    ):
        assert torch.equal(scale(calibrate), expected)


def test_calibration_shows_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    calibrated()
    assert capsys.readouterr().err == ""
    quantizer = ObserverQuantizer(net().eval(), LAYERS)
    quantizer.calibrate(batches(20))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and "calibration" in lines[-1] and "100%" in lines[-1]


def test_batches_pass_unobserved_while_ranges_are_frozen() -> None:
    layer, quantizer = linear("input", observer="minmax", reduce_range=False)
    quantizer(torch.rand(3, 6))
    quantizer.freeze_ranges()
    quantizer(torch.rand(3, 6) * 100)
    quantizer.freeze_ranges(False)
    quantizer.compress()
    assert layer.quantkern.input.scale < 1 / 255


def test_what_calibration_cannot_use() -> None:
    _, quantizer = linear("input")
    with pytest.raises(ValueError, match="steps must be at least 1 or None, got 0"):
        quantizer.calibrate([], steps=0)
    with pytest.raises(ValueError, match="loader gave no batch"):
        quantizer.calibrate([], progress=False)
    with pytest.raises(TypeError, match="a batch is str, expected a tensor, a tuple or list .* give forward="):
        quantizer.calibrate(["x"], progress=False)
    quantizer.calibrate([torch.rand(2, 6)], progress=False)
    quantizer.compress()
    with pytest.raises(RuntimeError, match=r"compress\(\) has frozen every scale; build a new quantizer"):
        quantizer.calibrate([torch.rand(2, 6)])


@pytest.mark.parametrize("part", ["whole", "one layer"])
def test_a_model_in_training_mode_is_an_error(part: str) -> None:
    model = net().eval()
    (model if part == "whole" else model.bn).train()
    with pytest.raises(ValueError, match=r"in training mode \(.*call model.eval\(\) first. The model is unchanged"):
        ObserverQuantizer(model, LAYERS)
    assert list(model.state_dict()) == list(net().state_dict())
    model.eval()
    quantizer = ObserverQuantizer(model, LAYERS)
    model.train()
    with pytest.raises(RuntimeError, match=r"conv.input: the model is in training mode; .*call model.eval\(\) first"):
        model(batch())
    model.eval()(batch())
    model.train()
    with pytest.raises(RuntimeError, match=r"compress\(\): the model is in training mode"):
        quantizer.compress()


def test_compress_without_calibration_is_an_error_and_changes_nothing() -> None:
    model, floating = net().eval(), net().eval()
    quantizer = ObserverQuantizer(model, LAYERS)
    state = state_of(model)
    with pytest.raises(RuntimeError, match="no calibration batch has been seen by conv.input, conv.output, fc.input"):
        quantizer.compress()
    assert same_state(state_of(model), state) and torch.equal(model(batch()), floating(batch()))
    quantizer.compress()
    weights_only = net().eval()
    ObserverQuantizer(weights_only, rule("weight", "conv")).compress()
    assert weights_only.conv.weight.unique().numel() <= 255


def test_a_batch_with_nan_is_an_error_at_compress() -> None:
    model, quantizer = calibrated()
    bad = batch(5)
    bad[0, 0, 0, 0] = torch.nan
    model(bad)
    state = state_of(model)
    with pytest.raises(ValueError, match="no grid holds, nothing is changed") as error:
        quantizer.compress()
    assert "1. conv.input holds NaN or infinity in batch 4 of 4" in str(error.value)
    assert same_state(state_of(model), state)


def test_a_weight_with_nan_is_an_error() -> None:
    layer, quantizer = linear("weight")
    with torch.no_grad():
        layer.parametrizations.weight.original[1, 2] = torch.nan
    with pytest.raises(ValueError, match="0.weight holds NaN or infinity$"):
        quantizer.compress()
    assert torch.isnan(layer.weight).sum() == 1


def test_constant_tensors() -> None:
    layer, quantizer = linear("weight input output")
    with torch.no_grad():
        layer.parametrizations.weight.original.fill_(0.5)
        layer.bias.zero_()
    x = torch.full((3, 6), 4.0)
    quantizer(x)
    quantizer.compress()
    torch.testing.assert_close(layer(x), torch.full((3, 5), 12.0), rtol=1e-3, atol=0)
    dead, quantizer = linear("input")
    quantizer(torch.zeros(3, 6))
    quantizer.compress()
    assert dead.quantkern.input.scale.item() == 1


def test_a_tensor_that_calibration_does_not_reach_stays_float() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)).eval()
    quantizer = ObserverQuantizer(model, rule("input output", "0") + rule("input", "1"))
    ids = torch.tensor([[1, 2]])
    quantizer(ids)
    with pytest.warns(UserWarning, match="not seen in calibration, stays float: 0.input$"):
        quantizer.compress()
    assert model(ids).shape == (1, 2, 3)
    with pytest.warns(UserWarning, match="0.input was not seen in calibration"):
        model[0].quantkern.input(torch.rand(2))


def test_a_tensor_that_appears_after_compress_stays_float() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
            return x if factor is None else x * factor

    model = nn.Sequential(Scaled()).eval()
    quantizer = ObserverQuantizer(model, rule("input", "0"))
    model(torch.rand(4))
    quantizer.compress()
    with pytest.warns(UserWarning, match="0.input_1 was not seen in calibration and stays float"):
        model[0](torch.rand(4), torch.tensor(0.123))
    assert quantizer.is_compressed()


def test_per_channel_sizes_come_with_the_first_batch() -> None:
    layer, quantizer = linear("input output", quant_scheme="per_channel_affine", axis=-1)
    quantizer(torch.randn(2, 7, 6))
    quantizer.compress()
    assert layer.quantkern.input.scale.shape == (6,) and layer.quantkern.output.scale.shape == (5,)
    other, quantizer = linear("input", quant_scheme="per_channel_affine")
    quantizer(torch.randn(2, 7, 6))
    with pytest.raises(ValueError, match=r"0.input: a tensor of shape \[2, 6, 6\] has 6 channels .*had 7"):
        quantizer(torch.randn(2, 6, 6))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"observer": "histgram"}, r"\['observer'\] is 'histgram', expected one of 'minmax', 'moving_average'"),
        ({"observer": {"input": 3}}, r"\['observer'\]\['input'\] is 3, expected one of"),
        ({"percentile": 30.0}, r"\['percentile'\] is 30.0, expected a float above 50"),
        ({"reduce_range": 1}, r"\['reduce_range'\] is 1, expected True or False"),
        ({"quant_bits": 1, "reduce_range": True}, "reduce_range leaves nothing of 1 bits for 'input'"),
        ({"quant_start_step": 3}, "unknown key 'quant_start_step'"),
        ({"obsever": "mse"}, "unknown key 'obsever'; did you mean 'observer'?"),
    ],
)
def test_wrong_rules(more: dict[str, Any], message: str) -> None:
    model = net().eval()
    with pytest.raises(ConfigError, match=message):
        ObserverQuantizer(model, [{"quant_types": ["input"], "quant_bits": 8, "op_types": ["Conv2d"], **more}])
    assert list(model.state_dict()) == list(net().state_dict())


def test_the_reference_gives_the_same_outputs() -> None:
    layer, quantizer = linear("weight input", 4, quant_scheme="per_channel_affine", observer="mse")
    quantizer.calibrate([torch.randn(40, 6)], progress=False)
    quantizer.compress()
    own, first = layer.parametrizations.weight, layer.quantkern.input
    x = torch.randn(9, 6)
    w = reference.quantize(own.original, own[0].scale, own[0].zero_point, *own[0].spec.quant_range, 0)[0]
    y = reference.quantize(x, first.scale, first.zero_point, *first.spec.quant_range, 1)[0]
    assert torch.equal(layer(x), nn.functional.linear(y, w, layer.bias))


def test_a_compressed_model_compiles() -> None:
    model, _ = compressed()
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(fast(batch(4)), model(batch(4)))
