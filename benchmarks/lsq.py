"""How fast a learned step size and DoReFa's transforms are here, forward and backward.

    python -m benchmarks.lsq
    python -m benchmarks.lsq --shapes weight-512 --ops lsq --json out.json

Every contestant is compared with quantkern.reference first. The floor, ``copy``, moves the bytes that cannot be
avoided: a clone of x for the forward (8 bytes an element in float32), and for the backward x and the gradient read,
dx written (12), as one addition.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import quantkern.functional as F
from benchmarks import harness, peers
from benchmarks.fakequant import DTYPES, GRANULARITIES, names_of
from benchmarks.peers import Unsupported
from benchmarks.shapes import SHAPES, Shape
from quantkern import reference

OPERATIONS = {
    "lsq": "learned step size, -8..7 (weights) or 0..15 (activations), gradients of x and scale",
    "dorefa_weight": "DoReFa's weight transform, 4 bits",
    "dorefa_activation": "DoReFa's activation, 4 bits",
}
SHOWN = ("act-64x56", "act-64x56-nhwc", "act-bert", "weight-512", "weight-64", "weight-1x1", "tiny-16")
BITS = 4


@dataclass
class Work:
    """One question with its numbers: x, the scale where there is one, and the gradient from above."""

    operation: str
    shape: Shape
    axis: int | None
    x: Tensor
    scale: Tensor
    above: Tensor
    quant_min: int
    quant_max: int

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that receive a gradient."""
        return (self.x, self.scale) if self.operation == "lsq" else (self.x,)


def make_work(operation: str, shape: Shape, axis: int | None, dtype: torch.dtype, device: torch.device) -> Work:
    """The same numbers every time."""
    x = shape.make(dtype, device)
    low, high = (0, 15) if shape.kind == "activation" else (-8, 7)
    if shape.kind == "activation":
        x = x.abs()
    mean = x.float().abs().mean() if axis is None else x.float().abs().movedim(axis, 0).flatten(1).mean(1)
    scale = (2 * mean / high**0.5).requires_grad_()
    return Work(operation, shape, axis, x.requires_grad_(), scale, shape.make(dtype, device, seed=1), low, high)


Step = Callable[[], Tensor]
Contestant = Callable[[Work], Step]


def quantkern(w: Work) -> Step:
    """Ours, as users call it."""
    if w.operation == "lsq":
        return lambda: F.lsq(w.x, w.scale, w.quant_min, w.quant_max, w.axis)
    function = F.dorefa_weight if w.operation == "dorefa_weight" else F.dorefa_activation
    return lambda: function(w.x, BITS)


def specification(w: Work) -> Step:
    """quantkern.reference, which every contestant must agree with."""
    if w.operation == "lsq":
        return lambda: reference.lsq(w.x, w.scale, w.quant_min, w.quant_max, w.axis)
    function = reference.dorefa_weight if w.operation == "dorefa_weight" else reference.dorefa_activation
    return lambda: function(w.x, BITS)


