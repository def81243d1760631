"""What a run allocates."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def traced(run: Callable[[], T], memory: bool = True) -> tuple[T, list[dict[str, Any]]]:
    """What ``run`` returns, and the events of torch's profiler: operators and, named "[memory]", tensors' memory."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler announces itself on every start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=memory) as profile:
        held = run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return held, json.loads(path.read_text())["traceEvents"]


def allocated(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes of tensors that one call of ``run`` allocates: at its peak, and still held when it has returned.

    What it returns is held. Memory that is no tensor's (a kernel's own small arrays on the CPU) is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        held = run()
        torch.cuda.synchronize()
        figures = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        del held
        return figures
    held, trace = traced(run)
    del held
    events = [one for one in trace if one.get("name") == "[memory]"]
    live: dict[int, int] = {}
    peak = 0
    for event in sorted(events, key=lambda one: one["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            live[address] = size
        else:
            live.pop(address, None)  # what was there before is not counted, neither when it goes
        peak = max(peak, sum(live.values()))
    return peak, sum(live.values())
