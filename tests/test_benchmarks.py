"""The benchmark harness: its statistics, its turns, its checks; and that every contestant here is right."""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, so that the installed quantkern is the one tested

from benchmarks import fakequant, harness, lsq, peers, report  # noqa: E402
from benchmarks.shapes import SHAPES, Shape  # noqa: E402
from quantkern import reference  # noqa: E402

CPU = torch.device("cpu")


def case(
    *contestants: harness.Contestant, elements: int = 1000, unavailable: dict[str, str] | None = None
) -> harness.Case:
    return harness.Case(
        {"operation": "nothing"}, elements, 8 * elements, contestants, CPU, unavailable=unavailable or {}
    )


def scripted(monkeypatch: pytest.MonkeyPatch, samples: dict[str, list[float]]) -> list[str]:
    """Let the timer report these nanoseconds, and return the list of who was timed, in order."""
    asked: list[str] = []
    left = {name: iter(values) for name, values in samples.items()}

    def sample(self: harness.CpuTimer, run: Callable[[], object], repeats: int) -> float:
        name = str(run())
        asked.append(name)
        assert not gc.isenabled()
        return next(left[name])

    monkeypatch.setattr(harness.CpuTimer, "sample", sample)
    monkeypatch.setattr(harness.CpuTimer, "repeats", lambda self, run: 1)
    return asked


def contestant(name: str, check: Callable[[], harness.Verdict] | None = None) -> harness.Contestant:
    return harness.Contestant(name, lambda: name, check)


