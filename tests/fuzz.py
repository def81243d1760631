"""Runs random trials of every operation until told to stop: ``python -m tests.fuzz --minutes 10 --op lsq``.

Every case follows from its own seed. What fails is printed with the command that runs that case alone.
"""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests import each other by the names of their files

import conftest  # noqa: E402, F401  before triton
import torch  # noqa: E402
from op_specs import every_draw  # noqa: E402
from strategies import Draw, RandomDraw  # noqa: E402
from trials import Trial, check  # noqa: E402

from benchmarks.harness import environment  # noqa: E402
from quantkern import _C, Backend, files  # noqa: E402

CHUNK = 50
"""Cases of an operation before it is another one's turn."""

SHOWN = 5
"""Failures of an operation that are kept and printed."""


@dataclass
class Tally:
    """What came of an operation: cases tried, those of them that were refused (as they must), failures."""

    tried: int = 0
    refused: int = 0
    failed: int = 0
    seconds: float = 0.0
    failures: list[dict[str, Any]] = field(default_factory=list)


def run_case(draw_trial: Callable[[Draw], Trial], seed: int, device: str, backend: Backend) -> bool:
    """One case; whether its arguments were valid."""
    draw = RandomDraw(seed, device)
    return check(draw, draw_trial(draw), backend)


def describe(draw_trial: Callable[[Draw], Trial], seed: int, device: str) -> str:
    """How a case calls its operation, as far as it can be drawn."""
    try:
        return draw_trial(RandomDraw(seed, device)).describe()
    except Exception as error:
        return f"cannot be drawn: {error!r}"


def run_chunk(name: str, tally: Tally, cases: int, seed: int, device: str, backend: Backend) -> None:
    """The next cases of an operation."""
    draw_trial, began = every_draw()[name], time.perf_counter()
    for case in range(seed + tally.tried, seed + tally.tried + cases):
        try:
            tally.refused += not run_case(draw_trial, case, device, backend)
        except Exception as error:  # whatever an operation does wrong is a finding
            tally.failed += 1
            if len(tally.failures) < SHOWN:
                what = f"{describe(draw_trial, case, device)}: {type(error).__name__}: {error}"
                tally.failures.append({"seed": case, "what": what})
                again = f"python -m tests.fuzz --op {name} --seed {case} --cases 1"
                print(f"FAILED {what}\n  again: {again} --device {device} --backend {backend.value}", flush=True)
        tally.tried += 1
    tally.seconds += time.perf_counter() - began


def run(
    names: list[str], minutes: float | None, cases: int | None, seed: int, device: str, backend: Backend
) -> dict[str, Tally]:
    """Cases of every named operation, as many of one as of another, until the time, the cases or patience end."""
    tallies = {name: Tally() for name in names}
    began = shown = time.monotonic()
    try:
        while minutes is None or time.monotonic() - began < 60 * minutes:
            name = min(tallies, key=lambda name: tallies[name].tried)
            left = CHUNK if cases is None else min(CHUNK, cases - tallies[name].tried)
            if left <= 0:
                break
            run_chunk(name, tallies[name], left, seed, device, backend)
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                done = sum(tally.tried for tally in tallies.values())
                print(f"{(shown - began) / 60:.0f} min: {done:,} cases, {total_failed(tallies)} failed", flush=True)
    except KeyboardInterrupt:
        print("stopped")
    return tallies


def total_failed(tallies: dict[str, Tally]) -> int:
    """Of all operations."""
    return sum(tally.failed for tally in tallies.values())


def print_table(tallies: dict[str, Tally]) -> None:
    """Cases tried per operation."""
    print(f"{'operation':26}{'cases':>12}{'refused':>10}{'failed':>8}{'us a case':>11}")
    for name, tally in tallies.items():
        each = 1e6 * tally.seconds / tally.tried if tally.tried else 0.0
        print(f"{name:26}{tally.tried:12,}{tally.refused:10,}{tally.failed:8}{each:11.0f}")


def write_report(path: Path, tallies: dict[str, Tally], arguments: dict[str, Any]) -> None:
    """Counts, failures, and where they come from."""
    document = {
        "fuzz": "operations",
        **environment(torch.device(arguments["device"])),
        "cpu_capabilities": list(_C.supported_cpu_capabilities()),
        "arguments": arguments,
        "operations": {name: vars(tally) for name, tally in tallies.items()},
    }
    with files.replaced("--json", path) as file:
        file.write_text(json.dumps(document, indent=1) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="stop after so long; without it and --cases: when interrupted")
    parser.add_argument("--cases", type=int, help="stop when every operation had so many")
    parser.add_argument("--op", action="append", choices=sorted(every_draw()), help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, help="of the first case; the others follow (default: a random one)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the tensors lie")
    parser.add_argument("--backend", default="native", choices=["native", "triton"], help="what is compared")
    parser.add_argument("--json", type=Path, help="write counts, versions, commit and machine to this file")
    return parser.parse_args(arguments)


def interrupt(*_: Any) -> None:
    """A request to end is answered as Ctrl-C is: with the counts so far."""
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """0 where nothing failed."""
    given = parse(arguments)
    signal.signal(signal.SIGTERM, interrupt)
    torch.set_num_threads(1)  # the tensors are small
    seed = secrets.randbits(48) if given.seed is None else given.seed
    print(f"seed {seed}, {given.backend} on {given.device} against the reference", flush=True)
    tallies = run(
        given.op or list(every_draw()), given.minutes, given.cases, seed, given.device, Backend(given.backend)
    )
    print_table(tallies)
    if given.json:
        write_report(given.json, tallies, {**vars(given), "json": str(given.json), "seed": seed})
    return 1 if total_failed(tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
