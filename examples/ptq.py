"""Quantize a trained network without training it further, and compare what every observer makes of it.

    python examples/ptq.py                                      # digits, under a minute
    python examples/ptq.py --dataset fashion-mnist              # NNI's LeNet on 60,000 images

The float model is trained once a seed. For every observer and number of bits a copy of it sees 100 of its training
images and is then tested with quantized weights, inputs and activations. Nothing is chosen by looking at the test
images. "error" is the mean squared difference of the scores from the float model's, in parts of their variance.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import data
import models
import torch
import train
from progress import Progress
from torch import Tensor, nn

from quantkern import ObserverQuantizer
from quantkern.observers import OBSERVERS


@dataclass(frozen=True)
class Run:
    """One model: accuracy on the test images in percent, error of its scores, seconds of calibration and search."""

    observer: str
    bits: int
    seed: int
    accuracy: float
    error: float
    seconds: float


def config_list(observer: str, bits: int) -> list[dict[str, object]]:
    """Weights per tensor, and what every matrix product reads and every activation writes.

    The observer is for inputs and outputs; weights keep their whole range with 8 bits and more and get the smallest
    squared error with fewer.
    """
    observers = {"weight": "minmax" if bits >= 8 else "mse", "input": observer, "output": observer}
    shared: dict[str, object] = {"quant_bits": bits, "observer": observers}
    return [
        {**shared, "quant_types": ["weight", "input"], "op_types": ["Conv2d", "Linear"]},
        {**shared, "quant_types": ["output"], "op_types": ["ReLU6"]},
    ]


def trained(
    make_model: Callable[[], nn.Module],
    images: data.Dataset,
    options: argparse.Namespace,
    seed: int,
    progress: Progress,
) -> nn.Module:
    """A float model, in evaluation mode."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    count = len(images.train_labels)
    total = options.epochs * train.steps_per_epoch(count, options.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(options.epochs):
        progress.describe(f"{images.name}: float, seed {seed}, epoch {epoch + 1}/{options.epochs}")
        for chosen in train.batches(count, options.batch_size, order):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images.train_images[chosen]), images.train_labels[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            progress.advance()
    return model.eval()


@torch.no_grad()
def scores(model: nn.Module, images: Tensor) -> Tensor:
    """The model's outputs for all images."""
    parts: Sequence[Tensor] = torch.split(images, 1000)  # type: ignore[no-untyped-call]
    return torch.cat([model(part) for part in parts])


def quantized(
    floating: nn.Module, images: data.Dataset, observer: str, bits: int, calibration: int
) -> tuple[nn.Module, float]:
    """A quantized copy of the model, and the seconds it took."""
    model = copy.deepcopy(floating)
    start = time.perf_counter()
    quantizer = ObserverQuantizer(model, config_list(observer, bits))
    batches: Sequence[Tensor] = torch.split(images.train_images[:calibration], 20)  # type: ignore[no-untyped-call]
    quantizer.calibrate(batches, progress=False)
    return quantizer.compress(), time.perf_counter() - start


def compare(images: data.Dataset, options: argparse.Namespace) -> list[Run]:
    """Every observer with every number of bits, for each seed."""
    size, channels = images.train_images.shape[-1], images.train_images.shape[1]
    classes = len(images.classes)

    def make() -> nn.Module:
        return models.DigitsNet(channels, classes) if size < 28 else models.LeNet(channels, size, classes)

    runs: list[Run] = []
    per_seed = options.epochs * train.steps_per_epoch(len(images.train_labels), options.batch_size)
    per_seed += len(options.observers) * len(options.bits)
    with Progress(options.seeds * per_seed) as progress:
        for seed in range(options.seeds):
            floating = trained(make, images, options, seed, progress)
            expected = scores(floating, images.test_images)
            right = 100 * float((expected.argmax(1) == images.test_labels).float().mean())
            runs.append(Run("float", 32, seed, right, 0.0, 0.0))
            for bits in options.bits:
                for observer in options.observers:
                    progress.describe(f"{images.name}: {observer}, {bits} bits, seed {seed}")
                    model, seconds = quantized(floating, images, observer, bits, options.calibration)
                    found = scores(model, images.test_images)
                    right = 100 * float((found.argmax(1) == images.test_labels).float().mean())
                    error = float((found - expected).square().mean() / expected.var())
                    runs.append(Run(observer, bits, seed, right, error, seconds))
                    progress.advance()
    return runs


def table(runs: Sequence[Run]) -> str:
    """The outcomes, one line an observer and number of bits: means over the seeds."""
    lines = [("observer", "bits", "accuracy %", "vs float", "error", "seconds")]
    level = statistics.fmean(run.accuracy for run in runs if run.observer == "float")
    for observer, bits in dict.fromkeys((run.observer, run.bits) for run in runs):
        mine = [run for run in runs if (run.observer, run.bits) == (observer, bits)]
        accuracy, error, seconds = (
            statistics.fmean(getattr(run, name) for run in mine) for name in ("accuracy", "error", "seconds")
        )
        lines.append(
            (observer, str(bits), f"{accuracy:.2f}", f"{accuracy - level:+.2f}", f"{error:.2e}", f"{seconds:.2f}")
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def known_observers(text: str) -> list[str]:
    """An argparse type: a comma separated list of observers."""
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    if not chosen or any(name not in OBSERVERS for name in chosen):
        raise argparse.ArgumentTypeError(f"expected a list of {', '.join(OBSERVERS)}; got {text!r}")
    return chosen


def bit_widths(text: str) -> list[int]:
    """An argparse type: a comma separated list of numbers of bits."""
    chosen = [int(word) if word.strip().isdigit() else 0 for word in text.split(",")]
    if not all(2 <= bits <= 16 for bits in chosen):
        raise argparse.ArgumentTypeError(f"expected numbers from 2 to 16 with commas between, got {text!r}")
    return chosen


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; how long to train depends on the data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("digits", "fashion-mnist", "mnist", "cifar10"), default="digits")
    parser.add_argument("--data", type=Path, help="folder of the data set's files")
    parser.add_argument("--observers", type=known_observers, default=list(OBSERVERS), help=f"of {','.join(OBSERVERS)}")
    parser.add_argument("--bits", type=bit_widths, default=[8, 6, 4], help="default 8,6,4")
    parser.add_argument("--calibration", type=train.positive, default=100, help="images to observe (default 100)")
    parser.add_argument("--epochs", type=train.positive, help="of float training (default 15, else 3)")
    parser.add_argument("--batch-size", type=train.positive, help="default 64 for digits, else 128")
    parser.add_argument("--lr", type=float, help="default 0.003 for digits, else 0.001")
    parser.add_argument("--seeds", type=train.positive, default=1, help="train this many float models (default 1)")
    parser.add_argument("--limit", type=train.positive, help="use only so many training and test images")
    parser.add_argument("--threads", type=train.positive, help="CPU threads (default: 1 for digits, else torch's)")
    parser.add_argument("--json", type=Path, help="write every run to this file")
    options = parser.parse_args(arguments)
    small = options.dataset == "digits"
    options.epochs = options.epochs or (15 if small else 3)
    options.batch_size = options.batch_size or (64 if small else 128)
    options.lr = options.lr or (3e-3 if small else 1e-3)
    options.threads = options.threads or (1 if small else None)
    return options


def write_json(path: Path, images: data.Dataset, options: argparse.Namespace, runs: Sequence[Run]) -> None:
    """The runs, and where and with what they were made."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks import environment

    document = {
        "data": images.name,
        "train_images": len(images.train_labels),
        "test_images": len(images.test_labels),
        **environment.environment(torch.device("cpu"), ["quantkern"]),
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()},
        "runs": [asdict(run) for run in runs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> list[Run]:
    """Run the example."""
    options = parse(arguments)
    try:
        images = data.load(options.dataset, options.data).limited(options.limit)
    except (data.MissingData, data.BadData) as error:
        raise SystemExit(str(error)) from None
    if options.threads:
        torch.set_num_threads(options.threads)
    print(
        f"{images.name}: {len(images.train_labels)} training and {len(images.test_labels)} test images, "
        f"{options.calibration} for calibration, {torch.get_num_threads()} threads.",
        flush=True,
    )
    runs = compare(images, options)
    print(f"\n{table(runs)}")
    if options.json:
        write_json(options.json, images, options, runs)
        print(f"written: {options.json}")
    return runs


if __name__ == "__main__":
    main()
