"""Trains a model once per recipe and seed and puts the outcomes side by side. Shared by the examples.

Every recipe gets the same treatment: for a seed the same initial weights, the same order of images, the same number
of epochs from scratch and the same learning rate. Nothing is chosen by looking at the test images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from data import Dataset
from progress import Progress
from recipes import RECIPES, Recipe
from torch import Tensor, nn


@dataclass(frozen=True)
class Run:
    """One training: accuracy on the test images in percent, median time of a training step."""

    recipe: str
    seed: int
    accuracy: float
    ms_per_step: float


@dataclass(frozen=True)
class Setting:
    """What all recipes share."""

    make_model: Callable[[], nn.Module]
    epochs: int
    batch_size: int
    learning_rate: float


def batches(count: int, batch_size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """The indices of an epoch in random order. A last batch of less than half the size is left out."""
    order = torch.randperm(count, generator=generator)
    chunks = torch.split(order, min(batch_size, count))  # type: ignore[no-untyped-call]
    return chunks[:-1] if len(chunks) > 1 and 2 * len(chunks[-1]) < batch_size else chunks


def steps_per_epoch(count: int, batch_size: int) -> int:
    """How many batches ``batches`` makes."""
    return len(batches(count, batch_size, torch.Generator()))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 1000) -> float:
    """Percent of the images whose highest score is the right class, with the model in evaluation mode."""
    training = model.training
    model.eval()
    with torch.no_grad():
        right = 0
        for first in range(0, len(labels), batch_size):
            part = slice(first, first + batch_size)
            right += int((model(images[part]).argmax(1) == labels[part]).sum())
    model.train(training)
    return 100.0 * right / len(labels)


def train_one(
    name: str, recipe: Recipe, data: Dataset, setting: Setting, seed: int, progress: Progress, export: Path | None
) -> Run:
    """Train one model from scratch and test it."""
    torch.manual_seed(seed)
    model = recipe.prepare(setting.make_model())
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.learning_rate)
    count = len(data.train_labels)
    per_epoch = steps_per_epoch(count, setting.batch_size)
    quantizer = recipe.make(model, optimizer, per_epoch) if recipe.make else None
    if quantizer is not None:
        model = quantizer.compress()
    # After the quantizer: learned step sizes are a parameter group of their own, which the schedule must know.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.epochs * per_epoch)
    order = torch.Generator().manual_seed(seed)
    times = []
    model.train()
    for epoch in range(setting.epochs):
        progress.describe(f"{data.name}: {name}, seed {seed}, epoch {epoch + 1}/{setting.epochs}")
        for chosen in batches(count, setting.batch_size, order):
            x, target = data.train_images[chosen], data.train_labels[chosen]
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            times.append(time.perf_counter() - start)
            schedule.step()
            progress.advance()
    run = Run(name, seed, accuracy(model, data.test_images, data.test_labels), statistics.median(times) * 1e3)
    if export is not None and quantizer is not None:
        export.mkdir(parents=True, exist_ok=True)
        quantizer.export_model(str(export / f"{name}-{seed}.pth"), str(export / f"{name}-{seed}-calibration.pth"))
    return run


def compare(
    data: Dataset, setting: Setting, recipes: Sequence[str], seeds: Sequence[int], export: Path | None = None
) -> list[Run]:
    """Every recipe with every seed. The recipes take turns, so that a busy machine slows all of them alike."""
    steps = setting.epochs * steps_per_epoch(len(data.train_labels), setting.batch_size)
    with Progress(steps * len(recipes) * len(seeds)) as progress:
        return [
            train_one(name, RECIPES[name], data, setting, seed, progress, export) for seed in seeds for name in recipes
        ]


def table(runs: Sequence[Run]) -> str:
    """The outcomes, one line a recipe: accuracy's mean over the seeds and standard deviation, the median step time."""
    columns = ("recipe", "weight bits", "activation bits", "accuracy %", "+-", "vs float", "ms/step", "vs float")
    lines = [columns]
    means: dict[str, tuple[float, float]] = {}
    for name in dict.fromkeys(run.recipe for run in runs):
        mine = [run for run in runs if run.recipe == name]
        scores, recipe = [run.accuracy for run in mine], RECIPES[name]
        means[name] = statistics.fmean(scores), statistics.median(run.ms_per_step for run in mine)
        score, ms = means[name]
        against = ("-", "-")
        if "float" in means:
            against = f"{score - means['float'][0]:+.2f}", f"{ms / means['float'][1]:.2f}x"
        deviation = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "-"
        bits = (str(recipe.weights), str(recipe.activations))
        lines.append((name, *bits, f"{score:.2f}", deviation, against[0], f"{ms:.2f}", against[1]))
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def write_json(path: Path, data: Dataset, settings: dict[str, object], runs: Sequence[Run]) -> None:
    """The runs, and where and with what they were made."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks import environment

    shown = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    document = {
        "data": data.name,
        "train_images": len(data.train_labels),
        "test_images": len(data.test_labels),
        **environment.environment(torch.device("cpu"), ["quantkern"]),
        "settings": shown,
        "runs": [asdict(run) for run in runs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def plot(path: Path, data: Dataset, runs: Sequence[Run]) -> None:
    """Accuracy over bits, a line for each kind of quantizer and the float model as a level."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    lines: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        recipe = RECIPES[run.recipe]
        kind = recipe.what if recipe.activations == recipe.weights else f"{recipe.what}, weights only"
        lines.setdefault(kind, {}).setdefault(recipe.weights, []).append(run.accuracy)
    chart, axes = plt.subplots(figsize=(7, 4.5))
    for kind, scores in lines.items():
        bits = sorted(scores)
        means = [statistics.fmean(scores[width]) for width in bits]
        if bits == [32]:
            axes.axhline(means[0], color="grey", linestyle="--", label="float")
        else:
            axes.plot(bits, means, marker="o", label=kind)
    axes.set(xlabel="bits", ylabel="test accuracy, %", title=f"{data.name}, {len(data.train_labels)} images")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(chart)


