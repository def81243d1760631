"""NNI's BNN experiment: a VGG with binary weights and activations on CIFAR-10, then as a packed inference model.

    python examples/bnn_vgg.py --data ~/cifar-10-batches-py --device cuda      # the network of the paper, on a GPU
    python examples/bnn_vgg.py                                                 # a quarter as wide, Fashion-MNIST

--config nni has the layer lists of NNI's documentation, nni-script those of its example script (whose weights of
features.17 stay real), full makes every layer but the first and the last binary, and float none. Clipping happens
after every optimizer step, the learning rate follows a cosine to zero, the loss is cross-entropy. Without a GPU and
with the defaults it takes about a quarter of an hour on two cores; --limit 6000 for a quick look.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import data
import models
import torch
import train
from progress import Progress
from torch import Tensor, nn

from quantkern import BNNQuantizer

WEIGHTS = [f"features.{index}" for index in (0, 3, 7, 10, 14, 17)] + ["classifier.0", "classifier.3"]
OUTPUTS = [f"features.{index}" for index in (6, 9, 13, 16, 20)] + ["classifier.2", "classifier.5"]
CONFIGS = {
    "float": None,
    "nni": (WEIGHTS, OUTPUTS),
    "nni-script": ([name for name in WEIGHTS if name not in ("features.0", "features.17")], OUTPUTS),
    "full": (WEIGHTS[1:], ["features.2", *OUTPUTS]),
}
"""The layers with binary weights and those with binary outputs; the last linear layer is always real."""


@dataclass(frozen=True)
class Epoch:
    """Mean loss of an epoch, accuracy on the test images in percent after it, seconds of training."""

    loss: float
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Speed:
    """Milliseconds for a batch, median; megabytes of the saved state."""

    batch: int
    float_ms: float
    packed_ms: float


def config_list(name: str) -> list[dict[str, object]]:
    """NNI's two rules with one of the lists of layers."""
    lists = CONFIGS[name]
    if lists is None:
        return []
    weights, outputs = lists
    return [
        {"quant_bits": 1, "quant_types": ["weight"], "op_types": ["Conv2d", "Linear"], "op_names": weights},
        {"quant_bits": 1, "quant_types": ["output"], "op_types": ["Hardtanh"], "op_names": outputs},
    ]


def padded(images: data.Dataset, size: int = 32) -> data.Dataset:
    """Images of at least ``size`` pixels a side, with background around smaller ones."""
    border = (size - images.train_images.shape[-1]) // 2
    if border <= 0:
        return images
    background = float(images.train_images.min())

    def pad(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (border,) * 4, value=background)

    return replace(images, train_images=pad(images.train_images), test_images=pad(images.test_images))


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch mirrored at random, and moved by up to four pixels: the usual for photographs."""
    size = images.shape[-1]
    top, left, mirror = torch.randint(0, 9, (3,), generator=generator).tolist()
    moved = nn.functional.pad(images, (4, 4, 4, 4))[..., top : top + size, left : left + size]
    return moved.flip(-1) if mirror % 2 else moved


def fit(
    model: nn.Module, images: data.Dataset, options: argparse.Namespace, optimizer: torch.optim.Optimizer
) -> list[Epoch]:
    """Train and test, epoch by epoch."""
    count, device = len(images.train_labels), options.device
    per_epoch = train.steps_per_epoch(count, options.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * per_epoch)
    order = torch.Generator().manual_seed(options.seed)
    epochs: list[Epoch] = []
    with Progress(options.epochs * per_epoch) as progress:
        for number in range(options.epochs):
            last = f", {epochs[-1].accuracy:.2f}% so far" if epochs else ""
            progress.describe(f"{images.name}: {options.config}, epoch {number + 1}/{options.epochs}{last}")
            start = time.monotonic()
            losses = []
            model.train()
            for chosen in train.batches(count, options.batch_size, order):
                chosen = chosen.to(device)
                x, target = images.train_images[chosen], images.train_labels[chosen]
                if images.name == "cifar10":
                    x = shifted(x, order)
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), target)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                progress.advance()
            mean = float(torch.stack(losses).mean())
            seconds = time.monotonic() - start
            epochs.append(Epoch(mean, train.accuracy(model, images.test_images, images.test_labels), seconds))
    return epochs


@torch.no_grad()
def same_answers(model: nn.Module, packed: nn.Module, images: Tensor, batch_size: int = 500) -> bool:
    """Whether two models give equal scores for every image, to the last bit."""
    model.eval()
    return all(torch.equal(model(part), packed(part)) for part in images.split(batch_size))  # type: ignore[no-untyped-call]


@torch.no_grad()
def milliseconds(model: nn.Module, x: Tensor, repeat: int = 15) -> float:
    """Median time of a forward in evaluation."""
    model.eval()
    times = []
    for _ in range(repeat + 2):
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        start = time.perf_counter()
        model(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def megabytes(model: nn.Module) -> float:
    """The size of a model's saved state."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6


