"""What a training step allocates, what it keeps for its backward, how many operators it calls.

On the CPU torch's profiler sees every tensor's memory come and go from the building of the model on, so that
parameters, momentum, gradients, masks in C++ nodes and whatever a library caches all count, each once. Memory that is
no tensor's (oneDNN's scratch space, a kernel's own small arrays) is not seen, the batch itself is not counted. On a
GPU the allocator says the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import allocations
from benchmarks.quantized_networks import Trainee, train_step

STEP, FORWARD = "benchmarks.step", "benchmarks.forward"
"""Names of what is marked in the profile."""

WARM_STEPS = 3
"""Steps before the one that is looked at: momentum exists, learned scales have started."""

Batches = Sequence[tuple[Tensor, Tensor]]


def bytes_over_time(events: Sequence[dict[str, Any]]) -> list[tuple[float, int]]:
    """Times, and the bytes that are alive from there on, of the profiler's memory events."""
    live: dict[int, int] = {}
    now = 0
    found = []
    for event in sorted((one for one in events if one.get("name") == "[memory]"), key=lambda one: one["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            now += size - live.get(address, 0)
            live[address] = size
        else:
            now -= live.pop(address, 0)  # what was there before is not counted, neither when it goes
        found.append((event["ts"], now))
    return found


def window(events: Sequence[dict[str, Any]], name: str) -> tuple[float, float]:
    """When the marked stretch began and ended."""
    (one,) = (one for one in events if one.get("name") == name and one.get("cat") == "user_annotation")
    return one["ts"], one["ts"] + one["dur"]


def is_operator(event: dict[str, Any]) -> bool:
    """Whether an event is a call of an operator, not of the autograd engine or an annotation."""
    name = event.get("name", "")
    return event.get("cat") == "cpu_op" and "::" in name and "autograd::" not in name


def one_step(trainee: Trainee, x: Tensor, y: Tensor, after_forward: Callable[[], None]) -> None:
    """A step whose gradients are cleared already."""
    with torch.profiler.record_function(FORWARD):
        loss = nn.functional.cross_entropy(trainee.call(x), y)
    after_forward()
    loss.backward()  # type: ignore[no-untyped-call]
    trainee.optimizer.step()


def settled(build: Callable[[], Trainee], batches: Batches) -> tuple[Trainee, list[float]]:
    """A trainee after WARM_STEPS without gradients, and the losses of those steps."""
    trainee = build()
    losses = [float(train_step(trainee, list(batches))) for _ in range(WARM_STEPS)]
    return trainee, losses


def measure(build: Callable[[], Trainee], batches: Batches, device: torch.device) -> tuple[Trainee, dict[str, float]]:
    """A trainee that has been trained some steps, and the figures of one more step of one batch.

    state_bytes: tensors alive before the step, gradients not. saved_bytes: what is alive at the end of the forward
    besides. peak_bytes: the most that is alive at once in the step, state included. operator_calls: calls of operators
    as the profiler counts them, those from inside others too. first_loss, last_loss: of the steps before.
    """
    x, y = batches[0]

    def whole() -> tuple[Trainee, list[float], list[int]]:
        base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        trainee, losses = settled(build, batches)
        trainee.optimizer.zero_grad()
        gc.collect()
        sizes = []

        def note() -> None:
            if device.type == "cuda":
                sizes.append(torch.cuda.memory_allocated(device) - base)

        note()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with torch.profiler.record_function(STEP):
            one_step(trainee, x, y, note)
        if device.type == "cuda":
            sizes.append(torch.cuda.max_memory_allocated(device) - base)
        return trainee, losses, sizes

    (trainee, losses, sizes), events = allocations.traced(whole)
    begin, end = window(events, STEP)
    if device.type != "cuda":
        timeline = bytes_over_time(events)
        _, forward_end = window(events, FORWARD)
        state = max((at for at in timeline if at[0] < begin), default=(0.0, 0))[1]
        kept = max((at for at in timeline if at[0] <= forward_end), default=(0.0, 0))[1]
        sizes = [state, kept, max([state, *(size for time, size in timeline if begin <= time <= end)])]
    calls = sum(is_operator(one) and begin <= one["ts"] <= end for one in events)
    state, kept, peak = sizes
    figures = {"state_bytes": state, "saved_bytes": kept - state, "peak_bytes": peak, "operator_calls": calls}
    return trainee, {**map_floats(figures), "first_loss": losses[0], "last_loss": losses[-1]}


def map_floats(figures: dict[str, int]) -> dict[str, float]:
    """The same as floats, as results hold them."""
    return {name: float(value) for name, value in figures.items()}


def weights_without_gradient(model: nn.Module) -> int:
    """How many matrices of parameters have received no gradient, or nothing but zeros."""
    return sum(
        one.requires_grad and one.dim() > 1 and (one.grad is None or not bool(one.grad.any()))
        for one in model.parameters()
    )
