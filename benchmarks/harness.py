"""Fair timing on noisy machines: contestants take turns in one process, and are checked before they are timed.

A benchmark makes ``Case`` objects (one question, several ``Contestant`` answers) and hands them to ``interleave``.
Statistics, the description of the machine, JSON, tables and charts are here too, so that a benchmark's own file
holds only its cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.tables import plot, print_case, print_summary, require_matplotlib

RESULTS = Path(__file__).resolve().parent / "results"


SAMPLE_NS = 200_000
"""A sample shorter than this is mostly timer noise: short operations are repeated until one takes as long."""
FLUSH_BYTES = 256 << 20
"""Written before every CUDA sample: several times any GPU's L2 cache, so that no contestant finds its data there."""
HEAD_START_CYCLES = 1_000_000
"""The GPU idles this long (about 0.6 ms) before a CUDA sample, so that it never waits for the host to launch."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check: whether the contestant may be timed, and by how much it differs, in words and numbers.

    other_work: how a contestant that is timed all the same differs from the specification; its results are marked.
    """

    accepted: bool
    text: str
    figures: dict[str, float] = field(default_factory=dict)
    other_work: str = ""


@dataclass(frozen=True)
class Contestant:
    """One way to do the work of a case. ``run`` does it once, whole; ``check`` compares it with the reference."""

    name: str
    run: Callable[[], object]
    check: Callable[[], Verdict] | None = None