def positive(text: str) -> int:
    """An argparse type: an integer from 1 up."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return int(text)


def known_recipes(text: str) -> list[str]:
    """An argparse type: a comma separated list of recipes."""
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in RECIPES]
    if unknown or not chosen:
        raise argparse.ArgumentTypeError(f"expected a list of {', '.join(RECIPES)}; got {text!r}")
    return chosen


def add_options(
    parser: argparse.ArgumentParser,
    epochs: int,
    batch_size: int,
    seeds: int,
    recipes: Sequence[str] = tuple(RECIPES),
    threads: int | None = None,
) -> None:
    """The options that all examples have."""
    parser.add_argument("--epochs", type=positive, default=epochs, help=f"default {epochs}")
    parser.add_argument("--batch-size", type=positive, default=batch_size, help=f"default {batch_size}")
    parser.add_argument("--seeds", type=positive, default=seeds, help=f"train this many times (default {seeds})")
    shown = f"of {','.join(RECIPES)} (default {','.join(recipes)})"
    parser.add_argument("--quantizers", type=known_recipes, default=list(recipes), help=shown)
    parser.add_argument("--limit", type=positive, help="use only so many training and test images")
    parser.add_argument(
        "--threads",
        type=positive,
        default=threads,
        help=f"CPU threads (default: {threads or 'as many as torch takes'})",
    )
    parser.add_argument("--export", type=Path, help="folder for the trained models and their calibration")
    parser.add_argument("--json", type=Path, help="write every run to this file")
    parser.add_argument("--plot", type=Path, help="draw accuracy over bits to this file (needs matplotlib)")


def report(data: Dataset, setting: Setting, options: argparse.Namespace) -> list[Run]:
    """Say what is trained, train it, print the table."""
    if options.threads:
        torch.set_num_threads(options.threads)
    print(
        f"{data.name}: {len(data.train_labels)} training and {len(data.test_labels)} test images. Every recipe from "
        f"scratch: {setting.epochs} epochs, batches of {setting.batch_size}, seeds 0..{options.seeds - 1}, "
        f"{torch.get_num_threads()} threads.",
        flush=True,
    )
    start = time.monotonic()
    runs = compare(data, setting, options.quantizers, range(options.seeds), options.export)
    print(f"\n{table(runs)}\n\n{time.monotonic() - start:.0f} s in total")
    if options.json:
        write_json(options.json, data, vars(options), runs)
        print(f"written: {options.json}")
    if options.plot:
        plot(options.plot, data, runs)
        print(f"drawn: {options.plot}")
    return runs
