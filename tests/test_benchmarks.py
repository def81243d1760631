"""The benchmark harness: its statistics, its turns, its checks, what it writes and draws."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, so that the installed quantkern is the one tested

from benchmarks import allocations, environment, harness, tables  # noqa: E402

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
    assert [tables.ratio(one) for one in results[1:]] == ["1.00x", "1.00x*"]
    assert tables.notes(results + results) == ["* peer: rounds down"]
    tables.print_summary("title", results)
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
    peak, kept = allocations.allocated(run_and_drop, CPU)
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
    where = environment.environment(CPU, ["numpy", "no-such-distribution"])
    harness.write_json(path, "test", where, {"seconds": 1}, [result], [excluded])
    document, results, exclusions = harness.read_json(path)
    assert (results, exclusions) == ([result], [excluded])
    assert document["versions"]["torch"] == torch.__version__
    assert document["versions"]["no-such-distribution"] is None
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert set(document["commit"]) == {"hash", "dirty"}


def test_plot_draws_a_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install matplotlib)")
    results = [
        harness.Result({"op": "a"}, name, 7, 1, ms * 0.9, ms, ms * 1.2, 1.0, 1.0, None, None, "", {})
        for name, ms in (("copy", 0.1), ("quantkern", 0.2))
    ]
    tables.plot(tmp_path / "chart.png", "title", results)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