def environment(device: torch.device) -> dict[str, object]:
    """Machine, versions and commit."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks import environment

    return environment.environment(device, ["quantkern"])


def load(options: argparse.Namespace) -> data.Dataset:
    """CIFAR-10 where a folder is given, else Fashion-MNIST, on the device."""
    found = data.load(options.dataset, options.data).limited(options.limit)
    found = padded(found)
    names = ("train_images", "train_labels", "test_images", "test_labels")
    return replace(found, **{name: getattr(found, name).to(options.device) for name in names})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; what is not given depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=list(CONFIGS), default="full", help="which layers are binary")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's batches (or of --dataset's files)")
    parser.add_argument("--dataset", choices=("cifar10", "fashion-mnist", "mnist"), help="default: cifar10 with --data")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--width", type=float, help="factor of all channels (default 1, on the CPU 0.25)")
    parser.add_argument("--epochs", type=train.positive, help="default 200, on the CPU 4")
    parser.add_argument("--batch-size", type=train.positive, default=100)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=train.positive, help="use only so many training and test images")
    parser.add_argument("--threads", type=train.positive, help="CPU threads (default: as many as torch takes)")
    parser.add_argument("--export", type=Path, help="folder for the trained and the packed model")
    parser.add_argument("--json", type=Path, help="write the outcome to this file")
    options = parser.parse_args(arguments)
    small = options.device.type == "cpu"
    options.dataset = options.dataset or ("cifar10" if options.data else "fashion-mnist")
    options.width = options.width or (0.25 if small else 1.0)
    options.epochs = options.epochs or (4 if small else 200)
    if options.width <= 0:
        parser.error(f"--width must be positive, got {options.width}")
    return options


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Run the example; what --json writes."""
    options = parse(arguments)
    try:
        images = load(options)
    except (data.MissingData, data.BadData) as error:
        raise SystemExit(str(error)) from None
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    channels, classes = images.train_images.shape[1], len(images.classes)
    model: nn.Module = models.BinaryVGG(channels, classes, options.width).to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    rules = config_list(options.config)
    quantizer = BNNQuantizer(model, rules, optimizer) if rules else None
    print(
        f"{images.name}: {len(images.train_labels)} training and {len(images.test_labels)} test images, "
        f"{sum(p.numel() for p in model.parameters()):,} weights (width {options.width:g}), {options.epochs} epochs on "
        f"{options.device}, {torch.get_num_threads()} threads.",
        flush=True,
    )
    if quantizer is not None:
        print(f"packed kernels: {', '.join(quantizer.packed_layers)}")
        print("".join(f"binary weight, real input: {name}\n" for name in quantizer.float_layers), end="", flush=True)
    epochs = fit(model, images, options, optimizer)
    for number, epoch in enumerate(epochs, 1):
        print(f"epoch {number}: loss {epoch.loss:.4f}, accuracy {epoch.accuracy:.2f}%, {epoch.seconds:.0f} s")
    outcome: dict[str, object] = {
        "data": images.name,
        "train_images": len(images.train_labels),
        "test_images": len(images.test_labels),
        **environment(options.device),
        "settings": {k: v if isinstance(v, (int, float, type(None))) else str(v) for k, v in vars(options).items()},
        "accuracy": epochs[-1].accuracy,
        "epochs": [asdict(epoch) for epoch in epochs],
    }
    if quantizer is not None:
        outcome["packed"] = compare(model, quantizer, images, options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(outcome, indent=1) + "\n")
        print(f"written: {options.json}")
    return outcome


def compare(
    model: nn.Module, quantizer: BNNQuantizer, images: data.Dataset, options: argparse.Namespace
) -> dict[str, object]:
    """The packed model beside the trained one and beside the float network of the same shape."""
    packed = quantizer.convert()
    channels, classes = images.train_images.shape[1], len(images.classes)
    plain = models.BinaryVGG(channels, classes, options.width).to(options.device)
    same = same_answers(model, packed, images.test_images)
    accuracy = train.accuracy(packed, images.test_images, images.test_labels)
    sizes = megabytes(plain), megabytes(packed)
    speeds = []
    for size in (1, 32):
        x = images.test_images[:size]
        speeds.append(Speed(len(x), milliseconds(plain, x), milliseconds(packed, x)))
    print(f"packed model: scores {'equal' if same else 'NOT EQUAL'} to the trained model's, accuracy {accuracy:.2f}%")
    print(f"saved: float {sizes[0]:.2f} MB, packed {sizes[1]:.2f} MB, {sizes[0] / sizes[1]:.1f} times smaller")
    for speed in speeds:
        ratio = speed.float_ms / speed.packed_ms
        print(f"batch {speed.batch}: float {speed.float_ms:.2f} ms, packed {speed.packed_ms:.2f} ms, {ratio:.1f}x")
    if options.export:
        options.export.mkdir(parents=True, exist_ok=True)
        torch.save(packed.state_dict(), options.export / f"bnn-vgg-{options.config}-packed.pth")
        quantizer.export_model(options.export / f"bnn-vgg-{options.config}.pth")
        print(f"exported: {options.export}")
    return {
        "equal": same,
        "accuracy": accuracy,
        "float_megabytes": sizes[0],
        "packed_megabytes": sizes[1],
        "latency": [asdict(speed) for speed in speeds],
    }


if __name__ == "__main__":
    main()
