"""Flips single bits of files that export_model and torch.save write, and looks at what is read from them then.

    python tests/flip_bits.py

flips every bit of three files and prints one JSON object for each: how many flips, in how many quantkern.load said that
the file is damaged, in how many it gave the very same values (the bit lies between two tensors, or is no part of them),
in how many torch.load gave other values without an error, and ``wrong``, where quantkern.load did. The test of
tests/test_disk_faults.py flips some of them.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import quantkern

RULES = [{"quant_types": ["weight", "input"], "quant_bits": 8, "op_types": ["Linear"]}]
FILES = ("model.pth", "calibration.pth", "checkpoint.pth")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def quantizer_of(model: nn.Module) -> quantkern.QAT_Quantizer:
    quantizer = quantkern.QAT_Quantizer(model, RULES)
    model(torch.randn(8, 16))
    return quantizer


def write_files(folder: Path) -> None:
    """What training leaves: a checkpoint, the exported model and its calibration."""
    model = network()
    quantizer = quantizer_of(model)
    torch.save({"model": model.state_dict(), "quantizer": quantizer.state_dict()}, folder / "checkpoint.pth")
    quantizer.export_model(folder / "model.pth", folder / "calibration.pth")


def equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def flip(file: Path, bits: Iterable[int]) -> tuple[Counter[str], list[int]]:
    """One after the other; the counts, and the bits whose flip went unnoticed."""
    good, expected = file.read_bytes(), torch.load(file, weights_only=True)
    damaged = file.with_name(f"damaged-{file.name}")
    counts, wrong = Counter[str](), list[int]()
    for bit in bits:
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(data)
        counts["flips"] += 1
        try:
            if equal(quantkern.load(damaged), expected):
                counts["the same"] += 1
            else:
                wrong.append(bit)
        except ValueError as error:
            assert str(damaged) in str(error)
            counts["said"] += 1
        with contextlib.suppress(Exception):
            counts["wrong by torch.load"] += not equal(torch.load(damaged, weights_only=True), expected)
    damaged.unlink()
    return counts, wrong


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        write_files(Path(place))
        for name in sys.argv[1:] or FILES:
            found, unnoticed = flip(Path(place, name), range(Path(place, name).stat().st_size * 8))
            print(json.dumps({"file": name, **found, "wrong": unnoticed}), flush=True)
