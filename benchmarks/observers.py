"""How fast tensors are observed for post-training quantization, and how good the grids are that come of it.

    python -m benchmarks.observers
    python -m benchmarks.observers --tensors small --observers histogram --json out.json

Ours and torch.ao's observers see the same batches: 8 bits, unsigned, affine, 0..255. Three parts are timed: "observe",
a new observer that sees every batch; "qparams", the scale and zero point of one that has seen them; "both", one after
the other, as a user waits for it. The floor of what reads the batches, ``read``, is their sum: each value read once.

The check quantizes all batches with the grid that the observer gives and says the mean squared error, in parts of the
values' variance. Observers of ranges must have the reference's scale. Our histogram must not be worse than the whole
range; torch.ao's is timed with whatever error it has.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.ao.quantization import observer as theirs

from benchmarks import harness, tables
from benchmarks.fakequant import GRANULARITIES, names_of
from quantkern import reference
from quantkern.observers import Observer, ObserverSpec, make_observer

OBSERVERS = ("histogram", "minmax", "moving_average")
PARTS = ("observe", "qparams", "both")
EMA_DECAY = 0.99
QUANT_RANGE = (0, 255)
AXIS = 1
SCALE_OFF = 1e-6
"""How far a scale may be off the reference's, by its own size: one rounding."""
HISTOGRAM_OFF = 0.02
"""A histogram estimates errors from bins: by so much of its error a range may be worse than the whole one."""

Grid = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Batches:
    """Where the values come from: a shape, how many batches, and what makes them of normal numbers."""

    shape: tuple[int, ...]
    count: int
    make: Callable[[Tensor], Tensor]
    origin: str

    def tensors(self, device: torch.device) -> list[Tensor]:
        """The same numbers every time; each batch is a little wider than the one before, so that ranges grow."""
        generator = torch.Generator().manual_seed(0)
        parts = [torch.randn(self.shape, generator=generator) * (1 + i / 10) for i in range(self.count)]
        return [self.make(part).to(device) for part in parts]


def _conv1(images: Tensor) -> Tensor:
    """The first activation of the examples' LeNet, with the weights of seed 0."""
    weight = torch.randn(20, 1, 5, 5, generator=torch.Generator().manual_seed(0)) / 5
    return nn.functional.relu6(nn.functional.conv2d(images, weight))


TENSORS = {
    "large": Batches((32, 64, 56, 56), 4, torch.relu, "behind a ReLU, ResNet, first stage, batch 32"),
    "large-signed": Batches((32, 64, 56, 56), 4, torch.clone, "normal, before the ReLU"),
    "small": Batches((32, 16, 14, 14), 10, torch.relu, "behind a ReLU, 100,352 values"),
    "small-tails": Batches((32, 16, 14, 14), 10, lambda x: x**3, "heavy tails: cubes of normal numbers"),
    "lenet": Batches((20, 1, 28, 28), 5, _conv1, "LeNet's first ReLU6, 100 images in batches of 20"),
}


def ours(name: str, channels: int, device: torch.device) -> nn.Module:
    """quantkern's observer; channels 0: of the whole tensor."""
    scheme = "per_channel_affine" if channels else "per_tensor_affine"
    axis = AXIS if channels else None
    spec = ObserverSpec(8, "uint", scheme, ema_decay=EMA_DECAY, axis=axis, observer=name)
    return make_observer(spec, channels, device)


def torch_ao(name: str, channels: int, device: torch.device) -> nn.Module:
    """torch.ao's observer of the same kind."""
    kinds = {
        ("minmax", False): theirs.MinMaxObserver,
        ("minmax", True): theirs.PerChannelMinMaxObserver,
        ("moving_average", False): theirs.MovingAverageMinMaxObserver,
        ("moving_average", True): theirs.MovingAveragePerChannelMinMaxObserver,
        ("histogram", False): theirs.HistogramObserver,
    }
    scheme = torch.per_channel_affine if channels else torch.per_tensor_affine
    given = {"dtype": torch.quint8, "qscheme": scheme, "quant_min": QUANT_RANGE[0], "quant_max": QUANT_RANGE[1]}
    if channels:
        given["ch_axis"] = AXIS
    if name == "moving_average":
        given["averaging_constant"] = 1 - EMA_DECAY
    made: nn.Module = kinds[name, bool(channels)](**given)
    return made.to(device)


CONTESTANTS = {"quantkern": ours, "torch.ao": torch_ao}


