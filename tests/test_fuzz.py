"""A short differential run of every operation, and the fuzzer itself: it finds what is wrong and finds it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
import strategies
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_specs import WITHOUT_TWIN, every_draw
from strategies import Draw, HypothesisDraw, RandomDraw
from torch import Tensor
from trials import Trial, check

from quantkern import _C, Backend, reference
from quantkern import functional as F

CHECKED_BY_OTHERS = {"arrange_signs"}
"""Functions that are arguments of others: a product with arranged weights is compared with one without."""


@pytest.fixture(autouse=True)
def _capability_as_before() -> Any:
    before = _C.cpu_capability()
    yield
    _C.set_cpu_capability(before)


def test_every_function_is_drawn() -> None:
    assert set(F.__all__) - CHECKED_BY_OTHERS | set(WITHOUT_TWIN) == set(every_draw())


@pytest.mark.parametrize("name", every_draw())
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
@given(data=st.data())
def test_an_operation_keeps_the_numerics_contract(name: str, data: Any) -> None:
    draw = HypothesisDraw(data)
    check(draw, every_draw()[name](draw))


@pytest.mark.parametrize("name", every_draw())
def test_random_cases(name: str) -> None:
    """The way of the long run, which reaches combinations that few examples of hypothesis do."""
    tally = fuzz.Tally()
    fuzz.run_chunk(fuzz.operation(name, Backend.NATIVE), tally, 30, 1000, "cpu", "")
    assert tally.failed == 0, tally.failures
    assert tally.tried == 30 and tally.refused < 30


def test_layouts_keep_their_values() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    seen = set()
    for layout in strategies.LAYOUTS:
        for seed in range(20):
            found = strategies.place(RandomDraw(seed), x.clone(), layout)
            assert torch.equal(found, x) and found.shape == x.shape
            seen.add((layout, found.is_contiguous(), found.storage_offset() > 0, found.is_neg()))
    assert {("sliced", False, True, False), ("stepped", False, False, False), ("far", False, True, False)} <= seen
    assert ("negated", True, False, True) in seen and ("permuted", False, False, False) in seen


def test_strategies_reach_the_special_values_and_layouts() -> None:
    found = {"nan": 0, "infinite": 0, "denormal": 0, "minus_zero": 0, "empty": 0, "scalar": 0, "repeated": 0, "far": 0}
    for seed in range(4000):
        draw = RandomDraw(seed)
        x = strategies.laid_out(draw, strategies.shapes(draw), torch.float32)
        found["nan"] += bool(x.isnan().any())
        found["infinite"] += bool(x.isinf().any())
        found["denormal"] += bool(((x != 0) & (x.abs() < torch.finfo(torch.float32).smallest_normal)).any())
        found["minus_zero"] += bool(((x == 0) & torch.signbit(x)).any())
        found["empty"] += x.numel() == 0
        found["scalar"] += x.dim() == 0
        found["repeated"] += 0 in x.stride() and x.numel() > 1
        found["far"] += strategies.FAR in x.stride()
    assert min(found.values()) >= 3, found


def wrong_by_one_step(right: Callable[..., Any]) -> Callable[..., Any]:
    """The specification with the largest value of a tensor moved by one step."""

    def quantize(x: Tensor, scale: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        y, inside = right(x, scale, *more)
        largest = (y == y.nan_to_num(-torch.inf).amax()) & torch.isfinite(y) if y.numel() else inside
        return torch.where(largest, y + reference.along_axis(scale, x, more[3]).to(y.dtype), y), inside

    return quantize


def test_the_fuzzer_finds_an_error_and_finds_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    arguments = ["--op", "fake_quantize", "--cases", "60", "--seed", "5", "--json", str(report)]
    assert fuzz.main(arguments) == 0
    assert json.loads(report.read_text())["tallies"]["fake_quantize"]["tried"] == 60
    with monkeypatch.context() as patch:
        patch.setattr(reference.affine, "quantize", wrong_by_one_step(reference.quantize))
        assert fuzz.main(arguments) == 1
        found = json.loads(report.read_text())["tallies"]["fake_quantize"]
        assert found["failed"] > 10 and "is not the reference's" in found["failures"][0]["what"]
        assert {"commit", "versions", "machine", "cpu_capabilities"} <= set(json.loads(report.read_text()))
        capsys.readouterr()
        alone = ["--op", "fake_quantize", "--cases", "1", "--seed", str(found["failures"][0]["seed"])]
        assert fuzz.main(alone) == 1
        assert found["failures"][0]["what"].split(":")[1] in capsys.readouterr().out
    assert fuzz.main(alone) == 0


def test_sessions_of_quantizers_run_and_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert fuzz.main(["--quantizers", "--cases", "2", "--seed", "3", "--json", str(report)]) == 0
    assert {tally["tried"] for tally in json.loads(report.read_text())["tallies"].values()} == {2}


def test_processes_try_cases_of_their_own_and_count_together(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ["--op", "binarize", "--op", "lsq", "--cases", "7", "--jobs", "2", "--seed", "3", "--json", str(report)]
    assert fuzz.main(arguments) == 0
    document = json.loads(report.read_text())
    assert {name: tally["tried"] for name, tally in document["tallies"].items()} == {"binarize": 14, "lsq": 14}
    assert document["arguments"]["seed"] == 3


def test_float64_tells_when_kernel_and_reference_are_wrong_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid moved by a quarter step on both sides: only the oracle can see it."""
    right = reference.quantize

    def moved(x: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        return right(x, *more) if x.dtype is torch.float64 else (right(x, *more)[0] * 1.001, right(x, *more)[1])

    draw_trial = every_draw()["fake_quantize"]

    def both_wrong(draw: Draw) -> Trial:
        trial = draw_trial(draw)
        run = trial.sample.run
        object.__setattr__(trial.sample, "run", lambda x, backend: run(x, Backend.REFERENCE))
        return trial

    with monkeypatch.context() as patch:
        patch.setattr(reference.affine, "quantize", moved)
        failed = 0
        for seed in range(60):
            draw = RandomDraw(seed)
            try:
                check(draw, both_wrong(draw))
            except AssertionError as error:
                failed += "in float64" in str(error)
        assert failed > 10
