"""Training on two ranks: DistributedDataParallel, fully_shard, and what they must have in common with one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from two_ranks import (
    CASES,
    COMPILED,
    LEARNING_RATES,
    QAT,
    RANGES,
    REPLICAS,
    ROUNDING,
    RULE,
    WEIGHTS,
    alone,
    batch,
    largest_difference,
    net,
    one_rank,
    train,
    train_frozen,
    untrained,
    weights_of,
)

from quantkern.quantizers import QAT_Quantizer

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found; one start of two processes serves every test."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["same_batch", "sharded"])
def test_two_ranks_train_as_one_process(found: list[dict[str, Any]], way: str, case: str) -> None:
    first, second = (dict(one[way][case]) for one in found)
    assert largest_difference(first, second) == 0
    expected = alone(case)
    points = [key for key, value in expected.items() if value.dtype is torch.int32]  # zero points
    for key in points if case in QAT else ():
        assert abs(int(first.pop(key)) - int(expected.pop(key))) <= 1
    assert largest_difference(first, expected) <= (RANGES if case in QAT else ROUNDING)
    assert largest_difference(weights_of(first), weights_of(expected)) <= (WEIGHTS if case in QAT else ROUNDING)
    assert largest_difference(weights_of(expected), weights_of(untrained(case))) > 0.03


@pytest.mark.parametrize("way", ["model", "whole"])
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_ranks_train_as_eager_ones(found: list[dict[str, Any]], case: str, way: str) -> None:
    """DistributedDataParallel around a compiled model, and itself compiled."""
    assert [one["compiled"][f"{case} {way}"] for one in found] == [0, 0]


@pytest.mark.parametrize("way", ["same_batch", "sharded"])
def test_running_ranges_are_those_of_the_global_batch(found: list[dict[str, Any]], way: str) -> None:
    """The input of the first layer does not depend on what was trained: its range has the same bits."""
    expected, first = alone("qat"), found[0][way]["qat"]
    for name in ("running_min", "running_max", "scale", "zero_point"):
        assert torch.equal(first[f"conv.quantkern.input.{name}"], expected[f"conv.quantkern.input.{name}"])


def test_one_collective_a_step_shares_all_ranges(found: list[dict[str, Any]]) -> None:
    assert [one["collectives"] for one in found] == [[1, 1, 1]] * 2


def test_only_the_first_step_waits_for_the_device(found: list[dict[str, Any]]) -> None:
    assert [one["reads"] for one in found] == [[], []]


@pytest.mark.parametrize("wrapped", ["model", "quantizer"])
def test_nothing_of_a_weight_is_broadcast(found: list[dict[str, Any]], wrapped: str) -> None:
    names = found[0]["broadcast"][wrapped]
    assert len(names) == 3 * 10 and not any("weight" in name for name in names)


def test_an_export_leaves_no_word_for_ddp(tmp_path: Path) -> None:
    model = net()
    model._ddp_params_and_buffers_to_ignore = ["mine"]
    quantizer = QAT_Quantizer(model, [RULE])
    train(model, range(1))
    assert model._ddp_params_and_buffers_to_ignore[:2] == ["mine", "conv.parametrizations.weight.0.scale"]
    with pytest.raises(OSError):
        quantizer.export_model(tmp_path / "nowhere" / "model.pt")
    assert len(model._ddp_params_and_buffers_to_ignore) == 1 + 2 * 3
    quantizer.export_model(tmp_path / "model.pt")
    assert model._ddp_params_and_buffers_to_ignore == ["mine"]
    assert not hasattr(quantizer, "_ddp_params_and_buffers_to_ignore")


def test_sharing_can_be_switched_off_and_on(found: list[dict[str, Any]]) -> None:
    first, second = (one["switched_off"] for one in found)
    assert largest_difference(first["off"], second["off"]) > 0.01
    assert largest_difference(first["on"], second["on"]) == 0


def test_ranks_go_alone_inside_no_sync_and_meet_behind_it(found: list[dict[str, Any]]) -> None:
    first, second = (one["accumulation"] for one in found)
    assert largest_difference(first["inside"], second["inside"]) > 0
    assert largest_difference(first["after"], second["after"]) == 0


def test_two_ranks_with_frozen_ranges_train_as_one_process(found: list[dict[str, Any]]) -> None:
    """QAT without a difference between the ranges of a half and of the whole: what is left is the order of sums."""
    kind, rules = CASES["qat delayed"]
    model = net()
    expected = train_frozen(kind(model, rules), model)
    first, second = (one["frozen"] for one in found)
    assert largest_difference(first, second) == 0
    assert largest_difference(first, expected) <= ROUNDING


def test_ranges_that_were_assigned_are_shared(found: list[dict[str, Any]]) -> None:
    first, second = (one["moved"] for one in found)
    assert largest_difference(first, second) == 0 and len(first) == 12


def test_frozen_ranges_keep_their_scale(found: list[dict[str, Any]]) -> None:
    assert [one["frozen_scale"] for one in found] == [0.5, 0.5]


def replicas_of(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """DataParallel's copies of a model for one forward; the first has the model's own tensors, as on its device."""

    def broadcast(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [list(tensors), [tensor.clone() for tensor in tensors]]

    module = sys.modules["torch.nn.parallel.replicate"]  # its name in the package is that of the function
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    return nn.parallel.replicate(model, [0, 1])


@pytest.mark.parametrize("case", CASES)
def test_data_parallel_trains_as_one_process(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """DataParallel needs several GPUs: here its replicas run one after the other, each with half of the batch."""
    kind, rules = CASES[case]
    model = net()
    kind(model, rules)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATES.get(case, 0.1), momentum=0.9)
    for seed in range(5):
        optimizer.zero_grad()
        halves = zip(replicas_of(model, monkeypatch), batch(seed).split(4), strict=True)
        torch.cat([replica(half) for replica, half in halves]).square().mean().backward()
        optimizer.step()
    own, expected = weights_of(model.state_dict()), weights_of(alone(case))
    assert largest_difference(own, expected) <= (REPLICAS if case in (*QAT, "lsq") else ROUNDING)
    if case in QAT:  # the ranges are those of the first replica, as with NNI
        assert model.eval()(batch(9)).isfinite().all() and model.conv.quantkern.input.is_observed()
    if case == "lsq":
        assert model.conv.quantkern.input.initialized and model.conv.quantkern.input.scale.grad.abs() > 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["same_batch", "sharded"])
def test_a_rank_may_have_no_samples(found: list[dict[str, Any]], way: str, case: str) -> None:
    """In the first step, in which ranges and scales start, and in a later one."""
    first, second = (one["empty"][f"{case} {way}"] for one in found)
    assert largest_difference(first, second) == 0
    assert all(value.isfinite().all() for value in first.values())
    assert not torch.equal(first["last.bias"], net().last.bias)


@pytest.mark.parametrize("case", ["qat 0", "qat 1", "lsq 0", "lsq 1"])
def test_a_rank_may_leave_out_a_layer(found: list[dict[str, Any]], case: str) -> None:
    """Also in the first step, in which scales start."""
    first, second = (one["unused"][case] for one in found)
    assert largest_difference(first, second) == 0
    if case.startswith("lsq"):
        scale = first["first.quantkern.input.scale"]
        assert first["first.quantkern.input.initialized"] and 0.01 < scale < 0.8
        assert first["first.parametrizations.weight.0.initialized"]
        assert first["first.parametrizations.weight.0.scale"] < 0.2


def test_ranks_with_other_layers_say_so(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert "only some ranks have a quantizer for first.quantkern.input" in one["other_layers"]
        assert "dummy_input" in one["other_layers"]


def test_what_needs_whole_weights_refuses_sharded_ones(found: list[dict[str, Any]]) -> None:
    for one in found:
        export, report, scales = one["refused"]
        assert export.startswith("export_model(): fully_shard") and "full_state_dict=True" in export
        assert report.startswith("report(): fully_shard")
        assert "ignored_params=set(quantizer.scale_parameters())" in scales


def test_the_state_of_a_sharded_model_is_exported_from_a_whole_one(found: list[dict[str, Any]], tmp_path: Path) -> None:
    for case in ("qat", "lsq"):
        kind, rules = CASES[case]
        model = net()
        quantizer = kind(model, rules)
        model.load_state_dict(found[0]["sharded"][case], strict=True)
        calibration = quantizer.export_model(tmp_path / f"{case}.pt")
        scale = found[0]["sharded"][case]["conv.quantkern.input.scale"]
        assert calibration["conv"]["input_scale"] == pytest.approx(scale.item())


def test_distributed_checkpoints_resume_exactly(found: list[dict[str, Any]]) -> None:
    assert all(one["resumed"] == {"qat": True, "lsq": True} for one in found)
