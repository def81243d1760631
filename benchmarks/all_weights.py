"""All weights of a network in one operation, against one operation for each of them.

    python -m benchmarks.all_weights
    python -m benchmarks.all_weights --device cuda --networks resnet50 --json out.json

Both contestants are ours and are called as users call them; they are timed only where their results, states and
gradients are equal to the last bit. "forward" is without gradients; "both" also has the backward, which is one node a
weight for either. The floor, ``copy``, is a plain copy of the same bytes: a clone of every weight, and for "both" one
of every gradient. On the CPU freed memory stays with the process: whether the C library gives a result's pages back,
to fetch them anew in the next call, would otherwise outweigh what is compared.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import quantkern.functional as F
from benchmarks import harness, peers
from benchmarks.fakequant import DIRECTIONS, GRANULARITIES, names_of

OPERATIONS = ("weights", "lsq")


def _resnet18() -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    before = 64
    for size in (64, 128, 256, 512):
        for _ in range(2):
            found += [(size, before, 3, 3), (size, size, 3, 3)]
            if before != size:
                found.append((size, before, 1, 1))
            before = size
    return [*found, (1000, 512)]


def _resnet50() -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    before = 64
    for size, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            found += [(size, before, 1, 1), (size, size, 3, 3), (4 * size, size, 1, 1)]
            if block == 0:
                found.append((4 * size, before, 1, 1))
            before = 4 * size
    return [*found, (1000, 2048)]


NETWORKS = {
    "lenet": [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500)],
    "resnet18": _resnet18(),
    "resnet50": _resnet50(),
}
"""The shapes of the quantized weights; of the ResNets as torchvision has them for ImageNet."""


@dataclass(frozen=True)
class Question:
    """One case to be."""

    network: str
    operation: str
    granularity: str
    direction: str

    @property
    def labels(self) -> dict[str, str]:
        """The case's name in columns."""
        names = ("network", "operation", "per", "direction")
        return dict(zip(names, (self.network, self.operation, self.granularity, self.direction), strict=True))


class Weights:
    """Weights with their state and the gradients from above, the same numbers in every instance."""

    def __init__(self, question: Question, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        shapes = NETWORKS[question.network]
        both, per_tensor = question.direction == "both", question.granularity == "tensor"
        self.learned = question.operation == "lsq"
        self.xs = [draw(shape).requires_grad_(both) for shape in shapes]
        self.above = [draw(shape) for shape in shapes] if both else []
        self.axis = None if per_tensor else 0
        sizes: list[tuple[int, ...]] = [() if per_tensor else shape[:1] for shape in shapes]
        self.scales = [torch.full(size, 0.3, device=device, requires_grad=both and self.learned) for size in sizes]
        self.zero_points = [torch.zeros(size, dtype=torch.int32, device=device) for size in sizes]

    def together(self) -> list[Tensor]:
        """One operation."""
        count = len(self.xs)
        low, high, axes = [-8 if self.learned else -127] * count, [7 if self.learned else 127] * count, [self.axis]
        if self.learned:
            return F.lsq_weights(self.xs, self.scales, low, high, axes * count, [0.01] * count)
        return F.fake_quantize_weights(
            self.xs, self.scales, self.zero_points, low, high, [True] * count, axes * count
        )  # fmt: skip

    def one_by_one(self) -> list[Tensor]:
        """One operation for each weight."""
        if self.learned:
            return [F.lsq(x, s, -8, 7, self.axis, 0.01) for x, s in zip(self.xs, self.scales, strict=True)]
        state = zip(self.xs, self.scales, self.zero_points, strict=True)
        return [F.fake_quantize_weight(x, s, z, -127, 127, True, self.axis) for x, s, z in state]

    def gradients(self, ys: list[Tensor]) -> list[Tensor]:
        """The backward of all, one after the other as a network's layers come."""
        found: list[Tensor] = []
        for x, scale, y, above in zip(self.xs, self.scales, ys, self.above, strict=True):
            found += harness.gradients(y, (x, scale) if self.learned else (x,), above)
        return found

    def everything(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Results, gradients where they are asked for, and what was written."""
        ys = run()
        gradients = self.gradients(ys) if self.above else []
        return [*(y.detach() for y in ys), *gradients, *self.scales, *self.zero_points]


def make_case(question: Question, device: torch.device) -> harness.Case:
    """The two and the floor."""
    mine, others, floor = (Weights(question, device) for _ in range(3))

    def check() -> harness.Verdict:
        pairs = list(zip(mine.everything(mine.together), others.everything(others.one_by_one), strict=True))
        equal = all(torch.equal(one, other) for one, other in pairs)
        text = "equal" if equal else "one operation and the loop differ"
        return harness.Verdict(equal, text, {"differing": float(not equal)})

    def whole(weights: Weights, run: Callable[[], list[Tensor]]) -> Callable[[], object]:
        return lambda: weights.gradients(run()) if weights.above else run()

    elements = sum(x.numel() for x in mine.xs)
    passes = 2 if question.direction == "forward" else 4
    return harness.Case(
        labels=question.labels,
        elements=elements,
        floor_bytes=passes * 4 * elements,
        contestants=[
            harness.Contestant("copy", lambda: [t.detach().clone() for t in (*floor.xs, *floor.above)]),
            harness.Contestant("quantkern", whole(mine, mine.together), check),
            harness.Contestant("one-by-one", whole(others, others.one_by_one), check),
        ],
        device=device,
        host_time=True,
    )


def cases(
    networks: list[str], operations: list[str], per: list[str], directions: list[str], device: torch.device
) -> Iterator[harness.Case]:
    """Every combination, made one at a time."""
    for network in networks:
        for operation in operations:
            for granularity in per:
                for direction in directions:
                    yield make_case(Question(network, operation, granularity, direction), device)


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, however large; other C libraries have no such function and are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, map_threshold = -1, -3
    if mallopt is not None:
        mallopt(map_threshold, 1 << 30)
        mallopt(trim_threshold, -1)  # as a size_t the largest there is


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.all_weights", description=__doc__.splitlines()[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    p.add_argument("--networks", type=names_of(list(NETWORKS), "--networks"), default=list(NETWORKS))
    p.add_argument("--ops", type=names_of(list(OPERATIONS), "--ops"), default=list(OPERATIONS))
    p.add_argument("--per", type=names_of(list(GRANULARITIES), "--per"), default=list(GRANULARITIES))
    p.add_argument("--directions", type=names_of(list(DIRECTIONS), "--directions"), default=list(DIRECTIONS))
    p.add_argument("--seconds", type=float, default=2.0, help="time budget for timing one case (default 2)")
    p.add_argument("--json", type=Path, help="the results (default benchmarks/results/all-weights-DEVICE.json)")
    p.add_argument("--plot", type=Path, help="draw the medians to this file (needs matplotlib)")
    return p


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    options = parser().parse_args(arguments)
    device = harness.device_for(options)
    keep_freed_memory()
    path = options.json or harness.RESULTS / f"all-weights-{options.device}.json"
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    made = cases(options.networks, options.ops, options.per, options.directions, device)
    harness.run(
        "all_weights", made, device, path, {**shown, "dtype": "float32"}, options.seconds, options.plot,
        peers.DISTRIBUTIONS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
