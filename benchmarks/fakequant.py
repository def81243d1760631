"""How fast fake-quantization is here, and how much faster or slower than what else one could call.

    python -m benchmarks.fakequant                       every shape and operation, on the CPU
    python -m benchmarks.fakequant --device cuda --shapes act-64x56,weight-512 --ops weight --json out.json

Every contestant is first compared with quantkern.reference and timed only if it agrees. Two directions are timed:
"forward" without gradients, and "both", the forward with gradients and the backward. The floor, ``copy``, is a plain
copy of the same bytes: one clone of x for the forward, clones of x and of the gradient for both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import harness, tables
from benchmarks.shapes import SHAPES, Shape

try:
    import quantkern.functional as F
    from benchmarks import peers
    from benchmarks.problems import (
        ACTIVATION,
        EMA_DECAY,
        FAKE_QUANTIZE,
        OPERATIONS,
        WEIGHT,
        Adapter,
        Problem,
        Unsupported,
    )
    from quantkern import Backend, reference
    from quantkern.backend import has_native
except ImportError as error:
    raise SystemExit(f"benchmarks.fakequant needs quantkern with its compiled kernels: {error}") from error

GRANULARITIES = ("tensor", "channel")
DIRECTIONS = ("forward", "both")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OURS = {"quantkern": Backend.AUTO, "quantkern-triton": Backend.TRITON}
"""AUTO, as users call it; the benchmark stops where that is not the compiled kernels."""

MAX_WRONG = 1e-3
"""Fraction of elements that may be off by more than one quantization step, or have another gradient."""


def ours(backend: Backend) -> Adapter:
    """quantkern.functional, as a user calls it, on one backend."""

    def adapter(p: Problem) -> Callable[[], Tensor]:
        low, high, axis = p.quant_min, p.quant_max, p.axis
        if p.operation == FAKE_QUANTIZE:
            scale: Tensor | float = float(p.scale) if axis is None else p.scale
            zero_point: Tensor | float = int(p.zero_point) if axis is None else p.zero_point
            return lambda: F.fake_quantize(p.x, scale, zero_point, low, high, axis, backend=backend)
        s = p.state()
        if p.operation == WEIGHT:
            return lambda: F.fake_quantize_weight(
                p.x, s["scale"], s["zero_point"], low, high, p.symmetric, axis, backend=backend
            )
        observing = torch.ones(1, dtype=torch.bool, device=p.x.device)
        state = (s["running_min"], s["running_max"], s["scale"], s["zero_point"])
        return lambda: F.fake_quantize_activation(
            p.x, *state, observing, low, high, p.symmetric, EMA_DECAY, axis, backend=backend
        )

    return adapter


@dataclass(frozen=True)
class Question:
    """One case to be: which operation, on what, in which direction."""

    operation: str
    shape: Shape
    granularity: str
    direction: str
    dtype: str

    @property
    def labels(self) -> dict[str, str]:
        """The case's name in columns."""
        return {
            "operation": self.operation,
            "shape": self.shape.name,
            "per": self.granularity,
            "direction": self.direction,
            "dtype": self.dtype,
        }

    def axis(self) -> int | None:
        """The channel axis, None per tensor."""
        return self.shape.channel_axis if self.granularity == "channel" else None


def questions(shapes: list[str], ops: list[str], per: list[str], directions: list[str], dtype: str) -> list[Question]:
    """Every combination that occurs: activations always have a moving average, weights only per channel.

    (torch.ao's default settings track the weights' channels so; there ATen's operation can be used as it is, because
    on the CPU it takes channels on axis 0 only.)
    """

    def occurs(op: str, kind: str, granularity: str) -> bool:
        moving_average_of_weight = op == ACTIVATION and kind == "weight" and granularity == "channel"
        return op == FAKE_QUANTIZE or kind in (op, "tiny") or moving_average_of_weight

    return [
        Question(op, SHAPES[name], granularity, direction, dtype)
        for name in shapes
        for op in ops
        for granularity in per
        for direction in directions
        if occurs(op, SHAPES[name].kind, granularity)
    ]