def seen(observer: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """The observer, after these batches."""
    for batch in batches:
        observer(batch)
    return observer


def grid_of(observer: nn.Module) -> Grid:
    """Scale and zero point."""
    scale, zero_point = observer.calculate_qparams()  # type: ignore[operator]
    return scale, zero_point


def error_of(grid: Grid, batches: Sequence[Tensor], axis: int | None) -> float:
    """Mean squared error of the quantized batches in parts of the variance of all values."""
    scale, zero_point = (value if axis is not None else value.reshape(()) for value in grid)
    error = sum(
        float((reference.quantize(x, scale, zero_point, *QUANT_RANGE, axis)[0] - x).double().square().sum())
        for x in batches
    )
    count = sum(x.numel() for x in batches)
    mean = sum(float(x.double().sum()) for x in batches) / count
    square = sum(float(x.double().square().sum()) for x in batches) / count
    return error / count / (square - mean**2)


def range_grid(name: str, batches: Sequence[Tensor], axis: int | None) -> Grid:
    """The reference's scale and zero point of the whole range, or of its moving average."""
    low = high = None
    for x in batches:
        rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
        new_low, new_high = rows.amin(1), rows.amax(1)
        if low is None or high is None:
            low, high = new_low, new_high
        elif name == "moving_average":
            low, high = reference.update_running(low, high, new_low, new_high, EMA_DECAY)
        else:
            low, high = torch.minimum(low, new_low), torch.maximum(high, new_high)
    assert low is not None and high is not None
    return reference.choose_scale(low, high, *QUANT_RANGE, False)


def check(name: str, observer: nn.Module, batches: Sequence[Tensor], axis: int | None) -> harness.Verdict:
    """What the grid is worth, and whether it is one that the observer may give."""
    grid = grid_of(seen(observer, batches))
    error = error_of(grid, batches, axis)
    figures = {"error": error}
    expected = range_grid(name, batches, axis)
    if name == "histogram":
        whole = error_of(expected, batches, axis)
        mine = isinstance(observer, Observer)
        right, against = not mine or error <= whole * (1 + HISTOGRAM_OFF), f"of the whole range {whole:.4g}"
        figures["whole_range_error"] = whole
    else:
        off = float(((grid[0].reshape(-1) - expected[0]).abs() / expected[0]).max())
        same = bool((grid[1].reshape(-1) == expected[1]).all())
        right, against = off <= SCALE_OFF and same, f"scale {off:.2g} off the reference's"
    return harness.Verdict(right, f"error {error:.4g}, {against}", figures)


def cases(
    tensors: Sequence[str], observers: Sequence[str], per: Sequence[str], parts: Sequence[str], device: torch.device
) -> Iterator[harness.Case]:
    """Every tensor with every observer."""
    for tensor in tensors:
        batches = TENSORS[tensor].tensors(device)
        for name in observers:
            for granularity in per:
                for part in parts:
                    yield _case(tensor, name, granularity, part, batches, device)


def _case(
    tensor: str, name: str, granularity: str, part: str, batches: list[Tensor], device: torch.device
) -> harness.Case:
    axis = AXIS if granularity == "channel" else None
    channels = 0 if axis is None else batches[0].shape[axis]
    elements = sum(x.numel() for x in batches)
    taking_part, unavailable = [], {}
    if part != "qparams":
        taking_part.append(harness.Contestant("read", lambda: [x.sum() for x in batches]))
    for contestant, make in CONTESTANTS.items():
        try:
            taking_part.append(_contestant(contestant, lambda make=make: make(name, channels, device), name, part,
                                           batches, axis))  # fmt: skip
        except KeyError:
            unavailable[contestant] = "has no such observer"
    return harness.Case(
        labels={"observer": name, "tensor": tensor, "per": granularity, "part": part},
        elements=elements,
        floor_bytes=sum(x.nbytes for x in batches),
        contestants=taking_part,
        device=device,
        floor="read",
        host_time=part == "qparams",
        unavailable=unavailable,
    )


def _contestant(
    contestant: str,
    make: Callable[[], nn.Module],
    name: str,
    part: str,
    batches: list[Tensor],
    axis: int | None,
) -> harness.Contestant:
    ready = make()
    if part == "qparams":
        seen(ready, batches)
    runs: dict[str, Callable[[], object]] = {
        "observe": lambda: seen(make(), batches),
        "qparams": lambda: grid_of(ready),
        "both": lambda: grid_of(seen(make(), batches)),
    }
    return harness.Contestant(contestant, runs[part], lambda: check(name, make(), batches, axis))


def print_errors(results: Sequence[harness.Result]) -> None:
    """How the errors compare: one row a tensor and observer."""
    rows = []
    errors: dict[tuple[str, ...], dict[str, float]] = {}
    for result in results:
        if "error" in result.figures:
            labels = tuple(text for label, text in result.labels.items() if label != "part")
            errors.setdefault(labels, {})[result.contestant] = result.figures["error"]
    for labels, found in errors.items():
        mine, peer = found.get("quantkern"), found.get("torch.ao")
        ratio = mine / peer if mine is not None and peer else None
        rows.append([*labels, *(f"{value:.4g}" if value is not None else "-" for value in (mine, peer, ratio))])
    columns = ["observer", "tensor", "per", "quantkern", "torch.ao", "ours / theirs"]
    tables.print_table("mean squared error in parts of the variance", columns, rows, text_columns=3)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.observers", description=__doc__.splitlines()[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=int, help="CPU threads for every contestant (default: torch's own choice)")
    p.add_argument("--tensors", type=names_of(list(TENSORS), "--tensors"), default=list(TENSORS))
    p.add_argument("--observers", type=names_of(list(OBSERVERS), "--observers"), default=list(OBSERVERS))
    p.add_argument("--per", type=names_of(list(GRANULARITIES), "--per"), default=list(GRANULARITIES))
    p.add_argument("--parts", type=names_of(list(PARTS), "--parts"), default=list(PARTS))
    p.add_argument("--seconds", type=float, default=2.0, help="time budget for timing one case (default 2)")
    p.add_argument("--json", type=Path, help="where the results go (default benchmarks/results/observers-DEVICE.json)")
    p.add_argument("--plot", type=Path, help="draw the medians to this file (needs matplotlib)")
    options = p.parse_args(arguments)
    device = harness.device_for(options)
    chosen = cases(options.tensors, options.observers, options.per, options.parts, device)
    path = options.json or harness.RESULTS / f"observers-{options.device}.json"
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    shown["dtype"] = "float32"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.ao announces its move to torchao
        results = harness.run(
            "observers", chosen, device, path, shown, options.seconds, options.plot, ("quantkern",), floor="read"
        )
    print_errors(results)


if __name__ == "__main__":
    main()
