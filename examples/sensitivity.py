"""Which layers of a trained network need their bits? Measure it, choose bits by layer, and look at the outcome.

    python examples/sensitivity.py                              # digits, under a minute
    python examples/sensitivity.py --plot sensitivity.png --html report.html

A float network is trained on the digits. Each of its layers is then quantized alone, with several bit widths: what is
left of its outputs (SQNR, on 100 training images) and of its accuracy (on the test images). The bits that the SQNR
suggests are then used all together, and the report of that model says what happens to every tensor.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import data
import models
import torch
import train
from progress import Progress
from ptq import bit_widths, trained
from torch import Tensor

import quantkern
from quantkern.report import Report


def quantized(model: torch.nn.Module, bits: dict[str, int], batches: Sequence[Tensor]) -> quantkern.ObserverQuantizer:
    """The model with these bits by layer."""
    rules = [
        {"quant_types": ["weight", "input"], "quant_bits": width, "op_names": [layer]} for layer, width in bits.items()
    ]
    quantizer = quantkern.ObserverQuantizer(model, rules)
    quantizer.calibrate(batches, progress=False)
    quantizer.compress()
    return quantizer


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=bit_widths, default=[8, 6, 5, 4, 3, 2], help="default 8,6,5,4,3,2")
    parser.add_argument("--sqnr", type=float, default=20.0, help="dB that the outputs should keep (default 20)")
    parser.add_argument("--epochs", type=train.positive, default=15, help="of float training (default 15)")
    parser.add_argument("--batch-size", type=train.positive, default=64, help="default 64")
    parser.add_argument("--lr", type=float, default=3e-3, help="default 0.003")
    parser.add_argument("--limit", type=train.positive, help="use only so many training and test images")
    parser.add_argument("--plot", type=Path, help="draw the SQNR of layers by bits: .png, .svg or .pdf")
    parser.add_argument("--html", type=Path, help="write the report of the quantized model to this page")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Report:
    """Run the example; the report of the quantized model."""
    options = parse(arguments)
    try:
        digits = data.digits().limited(options.limit)
    except (data.MissingData, data.BadData) as error:
        raise SystemExit(str(error)) from None
    torch.set_num_threads(1)  # the network is too small to share
    steps = options.epochs * train.steps_per_epoch(len(digits.train_labels), options.batch_size)
    with Progress(steps) as progress:
        model = trained(models.DigitsNet, digits, options, 0, progress)
    calibration: Sequence[Tensor] = torch.split(digits.train_images[:100], 20)  # type: ignore[no-untyped-call]

    found = quantkern.sensitivity(model, calibration, bits=options.bits)
    print(f"\n{found}")
    labelled = [(digits.test_images, digits.test_labels)]
    print(f"\n{quantkern.sensitivity(model, labelled, bits=options.bits, metric='accuracy')}")
    if options.plot:
        found.plot(options.plot)
        print(f"\nwritten: {options.plot}")

    try:
        chosen = found.suggest(options.sqnr)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    before = train.accuracy(model, digits.test_images, digits.test_labels)
    quantizer = quantized(model, chosen, calibration)
    after = train.accuracy(model, digits.test_images, digits.test_labels)
    listed = ", ".join(f"{layer} {bits}" for layer, bits in chosen.items())
    print(f"\nBits for an SQNR of about {options.sqnr:g} dB: {listed}. Accuracy {before:.2f} -> {after:.2f}%\n")
    report = quantizer.report(calibration[0])
    print(report)
    if options.html:
        report.to_html(options.html)
        print(f"\nwritten: {options.html}")
    return report


if __name__ == "__main__":
    main()