def make_problem(question: Question, device: torch.device) -> Problem:
    """The same numbers for every contestant, in memory of its own."""
    shape, axis = question.shape, question.axis()
    x = shape.make(DTYPES[question.dtype], device)
    if shape.kind == "activation":
        x = x * 1.5 + 0.5  # a range that is not centred, as after an addition
    unsigned = question.operation == ACTIVATION or (question.operation == FAKE_QUANTIZE and shape.kind == "activation")
    low, high = (0, 255) if unsigned else (-127, 127)
    # Given ranges are a little narrower than the data, so that some elements are clipped.
    smallest, largest = (0.8 * bound for bound in reference.min_max(x, axis))
    scale, zero_point = reference.choose_scale(smallest, largest, low, high, symmetric=not unsigned)
    needs_grad = question.direction == "both"
    parameter = nn.Parameter(x, requires_grad=needs_grad)
    return Problem(question.operation, parameter, scale, zero_point, low, high, not unsigned, axis)


def make_gradient(question: Question, device: torch.device) -> Tensor:
    """The gradient that comes from above, with x's strides."""
    return question.shape.make(DTYPES[question.dtype], device, seed=1)


def compare(question: Question, device: torch.device, adapter: Adapter) -> harness.Verdict:
    """Run a contestant and the reference on two batches and compare the second y and gradient.

    One element a channel may have another gradient: where a library also sends gradient through the range (brevitas),
    it lands on the element that set it.
    """
    both = question.direction == "both"
    outcome: list[tuple[Tensor, Tensor | None]] = []
    scale = torch.ones(())
    for build in (peers.reference_adapter, adapter):
        p = make_problem(question, device)
        step = build(p)
        second = p.x.detach().clone()
        with torch.no_grad():
            p.x.mul_(0.7)
        y = step()
        with torch.no_grad():
            p.x.copy_(second)
        y = step()
        grad = harness.gradients(y, (p.x,), make_gradient(question, device))[0] if both else None
        outcome.append((y.detach().float(), grad))
        if build is peers.reference_adapter:
            scale = _scale_used(p)
    (y, grad), (other_y, other_grad) = outcome
    steps = (y - other_y).abs() / scale
    differing = float((y != other_y).float().mean())
    wrong = int((~(steps <= 1.001)).sum())
    figures = {"max_steps": float(steps.max()), "differing": differing, "off_by_more_than_a_step": wrong / y.numel()}
    text = "equal" if differing == 0 else f"{differing:.2g} differ, {figures['max_steps']:.2g} steps"
    accepted = wrong <= MAX_WRONG * y.numel()
    if grad is not None and other_grad is not None:
        # A gradient passes or it does not; that a library multiplies and divides it by the scale is no difference.
        wrong_grad = int((~((grad - other_grad).abs() <= 0.01 * make_gradient(question, device).abs())).sum())
        figures["gradient_differing"] = wrong_grad / y.numel()
        accepted = accepted and wrong_grad <= MAX_WRONG * y.numel() + scale.numel()
        if wrong_grad:
            text += f"; gradient {figures['gradient_differing']:.2g} differ"
    return harness.Verdict(accepted, text if accepted else f"disagrees with the reference: {text}", figures)


def _scale_used(p: Problem) -> Tensor:
    """The scale of the reference's second call, shaped to divide y; the moving average hardly moves from the first."""
    if p.operation == FAKE_QUANTIZE:
        return reference.along_axis(p.scale, p.x, p.axis)
    low, high = reference.min_max(p.x, p.axis)
    if p.operation == ACTIVATION:
        keep = 0.7 * EMA_DECAY + (1 - EMA_DECAY)
        low, high = low * keep, high * keep
    scale, _ = reference.choose_scale(low, high, p.quant_min, p.quant_max, p.symmetric)
    return reference.along_axis(scale, p.x, p.axis)


def make_contestant(name: str, question: Question, device: torch.device, adapter: Adapter) -> harness.Contestant:
    """An adapter with x and gradient of its own, ready to be timed."""
    p = make_problem(question, device)
    step = adapter(p)
    run: Callable[[], object] = step
    if question.direction == "both":
        above = make_gradient(question, device)

        def run() -> object:
            return harness.gradients(step(), (p.x,), above)

    return harness.Contestant(name, run, lambda: compare(question, device, adapter))


def make_floor(question: Question, device: torch.device) -> harness.Contestant:
    """The plain copy."""
    p = make_problem(question, device)
    x = p.x.detach()
    if question.direction == "forward":
        return harness.Contestant("copy", x.clone)
    above = make_gradient(question, device)
    return harness.Contestant("copy", lambda: (x.clone(), above.clone()))


