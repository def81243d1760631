"""What each of two ranks does in the tests of distributed training, and what one process does alone."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantizer_checks import NoReads
from torch import Tensor, nn

from quantkern.quantizers import BNNQuantizer, DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, QAT_Quantizer

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
COMPILED = (*QAT, "lsq")
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

    def compiled(self) -> dict[str, float]:
        """How far five compiled steps are from as many eager ones."""
        found = {}
        for case in COMPILED:
            eager = self.parallel(case)
            train(eager[2], range(5), self.half)
            for way in ("model", "whole"):
                torch.compiler.reset()
                torch._dynamo.utils.counters.clear()
                model, _, run = self.parallel(case)
                if way == "whole":
                    run = torch.compile(run, backend="aot_eager")
                else:
                    run = nn.parallel.DistributedDataParallel(torch.compile(model, backend="aot_eager"))
                train(run, range(5), self.half)
                assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
                found[f"{case} {way}"] = largest_difference(model.state_dict(), eager[0].state_dict())
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
CHECKS = (*FIRST, "compiled", "moved", "empty", "unused", "other_layers", "sharded", "refused", "resumed")


def one_rank(rank: int, folder: str) -> None:
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
