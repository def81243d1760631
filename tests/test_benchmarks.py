"""The benchmark harness: its statistics, its turns, its checks; and that every contestant here is right."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, so that the installed quantkern is the one tested

from benchmarks import fakequant, harness, peers  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402

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
