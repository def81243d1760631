"""``python -m quantkern``: every operation has its line, a wrong one is found and said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantkern
from quantkern import Backend, __main__, health
from quantkern import functional as F

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def test_every_function_has_a_check() -> None:
    assert sorted(health.OPERATIONS) == sorted(F.__all__)


@pytest.mark.parametrize("operation", health.OPERATIONS)
def test_every_operation_is_well(operation: str) -> None:
    assert health.check(operation, CPU, Backend.AUTO).differs == ""


@pytest.mark.parametrize("operation", health.OPERATIONS)
def test_a_wrong_number_is_found(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any of the results, gradients and state that a check looks at."""
    call, tolerance = health.OPERATIONS[operation]
    right = [one.clone() for one in call(CPU, Backend.AUTO)]
    for number in range(len(right)):
        wrong = [one.clone() for one in right]
        wrong[number].view(-1)[-1] += 1
        monkeypatch.setitem(
            health.OPERATIONS,
            operation,
            (lambda device, backend, wrong=wrong: right if backend is Backend.REFERENCE else wrong, tolerance),
        )
        said = health.check(operation, CPU, Backend.AUTO).differs
        assert said.startswith(f"result {number + 1} differs in 1 of {right[number].numel()} elements, the first at ")


def test_an_operation_that_fails_is_said_and_the_others_are_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(device: torch.device, backend: Backend) -> list[torch.Tensor]:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(health.OPERATIONS, "lsq", (fail, 0))
    assert __main__.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("lsq ")][0].endswith("RuntimeError: no such kernel")
    assert sum(line.endswith(" ok") for line in lines) >= len(F.__all__) - 1


def test_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "quantkern"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in (f"quantkern {quantkern.__version__}, python ", f"torch {torch.__version__}", *F.__all__, "checks ok"):
        assert part in done.stdout
    assert str(quantkern.backends()).splitlines()[0] in done.stdout
    assert ("no CUDA device" in done.stdout) == (torch.cuda.device_count() == 0)


def test_the_same_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["versions"]["torch"] == torch.__version__
    assert {one["operation"] for one in found["health"]} == set(F.__all__)
    assert found["health"][0].keys() == {"operation", "device", "backend", "ok", "differs"}
    assert found["kernels"]["chosen"]["cpu"][0] == "native"
    assert found["kernels"]["cpu_capability"] == quantkern.backends().cpu_capability