@pytest.mark.parametrize("percent", [0, 20, 50, 80, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_percentile_is_numpys(percent: int, count: int) -> None:
    values = np.random.RandomState(count).rand(count).tolist()
    assert harness.percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        harness.percentile([], 50)


def test_results_hold_the_statistics_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {"copy": [1e6, 2e6, 3e6], "quantkern": [2e6, 4e6, 9e6], "peer": [40e6, 40e6, 41e6]})
    everyone = [contestant(name) for name in ("copy", "quantkern", "peer")]
    ((_, results, excluded),) = harness.interleave([case(*everyone)], seconds=0, min_rounds=3)
    by_name = {one.contestant: one for one in results}
    assert not excluded
    ours, peer = by_name["quantkern"], by_name["peer"]
    assert (ours.p50_ms, ours.samples) == (4.0, 3)
    assert (ours.p20_ms, ours.p80_ms) == pytest.approx((2.8, 7.0))
    assert ours.ns_per_element == pytest.approx(4e6 / 1000)
    assert ours.gb_per_s == pytest.approx(8 * 1000 / 4e6)
    assert (ours.to_floor, ours.to_ours) == (2.0, 1.0)
    assert (peer.to_floor, peer.to_ours) == (20.0, 10.0)
    assert (ours.floor_bytes_per_element, ours.bytes_per_element) == pytest.approx((8.0, 16.0))


def test_contestants_take_turns_in_changing_order(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["copy", "quantkern", "peer"]
    asked = scripted(monkeypatch, {name: [1.0] * 20 for name in names})
    list(harness.interleave([case(*map(contestant, names))], seconds=60, max_rounds=20))
    rounds = [tuple(asked[i : i + 3]) for i in range(0, len(asked), 3)]
    assert len(rounds) == 20
    assert all(sorted(one) == sorted(names) for one in rounds)
    assert len(set(rounds)) > 1
    assert gc.isenabled()


def test_wrong_and_failing_contestants_are_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = scripted(monkeypatch, {"copy": [1.0] * 2})

    def fails() -> harness.Verdict:
        raise RuntimeError("no kernel for this\nand more lines")

    wrong = contestant("wrong", lambda: harness.Verdict(False, "disagrees"))
    one = case(contestant("copy"), wrong, contestant("fails", fails), unavailable={"absent": "has no such operation"})
    ((_, results, excluded),) = harness.interleave([one], seconds=0, min_rounds=2)
    assert [result.contestant for result in results] == ["copy"]
    assert {out.contestant: out.reason for out in excluded} == {
        "absent": "has no such operation",
        "wrong": "disagrees",
        "fails": "RuntimeError: no kernel for this",
    }
    assert set(asked) == {"copy"}
    assert results[0].to_ours is None


def test_a_contestant_that_does_other_work_is_timed_and_starred(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, {name: [1.0] * 2 for name in ("copy", "quantkern", "peer")})
    verdict = harness.Verdict(True, "half is wrong *", other_work="rounds down")
    everyone = [contestant("copy"), contestant("quantkern"), contestant("peer", lambda: verdict)]
    ((_, results, _),) = harness.interleave([case(*everyone)], seconds=0, min_rounds=2)
    assert [one.other_work for one in results] == ["", "", "rounds down"]
    assert [harness.ratio(one) for one in results[1:]] == ["1.00x", "1.00x*"]
    assert harness.notes(results + results) == ["* peer: rounds down"]
    harness.print_summary("title", results)
    printed = capsys.readouterr().out
    assert "1.00x*" in printed and printed.endswith("* peer: rounds down\n")


def test_allocated_bytes_are_those_of_tensors_at_the_peak_and_at_the_end() -> None:
    outer = torch.zeros(1000)

    def run() -> Tensor:
        return (outer.repeat(50) + 1)[:1000].clone()

    def run_and_drop() -> Tensor:
        before.clear()
        return run()

    before = [torch.zeros(50_000)]  # that it is freed meanwhile is no part of the figures
    run()
    peak, kept = harness.allocated(run_and_drop, CPU)
    assert 400_000 <= peak < 401_000  # the repeated tensor and the sum, and scalars
    assert kept == 4_000


def test_our_own_failure_ends_the_run() -> None:
    def fails() -> harness.Verdict:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(harness.interleave([case(contestant("quantkern", fails))]))


def test_short_operations_are_repeated_until_a_sample_is_long_enough() -> None:
    timer = harness.CpuTimer(CPU)
    x = torch.zeros(16)
    repeats = timer.repeats(x.clone)
    assert repeats > 1
    assert timer.sample(x.clone, repeats) * repeats > harness.SAMPLE_NS / 20


def test_json_round_trip(tmp_path: Path) -> None:
    result = harness.Result({"a": "b"}, "copy", 7, 3, 0.1, 0.2, 0.3, 4.0, 5.0, 1.0, None, "equal", {"max_steps": 0.0})
    excluded = harness.Excluded({"a": "b"}, "peer", "why")
    path = tmp_path / "folder" / "out.json"
    where = harness.environment(CPU, ["numpy", "no-such-distribution"])
    harness.write_json(path, "test", where, {"seconds": 1}, [result], [excluded])
    document, results, exclusions = harness.read_json(path)
    assert (results, exclusions) == ([result], [excluded])
    assert document["versions"]["torch"] == torch.__version__
    assert document["versions"]["no-such-distribution"] is None
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert set(document["commit"]) == {"hash", "dirty"}


def questions(direction: str) -> list[fakequant.Question]:
    shapes = ["tiny-16", "weight-depthwise"]
    return fakequant.questions(shapes, list(peers.OPERATIONS), ["tensor", "channel"], [direction], "float32")


@pytest.mark.parametrize("direction", fakequant.DIRECTIONS)
def test_every_contestant_agrees_with_the_reference(direction: str) -> None:
    contestants = fakequant.contestants_for(CPU, None)
    del contestants["torch.compile"]  # takes ten seconds a case; it compiles the reference itself
    checked = set()
    for question in questions(direction):
        for name, adapter in contestants.items():
            try:
                verdict = fakequant.compare(question, CPU, adapter)
            except peers.Unsupported:
                continue
            assert verdict.accepted, (question, name, verdict.text)
            if name == "quantkern":
                assert verdict.text == "equal", question
            checked.add(name)
    assert checked == set(contestants)


@pytest.mark.parametrize("question", questions("both"), ids=lambda question: "-".join(question.labels.values()))
def test_a_wrong_contestant_is_found_out(question: fakequant.Question) -> None:
    def wrong_value(p: peers.Problem) -> Callable[[], Tensor]:
        right = peers.reference_adapter(p)
        return lambda: right() * 1.05

    def wrong_gradient(p: peers.Problem) -> Callable[[], Tensor]:
        right = peers.reference_adapter(p)
        return lambda: right().detach() + 0.5 * (p.x - p.x.detach())

    for wrong in (wrong_value, wrong_gradient):
        verdict = fakequant.compare(question, CPU, wrong)
        assert not verdict.accepted
        assert verdict.text.startswith("disagrees with the reference")


def test_a_nan_counts_as_wrong() -> None:
    question = questions("forward")[0]
    assert not fakequant.compare(question, CPU, lambda p: lambda: torch.full_like(p.x, torch.nan)).accepted


def test_weights_and_activations_get_the_operations_that_occur() -> None:
    everything = fakequant.questions(
        list(SHAPES), list(peers.OPERATIONS), ["tensor", "channel"], ["forward"], "float32"
    )
    seen = {(one.operation, one.shape.kind, one.granularity) for one in everything}
    assert ("activation", "activation", "tensor") in seen
    assert ("activation", "weight", "channel") in seen
    assert ("activation", "weight", "tensor") not in seen
    assert ("weight", "activation", "tensor") not in seen
    assert len(everything) == len(set(everything))


def test_shapes_keep_their_promises() -> None:
    assert any(shape.channels >= 512 for shape in SHAPES.values() if shape.kind == "activation")
    x = SHAPES["weight-64"].make(torch.bfloat16, CPU)
    assert x.dtype is torch.bfloat16 and tuple(x.shape) == SHAPES["weight-64"].dims
    nhwc = next(shape for shape in SHAPES.values() if shape.channels_last)
    assert nhwc.make(torch.float32, CPU).is_contiguous(memory_format=torch.channels_last)


def test_whole_run_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    threads = torch.get_num_threads()
    options = (
        "--shapes tiny-16 --ops fake_quantize --per tensor --seconds 0.01 --contestants quantkern,aten --threads 1"
    )
    try:
        fakequant.main([*options.split(), "--json", str(path)])
    finally:
        torch.set_num_threads(threads)
    document, results, excluded = harness.read_json(path)
    assert not excluded
    assert {one.contestant for one in results} == {"copy", "quantkern", "aten"}
    assert {one.labels["direction"] for one in results} == {"forward", "both"}
    assert all(0 < one.p20_ms <= one.p50_ms <= one.p80_ms for one in results)
    assert document["arguments"]["threads"] == 1
    assert json.loads(path.read_text())["machine"]["quantkern"].startswith("native")
    printed = capsys.readouterr().out
    assert "aten/quantkern" in printed
    assert str(path) in printed


SMALL = Shape("small", (3, 8, 5, 7), "activation", 1, "a test")


def builder(operation: str, shape: Shape, axis: int | None) -> Callable[[], lsq.Work]:
    return lambda: lsq.make_work(operation, shape, axis, torch.float32, CPU)


def works() -> dict[str, Callable[[], lsq.Work]]:
    """Every operation of benchmarks.lsq on small tensors, per tensor and per channel."""
    return {
        f"{operation} {shape.name} {axis}": builder(operation, shape, axis)
        for shape in (SMALL, SHAPES["weight-depthwise"], SHAPES["tiny-16"])
        for operation in lsq.OPERATIONS
        for axis in ((None, shape.channel_axis) if operation == peers.LSQ else (None,))
        if operation == peers.LSQ or shape.kind in ("tiny", operation.removeprefix("dorefa_"))
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
            except peers.Unsupported:
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
        assert departing["brevitas"] <= {peers.ROUNDS_FIRST}


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
    build = builder(peers.LSQ, SMALL, None)

    def with_departs(departs: dict[str, str]) -> lsq.Contestant:
        return lambda w: peers.Learner(lsq.prepare(wrong_in(part), w).step, w.inputs, departs=departs)

    refused = lsq.check(wrong_in(part), build)
    assert not refused.accepted and refused.text.startswith("disagrees with the reference")
    others = dict.fromkeys({"y", "gradient", "scale"} - {part}, "something else")
    assert not lsq.check(with_departs(others), build).accepted
    known = lsq.check(with_departs({part: "the reason"}), build)
    assert known.accepted and known.other_work == "the reason"


def test_a_gradient_that_never_comes_counts_as_zero_and_is_noticed() -> None:
    build = builder(peers.LSQ, SMALL, None)

    def detached(w: lsq.Work) -> lsq.Step:
        return lambda: w.x.detach() * w.scale / w.scale.detach()

    verdict = lsq.check(detached, build)
    assert not verdict.accepted
    assert verdict.figures["gradient_differing"] > 0.9


def test_a_library_s_own_scale_is_compared_by_its_factor() -> None:
    build = builder(peers.LSQ, SMALL, 1)

    def entrant(factor: float) -> lsq.Contestant:
        def make(w: lsq.Work) -> peers.Learner:
            own = (w.scale.detach() * 15).reshape(1, -1, 1, 1).requires_grad_()
            low, high = w.quant_min, w.quant_max

            def step() -> Tensor:
                return reference.lsq(w.x, own.flatten() / 15, low, high, w.axis)

            return peers.Learner(step, (w.x, own), factor)

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
        return lsq.counted_bytes(lsq.make_work(peers.LSQ, shape, axis, dtype, CPU))

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
    build = builder(peers.LSQ, SHAPES["weight-64"], axis)

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
    def without_gradient(w: lsq.Work) -> peers.Learner:
        def step() -> Tensor:
            return reference.lsq(w.x.detach(), w.scale, w.quant_min, w.quant_max, w.axis)

        return peers.Learner(step, w.inputs, departs={"gradient": "no gradient"})

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
    assert cells[5] == f"{harness.figure(backward.bytes_per_element)} B; 12.0 B"
    assert cells[7].endswith("x*")
    assert tiny.split("|")[5].strip() == ""
    assert report.table("lsq-here").endswith("\\* nni: no gradient\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "act-64x57"], "act-64x57"),
        (["--ops", ""], "takes a list of"),
        (["--dtype", "float64"], "float64"),
    ],
)
def test_unknown_choices_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fakequant.main(arguments)
    assert message in capsys.readouterr().err


def test_unknown_contestant_is_named() -> None:
    with pytest.raises(SystemExit, match="nobody"):
        fakequant.main(["--contestants", "quantkern,nobody"])


def test_plot_without_matplotlib_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        fakequant.main(["--plot", "x.png"])


def test_plot_draws_a_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install matplotlib)")
    results = [
        harness.Result({"op": "a"}, name, 7, 1, ms * 0.9, ms, ms * 1.2, 1.0, 1.0, None, None, "", {})
        for name, ms in (("copy", 0.1), ("quantkern", 0.2))
    ]
    harness.plot(tmp_path / "chart.png", "title", results)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(peers, "missing", lambda: ["nni"])
    fakequant.main(["--list"])
    printed = capsys.readouterr().out
    assert "not installed, so not compared: nni" in printed
    assert all(name in printed for name in (*SHAPES, *peers.OPERATIONS, "torch.compile"))
