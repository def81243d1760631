"""benchmarks.lsq: every contestant agrees or departs as it is known to, and what moves is counted."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, so that the installed quantkern is the one tested

from benchmarks import harness, lsq, problems, report, tables  # noqa: E402
from benchmarks.shapes import SHAPES, Shape  # noqa: E402
from quantkern import reference  # noqa: E402

CPU = torch.device("cpu")


SMALL = Shape("small", (3, 8, 5, 7), "activation", 1, "a test")


def builder(operation: str, shape: Shape, axis: int | None) -> Callable[[], lsq.Work]:
    return lambda: lsq.make_work(operation, shape, axis, torch.float32, CPU)


def works() -> dict[str, Callable[[], lsq.Work]]:
    """Every operation of benchmarks.lsq on small tensors, per tensor and per channel."""
    return {
        f"{operation} {shape.name} {axis}": builder(operation, shape, axis)
        for shape in (SMALL, SHAPES["weight-depthwise"], SHAPES["tiny-16"])
        for operation in lsq.OPERATIONS
        for axis in ((None, shape.channel_axis) if operation == problems.LSQ else (None,))
        if operation == problems.LSQ or shape.kind in ("tiny", operation.removeprefix("dorefa_"))
    }


def test_every_contestant_of_lsq_agrees_or_departs_as_it_is_known_to() -> None:
    everyone = lsq.contestants()
    del everyone["torch.compile"]  # takes ten seconds a case
    departing: dict[str, set[str]] = {name: set() for name in everyone}
    checked = set()
    for work, build in works().items():
        for name, entrant in everyone.items():
            try:
                verdict = lsq.check(entrant, build)
            except problems.Unsupported:
                continue
            assert verdict.accepted, (work, name, verdict.text)
            assert verdict.text.endswith("*") == bool(verdict.other_work)
            departing[name] |= {verdict.other_work} - {""}
            checked.add(name)
    assert checked == set(everyone)
    assert not departing["quantkern"] and not departing["eager"]
    if "nni" in everyone:
        assert departing["nni"] == {
            "no gradient reaches the weight",
            "quantizes to the signed range whatever the input",
            "the gradient skips tanh and the maximum",
        }
    if "brevitas" in everyone:
        assert departing["brevitas"] <= {problems.ROUNDS_FIRST}


def wrong_in(part: str) -> lsq.Contestant:
    """A contestant that is right but for y, the gradient of x, or that of the scale."""

    def entrant(w: lsq.Work) -> lsq.Step:
        right = lsq.specification(w)
        if part == "y":
            return lambda: right() + w.scale.detach().max()
        if part == "gradient":
            return lambda: right() + 0.1 * (w.x - w.x.detach())
        return lambda: right() + 0.1 * (w.scale - w.scale.detach()).sum()

    return entrant


@pytest.mark.parametrize("part", ["y", "gradient", "scale"])
def test_departures_are_accepted_only_where_they_are_known(part: str) -> None:
    build = builder(problems.LSQ, SMALL, None)

    def with_departs(departs: dict[str, str]) -> lsq.Contestant:
        return lambda w: problems.Learner(lsq.prepare(wrong_in(part), w).step, w.inputs, departs=departs)

    refused = lsq.check(wrong_in(part), build)
    assert not refused.accepted and refused.text.startswith("disagrees with the reference")
    others = dict.fromkeys({"y", "gradient", "scale"} - {part}, "something else")
    assert not lsq.check(with_departs(others), build).accepted
    known = lsq.check(with_departs({part: "the reason"}), build)
    assert known.accepted and known.other_work == "the reason"


def test_a_gradient_that_never_comes_counts_as_zero_and_is_noticed() -> None:
    build = builder(problems.LSQ, SMALL, None)

    def detached(w: lsq.Work) -> lsq.Step:
        return lambda: w.x.detach() * w.scale / w.scale.detach()

    verdict = lsq.check(detached, build)
    assert not verdict.accepted
    assert verdict.figures["gradient_differing"] > 0.9


def test_a_library_s_own_scale_is_compared_by_its_factor() -> None:
    build = builder(problems.LSQ, SMALL, 1)

    def entrant(factor: float) -> lsq.Contestant:
        def make(w: lsq.Work) -> problems.Learner:
            own = (w.scale.detach() * 15).reshape(1, -1, 1, 1).requires_grad_()
            low, high = w.quant_min, w.quant_max

            def step() -> Tensor:
                return reference.lsq(w.x, own.flatten() / 15, low, high, w.axis)

            return problems.Learner(step, (w.x, own), factor)

        return make

    assert lsq.check(entrant(15), build).accepted
    assert not lsq.check(entrant(1), build).accepted


def test_the_count_of_moved_bytes_follows_the_kernel() -> None:
    source = Path(__file__).resolve().parents[1] / "csrc" / "cpu"
    text = "".join((source / name).read_text() for name in ("parallel.h", "channel_params.h", "lsq.cpp"))
    stretch = re.search(r"kSumStretch = (\d+);", text)
    short = re.search(r"kShortRow = (\d+);", text)
    blocks = re.search(r"rows_a_block = std::max<int64_t>\((\d+), (\d+) / period\)", text)
    assert stretch and short and blocks
    assert int(stretch[1]) == lsq.CPU_STRETCH
    assert int(short[1]) == lsq.CPU_SHORT_ROW
    assert (int(blocks[1]), int(blocks[2])) == (lsq.CPU_COLUMN_ROWS, lsq.CPU_COLUMN_BLOCK)


def test_the_bytes_that_the_backward_moves_are_counted() -> None:
    def counted(shape: Shape, axis: int | None, dtype: torch.dtype = torch.float32) -> float:
        return lsq.counted_bytes(lsq.make_work(problems.LSQ, shape, axis, dtype, CPU))

    size = 64 * 64 * 9  # nine stretches, or 64 rows of less than a stretch
    assert counted(SHAPES["weight-64"], None, torch.bfloat16) == 6 + (3 * 9 * 16 + 24) / size
    assert counted(SHAPES["weight-64"], 0) == 12 + (3 * 64 * 16 + 64 * 24) / size
    columns = Shape("columns", (4096, 64), "activation", 1, "four blocks of 1024 rows")
    assert counted(columns, 1) == 12 + (3 * 4 * 64 * 4 + 64 * 24) / (4096 * 64)
    for shape in (SHAPES[name] for name in lsq.SHOWN):
        if shape.kind == "weight":  # the large activations have a smaller share of sums
            assert all(12 < counted(shape, axis) < 1.3 * 12 for axis in (None, shape.channel_axis)), shape.name


@pytest.mark.parametrize("axis", [None, 0])
def test_our_backward_allocates_dx_and_the_forward_saves_nothing(axis: int | None) -> None:
    build = builder(problems.LSQ, SHAPES["weight-64"], axis)

    ours = lsq.traffic(lsq.quantkern, build, counted=True)
    assert 4 <= ours["allocated_bytes"] < 4.05
    assert 0 <= ours["saved_bytes"] < 0.05
    assert ours["counted_bytes"] == lsq.counted_bytes(build())
    eager = lsq.traffic(lsq.eager, build, counted=False)
    assert eager["allocated_bytes"] >= 8 and eager["saved_bytes"] >= 4
    assert "counted_bytes" not in eager


def test_whole_run_of_lsq_writes_its_results_and_the_readme_s_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_gradient(w: lsq.Work) -> problems.Learner:
        def step() -> Tensor:
            return reference.lsq(w.x.detach(), w.scale, w.quant_min, w.quant_max, w.axis)

        return problems.Learner(step, w.inputs, departs={"gradient": "no gradient"})

    chosen = {"quantkern": lsq.quantkern, "eager": lsq.eager, "nni": without_gradient}
    monkeypatch.setattr(lsq, "contestants", lambda: chosen)
    path = tmp_path / "lsq-here.json"
    lsq.main(
        ["--shapes", "weight-64,tiny-16", "--ops", "lsq", "--per", "tensor", "--seconds", "0", "--json", str(path)]
    )
    _, results, excluded = harness.read_json(path)
    assert not excluded
    assert {one.contestant for one in results} == {"copy", *chosen}
    directions = {(one.labels["shape"], one.labels["direction"]) for one in results}
    assert directions == {("weight-64", "both"), ("weight-64", "backward"), ("tiny-16", "both")}
    (backward,) = [one for one in results if one.labels["direction"] == "backward" and one.contestant == "quantkern"]
    assert backward.floor_bytes_per_element == pytest.approx(12)
    assert {"counted_bytes", "allocated_bytes", "saved_bytes"} <= set(backward.figures)
    assert "* nni: no gradient" in capsys.readouterr().out
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    head, large, tiny = (line for line in report.table("lsq-here").splitlines() if line.startswith("| "))
    assert head == "| operation | tensor | per | ours / copy | our backward | eager | NNI 2.10 |"
    cells = [cell.strip() for cell in large.split("|")]
    assert cells[5] == f"{tables.figure(backward.bytes_per_element)} B; 12.0 B"
    assert cells[7].endswith("x*")
    assert tiny.split("|")[5].strip() == ""
    assert report.table("lsq-here").endswith("\\* nni: no gradient\n")
