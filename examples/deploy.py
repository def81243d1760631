"""From training to an ONNX file: train, quantize to 8 bits with folded batch norms, export, compare, time.

    python examples/deploy.py                                   # digits, under a minute
    python examples/deploy.py --dataset fashion-mnist           # 60,000 images, some minutes

A float network is trained, then trained on for an epoch with simulated quantization. The ONNX file that
``export_onnx`` writes runs with onnxruntime on every test image; its scores are compared with those of the simulated
model, in steps of their range / 255. Then its latency is compared with that of the same network in float32, also in
onnxruntime and with folded batch norms: both run in turn, the medians count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import data
import models
import numpy as np
import torch
import train
from progress import Progress
from torch import Tensor, nn

from quantkern import QAT_Quantizer
from quantkern.export.verify import compare, session_of


def rules(weight_bits: int) -> list[dict[str, object]]:
    """Weights per channel, inputs of 8 bits.

    With 7 bits for weights no sum of two products leaves 16 bits, so that onnxruntime may take its fastest kernels on
    x86 CPUs without VNNI too.
    """
    return [
        {
            "quant_types": ["weight", "input"],
            "quant_bits": {"weight": weight_bits, "input": 8},
            "quant_scheme": {"weight": "per_channel_symmetric", "input": "per_tensor_affine"},
            "quant_dtype": {"weight": "int", "input": "uint"},
            "op_types": ["Conv2d", "Linear"],
        }
    ]


@dataclass(frozen=True)
class Outcome:
    """Accuracies in percent; how far onnxruntime and the simulated model agree; bytes of both files."""

    float_accuracy: float
    simulated_accuracy: float
    onnxruntime_accuracy: float
    same_top1_percent: float
    mean_steps: float
    max_steps: float
    sqnr_db: float
    int8_bytes: int
    float_bytes: int


@dataclass(frozen=True)
class Latency:
    """Medians over the rounds, in milliseconds a run."""

    batch: int
    threads: int
    int8_ms: float
    float_ms: float

    @property
    def ratio(self) -> float:
        """How many times faster int8 is."""
        return self.float_ms / self.int8_ms


def train_epochs(
    model: nn.Module, images: data.Dataset, options: argparse.Namespace, epochs: int, lr: float, progress: Progress
) -> None:
    """Adam with a learning rate that falls to nothing."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    count = len(images.train_labels)
    steps = epochs * train.steps_per_epoch(count, options.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(options.seed)
    model.train()
    for _ in range(epochs):
        for chosen in train.batches(count, options.batch_size, order):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images.train_images[chosen]), images.train_labels[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            progress.advance()
    model.eval()


def quantized(images: data.Dataset, options: argparse.Namespace) -> tuple[QAT_Quantizer, float]:
    """A trained quantized network, and the accuracy of the float one that it was trained from."""
    torch.manual_seed(options.seed)
    channels, size = images.train_images.shape[1], images.train_images.shape[-1]
    model = models.ConvNet(channels, size, len(images.classes))
    per_epoch = train.steps_per_epoch(len(images.train_labels), options.batch_size)
    with Progress((options.epochs + 1) * per_epoch) as progress:
        progress.describe(f"{images.name}: float")
        train_epochs(model, images, options, options.epochs, options.lr, progress)
        accuracy = train.accuracy(model, images.test_images, images.test_labels)
        progress.describe(f"{images.name}: 8 bits")
        # The statistics of batch norms stand still in the second half: then training sees what inference computes.
        example = images.train_images[:2]
        quantizer = QAT_Quantizer(
            model, rules(options.weight_bits), dummy_input=example, freeze_bn_step=max(1, per_epoch // 2)
        )
        train_epochs(model, images, options, 1, options.lr / 10, progress)
    return quantizer, accuracy


def export_float(model: nn.Module, example: Tensor, path: Path) -> None:
    """The float network in torch's own way."""
    batch = torch.export.Dim("batch")
    torch.onnx.export(model.eval(), (example,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)


def scores_of(session: Any, images: Tensor) -> np.ndarray:
    """The network's outputs for all images."""
    (name,) = (value.name for value in session.get_inputs())
    parts: Any = torch.split(images, 1000)  # type: ignore[no-untyped-call]
    return np.concatenate([session.run(None, {name: part.numpy()})[0] for part in parts])


@torch.no_grad()
def agreement(
    quantizer: QAT_Quantizer, session: Any, images: data.Dataset, float_accuracy: float, files: tuple[Path, Path]
) -> Outcome:
    """Compare on every test image."""
    model = quantizer.bound_model.eval()
    parts: Any = torch.split(images.test_images, 1000)  # type: ignore[no-untyped-call]
    simulated = torch.cat([model(part) for part in parts]).numpy()
    found, labels = scores_of(session, images.test_images), images.test_labels.numpy()
    check = compare("scores", simulated, found)
    right = [100 * float((scores.argmax(1) == labels).mean()) for scores in (simulated, found)]
    same = 100 * float((simulated.argmax(1) == found.argmax(1)).mean())
    int8, floating = (sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")) for file in files)
    return Outcome(
        float_accuracy, right[0], right[1], same, check.mean_steps, check.max_steps, check.sqnr_db, int8, floating
    )


def latency(files: tuple[Path, Path], images: Tensor, threads: int, rounds: int) -> Latency:
    """Both in turn, each run timed on its own."""
    # Sessions whose idle threads wait in a loop would take each other's cores.
    int8, floating = (session_of(file, threads, spinning=False) for file in files)
    times: dict[int, list[float]] = {0: [], 1: []}
    feeds = [{session.get_inputs()[0].name: images.numpy()} for session in (int8, floating)]
    for number in range(rounds + 5):
        for which, session in enumerate((int8, floating)):
            start = time.perf_counter()
            session.run(None, feeds[which])
            if number >= 5:
                times[which].append(1e3 * (time.perf_counter() - start))
    return Latency(len(images), threads, statistics.median(times[0]), statistics.median(times[1]))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; how long to train depends on the data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("digits", "fashion-mnist", "mnist", "cifar10"), default="digits")
    parser.add_argument("--data", type=Path, help="folder of the data set's files")
    parser.add_argument("--epochs", type=train.positive, help="of float training (default 10 for digits, else 2)")
    parser.add_argument("--batch-size", type=train.positive, help="default 32 for digits, else 128")
    parser.add_argument("--lr", type=float, default=2e-3, help="default 0.002")
    parser.add_argument(
        "--weight-bits", type=int, choices=(7, 8), default=7, help="default 7, see rules() in the source"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=train.positive, help="use only so many training and test images")
    parser.add_argument("--threads", type=train.positive, default=2, help="of torch and onnxruntime (default 2)")
    parser.add_argument("--rounds", type=train.positive, default=200, help="timed runs of each network (default 200)")
    parser.add_argument("--out", type=Path, default=Path("deployed"), help="folder of the ONNX files")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args(arguments)
    small = options.dataset == "digits"
    options.epochs = options.epochs or (10 if small else 2)
    options.batch_size = options.batch_size or (32 if small else 128)
    return options


def write_json(
    path: Path, images: data.Dataset, options: argparse.Namespace, outcome: Outcome, times: list[Latency]
) -> None:
    """The outcome, and where and with what it was made."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks import environment

    document = {
        "data": images.name,
        "test_images": len(images.test_labels),
        **environment.environment(torch.device("cpu"), ["quantkern", "onnx", "onnxscript", "onnxruntime"]),
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()},
        "outcome": asdict(outcome),
        "latency": [{**asdict(one), "times_faster": one.ratio} for one in times],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> tuple[Outcome, list[Latency]]:
    """Run the example."""
    options = parse(arguments)
    try:
        images = data.load(options.dataset, options.data).limited(options.limit)
    except (data.MissingData, data.BadData) as error:
        raise SystemExit(str(error)) from None
    torch.set_num_threads(options.threads)
    print(f"{images.name}: {len(images.train_labels)} training and {len(images.test_labels)} test images.", flush=True)
    quantizer, float_accuracy = quantized(images, options)
    quantizer.round_biases()  # to what int32 holds: the simulated model then has the numbers of the file
    options.out.mkdir(parents=True, exist_ok=True)
    files = options.out / "int8.onnx", options.out / "float32.onnx"
    example = images.train_images[:64]
    print(quantizer.export_onnx(files[0], example))
    export_float(quantizer.folded_model(), example, files[1])
    outcome = agreement(quantizer, session_of(files[0], options.threads), images, float_accuracy, files)
    print(
        f"accuracy: float {outcome.float_accuracy:.2f} %, simulated {outcome.simulated_accuracy:.2f} %, onnxruntime "
        f"{outcome.onnxruntime_accuracy:.2f} %\n"
        f"onnxruntime and simulated model: same class for {outcome.same_top1_percent:.2f} % of the images, scores "
        f"differ by {outcome.mean_steps:.4f} steps on average, {outcome.max_steps:.2f} at most; "
        f"SQNR {outcome.sqnr_db:.1f} dB\n"
        f"bytes: int8 {outcome.int8_bytes}, float32 {outcome.float_bytes}"
    )
    cases = [(batch, threads) for threads in sorted({1, options.threads}) for batch in (1, 32)]
    times = [latency(files, images.test_images[:batch], threads, options.rounds) for batch, threads in cases]
    for one in times:
        print(
            f"batch of {one.batch}, {one.threads} thread(s): int8 {one.int8_ms:.3f} ms, float32 {one.float_ms:.3f} "
            f"ms, {one.ratio:.2f}x"
        )
    if options.json:
        write_json(options.json, images, options, outcome, times)
        print(f"written: {options.json}")
    return outcome, times


if __name__ == "__main__":
    main()
