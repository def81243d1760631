"""How fast a learned step size and DoReFa's transforms are here, forward and backward.

    python -m benchmarks.lsq
    python -m benchmarks.lsq --shapes weight-512 --ops lsq --json out.json

Every contestant is compared with quantkern.reference first. A library that is known to compute something else is
timed all the same; its figures are starred, and it is said what.

Two directions are timed: "both", the forward with gradients and the backward, and for lsq "backward" alone, on a graph
that is kept. The floor, ``copy``, moves the bytes that cannot be avoided: a clone of x for the forward (8 bytes an
element in float32), and for the backward x and the gradient read, dx written (12), as one addition. B/element is a
time in bytes: what the floor would have moved in it. The check of a "backward" also says what our kernel reads and
writes by count (on the CPU), what tensors were allocated at the peak, and what the forward saved beyond x and scale.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import quantkern.functional as F
from benchmarks import allocations, harness, peers, problems, tables
from benchmarks.fakequant import DTYPES, GRANULARITIES, names_of
from benchmarks.problems import DOREFA_ACTIVATION, DOREFA_WEIGHT, LSQ, Learner, Problem, Unsupported
from benchmarks.shapes import SHAPES, Shape
from quantkern import reference

OPERATIONS = {
    LSQ: "learned step size, -8..7 (weights) or 0..15 (activations), gradients of x and scale",
    DOREFA_WEIGHT: "DoReFa's weight transform, 4 bits",
    DOREFA_ACTIVATION: "DoReFa's activation, 4 bits",
}
DIRECTIONS = ("both", "backward")
SHOWN = ("act-64x56", "act-64x56-nhwc", "act-bert", "weight-512", "weight-64", "weight-1x1", "tiny-16")
BITS = 4

MAX_WRONG = 1e-3
"""Fraction of elements that may have another y or another gradient."""

MAX_SCALE_OFF = 0.01
"""How far the gradient of the scale may be off, by its own size."""


@dataclass
class Work:
    """One question with its numbers: x, the scale where there is one, and the gradient from above."""

    operation: str
    shape: Shape
    axis: int | None
    x: nn.Parameter
    scale: Tensor
    above: Tensor
    quant_min: int
    quant_max: int

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that receive a gradient."""
        return (self.x, self.scale) if self.operation == LSQ else (self.x,)

    @property
    def problem(self) -> Problem:
        """The same for the adapters of other libraries."""
        low, high = (self.quant_min, self.quant_max) if self.operation == LSQ else (0, 2**BITS - 1)
        scale = self.scale.detach()
        return Problem(self.operation, self.x, scale, torch.zeros_like(scale), low, high, True, self.axis)


def make_work(operation: str, shape: Shape, axis: int | None, dtype: torch.dtype, device: torch.device) -> Work:
    """The same numbers every time."""
    x = shape.make(dtype, device)
    low, high = (0, 15) if shape.kind == "activation" else (-8, 7)
    if shape.kind == "activation":
        x = x.abs()
    mean = x.float().abs().mean() if axis is None else x.float().abs().movedim(axis, 0).flatten(1).mean(1)
    scale = (2 * mean / high**0.5).requires_grad_()
    return Work(operation, shape, axis, nn.Parameter(x), scale, shape.make(dtype, device, seed=1), low, high)


Step = Callable[[], Tensor]
Contestant = Callable[[Work], Step | Learner]


def quantkern(w: Work) -> Step:
    """Ours, as users call it."""
    if w.operation == LSQ:
        return lambda: F.lsq(w.x, w.scale, w.quant_min, w.quant_max, w.axis)
    function = F.dorefa_weight if w.operation == DOREFA_WEIGHT else F.dorefa_activation
    return lambda: function(w.x, BITS)


def specification(w: Work) -> Step:
    """quantkern.reference, which every contestant must agree with."""
    if w.operation == LSQ:
        return lambda: reference.lsq(w.x, w.scale, w.quant_min, w.quant_max, w.axis)
    function = reference.dorefa_weight if w.operation == DOREFA_WEIGHT else reference.dorefa_activation
    return lambda: function(w.x, BITS)


