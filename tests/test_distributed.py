"""Training on two ranks: DistributedDataParallel, fully_shard, and what they must have in common with one process."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizer_checks import NoReads
from torch import Tensor, nn

from quantkern.quantizers import BNNQuantizer, DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, QAT_Quantizer

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

RULE = {"quant_types": ["weight", "input", "output"], "quant_bits": 8, "op_types": ["Conv2d", "Linear"]}
CASES: dict[str, tuple[type[Any], list[dict[str, Any]]]] = {
    "qat": (QAT_Quantizer, [RULE]),
    "qat delayed": (QAT_Quantizer, [{**RULE, "quant_start_step": 1}]),
    "lsq": (LsqQuantizer, [{**RULE, "quant_bits": 4}]),
    "dorefa": (DoReFaQuantizer, [{**RULE, "quant_types": ["weight", "input"], "quant_bits": 4}]),
    "naive": (NaiveQuantizer, [{**RULE, "quant_types": ["weight"]}]),
    "bnn": (BNNQuantizer, [{**RULE, "quant_types": ["weight"], "quant_bits": 1}]),
}
QAT = ("qat", "qat delayed")
ROUNDING = 2e-5
"""Of what one process and two compute in another order; about 100 times what was seen."""
RANGES, WEIGHTS = 1e-2, 2.5e-3
"""QAT: in a forward a rank's scales come from its own half of the batch. Seen: 0.005 and 0.0012; one step of 8 bits is
0.013, and training moves weights by 0.05."""
REPLICAS = 1.5e-2
"""QAT and LSQ under DataParallel, whose replicas cannot share ranges and first scales. Seen: 0.009."""
LEARNING_RATES = {"bnn": 1e-4}
"""0.1 where nothing else is said; sums of signs have no scale."""


class Net(nn.Module):
    """``shortcut``: leave out a layer."""

    shortcut = False

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.last = nn.Conv2d(1, 4, 3), nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().flatten(1)
        return self.last(x if self.shortcut else self.first(x).relu())


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(seed: int, size: int = 8) -> Tensor:
    return torch.randn(size, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def train(
    run: nn.Module,
    seeds: range,
    part: Callable[[Tensor], Tensor] = lambda x: x,
    prepare: Callable[[int], None] = id,
    case: str = "",
) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(run.parameters(), lr=LEARNING_RATES.get(case, 0.1), momentum=0.9)
    for seed in seeds:
        prepare(seed)
        optimizer.zero_grad()
        run(part(batch(seed))).square().mean().backward()
        optimizer.step()
    return optimizer


def alone(case: str) -> dict[str, Tensor]:
    """The state after five steps in one process."""
    kind, rules = CASES[case]
    model = net()
    train(kind(model, rules), range(5), case=case)
    return model.state_dict()


def untrained(case: str) -> dict[str, Tensor]:
    kind, rules = CASES[case]
    model = net()
    kind(model, rules)
    return model.state_dict()


def weights_of(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key.endswith((".original", ".bias"))}


def train_frozen(quantizer: Any, run: nn.Module, part: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
    """A float step that finds the ranges, and four quantized ones that keep them."""
    train(run, range(1), part)
    quantizer.freeze_ranges()
    train(run, range(1, 5), part)
    return quantizer.bound_model.state_dict()  # type: ignore[no-any-return]


def largest_difference(mine: dict[str, Any], theirs: dict[str, Any]) -> float:
    assert mine.keys() == theirs.keys()
    return max(float((mine[key].double() - theirs[key].double()).abs().max()) for key in theirs)


def whole_state(model: nn.Module) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=False))


def ranges(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if "running_" in key}


class Ranks:
    """What one of the two ranks does; each method returns what the tests look at."""

    def __init__(self, rank: int, folder: str) -> None:
        self.rank, self.folder = rank, folder

    def half(self, x: Tensor) -> Tensor:
        return x[4 * self.rank : 4 * self.rank + 4]

    def parallel(self, case: str, **settings: Any) -> tuple[Net, Any, nn.Module]:
        kind, rules = CASES[case]
        model = net()
        quantizer = kind(model, rules)
        return model, quantizer, nn.parallel.DistributedDataParallel(quantizer, **settings)

    def same_batch(self) -> dict[str, Any]:
        found = {}
        for case in CASES:
            model, _, run = self.parallel(case)
            train(run, range(5), self.half, case=case)
            found[case] = model.state_dict()
        return found

    def broadcast(self) -> dict[str, list[str]]:
        found = {}
        for what in range(2):  # the model and the quantizer
            model, quantizer, run = self.parallel("qat")
            run = run if what else nn.parallel.DistributedDataParallel(model)
            train(run, range(1), self.half)
            names = {id(buffer): name for name, buffer in model.named_buffers()}
            found["quantizer" if what else "model"] = [names[id(buffer)] for buffer in run.modules_buffers]
        return found

    def collectives(self) -> list[int]:
        """All-reduces of more than a gradient, in each of three steps."""
        model, _, run = self.parallel("qat")
        counts = []
        own, calls = torch.distributed.all_reduce, []
        torch.distributed.all_reduce = lambda *args, **kwargs: calls.append(args) or own(*args, **kwargs)
        try:
            for seed in range(3):
                calls.clear()
                train(run, range(seed, seed + 1), self.half)
                counts.append(len(calls))
        finally:
            torch.distributed.all_reduce = own
        return counts

    def reads(self) -> list[str]:
        """Steps that wait for the device, after the first."""
        found = []
        for case in ("qat", "lsq"):
            for way in ("same_batch", "sharded"):
                run = self.sharded_model(case)[0] if way == "sharded" else self.parallel(case)[2]
                optimizer = train(run, range(1), self.half)
                try:
                    with NoReads():
                        run(self.half(batch(1))).square().mean().backward()
                        optimizer.step()
                except AssertionError as error:
                    found.append(f"{case} {way}: {error}")
        return found

    def switched_off(self) -> dict[str, Any]:
        model, quantizer, run = self.parallel("qat", broadcast_buffers=False)
        quantizer.share_ranges(False)
        train(run, range(2), self.half)
        own = ranges(model)
        quantizer.share_ranges()
        train(run, range(2, 3), self.half)
        return {"off": own, "on": ranges(model)}

    def accumulation(self) -> dict[str, Any]:
        model, _, run = self.parallel("qat")
        train(run, range(1), self.half)
        with run.no_sync():
            run(self.half(batch(1))).square().mean().backward()
            run(self.half(batch(2))).square().mean().backward()
        inside = ranges(model)
        run(self.half(batch(3))).square().mean().backward()
        return {"inside": inside, "after": ranges(model)}

    def frozen(self) -> dict[str, Any]:
        _, quantizer, run = self.parallel("qat delayed")
        return train_frozen(quantizer, run, self.half)

    def frozen_scale(self) -> float:
        """One that does not follow from its range, as of a loaded calibration dict."""
        model, quantizer, run = self.parallel("qat")
        train(run, range(1), self.half)
        quantizer.freeze_ranges()
        model.conv.quantkern.input.scale.fill_(0.5)
        train(run, range(1, 3), self.half)
        return float(model.conv.quantkern.input.scale)

    def moved(self) -> dict[str, Any]:
        """Buffers that are other tensors than in the step before."""
        model, _, run = self.parallel("qat", broadcast_buffers=False)
        train(run, range(1), self.half)
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
        run(self.half(batch(1)))
        return ranges(model)

    def empty(self) -> dict[str, Any]:
        found = {}
        for case, way in [(case, way) for case in CASES for way in ("same_batch", "sharded")]:
            model, run = self.sharded_model(case)[:1] * 2 if way == "sharded" else self.parallel(case)[::2]
            optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATES.get(case, 0.1))
            for seed in range(3):
                optimizer.zero_grad()
                (run(batch(seed, 0 if self.rank and seed != 1 else 4)).square().sum() / 4).backward()
                optimizer.step()
            found[f"{case} {way}"] = whole_state(model)
        return found

    def unused(self) -> dict[str, Any]:
        found = {}
        for case in ("qat", "lsq"):
            for rank in range(2):  # the one that leaves out the layer, at first and later
                model, _, run = self.parallel(case, find_unused_parameters=True)

                def choose(seed: int, model: Net = model, rank: int = rank) -> None:
                    model.shortcut = seed != 1 and self.rank == rank

                train(run, range(4), self.half, choose)
                model.shortcut = False
                run(self.half(batch(4)))
                found[f"{case} {rank}"] = model.state_dict()
        return found

    def other_layers(self) -> str:
        quantizer = QAT_Quantizer(net(), [RULE] if self.rank else [{**RULE, "op_names": ["conv"]}])
        quantizer.share_ranges(group=torch.distributed.group.WORLD)
        with pytest.raises(RuntimeError) as error:
            quantizer(batch(0))
        return str(error.value)

    def mesh(self) -> Any:
        return torch.distributed.device_mesh.init_device_mesh("cpu", (2,))

    def sharded_model(self, case: str) -> tuple[Net, Any]:
        from torch.distributed.fsdp import fully_shard

        kind, rules = CASES[case]
        model, mesh = net(), self.mesh()
        quantizer = kind(model, rules)
        scales = set(quantizer.scale_parameters()) if case == "lsq" else None
        for layer in (model.first, model.last, model):
            fully_shard(layer, mesh=mesh, ignored_params=scales)
        return model, quantizer

    def sharded(self) -> dict[str, Any]:
        found = {}
        for case in CASES:
            model, _ = self.sharded_model(case)
            train(model, range(5), self.half, case=case)
            found[case] = whole_state(model)
        return found

    def refused(self) -> list[str]:
        from torch.distributed.fsdp import fully_shard

        texts = []
        _, quantizer = self.sharded_model("qat")
        for method in (lambda: quantizer.export_model(f"{self.folder}/x{self.rank}.pt"), quantizer.report):
            with pytest.raises(RuntimeError) as error:
                method()
            texts.append(str(error.value))
        rules = [{**RULE, "quant_types": ["weight"], "quant_bits": 4, "quant_scheme": "per_channel_symmetric"}]
        model = net()
        LsqQuantizer(model, rules)
        fully_shard(model, mesh=self.mesh())
        with pytest.raises(RuntimeError) as error:
            model(batch(0))
        return [*texts, str(error.value)]

    def resumed(self) -> dict[str, bool]:
        """Two more steps after a distributed checkpoint, and without one."""
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        found = {}
        for case in ("qat", "lsq"):
            model, _ = self.sharded_model(case)
            optimizer = train(model, range(3), self.half)
            path = f"{self.folder}/checkpoint-{case}"
            state, optimizer_state = get_state_dict(model, optimizer)
            checkpoint.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=path)

            def go_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
                losses = []
                for seed in range(3, 6):
                    optimizer.zero_grad()
                    losses.append(model(self.half(batch(seed))).square().mean())
                    losses[-1].backward()
                    optimizer.step()
                return losses

            expected = go_on(model, optimizer)
            again, _ = self.sharded_model(case)
            optimizer = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
            state, optimizer_state = get_state_dict(again, optimizer)
            both = {"model": state, "optimizer": optimizer_state}
            checkpoint.load(both, checkpoint_id=path)
            set_state_dict(again, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"])
            found[case] = all(map(torch.equal, go_on(again, optimizer), expected))
        return found


FIRST = ("same_batch", "broadcast", "collectives", "reads", "switched_off", "accumulation", "frozen", "frozen_scale")
CHECKS = (*FIRST, "moved", "empty", "unused", "other_layers", "sharded", "refused", "resumed")


def _one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    try:
        ranks = Ranks(rank, folder)
        found = {name: getattr(ranks, name)() for name in CHECKS}
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found; one start of two processes serves every test."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_one_rank, (str(folder),), nprocs=2)
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
