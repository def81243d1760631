"""What is installed here and whether it works: ``python -m quantkern [--json]``; exit status 1 where it does not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

import quantkern
from quantkern.health import check_all

PACKAGES = ("numpy", "triton", "onnx", "onnxscript", "onnxruntime")


def versions() -> dict[str, str | None]:
    """Name -> version, None where a package is not installed."""
    found: dict[str, str | None] = {
        "quantkern": quantkern.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print versions, kernels and one line for every operation; 1 where an operation differs from the reference."""
    parser = argparse.ArgumentParser(prog="python -m quantkern", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the same for programs")
    options = parser.parse_args(arguments)
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    kernels = quantkern.backends()
    verdicts = list(check_all())
    failed = sum(not verdict.ok for verdict in verdicts)
    if options.json:
        report = {
            "ok": not failed,
            "versions": versions(),
            "platform": platform.platform(),
            "cuda_devices": gpus,
            "kernels": asdict(kernels),
            "health": [{**asdict(one), "ok": one.ok} for one in verdicts],
        }
        print(json.dumps(report, indent=2, default=lambda choice: choice.value))
    else:
        print(", ".join(f"{name} {version}" for name, version in versions().items() if version is not None))
        processors = f"{os.cpu_count()} processors, {torch.get_num_threads()} threads"
        print(f"{platform.platform()}, {processors}, {', '.join(gpus) or 'no CUDA device'}")
        print(f"{kernels}\n")
        print("\n".join(map(str, verdicts)))
        print(f"\n{len(verdicts) - failed} of {len(verdicts)} checks ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