def cases(chosen: list[Question], device: torch.device, contestants: dict[str, Adapter]) -> Iterator[harness.Case]:
    """The questions with everyone who can answer them, made one at a time."""
    for question in chosen:
        taking_part, unavailable = [make_floor(question, device)], {}
        for name, adapter in contestants.items():
            try:
                taking_part.append(make_contestant(name, question, device, adapter))
            except Unsupported as reason:
                unavailable[name] = str(reason)
        item = DTYPES[question.dtype].itemsize
        passes = 2 if question.direction == "forward" else 4  # x read, y written; gradient read and written
        yield harness.Case(
            labels=question.labels,
            elements=question.shape.elements,
            floor_bytes=passes * item * question.shape.elements,
            contestants=taking_part,
            device=device,
            host_time=question.shape.kind == "tiny",
            unavailable=unavailable,
        )


def contestants_for(device: torch.device, only: list[str] | None) -> dict[str, Adapter]:
    """Ours and every peer that is installed, or those of them that are named."""
    everyone = {name: ours(backend) for name, backend in OURS.items() if name == "quantkern" or device.type == "cuda"}
    everyone.update(peers.installed())
    unknown = [name for name in only or () if name not in everyone]
    if unknown:
        here = ", ".join(everyone)
        raise SystemExit(f"--contestants: unknown or not installed: {', '.join(unknown)}; here are: {here}")
    return {name: adapter for name, adapter in everyone.items() if only is None or name in only}


def names_of(known: list[str], option: str) -> Callable[[str], list[str]]:
    """A parser of comma-separated names, for argparse."""

    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in chosen if name not in known]
        if unknown or not chosen:
            raise argparse.ArgumentTypeError(f"{option} takes a list of {', '.join(known)}; got {text!r}")
        return chosen

    return parse


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.fakequant", description=__doc__.splitlines()[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    p.add_argument("--threads", type=int, help="CPU threads for every contestant (default: torch's own choice)")
    p.add_argument("--shapes", type=names_of(list(SHAPES), "--shapes"), default=list(SHAPES), help="comma separated")
    p.add_argument("--ops", type=names_of(list(OPERATIONS), "--ops"), default=list(OPERATIONS), help="comma separated")
    p.add_argument("--per", type=names_of(list(GRANULARITIES), "--per"), default=list(GRANULARITIES))
    p.add_argument("--directions", type=names_of(list(DIRECTIONS), "--directions"), default=list(DIRECTIONS))
    p.add_argument("--contestants", type=lambda text: text.split(","), help="comma separated (default: all installed)")
    p.add_argument("--seconds", type=float, default=2.0, help="time budget for timing one case (default 2)")
    p.add_argument("--json", type=Path, help="where the results go (default benchmarks/results/fakequant-DEVICE.json)")
    p.add_argument("--plot", type=Path, help="draw the medians to this file (needs matplotlib)")
    p.add_argument("--list", action="store_true", help="show shapes, operations and contestants, and stop")
    return p


def print_list(contestants: dict[str, Adapter]) -> None:
    """What there is to choose from."""
    rows = [[one.name, str(one), one.kind, str(one.channels), one.origin] for one in SHAPES.values()]
    tables.print_table("shapes", ["name", "dimensions", "kind", "channels", "where"], rows, text_columns=5)
    tables.print_table("operations", ["name", "what it does"], [list(one) for one in OPERATIONS.items()], 2)
    about = [[name, (adapter.__doc__ or ours.__doc__ or "").splitlines()[0]] for name, adapter in contestants.items()]
    tables.print_table("contestants", ["name", "what is called"], [["copy", "the floor: x.clone()"], *about], 2)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    options = parser().parse_args(arguments)
    if options.plot:
        tables.require_matplotlib()
    device = harness.device_for(options)
    contestants = contestants_for(device, options.contestants)
    absent = peers.missing()
    if absent:
        commands = dict.fromkeys(
            "pip install nni==2.10" if name == "nni" else "pip install '.[peers]'" for name in absent
        )
        print(f"not installed, so not compared: {', '.join(absent)} ({'; '.join(commands)})")
    if options.list:
        print_list(contestants)
        return
    if "quantkern" in contestants and not has_native(device.type):
        raise SystemExit(
            f"this build of quantkern has no compiled kernels for {device.type}; rebuild it on a machine with the "
            "CUDA toolkit: QUANTKERN_CUDA=1 pip install ."
        )
    chosen = questions(options.shapes, options.ops, options.per, options.directions, options.dtype)
    suffix = "" if options.dtype == "float32" else f"-{options.dtype}"
    path = options.json or harness.RESULTS / f"fakequant-{options.device}{suffix}.json"
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    made = cases(chosen, device, contestants)
    harness.run("fakequant", made, device, path, shown, options.seconds, options.plot, peers.DISTRIBUTIONS)


if __name__ == "__main__":
    main()