def _pass_round(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


def composed(w: Work) -> Callable[[Tensor, Tensor], Tensor]:
    """The papers' formulas from torch operations, straight through the rounding, as libraries write them."""
    if w.operation == LSQ:
        factor = reference.lsq_grad_scale(w.x, w.quant_max, w.axis)

        def lsq(x: Tensor, scale: Tensor) -> Tensor:
            own = reference.along_axis(scale, x, w.axis)
            own = (own - own * factor).detach() + own * factor
            return _pass_round((x / own).clamp(w.quant_min, w.quant_max)) * own

        return lsq
    steps = float(2**BITS - 1)
    if w.operation == DOREFA_WEIGHT:

        def weight(x: Tensor, _: Tensor) -> Tensor:
            t = x.tanh()
            return 2 * (_pass_round((t / (2 * t.abs().max()) + 0.5) * steps) / steps) - 1

        return weight
    return lambda x, _: _pass_round(x.clamp(0, 1) * steps) / steps


def eager(w: Work) -> Step:
    """Plain torch operations and autograd."""
    function = composed(w)
    return lambda: function(w.x, w.scale)


def compiled(w: Work) -> Step:
    """torch.compile of the same, with fixed shapes and without graph breaks."""
    torch._dynamo.reset()
    function = torch.compile(composed(w), fullgraph=True, dynamic=False)
    return lambda: function(w.x, w.scale)


def aten(w: Work) -> Learner:
    """torch._fake_quantize_learnable_per_{tensor,channel}_affine, which also learn a zero point."""
    if w.operation != LSQ:
        raise Unsupported("has no such operation")
    factor = reference.lsq_grad_scale(w.x, w.quant_max, w.axis)
    zero = torch.zeros(max(1, w.scale.numel()), device=w.x.device, requires_grad=True)
    step: Step
    if w.axis is None:
        step = lambda: torch._fake_quantize_learnable_per_tensor_affine(  # noqa: E731
            w.x, w.scale.reshape(1), zero, w.quant_min, w.quant_max, factor
        )
    else:
        axis = w.axis
        step = lambda: torch._fake_quantize_learnable_per_channel_affine(  # noqa: E731
            w.x, w.scale, zero, axis, w.quant_min, w.quant_max, factor
        )
    return Learner(step, w.inputs, departs=dict.fromkeys(("gradient", "scale"), problems.ROUNDS_FIRST))


BUILT_IN: dict[str, Contestant] = {
    "quantkern": quantkern,
    "aten": aten,
    "eager": eager,
    "torch.compile": compiled,
}
"""Ours and what comes with torch."""


def contestants() -> dict[str, Contestant]:
    """Everyone who can take part here."""

    def adapted(adapter: Callable[[Problem], Learner]) -> Contestant:
        return lambda w: adapter(w.problem)

    return {**BUILT_IN, **{name: adapted(adapter) for name, adapter in peers.installed_learners().items()}}


def prepare(contestant: Contestant, work: Work) -> Learner:
    """A contestant that is ready to run on this work."""
    made = contestant(work)
    return made if isinstance(made, Learner) else Learner(made, work.inputs)


def outcome(learner: Learner, work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """y, the gradient of x, and that of the scale as the reference counts it; zeros for a gradient that never comes."""
    y = learner.step()
    found = harness.gradients(y, learner.inputs, work.above)
    dx, *own = [torch.zeros_like(x) if d is None else d for x, d in zip(learner.inputs, found, strict=True)]
    dscale = own[0].reshape(work.scale.shape) * learner.scale_factor if own else torch.zeros(0)
    return y.detach().float(), dx, dscale


def check(contestant: Contestant, build: Callable[[], Work]) -> harness.Verdict:
    """y within half a step and equal gradients, but for a thousandth of the elements; scales' gradients to 1 %.

    A contestant that fails in nothing but what it is known to do otherwise is accepted, and marked.
    """
    work = build()
    y, dx, dscale = outcome(prepare(specification, work), work)
    other = build()
    learner = prepare(contestant, other)
    other_y, other_dx, other_dscale = outcome(learner, other)
    # Dividing by the scale instead of multiplying by its reciprocal moves y by a rounding, or rarely by a whole step.
    step = reference.along_axis(work.scale.detach(), y, work.axis) if work.operation == LSQ else 1 / (2**BITS - 1)
    differing = float((~((y - other_y).abs() <= 0.5 * step)).float().mean())
    wrong = float((~((dx - other_dx).abs() <= 1e-3 * dx.abs().clamp(min=1e-3))).float().mean())
    off = float((dscale - other_dscale).norm() / dscale.norm()) if dscale.numel() else 0.0
    text = f"{differing:.2g} differ; gradient {wrong:.2g}; scale's {off:.2g}"
    figures = {"differing": differing, "gradient_differing": wrong, "scale_gradient_off": off}
    right = {"y": differing <= MAX_WRONG, "gradient": wrong <= MAX_WRONG, "scale": off <= MAX_SCALE_OFF}
    failed = [part for part, agrees in right.items() if not agrees]
    if any(part not in learner.departs for part in failed):
        return harness.Verdict(False, f"disagrees with the reference: {text}", figures)
    other_work = "; ".join(dict.fromkeys(learner.departs[part] for part in failed))
    return harness.Verdict(True, f"{text} *" if other_work else text, figures, other_work)


# --- what the backward moves

CPU_STRETCH, CPU_SHORT_ROW, CPU_COLUMN_BLOCK, CPU_COLUMN_ROWS = 4096, 32, 65536, 8
"""How csrc/cpu cuts a tensor for its sums (kSumStretch, kShortRow, and the blocks of column_gradients)."""


def counted_bytes(work: Work) -> float:
    """Bytes an element that lsq's backward on the CPU reads and writes in memory.

    x and the gradient are read and dx is written, once each. The partial sums of the scale are cleared, written and
    read: two float64 for every row or stretch of one, or, where channels are short rows that repeat, a float32 for
    every column of a block. Three float32 parameters a channel or column are written and read. Sums and parameters
    that are used again in every row count once: they stay in the nearest cache.
    """
    x, axis = work.x, work.axis
    channels, inner = (1, x.numel()) if axis is None else (x.shape[axis], x.stride(axis))
    period = channels * inner
    if channels > 1 and inner < CPU_SHORT_ROW and x.numel() > period:
        block = max(CPU_COLUMN_ROWS, CPU_COLUMN_BLOCK // period) * period
        sums, parameters = -(-x.numel() // block) * period * 4, period * 12
    else:
        sums, parameters = x.numel() // inner * -(-inner // CPU_STRETCH) * 16, channels * 12
    return 3 * x.element_size() + (3 * sums + 2 * parameters) / x.numel()


def traffic(contestant: Contestant, build: Callable[[], Work], counted: bool) -> dict[str, float]:
    """Bytes an element: tensors that the backward allocates at its peak, dx among them, and what the forward saved.

    Saved is what is held beyond y, x and the scale once the forward is done. With ``counted``, also ``counted_bytes``.
    """
    work = build()
    learner = prepare(contestant, work)
    learner.step()  # whatever is set up on first use
    held: list[Tensor] = []
    _, kept = allocations.allocated(lambda: held.append(learner.step()), work.x.device)
    y = held[0]
    peak, _ = allocations.allocated(
        lambda: harness.gradients(y, learner.inputs, work.above, keep_graph=True), work.x.device
    )
    figures = {"allocated_bytes": peak / y.numel(), "saved_bytes": (kept - y.nbytes) / y.numel()}
    return {**figures, "counted_bytes": counted_bytes(work)} if counted else figures


def check_backward(contestant: Contestant, build: Callable[[], Work], counted: bool) -> harness.Verdict:
    """As ``check``, and with what is allocated and moved."""
    verdict = check(contestant, build)
    moved = traffic(contestant, build, counted)
    text = ", ".join(f"{name.removesuffix('_bytes')} {tables.figure(value)}" for name, value in moved.items())
    return replace(verdict, text=f"{verdict.text}; B/element: {text}", figures={**verdict.figures, **moved})


def cases(
    operations: list[str],
    shapes: list[str],
    per: list[str],
    dtype: str,
    device: torch.device,
    directions: list[str] | None = None,
) -> Iterator[harness.Case]:
    """Every combination that makes sense: DoReFa has no channels, and its weights are weights.

    The backward alone is lsq's, and not that of a call's fixed cost.
    """
    for shape in (SHAPES[name] for name in shapes):
        for operation in operations:
            if operation != LSQ and shape.kind not in ("tiny", operation.removeprefix("dorefa_")):
                continue
            for granularity in per if operation == LSQ else ["tensor"]:
                axis = shape.channel_axis if granularity == "channel" else None

                def build(operation: str = operation, shape: Shape = shape, axis: int | None = axis) -> Work:
                    return make_work(operation, shape, axis, DTYPES[dtype], device)

                for direction in directions or DIRECTIONS:
                    if direction == "both" or (operation == LSQ and shape.kind != "tiny"):
                        yield _case(operation, shape, granularity, direction, dtype, device, build)


def _case(
    operation: str,
    shape: Shape,
    granularity: str,
    direction: str,
    dtype: str,
    device: torch.device,
    build: Callable[[], Work],
) -> harness.Case:
    taking_part, unavailable = [_floor(build(), direction)], {}
    for name, contestant in contestants().items():
        try:
            taking_part.append(_contestant(name, contestant, direction, build))
        except Unsupported as reason:
            unavailable[name] = str(reason)
    passes = 5 if direction == "both" else 3  # x read, y written; x and gradient read, dx written
    return harness.Case(
        labels={
            "operation": operation,
            "shape": shape.name,
            "per": granularity,
            "direction": direction,
            "dtype": dtype,
        },
        elements=shape.elements,
        floor_bytes=passes * DTYPES[dtype].itemsize * shape.elements,
        contestants=taking_part,
        device=device,
        host_time=shape.kind == "tiny",
        unavailable=unavailable,
    )


def _contestant(name: str, contestant: Contestant, direction: str, build: Callable[[], Work]) -> harness.Contestant:
    work = build()
    learner = prepare(contestant, work)
    if direction == "both":
        return harness.Contestant(
            name,
            lambda: harness.gradients(learner.step(), learner.inputs, work.above),
            lambda: check(contestant, build),
        )
    y = learner.step()
    counted = name == "quantkern" and work.x.device.type == "cpu"
    return harness.Contestant(
        name,
        lambda: harness.gradients(y, learner.inputs, work.above, keep_graph=True),
        lambda: check_backward(contestant, build, counted),
    )


def _floor(work: Work, direction: str) -> harness.Contestant:
    x, above = work.x.detach(), work.above
    if direction == "backward":
        return harness.Contestant("copy", lambda: torch.add(x, above))
    return harness.Contestant("copy", lambda: (x.clone(), torch.add(x, above)))


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.lsq", description=__doc__.splitlines()[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    p.add_argument("--threads", type=int, help="CPU threads for every contestant (default: torch's own choice)")
    p.add_argument("--shapes", type=names_of(list(SHAPES), "--shapes"), default=list(SHOWN))
    p.add_argument("--ops", type=names_of(list(OPERATIONS), "--ops"), default=list(OPERATIONS))
    p.add_argument("--per", type=names_of(list(GRANULARITIES), "--per"), default=list(GRANULARITIES))
    p.add_argument("--directions", type=names_of(list(DIRECTIONS), "--directions"), default=list(DIRECTIONS))
    p.add_argument("--seconds", type=float, default=2.0, help="time budget for timing one case (default 2)")
    p.add_argument("--json", type=Path, help="where the results go (default benchmarks/results/lsq-DEVICE.json)")
    p.add_argument("--plot", type=Path, help="draw the medians to this file (needs matplotlib)")
    options = p.parse_args(arguments)
    device = harness.device_for(options)
    absent = [name for name in peers.missing() if name in peers.LEARNERS]
    if absent:
        print(f"not installed, so not compared: {', '.join(absent)} (benchmarks.fakequant --list says how to)")
    chosen = cases(options.ops, options.shapes, options.per, options.dtype, device, options.directions)
    suffix = "" if options.dtype == "float32" else f"-{options.dtype}"
    path = options.json or harness.RESULTS / f"lsq-{options.device}{suffix}.json"
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    harness.run("lsq", chosen, device, path, shown, options.seconds, options.plot, peers.DISTRIBUTIONS)


if __name__ == "__main__":
    main()
