"""Where the time of quantization goes in a training step: by tensor, by operator, and what is left over.

Every fake-quantizer's forward and its node's backward are timed where they are called, so their times hold what Python
and autograd add inside. A tensor's floor is what must move at least (x read, y written, the gradient read and
written, LSQ's x once more, one bit an element where a mask is kept) at the bandwidth of a large copy; a tensor that
fits into a cache can be faster.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks import allocations, harness, tables
from benchmarks.networks import Network
from benchmarks.quantized_networks import Build, Trainee, train_step
from benchmarks.step_memory import STEP, WARM_STEPS, window
from quantkern.ahead import Ahead
from quantkern.current_range import WeightFakeQuant
from quantkern.fake_quant import FakeQuant
from quantkern.learned import LearnedState

PROFILED = ("quantkern-qat", "quantkern-lsq", "quantkern-qat-folded")

COPY_BYTES = 64 << 20
"""Of each of two tensors: together more than the caches of most machines hold."""

MASK = 1 / 8
"""Bytes an element."""


@dataclass
class Span:
    """One tensor's quantization: times in nanoseconds of every step, and the bytes that must move in one."""

    label: str
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    floor_bytes: float = 0.0
    shape: str = ""

    @property
    def kind(self) -> str:
        """weight, input or output."""
        return self.label.rpartition(".")[2]

    @property
    def forward_ms(self) -> float:
        """Median of the steps."""
        return harness.percentile(self.forward, 50) / 1e6 if self.forward else 0.0

    @property
    def backward_ms(self) -> float:
        """Median of the steps."""
        return harness.percentile(self.backward, 50) / 1e6 if self.backward else 0.0


def floor_bytes(module: FakeQuant, x: Tensor, with_gradient: bool) -> float:
    """Bytes that a step moves at least for one tensor."""
    item = x.element_size()
    if isinstance(module, LearnedState):
        return x.numel() * (2 * item + 3 * item)
    low, high = module.spec.quant_range
    passes_all = isinstance(module, WeightFakeQuant) and module.spec.symmetric and low == -high
    if passes_all or not with_gradient:
        return x.numel() * 2 * item
    return x.numel() * (4 * item + 2 * MASK)


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Span]]:
    """Time every fake-quantizer of the model as long as this lasts, weights one by one."""
    spans: dict[str, Span] = {}
    modules = [module for module in model.modules() if isinstance(module, FakeQuant)]
    for module in modules:
        span = spans[module.label] = Span(module.label)
        module.forward = _timed(module, span)
    try:
        yield spans
    finally:
        for module in modules:
            del module.forward


def _timed(module: FakeQuant, span: Span) -> Callable[[Tensor], Tensor]:
    forward = module.forward
    place: Ahead = getattr(module, "ahead", Ahead())
    place.seen = None

    def run(x: Tensor) -> Tensor:
        start = time.perf_counter_ns()
        y: Tensor = forward(x)
        span.forward.append(time.perf_counter_ns() - start)
        place.seen = None  # not together with the other weights next time
        node = y.grad_fn
        own = node is not None and "Quantkern" in node.name()
        span.shape = "x".join(map(str, x.shape))
        span.floor_bytes = floor_bytes(module, x, own)
        if own:
            assert node is not None
            began: list[int] = []
            node.register_prehook(lambda *_: began.append(time.perf_counter_ns()))
            node.register_hook(lambda *_: span.backward.append(time.perf_counter_ns() - began[0]))
        return y

    return run


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, what is read and what is written counted; the median of nine."""
    x = torch.zeros(COPY_BYTES // 4, device=device)
    y = torch.empty_like(x)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        y.copy_(x)
        times.append(time.perf_counter() - start)
    return 2 * COPY_BYTES / harness.percentile(times, 50)


def operator_times(run: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Calls and milliseconds of every operator and autograd node in one step, its own time without its children's."""

    def marked() -> None:
        with torch.profiler.record_function(STEP):
            run()

    _, events = allocations.traced(marked, memory=False)
    begin, end = window(events, STEP)
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    open_: list[tuple[float, str, list[float]]] = []
    calls = [one for one in events if one.get("cat") == "cpu_op" and begin <= one["ts"] <= end]

    def close(until: float) -> None:
        while open_ and open_[-1][0] <= until:
            _, name, own = open_.pop()
            count, total = found[name]
            found[name] = count + 1, total + own[0] / 1e3

    for one in sorted(calls, key=lambda one: (one["ts"], -one["dur"])):
        close(one["ts"])
        if open_:
            open_[-1][2][0] -= one["dur"]
        open_.append((one["ts"] + one["dur"], one["name"], [one["dur"]]))
    close(end + 1e12)
    return dict(found)