@dataclass(frozen=True)
class Case:
    """One question: the same work on the same numbers for every contestant.

    labels: what the question is, in the order of the table's columns.
    elements, floor_bytes: the size of the work, and the bytes that cannot be avoided.
    floor, ours: which contestants the ratios are taken to.
    host_time: time the call as the host sees it also on a GPU (for the cost of a call).
    unavailable: contestants that cannot take part, with the reason.
    """

    labels: dict[str, str]
    elements: int
    floor_bytes: int
    contestants: Sequence[Contestant]
    device: torch.device
    floor: str = "copy"
    ours: str = "quantkern"
    host_time: bool = False
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The labels in one line."""
        return " ".join(self.labels.values())


@dataclass(frozen=True)
class Result:
    """One contestant's figures in one case. Times are of one operation; the ratios are of medians.

    to_floor: this contestant's time over the floor's. to_ours: this contestant's time over ours, so 10 means that
    ours is ten times as fast. None where the floor or ours is not among the contestants.
    bytes_per_element: what the floor would have moved in this contestant's time, for an element. Less than the floor's
    own bytes: it is faster than the floor, whose stores may read a line of memory before they write it.
    other_work: not empty where it was timed although it computes something else, and what.
    round_to_floor: the median over the rounds of this contestant's sample over the floor's of the same round.
    """

    labels: dict[str, str]
    contestant: str
    samples: int
    repeats: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ns_per_element: float
    gb_per_s: float
    to_floor: float | None
    to_ours: float | None
    check: str
    figures: dict[str, float]
    bytes_per_element: float | None = None
    other_work: str = ""
    round_to_floor: float | None = None

    @property
    def floor_bytes_per_element(self) -> float:
        """The bytes an element that cannot be avoided."""
        return self.gb_per_s * self.ns_per_element


@dataclass(frozen=True)
class Excluded:
    """A contestant that was not timed, and why."""

    labels: dict[str, str]
    contestant: str
    reason: str


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of the values lie, interpolated linearly between neighbours.

    >>> percentile([4.0, 1.0, 2.0, 3.0], 50)
    2.5
    """
    if not values:
        raise ValueError("percentile of no values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


class CpuTimer:
    """Wall time of ``repeats`` calls, in nanoseconds a call, after one call that brings the data into the caches."""

    def __init__(self, device: torch.device) -> None:
        self.synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def repeats(self, run: Callable[[], object]) -> int:
        """How many calls make a sample of SAMPLE_NS."""
        for _ in range(2):
            run()
        count = 1
        while True:
            elapsed = self.sample(run, count) * count
            if elapsed >= SAMPLE_NS:
                return count
            count = max(count * 2, min(count * 20, math.ceil(1.2 * count * SAMPLE_NS / max(elapsed, 1))))

    def sample(self, run: Callable[[], object], repeats: int) -> float:
        """One sample."""
        run()
        self.synchronize()
        start = time.perf_counter_ns()
        for _ in range(repeats):
            run()
        self.synchronize()
        return (time.perf_counter_ns() - start) / repeats


class CudaTimer:
    """Device time of one call, in nanoseconds, with a cold L2 cache and without the host's launch time."""

    def __init__(self, device: torch.device) -> None:
        self.scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def repeats(self, run: Callable[[], object]) -> int:
        """Always one: a second call would find its data in the cache."""
        for _ in range(3):
            run()
        return 1

    def sample(self, run: Callable[[], object], repeats: int) -> float:  # noqa: ARG002
        """One sample."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.scratch.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e6


def interleave(
    cases: Iterable[Case], seconds: float = 2.0, min_rounds: int = 7, max_rounds: int = 300, seed: int = 0
) -> Iterator[tuple[Case, list[Result], list[Excluded]]]:
    """Check, then time each case's contestants: rounds in which each takes one sample, in a new random order.

    Drift of the machine (clock, neighbours) then falls on all of them alike. ``seconds`` limits the timing of a
    case, not its checks; at least ``min_rounds`` are taken. Cases are taken from the iterable one at a time, so
    that only one holds memory.
    """
    order = random.Random(seed)
    for case in cases:
        excluded = [Excluded(case.labels, name, reason) for name, reason in case.unavailable.items()]
        accepted: dict[str, tuple[Contestant, Verdict]] = {}
        for contestant in case.contestants:
            try:
                verdict = contestant.check() if contestant.check else Verdict(True, "")
            except Exception as error:  # a peer that cannot do this case is a finding, not the end of the run
                if contestant.name == case.ours:
                    raise
                reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                excluded.append(Excluded(case.labels, contestant.name, reason[:200]))
                continue
            if verdict.accepted:
                accepted[contestant.name] = (contestant, verdict)
            else:
                excluded.append(Excluded(case.labels, contestant.name, verdict.text))
        yield case, _time(case, accepted, seconds, min_rounds, max_rounds, order), excluded


def _time(
    case: Case,
    accepted: dict[str, tuple[Contestant, Verdict]],
    seconds: float,
    min_rounds: int,
    max_rounds: int,
    order: random.Random,
) -> list[Result]:
    on_device = case.device.type == "cuda" and not case.host_time
    timer = CudaTimer(case.device) if on_device else CpuTimer(case.device)
    names = list(accepted)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        repeats = {name: timer.repeats(accepted[name][0].run) for name in names}
        deadline = time.perf_counter() + seconds
        for done in range(max_rounds):
            if done >= min_rounds and time.perf_counter() >= deadline:
                break
            for name in order.sample(names, len(names)):
                samples[name].append(timer.sample(accepted[name][0].run, repeats[name]))
    finally:
        if collecting:
            gc.enable()
    medians = {name: percentile(values, 50) for name, values in samples.items()}
    floor, ours = medians.get(case.floor), medians.get(case.ours)
    return [
        Result(
            labels=case.labels,
            contestant=name,
            samples=len(samples[name]),
            repeats=repeats[name],
            p20_ms=percentile(samples[name], 20) / 1e6,
            p50_ms=median / 1e6,
            p80_ms=percentile(samples[name], 80) / 1e6,
            ns_per_element=median / case.elements,
            gb_per_s=case.floor_bytes / median,
            to_floor=median / floor if floor else None,
            to_ours=median / ours if ours else None,
            check=accepted[name][1].text,
            figures=accepted[name][1].figures,
            bytes_per_element=case.floor_bytes / case.elements * median / floor if floor else None,
            other_work=accepted[name][1].other_work,
            round_to_floor=(
                percentile([own / other for own, other in zip(samples[name], samples[case.floor], strict=True)], 50)
                if floor
                else None
            ),
        )
        for name, median in medians.items()
    ]


def gradients(y: Tensor, inputs: Sequence[Tensor], above: Tensor, keep_graph: bool = False) -> tuple[Tensor, ...]:
    """The backward half of the work; with ``keep_graph`` it can be done again. None for an input y does not depend on.

    The engine is called as torch.autograd.grad calls it. That function's own Python takes about 25 us, as long as all
    the work on a small tensor; a training step pays for it once, not once a layer, so no contestant does here.
    """
    engine = torch.autograd.Variable._execution_engine
    return engine.run_backward(  # type: ignore[no-any-return, no-untyped-call]
        (y,), (above,), keep_graph, False, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )


def write_json(
    path: Path,
    benchmark: str,
    where: dict[str, Any],
    arguments: dict[str, Any],
    results: Sequence[Result],
    excluded: Sequence[Excluded],
) -> None:
    """Everything that was measured, in one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": benchmark,
        **where,
        "arguments": arguments,
        "results": [dataclasses.asdict(result) for result in results],
        "excluded": [dataclasses.asdict(one) for one in excluded],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def read_json(path: Path) -> tuple[dict[str, Any], list[Result], list[Excluded]]:
    """What ``write_json`` wrote: the whole document, its results and its exclusions."""
    document = json.loads(path.read_text())
    return (
        document,
        [Result(**one) for one in document["results"]],
        [Excluded(**one) for one in document["excluded"]],
    )


def device_for(options: argparse.Namespace) -> torch.device:
    """The device that ``--device`` names, with as many CPU threads as ``--threads`` says."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here")
    if options.threads:
        torch.set_num_threads(options.threads)
    return torch.device(options.device)


def kernels_for(device: torch.device) -> str:
    """Which of our kernels AUTO runs on a device, on the CPU with their instruction set."""
    from quantkern import _C
    from quantkern.backend import choose_backend

    backend, reason = choose_backend(device.type)
    if device.type == "cpu":
        reason = f"{reason}, running on {_C.cpu_capability()}"
    return f"{backend.value}: {reason}"


def run(
    benchmark: str,
    cases: Iterable[Case],
    device: torch.device,
    path: Path,
    arguments: dict[str, Any],
    seconds: float,
    chart: Path | None,
    distributions: Iterable[str],
    floor: str = "copy",
    min_rounds: int = 7,
    show: Callable[[Case, Sequence[Result], Sequence[Excluded]], None] | None = None,
) -> list[Result]:
    """Check, time, print, write after every case (a run may be cut short), and draw. ``floor``: the cases' own.

    ``show`` prints a case in a benchmark's own way; then there is no summary either.
    """
    if chart:
        require_matplotlib()
    where = environment(device, distributions)
    machine = where["machine"]
    machine["quantkern"] = kernels_for(device)
    print(f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} CPU threads, {arguments.get('dtype')}")
    print(f"quantkern runs: {machine['quantkern']}")
    results: list[Result] = []
    excluded: list[Excluded] = []
    for case, timed, not_timed in interleave(cases, seconds, min_rounds):
        (show or print_case)(case, timed, not_timed)
        results += timed
        excluded += not_timed
        write_json(path, benchmark, where, arguments, results, excluded)
    if show is None:
        print_summary("milliseconds, ours over the floor, and each peer's time over ours", results, floor)
    print(f"\nwritten: {path}")
    if chart:
        plot(chart, f"{benchmark}, {arguments.get('dtype')}, {device.type}", results)
        print(f"drawn: {chart}")
    return results
