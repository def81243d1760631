"""``quantizer.reuse_weights()``: weights are quantized again only after they have changed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_all_weights import LAYERS, MAKES, Calls, Make, batch, build, lsq, places, qat, same
from torch import Tensor, nn

from quantkern import DoReFaQuantizer
from quantkern.quantizers.base import Quantizer

MICRO_BATCHES = 8


def accumulate(make: Make, steps: int, reuse: bool) -> tuple[list[Tensor], list[Calls]]:
    """Training with micro-batches: losses, gradients and state, and the calls of each step."""
    model, quantizer, optimizer = build(make)
    losses, counts = [], []

    def micro_batches(step: int) -> None:
        for k in range(MICRO_BATCHES):
            loss = model(batch(100 * step + k)).square().mean() / MICRO_BATCHES
            loss.backward()
            losses.append(loss.detach())

    for step in range(steps):
        optimizer.zero_grad()
        with Calls() as calls:
            if reuse:
                with quantizer.reuse_weights():
                    micro_batches(step)
            else:
                micro_batches(step)
        optimizer.step()
        counts.append(calls)
    return [*losses, *(p.grad for p in model.parameters() if p.grad is not None), *model.state_dict().values()], counts


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_micro_batches_pay_once(make: Make) -> None:
    reused, counts = accumulate(make, 4, reuse=True)
    assert (counts[-1].together, counts[-1].single) == (1, 0)
    expected, counts = accumulate(make, 4, reuse=False)
    assert (counts[-1].together, counts[-1].single) == (MICRO_BATCHES, MICRO_BATCHES)  # one layer is used twice
    same(reused, expected)


def test_a_step_inside_is_noticed() -> None:
    plain, _, _ = build(qat)
    model, quantizer, optimizer = build(qat)
    model(batch(0)).sum().backward()
    with quantizer.reuse_weights():
        model(batch(0))
        optimizer.step()
        with Calls() as calls:
            y = model(batch(1))
        assert (calls.together, calls.single) == (1, 0)
        with torch.no_grad():
            model.get_parameter("last.parametrizations.weight.original").mul_(2)
        with Calls() as calls:
            model(batch(1))
        assert (calls.together, calls.single) == (1, 0)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain.get_parameter("last.parametrizations.weight.original").div_(2)
    torch.testing.assert_close(plain(batch(1)), y, rtol=0, atol=0)


@pytest.mark.parametrize("make", [qat, lsq])
def test_evaluation_and_training_in_one_block(make: Make) -> None:
    """In any order of modes, results are what each mode gives without the block."""
    model, quantizer, _ = build(make)
    model(batch(0)).sum().backward()

    def run() -> list[Tensor]:
        found = []
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad, torch.no_grad):
            model.eval()
            with mode():
                found.append(model(batch(1)))
        model.zero_grad()
        found[2].sum().backward()
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [each.detach().clone() for each in found]

    expected = run()
    with quantizer.reuse_weights():
        reused = run()
        with Calls() as calls:
            again = run()
        assert calls.together + calls.single == 0
    same(reused, expected)
    same(again, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [qat, lsq])
def test_evaluation_pays_once(make: Make, mode: type[torch.no_grad]) -> None:
    model, quantizer, _ = build(make)
    model(batch(0)).sum().backward()
    model.eval()
    with mode(), quantizer.reuse_weights(), Calls() as calls:
        for seed in range(3):
            model(batch(seed))
    assert (calls.together, calls.single) == (1, 0)


def test_a_result_that_someone_wrote_to_is_computed_again() -> None:
    model, quantizer, _ = build(qat)
    model(batch(0))
    with torch.no_grad(), quantizer.reuse_weights():
        expected = model.last.weight.clone()  # type: ignore[union-attr, operator]
        model.last.weight.mul_(3)  # type: ignore[union-attr, operator]
        assert torch.equal(model.last.weight, expected)  # type: ignore[union-attr, arg-type]


def test_parts_called_on_their_own_reuse_too() -> None:
    model, quantizer, _ = build(qat)
    with quantizer.reuse_weights(), Calls() as calls:
        for _ in range(3):
            model.first(batch(0)).sum().backward()  # type: ignore[operator]
    assert calls.together + calls.single == 1


def test_loaded_calibration_is_used_in_evaluation(tmp_path: Path) -> None:
    model, quantizer, _ = build(qat)
    model(batch(0))
    calibration = quantizer.export_model(tmp_path / "model.pt")
    for layer in calibration.values():
        layer["weight_scale"] = layer["weight_scale"] * 2
    quantizer = qat(model)
    quantizer.load_calibration_config(calibration)
    model.eval()
    expected = model(batch(1))
    with quantizer.reuse_weights():
        torch.testing.assert_close(model(batch(1)), expected, rtol=0, atol=0)
        model.train()
        model(batch(1))
        assert not torch.equal(model.last.weight, model.eval()(batch(1)).new_zeros(()))  # type: ignore[union-attr, arg-type]


def test_results_are_dropped_with_the_outermost_block() -> None:
    model, quantizer, _ = build(qat)
    model(batch(0))
    with quantizer.reuse_weights():
        with quantizer.reuse_weights():
            model(batch(0))
        assert all(place.result is not None for place in places(model))
        copied = copy.deepcopy(model)
        assert all(place.keep == 0 and place.result is None for place in places(copied))
        with pytest.raises(ZeroDivisionError), quantizer.reuse_weights():
            _ = 1 / 0
        assert all(place.result is not None for place in places(model))
    assert all(place.keep == 0 and place.result is None for place in places(model))


def test_writes_that_torch_does_not_count_are_seen_outside_the_block() -> None:
    model, quantizer, _ = build(qat)
    for _ in range(2):
        model(batch(0))
    before = model.last.weight.detach().clone()  # type: ignore[union-attr, operator]
    with quantizer.reuse_weights():
        model(batch(0))
    model.get_parameter("last.parametrizations.weight.original").data.mul_(2)
    with Calls() as calls:
        model(batch(0))
    assert calls.together == 1
    assert torch.equal(model.last.weight, 2 * before)  # type: ignore[union-attr, arg-type]


def test_shards_are_left_alone() -> None:
    """FSDP's modules carry its name; it fills the memory of weights again without a change of version."""
    model, quantizer, _ = build(qat)
    model(batch(0))
    norm = model.norm
    own = type(norm)
    norm.__class__ = type("FSDPBatchNorm2d", (own,), {})
    with quantizer.reuse_weights(), Calls() as calls:
        for _ in range(2):
            model(batch(0))
    assert calls.together == 0 and calls.single == 2 * (LAYERS + 1)
    norm.__class__ = own
    with Calls() as calls:
        model(batch(0))
    assert (calls.together, calls.single) == (1, 1)


