"""Where something was measured: processor, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def commit() -> dict[str, Any]:
    """The commit that ran and whether the tree differs from it (results being written do not count)."""
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {"hash": _git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def versions(distributions: Iterable[str] = ()) -> dict[str, str | None]:
    """Versions of Python, torch and the named distributions; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def environment(device: torch.device, distributions: Iterable[str] = ()) -> dict[str, Any]:
    """Machine, versions, commit and date: what a reader needs to place the numbers."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_allowed": affinity,
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = properties.name
        machine["gpu_capability"] = f"{properties.major}.{properties.minor}"
        machine["gpu_memory_bytes"] = properties.total_memory
        machine["cuda"] = torch.version.cuda
    return {
        "machine": machine,
        "versions": versions(distributions),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
