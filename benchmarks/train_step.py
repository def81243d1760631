"""What quantization adds to a training step: whole networks, float, ours and other libraries', side by side.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --networks resnet18 --contestants float,quantkern-qat,nni-qat --steps 30
    python -m benchmarks.train_step --networks lenet --accumulate 8
    python -m benchmarks.train_step --profile             where the time of quantization goes, tensor by tensor

A step clears the gradients, runs forward and backward and lets SGD with momentum step, in training mode; with
``--accumulate`` over several micro-batches, for ours inside ``quantizer.reuse_weights()``. Every contestant trains the
same network from the same weights on the same batch. Before it is timed its losses are compared with those of the float
network: near, but not equal. In every round each contestant takes one step after one that is not timed, in a random
order. "x float" is the ratio of the medians, "x float, rounds" the median of the ratios in each round; peak memory and
what is kept for the backward are explained in benchmarks/step_memory.py, the quantization that all share in
benchmarks/quantized_networks.py.

What ends in ``-compiled`` goes through torch.compile and takes part only where it is named.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import harness, peers, report, step_profile, tables
from benchmarks.fakequant import names_of
from benchmarks.networks import NETWORKS, Network
from benchmarks.problems import Unsupported
from benchmarks.quantized_networks import BUILT_IN, COMPILED, INSTALLABLE, Build, Trainee, train_step
from benchmarks.step_memory import measure, weights_without_gradient

FLOAT, OURS = "float", "quantkern-qat"

MAX_LOSS_OFF = 0.1
"""How far the loss of the first step may be from that of the float network, by the latter's size."""


def contestants_for(only: Sequence[str] | None) -> dict[str, Build]:
    """Ours and every library that is installed, or those of them that are named."""
    absent = peers.missing()
    found = dict(BUILT_IN)
    for package, builds in INSTALLABLE.items():
        if package not in absent:
            found.update(builds)
    if only is None:
        return found
    found.update(COMPILED)
    unknown = [name for name in only if name not in found]
    if unknown:
        raise SystemExit(f"--contestants: unknown or not installed: {', '.join(unknown)}; here are: {', '.join(found)}")
    return {name: found[name] for name in dict.fromkeys((FLOAT, *only))}


class Entry:
    """One contestant in one case: built when it is checked, and then ready to be timed."""

    def __init__(self, name: str, build: Build, network: Network, device: torch.device, accumulate: int) -> None:
        self.name, self.build, self.network, self.device = name, build, network, device
        self.batches = [network.draw(device, seed) for seed in range(accumulate)]
        self.trainee: Trainee | None = None

    def check(self, float_loss: Callable[[], float]) -> harness.Verdict:
        """Build, train a few steps and measure one."""
        trainee, figures = measure(lambda: self.build(self.network, self.device), self.batches, self.device)
        self.trainee = trainee
        expected, first, last = float_loss(), figures["first_loss"], figures["last_loss"]
        figures["weights_without_gradient"] = float(weights_without_gradient(trainee.model))
        text = f"first loss {first:.4g}, float {expected:.4g}"
        if not (abs(first - expected) <= MAX_LOSS_OFF * abs(expected) and torch.isfinite(torch.tensor(last))):
            return harness.Verdict(False, f"does not train as float does: {text}, then {last:.4g}", figures)
        if not self.name.startswith(FLOAT) and first == expected:
            return harness.Verdict(False, f"quantizes nothing: {text}", figures)
        notes = [trainee.other_work] if trainee.other_work else []
        if figures["weights_without_gradient"]:
            notes.append(f"no gradient reaches the weights of {figures['weights_without_gradient']:.0f} layers")
        return harness.Verdict(True, text, figures, "; ".join(notes))

    def run(self) -> object:
        """One step."""
        assert self.trainee is not None
        return train_step(self.trainee, self.batches)

    def contestant(self, float_loss: Callable[[], float]) -> harness.Contestant:
        """For the harness."""
        return harness.Contestant(self.name, self.run, lambda: self.check(float_loss))


def case(network: Network, builds: dict[str, Build], device: torch.device, accumulate: int) -> harness.Case:
    """One network with everyone who can train it."""
    entries = {name: Entry(name, build, network, device, accumulate) for name, build in builds.items()}
    losses: list[float] = []

    def float_loss() -> float:
        if not losses:
            losses.append(float(train_step(builds[FLOAT](network, device), entries[FLOAT].batches)))
        return losses[0]

    labels = {"network": network.name, "batch": str(network.batch), "micro-batches": str(accumulate)}
    return harness.Case(
        labels=labels,
        elements=network.batch * accumulate,
        floor_bytes=0,
        contestants=[entry.contestant(float_loss) for entry in entries.values()],
        device=device,
        floor=FLOAT,
        ours=OURS,
        host_time=True,
    )


def cases(
    networks: Sequence[str], builds: dict[str, Build], device: torch.device, accumulate: int
) -> Iterator[harness.Case]:
    """The networks one at a time."""
    for name in networks:
        torch._dynamo.reset()  # a new network must not count as a recompilation of the last one
        yield case(NETWORKS[name], builds, device, accumulate)


def show(case: harness.Case, results: Sequence[harness.Result], excluded: Sequence[harness.Excluded]) -> None:
    """All figures of one network."""
    title = f"{case.labels['network']}, batch {case.labels['batch']}"
    if case.labels["micro-batches"] != "1":
        title += f", {case.labels['micro-batches']} micro-batches a step"
    tables.print_table(title, *report.step_figures(results))
    for line in tables.notes(results):
        print(line)
    for one in excluded:
        print(f"  not timed: {one.contestant}: {one.reason}")


def positive(text: str) -> int:
    """An argparse type: an integer from 1 up."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=positive, help="CPU threads for every contestant (default: torch's own choice)")
    p.add_argument("--networks", type=names_of(list(NETWORKS), "--networks"), default=list(NETWORKS))
    p.add_argument("--contestants", type=lambda text: text.split(","), help="comma separated (default: all installed)")
    p.add_argument("--steps", type=positive, default=15, help="time at least so many steps of each (default 15)")
    p.add_argument("--seconds", type=float, default=5.0, help="and go on for so long in each network (default 5)")
    p.add_argument("--accumulate", type=positive, default=1, help="micro-batches an optimizer step (default 1)")
    p.add_argument("--profile", action="store_true", help="show where the time of our quantization goes, and stop")
    p.add_argument("--json", type=Path, help="where the results go (default benchmarks/results/train-step-DEVICE.json)")
    p.add_argument("--plot", type=Path, help="draw the medians to this file (needs matplotlib)")
    return p


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    options = parser().parse_args(arguments)
    device = harness.device_for(options)
    builds = contestants_for(options.contestants)
    if options.profile:
        chosen = [name for name in builds if name in step_profile.PROFILED]
        for network in options.networks:
            for name in chosen:
                try:
                    step_profile.show(NETWORKS[network], name, builds[FLOAT], builds[name], device, options.steps)
                except Unsupported as reason:
                    print(f"\n{network}: not profiled: {name}: {reason}")
        return
    suffix = "" if options.accumulate == 1 else f"-accumulate-{options.accumulate}"
    path = options.json or harness.RESULTS / f"train-step-{options.device}{suffix}.json"
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    harness.run(
        "train_step",
        cases(options.networks, builds, device, options.accumulate),
        device,
        path,
        {**shown, "dtype": "float32"},
        options.seconds,
        options.plot,
        peers.DISTRIBUTIONS,
        floor=FLOAT,
        min_rounds=options.steps,
        show=show,
    )


if __name__ == "__main__":
    main()
