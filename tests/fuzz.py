"""Runs random trials of every operation until told to stop: ``python -m tests.fuzz --minutes 10 --op lsq``.

With ``--quantizers`` random models under random quantizers, with random actions in random order. Every case follows
from its own seed. What fails is printed with the command that runs that case alone.
"""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests import each other by the names of their files

import conftest  # noqa: E402, F401  before triton
import torch  # noqa: E402
from op_specs import every_draw  # noqa: E402
from quantizer_session import Session  # noqa: E402
from random_models import QUANTIZERS  # noqa: E402
from strategies import Draw, RandomDraw, pick  # noqa: E402
from trials import check  # noqa: E402

from benchmarks.environment import environment  # noqa: E402
from quantkern import _C, Backend, files  # noqa: E402

CHUNK, SESSIONS = 50, 2
"""Cases of an operation, and of a quantizer, before it is another one's turn."""

APART = 1 << 32
"""How far the first seeds of processes lie apart."""

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


Case = Callable[[Draw, list[str]], bool]
"""Runs one case and returns whether its arguments were valid; the list receives what the case was, as it is drawn."""


def operation(name: str, backend: Backend) -> Case:
    """Cases of an operation."""

    def run_case(draw: Draw, what: list[str]) -> bool:
        trial = every_draw()[name](draw)
        what.append(trial.describe())
        return check(draw, trial, backend)

    return run_case


def sessions(kind: str) -> Case:
    """Cases of a quantizer: a model, a configuration and what is done with them."""

    def run_case(draw: Draw, what: list[str]) -> bool:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            session = Session(draw, Path(folder), kind)
            try:
                for _ in range(draw.integer(2, 12)):
                    session.act(draw, pick(draw, session.actions))
            finally:
                what.append(session.describe())
        return True

    return run_case


def run_chunk(case: Case, tally: Tally, cases: int, seed: int, device: str, again: str) -> None:
    """The next cases; again: the command for one of them, without its seed."""
    began = time.perf_counter()
    for number in range(seed + tally.tried, seed + tally.tried + cases):
        what: list[str] = []
        try:
            tally.refused += not case(RandomDraw(number, device), what)
        except Exception as error:  # whatever goes wrong is a finding
            tally.failed += 1
            if len(tally.failures) < SHOWN:
                text = f"{' '.join(what)}: {type(error).__name__}: {error}"
                tally.failures.append({"seed": number, "what": text})
                print(f"FAILED {text}\n  again: {again} --seed {number} --cases 1", flush=True)
        tally.tried += 1
    tally.seconds += time.perf_counter() - began


def run(
    case_of: dict[str, tuple[Case, str]], minutes: float | None, cases: int | None, seed: int, device: str, chunk: int
) -> dict[str, Tally]:
    """As many cases of one name as of another, until the time, the cases or patience end."""
    tallies = {name: Tally() for name in case_of}
    began = shown = time.monotonic()
    try:
        while minutes is None or time.monotonic() - began < 60 * minutes:
            name = min(tallies, key=lambda name: tallies[name].tried)
            left = chunk if cases is None else min(chunk, cases - tallies[name].tried)
            if left <= 0:
                break
            run_chunk(case_of[name][0], tallies[name], left, seed, device, case_of[name][1])
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                done = sum(tally.tried for tally in tallies.values())
                print(f"{(shown - began) / 60:.0f} min: {done:,} cases, {total_failed(tallies)} failed", flush=True)
    except KeyboardInterrupt:
        print("stopped")
    return tallies


def run_processes(given: argparse.Namespace, seed: int) -> dict[str, Tally]:
    """The cases of several processes together, each with seeds of its own."""
    choices = [("--op", given.op), ("--quantizer", given.quantizer)]
    same = ["--quantizers"] * given.quantizers + ["--device", given.device, "--backend", given.backend]
    same += [word for name, values in choices for value in values or [] for word in (name, value)]
    limits = [("--minutes", given.minutes), ("--cases", given.cases)]
    same += [word for name, value in limits if value is not None for word in (name, str(value))]
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{number}.json" for number in range(given.jobs)]
        children = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.fuzz",
                    *same,
                    "--seed",
                    str(seed + number * APART),
                    "--json",
                    str(report),
                ],
                cwd=ROOT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            )
            for number, report in enumerate(reports)
        ]
        try:
            for child in children:
                child.wait()
        except KeyboardInterrupt:
            for child in children:
                child.terminate()
            for child in children:
                child.wait()
        found = [json.loads(report.read_text())["tallies"] for report in reports]
    tallies = {name: Tally(**tally) for name, tally in found[0].items()}
    for others in found[1:]:
        for name, other in others.items():
            for key, value in other.items():
                setattr(tallies[name], key, getattr(tallies[name], key) + value)
    return tallies


def total_failed(tallies: dict[str, Tally]) -> int:
    """Of all operations."""
    return sum(tally.failed for tally in tallies.values())


def print_table(tallies: dict[str, Tally]) -> None:
    """Cases tried, by name."""
    print(f"{'':26}{'cases':>12}{'refused':>10}{'failed':>8}{'us a case':>11}")
    for name, tally in tallies.items():
        each = 1e6 * tally.seconds / tally.tried if tally.tried else 0.0
        print(f"{name:26}{tally.tried:12,}{tally.refused:10,}{tally.failed:8}{each:11.0f}")


def write_report(path: Path, tallies: dict[str, Tally], arguments: dict[str, Any]) -> None:
    """Counts, failures, and where they come from."""
    document = {
        "fuzz": "quantizers" if arguments["quantizers"] else "operations",
        **environment(torch.device(arguments["device"])),
        "cpu_capabilities": list(_C.supported_cpu_capabilities()),
        "arguments": arguments,
        "tallies": {name: vars(tally) for name, tally in tallies.items()},
    }
    with files.replaced("--json", path) as file:
        file.write_text(json.dumps(document, indent=1) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="stop after so long; without it and --cases: when interrupted")
    parser.add_argument("--cases", type=int, help="stop when each had so many")
    parser.add_argument("--op", action="append", choices=sorted(every_draw()), help="only this one; may be repeated")
    parser.add_argument("--quantizers", action="store_true", help="sessions of quantizers instead of operations")
    parser.add_argument("--quantizer", action="append", choices=sorted(QUANTIZERS), help="only this one, as --op")
    parser.add_argument("--seed", type=int, help="of the first case; the others follow (default: a random one)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the tensors lie")
    parser.add_argument("--backend", default="native", choices=["native", "triton"], help="what is compared")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once (default 1)")
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
    what = "quantizers" if given.quantizers else f"{given.backend} on {given.device} against the reference"
    print(f"seed {seed}, {what}", flush=True)
    if given.quantizers:
        command = "python -m tests.fuzz --quantizers --quantizer"
        case_of = {kind: (sessions(kind), f"{command} {kind}") for kind in given.quantizer or QUANTIZERS}
    else:
        command = f"python -m tests.fuzz --device {given.device} --backend {given.backend} --op"
        backend = Backend(given.backend)
        case_of = {name: (operation(name, backend), f"{command} {name}") for name in given.op or every_draw()}
    if given.jobs > 1:
        tallies = run_processes(given, seed)
    else:
        tallies = run(case_of, given.minutes, given.cases, seed, given.device, SESSIONS if given.quantizers else CHUNK)
    print_table(tallies)
    if given.json:
        write_report(given.json, tallies, {**vars(given), "json": str(given.json), "seed": seed})
    return 1 if total_failed(tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