def medians_of_times(times: list[dict[str, tuple[int, float]]]) -> dict[str, tuple[int, float]]:
    """Of several steps: calls, and the median of the milliseconds, of every operator."""
    names = {name for one in times for name in one}
    return {
        name: (
            max(one.get(name, (0, 0.0))[0] for one in times),
            harness.percentile([one.get(name, (0, 0.0))[1] for one in times], 50),
        )
        for name in names
    }


def by_tensor(spans: dict[str, Span], step_ms: float, bandwidth: float) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: one a tensor, the slowest first, then one a kind."""
    columns = ["layer", "tensor", "shape", "forward ms", "backward ms", "% of step", "GB/s", "x floor"]

    def row(head: list[str], members: list[Span]) -> list[str]:
        forward, backward = sum(one.forward_ms for one in members), sum(one.backward_ms for one in members)
        moved = sum(one.floor_bytes for one in members)
        total = forward + backward
        floor = moved / bandwidth * 1e3
        cells = [forward, backward, 100 * total / step_ms, moved / total / 1e6 if total else 0.0]
        return [*head, *(tables.figure(cell) for cell in cells), tables.figure(total / floor if floor else None)]

    ordered = sorted(spans.values(), key=lambda one: -one.forward_ms - one.backward_ms)
    rows = [row([one.label.rpartition(".")[0], one.kind, one.shape], [one]) for one in ordered]
    kinds: dict[str, list[Span]] = defaultdict(list)
    for one in ordered:
        kinds[one.kind].append(one)
    rows += [row(["all", kind, f"{len(members)} tensors"], members) for kind, members in kinds.items()]
    rows.append(row(["all", "", f"{len(ordered)} tensors"], ordered))
    return columns, rows


def by_operator(
    plain: dict[str, tuple[int, float]], quantized: dict[str, tuple[int, float]], shown: int = 20
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: operators and autograd nodes whose own time differs most between the two networks."""
    names = set(plain) | set(quantized)
    none = (0, 0.0)
    differences = {name: quantized.get(name, none)[1] - plain.get(name, none)[1] for name in names}
    rows = []
    for name in sorted(names, key=lambda name: -abs(differences[name]))[:shown]:
        (calls, ms), (own_calls, own_ms) = plain.get(name, none), quantized.get(name, none)
        short = name.removeprefix("autograd::engine::evaluate_function: ")
        label = f"engine: {short}" if short != name else name
        rows.append([label, str(calls), tables.figure(ms), str(own_calls), tables.figure(own_ms)])
        rows[-1].append(f"{differences[name]:+.3f}")
    return ["operator", "float calls", "ms", "quantized calls", "ms", "difference"], rows


def show(
    network: Network, name: str, build_float: Build, build: Build, device: torch.device, steps: int
) -> dict[str, Span]:
    """Print the three tables of one network; returns the times of its tensors."""
    batches = [network.draw(device)]
    plain, trainee = build_float(network, device), build(network, device)
    for one in (plain, trainee):
        for _ in range(WARM_STEPS):
            train_step(one, batches)
    bandwidth = copy_bandwidth(device)
    samples: dict[str, list[float]] = {"float": [], name: [], "watched": []}

    def timed(kind: str, which: Trainee) -> None:
        start = time.perf_counter_ns()
        train_step(which, batches)
        samples[kind].append((time.perf_counter_ns() - start) / 1e6)

    spans: dict[str, Span] = {}
    for _ in range(steps):
        timed("float", plain)
        timed(name, trainee)
        with watched(trainee.model) as seen:
            timed("watched", trainee)
        for label, span in seen.items():
            kept = spans.setdefault(label, span)
            if kept is not span:
                kept.forward += span.forward
                kept.backward += span.backward
    float_ms, own_ms = (harness.percentile(samples[kind], 50) for kind in ("float", name))
    tables.print_table(
        f"{network.name}, batch {network.batch}: {name}, {steps} steps, copying at {bandwidth / 1e9:.1f} GB/s",
        *by_tensor(spans, own_ms, bandwidth),
        text_columns=3,
    )
    inside = sum(one.forward_ms + one.backward_ms for one in spans.values())
    rest = own_ms - float_ms - inside
    print(
        f"step: float {float_ms:.3f} ms, {name} {own_ms:.3f} ms ({own_ms / float_ms:.3f}x): {own_ms - float_ms:.3f} ms "
        f"more, {inside:.3f} inside fake-quantizers and their backward, {rest:.3f} elsewhere (hooks and "
        "parametrizations, the engine, caches, a longer optimizer step)"
    )

    def profiled(which: Trainee) -> dict[str, tuple[int, float]]:
        return medians_of_times([operator_times(lambda: train_step(which, batches)) for _ in range(min(steps, 5))])

    title = f"{network.name}: own time of operators under the profiler, {name} against float, ms"
    tables.print_table(title, *by_operator(profiled(plain), profiled(trainee)))
    return spans
