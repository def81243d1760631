"""What a quantizer's report says, and that it changes nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from reported_networks import BOTH, KINDS, batch, codes, make, row_of, sqnr, train
from torch import Tensor, nn

from quantkern import (
    QAT_Quantizer,
    reference,
)


def test_rows_hold_what_the_quantizer_holds() -> None:
    quantizer = make("qat")
    model = quantizer.bound_model.eval()
    report = quantizer.report(batch())
    assert [row.name for row in report.rows] == [
        f"{layer}.{tensor}" for layer in ("conv1", "conv2", "fc") for tensor in ("input", "weight")
    ]
    seen: list[Tensor] = []
    model.relu1.register_forward_hook(lambda module, args, output: seen.append(output))
    model(batch())
    x, fake, row = seen[0], model.conv2.quantkern.input, row_of(report, "conv2.input")
    y, inside = reference.quantize(x, fake.scale, fake.zero_point, 0, 255)
    assert (row.bits, row.dtype, row.scheme, row.state) == (8, "uint", "per_tensor_affine", "")
    assert row.scale == (fake.scale.item(), fake.scale.item())
    assert row.zero_point == (fake.zero_point.item(), fake.zero_point.item())
    assert row.range is not None and row.range[1] == pytest.approx((255 - fake.zero_point.item()) * fake.scale.item())
    assert row.saturation == pytest.approx(100 * float((~inside).float().mean()))
    assert row.sqnr == pytest.approx(sqnr(x, y), abs=0.01)
    assert row.values == (x.min().item(), x.max().item())
    assert row.histogram is not None and sum(row.histogram.counts) == x.numel()
    weight = model.fc.parametrizations.weight.original
    row = row_of(report, "fc.weight")
    assert row.sqnr == pytest.approx(sqnr(weight, model.fc.weight), abs=0.01)
    assert row.gradient == pytest.approx(weight.grad.norm().item()) and row.elements == weight.numel()


def test_saturation_counts_clipped_values() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    quantizer = QAT_Quantizer(model, [BOTH])
    model(torch.linspace(0, 1, 8).reshape(2, 4))
    x = torch.tensor([[0.0, 0.5, 1.0, 7.0]])
    row = row_of(quantizer.report(x), "0.input")
    assert row.saturation == 25.0 and row.values == (0.0, 7.0)
    assert row.range == pytest.approx((0.0, 1.0))


def test_a_folded_weight_is_measured_with_its_batch_norm() -> None:
    quantizer = make("qat folded")
    model = quantizer.bound_model.eval()
    row = row_of(quantizer.report(batch()), "conv1.weight")
    fake = model.conv1.parametrizations.weight[0]
    folded = fake.folded_weight(model.conv1.parametrizations.weight.original)
    assert row.norm == "bn1" and row.sqnr == pytest.approx(sqnr(folded, model.conv1.weight), abs=0.01)
    assert row.values == (folded.min().item(), folded.max().item())
    assert "conv1 + bn1" in quantizer.report().plain()


def test_a_learned_folded_scale_is_that_of_the_folded_weight() -> None:
    quantizer = make("lsq folded")
    model = quantizer.bound_model.eval()
    row = row_of(quantizer.report(), "conv1.weight")
    steps = model.conv1.weight.detach() / row.scale[0]  # type: ignore[index]
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert row.scale_gradient is not None and row.scale_gradient > 0


def test_dorefa_is_measured_behind_its_tanh() -> None:
    quantizer = make("dorefa")
    model = quantizer.bound_model.eval()
    report = quantizer.report(batch())
    row, weight = row_of(report, "fc.weight"), model.fc.parametrizations.weight.original.detach()
    squashed = weight.tanh() / weight.tanh().abs().max()
    assert row.sqnr == pytest.approx(sqnr(squashed, model.fc.weight.detach()), abs=0.01)
    assert (row.range, row.saturation, row.scheme) == ((-1.0, 1.0), 0.0, "dorefa")
    first, outside = row_of(report, "conv1.input"), (batch() < -1 / 30) | (batch() > 1 + 1 / 30)
    assert first.saturation == pytest.approx(100 * float(outside.float().mean()))
    assert row_of(report, "fc.gradient").state == "in training only"


def test_signs_have_an_agreement() -> None:
    quantizer = make("bnn")
    row = row_of(quantizer.report(batch()), "fc.weight")
    weight = quantizer.bound_model.fc.parametrizations.weight.original.detach()
    expected = 100 * float(weight.abs().mean() / weight.square().mean().sqrt())
    assert row.agreement == pytest.approx(expected, rel=1e-4) and row.sqnr is None and row.scheme == "sign"
    assert "agree %" in quantizer.report().plain()
    assert "agree %" not in make("qat").report(batch()).plain()


def test_an_observer_says_that_it_observes() -> None:
    quantizer = make("observer before compress")
    report = quantizer.report(batch())
    assert all(row.state == "observing" and row.sqnr is None for row in report.rows)
    assert len(codes(report)["not-compressed"]) == 6
    assert row_of(report, "conv1.input").range == pytest.approx(
        (min(batch(seed=s).min().item() for s in (1, 2)), max(batch(seed=s).max().item() for s in (1, 2)))
    )
    quantizer.compress()
    after = quantizer.report(batch(seed=1))
    assert "not-compressed" not in codes(after) and all(row.sqnr is not None and row.sqnr > 25 for row in after.rows)


def test_without_a_batch_weights_are_measured() -> None:
    report = make("qat").report()
    assert not report.measured
    assert all((row.sqnr is not None) == (row.tensor == "weight") for row in report.rows)
    assert all(row.scale is not None and row.range is not None for row in report.rows)
    assert make("qat").report(batch()).measured


def facts(model: nn.Module) -> list[Any]:
    """Everything of a model that a report could change, as comparable values."""
    found: list[Any] = [torch.get_rng_state().tolist()]
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple))}
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks)]
        tensors = [(key, tensor, tensor.grad) for key, tensor in module.named_parameters(recurse=False)]
        tensors += [(key, tensor, None) for key, tensor in module.named_buffers(recurse=False)]
        values = [(k, t._version, t.tolist(), None if g is None else g.tolist()) for k, t, g in tensors]
        found.append((name, type(module), plain, hooks, repr(values)))
    return found


@pytest.mark.parametrize("with_batch", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes(kind: str, training: bool, with_batch: bool) -> None:
    quantizer = make(kind)
    model = quantizer.bound_model
    if not kind.startswith("observer"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.train(training)
            model.dropout.eval()  # a mode of its own
    before = facts(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = quantizer.report(batch() if with_batch else None)
    assert facts(model) == before
    assert report.plain()


@pytest.mark.parametrize("kind", ["qat", "qat folded", "lsq folded"])
def test_training_goes_on_as_without_a_report(kind: str) -> None:
    results = []
    for reported in (False, True):
        quantizer = make(kind)
        model = quantizer.bound_model
        loss = model(batch(seed=5)).square().mean()
        if reported:
            quantizer.report(batch())
        loss.backward()  # what the backward needs is still there
        train(model)
        results.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_batch_may_be_a_tuple_or_a_dict() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bilinear = nn.Bilinear(3, 4, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.bilinear(left, right)

    quantizer = QAT_Quantizer(Two(), [{**BOTH, "op_types": ["Bilinear"]}])
    left, right = torch.randn(5, 3), torch.randn(5, 4)
    quantizer(left, right)
    reports = [quantizer.report((left, right)), quantizer.report({"left": left, "right": right})]
    assert [row.tensor for row in reports[0].rows] == ["input", "input_1", "weight"]
    assert reports[0].plain() == reports[1].plain()
    with pytest.raises(ValueError, match="does not run on batch: .*missing 1 required.*Expected a tensor, a tuple"):
        quantizer.report(left)


def test_after_an_export_there_is_nothing_to_report(tmp_path: Path) -> None:
    quantizer = make("qat")
    quantizer.export_model(tmp_path / "model.pth")
    with pytest.raises(RuntimeError, match=r"report\(\): export_model\(\) has taken the quantizers off"):
        quantizer.report()
