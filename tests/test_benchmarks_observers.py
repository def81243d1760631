"""benchmarks.observers: the peers compute the same, errors are those of the grids, the tables say what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, so that the installed quantkern is the one tested

from benchmarks import harness, observers, report  # noqa: E402

CPU = torch.device("cpu")
SMALL = observers.Batches((8, 3, 16, 16), 3, torch.clone, "for tests")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(observers.TENSORS, "tiny", SMALL)
    monkeypatch.setattr(harness, "SAMPLE_NS", 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", observers.OBSERVERS)
@pytest.mark.parametrize("axis", [None, 1])
def test_every_contestant_is_right(name: str, axis: int | None) -> None:
    batches = SMALL.tensors(CPU)
    for contestant, make in observers.CONTESTANTS.items():
        if (contestant, name, axis) == ("torch.ao", "histogram", 1):
            with pytest.raises(KeyError):
                make(name, 3, CPU)
            continue
        verdict = observers.check(name, make(name, 3 if axis else 0, CPU), batches, axis)
        assert verdict.accepted and verdict.text.startswith(f"error {verdict.figures['error']:.4g}")
        assert 0 < verdict.figures["error"] < (1e-3 if name != "moving_average" else 0.1)


class Wrong(nn.Module):
    """An observer that is off by 1 percent."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        scale, zero_point = observers.range_grid("minmax", SMALL.tensors(CPU), None)
        return scale * 1.01, zero_point


def test_a_wrong_range_is_found_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = observers.check("minmax", Wrong(), SMALL.tensors(CPU), None)
    assert not verdict.accepted and "scale 0.01 off the reference's" in verdict.text
    monkeypatch.setitem(observers.CONTESTANTS, "torch.ao", lambda name, channels, device: Wrong())
    (case,) = observers.cases(["tiny"], ["minmax"], ["tensor"], ["observe"], CPU)
    ((_, results, excluded),) = harness.interleave([case], seconds=0, min_rounds=1)
    assert [one.contestant for one in results] == ["read", "quantkern"]
    assert [one.contestant for one in excluded] == ["torch.ao"]


def test_the_error_is_that_of_the_grid() -> None:
    """Uniform values: a twelfth of the squared step, in parts of the variance, a twelfth of the squared range."""
    x = torch.linspace(0, 255, 100001)
    error = observers.error_of((torch.tensor([1.0]), torch.tensor([0])), [x[::2], x[1::2]], None)
    assert error == pytest.approx(1 / 255**2, rel=1e-3)


def test_batches_are_the_same_every_time_and_grow() -> None:
    for name, tensor in observers.TENSORS.items():
        if name.startswith("large"):
            continue
        first, second = tensor.tensors(CPU), tensor.tensors(CPU)
        assert len(first) == tensor.count and all(map(torch.equal, first, second))
    assert first[-1].abs().max() > first[0].abs().max()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whole_run_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "observers.json"
    observers.main(["--tensors", "tiny", "--seconds", "0", "--json", str(path)])
    document, results, excluded = harness.read_json(path)
    assert document["benchmark"] == "observers"
    parts = {(one.labels["observer"], one.labels["per"], one.labels["part"]) for one in results}
    assert len(parts) == len(observers.OBSERVERS) * 2 * len(observers.PARTS)
    assert {one.reason for one in excluded} == {"has no such observer"} and len(excluded) == len(observers.PARTS)
    for one in results:
        assert (one.to_floor is None) == (one.labels["part"] == "qparams")
        assert ("error" in one.figures) == (one.contestant != "read")
    printed = capsys.readouterr().out
    table = printed[printed.index("mean squared error in parts") :]
    (row,) = (line.split() for line in table.splitlines() if line.startswith("minmax") and "tensor" in line)
    assert row[:3] == ["minmax", "tiny", "tensor"] and row[3] == row[4] and float(row[5]) == pytest.approx(1, abs=1e-3)


def test_unknown_choices_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        observers.main(["--observers", "median"])
    assert "--observers takes a list of histogram, minmax, moving_average; got 'median'" in capsys.readouterr().err


def _run(observer: str, bits: int, seed: int, accuracy: float, error: float) -> dict[str, Any]:
    return {"observer": observer, "bits": bits, "seed": seed, "accuracy": accuracy, "error": error, "seconds": 0.1}


def test_the_table_of_calibrated_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = {
        "data": "images", "test_images": 7, "versions": {"torch": "2"}, "date": "2026-01-02T03",
        "machine": {"cpu": "cpu", "threads": 1}, "commit": {"hash": "0123456789abc", "dirty": False},
        "settings": {"observers": ["mse"], "bits": [8, 4], "calibration": 100, "seeds": 2},
        "runs": [
            _run("float", 32, 0, 90.0, 0.0), _run("float", 32, 1, 92.0, 0.0),
            _run("mse", 8, 0, 89.999, 1e-4), _run("mse", 8, 1, 92.0, 3e-4),
            _run("mse", 4, 0, 88.0, 0.01), _run("mse", 4, 1, 91.0, 0.03),
        ],
    }  # fmt: skip
    (tmp_path / "here.json").write_text(json.dumps(document))
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    text = report.update("before\n<!-- ptq: here -->\nold\n<!-- end -->\nafter\n<!-- ptq: absent -->\n<!-- end -->\n")
    assert "old" not in text and text.endswith("after\n<!-- ptq: absent -->\n<!-- end -->\n")
    assert "a trained float model (91.00 %) on images: 7 test images, 100 training images observed" in text
    assert "| observer | 8 bits | 8 bits, error | 4 bits | 4 bits, error |" in text
    assert "| mse | +0.00 | 0.200 | -1.50 | 20.0 |" in text