def _pass_round(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


def composed(w: Work) -> Callable[[Tensor, Tensor], Tensor]:
    """The papers' formulas from torch operations, straight through the rounding, as libraries write them."""
    if w.operation == "lsq":
        factor = reference.lsq_grad_scale(w.x, w.quant_max, w.axis)

        def lsq(x: Tensor, scale: Tensor) -> Tensor:
            own = reference.along_axis(scale, x, w.axis)
            own = (own - own * factor).detach() + own * factor
            return _pass_round((x / own).clamp(w.quant_min, w.quant_max)) * own

        return lsq
    steps = float(2**BITS - 1)
    if w.operation == "dorefa_weight":

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


def aten(w: Work) -> Step:
    """torch._fake_quantize_learnable_per_{tensor,channel}_affine, which also learn a zero point."""
    if w.operation != "lsq":
        raise Unsupported("has no such operation")
    factor = reference.lsq_grad_scale(w.x, w.quant_max, w.axis)
    zero = torch.zeros(max(1, w.scale.numel()), device=w.x.device, requires_grad=True)
    if w.axis is None:
        return lambda: torch._fake_quantize_learnable_per_tensor_affine(
            w.x, w.scale.reshape(1), zero, w.quant_min, w.quant_max, factor
        )
    axis = w.axis
    return lambda: torch._fake_quantize_learnable_per_channel_affine(
        w.x, w.scale, zero, axis, w.quant_min, w.quant_max, factor
    )


CONTESTANTS: dict[str, Contestant] = {
    "quantkern": quantkern,
    "aten": aten,
    "eager": eager,
    "torch.compile": compiled,
}


def check(name: str, build: Callable[[], Work]) -> harness.Verdict:
    """y within one step and equal gradients, but for a thousandth of the elements; scales' gradients to 1 %."""
    outcome = []
    for contestant in (specification, CONTESTANTS[name]):
        work = build()
        y = contestant(work)()
        outcome.append((y.detach().float(), *harness.gradients(y, work.inputs, work.above)))
    (y, dx, *dscale), (other_y, other_dx, *other_dscale) = outcome
    # Dividing by the scale instead of multiplying by its reciprocal moves y by a rounding, or rarely by a whole step.
    step = reference.along_axis(work.scale.detach(), y, work.axis) if work.operation == "lsq" else 1 / (2**BITS - 1)
    differing = float(((y - other_y).abs() > 0.5 * step).float().mean())
    wrong = float(((dx - other_dx).abs() > 1e-3 * dx.abs().clamp(min=1e-3)).float().mean())
    off = max((float((a - b).norm() / a.norm()) for a, b in zip(dscale, other_dscale, strict=True)), default=0.0)
    figures = {"differing": differing, "gradient_differing": wrong, "scale_gradient_off": off}
    text = f"{differing:.2g} differ; gradient {wrong:.2g}; scale's {off:.2g}"
    # Clipped elements of ATen pass by the rounded value, half a step further out than the paper's.
    accepted = (
        differing <= 1e-3 and off <= (0.2 if name == "aten" else 0.01) and wrong <= (0.05 if name == "aten" else 1e-3)
    )
    return harness.Verdict(accepted, text if accepted else f"disagrees with the reference: {text}", figures)


def cases(
    operations: list[str], shapes: list[str], per: list[str], dtype: str, device: torch.device
) -> Iterator[harness.Case]:
    """Every combination that makes sense: DoReFa has no channels, and its weights are weights."""
    for shape in (SHAPES[name] for name in shapes):
        for operation in operations:
            if operation != "lsq" and shape.kind not in ("tiny", operation.removeprefix("dorefa_")):
                continue
            for granularity in per if operation == "lsq" else ["tensor"]:
                axis = shape.channel_axis if granularity == "channel" else None

                def build(operation: str = operation, shape: Shape = shape, axis: int | None = axis) -> Work:
                    return make_work(operation, shape, axis, DTYPES[dtype], device)

                yield _case(operation, shape, granularity, dtype, device, build)


def _case(
    operation: str, shape: Shape, granularity: str, dtype: str, device: torch.device, build: Callable[[], Work]
) -> harness.Case:
    taking_part, unavailable = [_floor(build())], {}
    for name, contestant in CONTESTANTS.items():
        work = build()
        try:
            step = contestant(work)
        except Unsupported as reason:
            unavailable[name] = str(reason)
            continue

        def run(step: Step = step, work: Work = work) -> object:
            return harness.gradients(step(), work.inputs, work.above)

        taking_part.append(harness.Contestant(name, run, lambda name=name: check(name, build)))
    return harness.Case(
        labels={
            "operation": operation,
            "shape": shape.name,
            "per": granularity,
            "direction": "both",
            "dtype": dtype,
        },
        elements=shape.elements,
        floor_bytes=5 * DTYPES[dtype].itemsize * shape.elements,
        contestants=taking_part,
        device=device,
        host_time=shape.kind == "tiny",
        unavailable=unavailable,
    )


def _floor(work: Work) -> harness.Contestant:
    x, above = work.x.detach(), work.above
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
    p.add_argument("--seconds", type=float, default=2.0, help="time budget for timing one case (default 2)")
    p.add_argument("--json", type=Path, help="where the results go (default benchmarks/results/lsq-DEVICE.json)")
    p.add_argument("--plot", type=Path, help="draw the medians to this file (needs matplotlib)")
    options = p.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    chosen = cases(options.ops, options.shapes, options.per, options.dtype, device)
    suffix = "" if options.dtype == "float32" else f"-{options.dtype}"
    path = options.json or harness.RESULTS / f"lsq-{options.device}{suffix}.json"
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    harness.run("lsq", chosen, device, path, shown, options.seconds, options.plot, peers.DISTRIBUTIONS)


if __name__ == "__main__":
    main()