def test_folded_batch_norms_keep_their_own_way() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    rules = [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Conv2d", "Linear"]}]
    from quantkern import QAT_Quantizer

    quantizer = QAT_Quantizer(model, rules, dummy_input=batch(0))
    other = copy.deepcopy(model)
    with quantizer.reuse_weights():
        for seed in range(3):
            torch.testing.assert_close(model(batch(seed)), other(batch(seed)), rtol=0, atol=0)
    same(list(model.state_dict().values()), list(other.state_dict().values()))


def test_a_model_without_quantized_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    quantizer = qat(model, quant_types=["input"])
    with quantizer.reuse_weights():
        model(torch.randn(3, 4)).sum().backward()


def test_errors(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    rules = [{"quant_types": ["weight"], "quant_bits": 2, "op_types": ["Linear"]}]
    other: Quantizer = DoReFaQuantizer(model, rules)
    with pytest.raises(TypeError, match="the weights of DoReFaQuantizer cannot be reused"):
        other.reuse_weights()
    other.export_model(tmp_path / "a.pt")
    quantizer = qat(model)
    quantizer.export_model(tmp_path / "b.pt")
    with pytest.raises(RuntimeError, match=r"reuse_weights\(\): export_model\(\) has taken"):
        quantizer.reuse_weights()
