"""benchmarks.fakequant: every contestant is right, wrong ones are found, and a whole run writes its results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, so that the installed quantkern is the one tested

from benchmarks import fakequant, harness, peers, problems  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402

CPU = torch.device("cpu")


def questions(direction: str) -> list[fakequant.Question]:
    shapes = ["tiny-16", "weight-depthwise"]
    return fakequant.questions(shapes, list(problems.OPERATIONS), ["tensor", "channel"], [direction], "float32")


@pytest.mark.parametrize("direction", fakequant.DIRECTIONS)
def test_every_contestant_agrees_with_the_reference(direction: str) -> None:
    contestants = fakequant.contestants_for(CPU, None)
    del contestants["torch.compile"]  # takes ten seconds a case; it compiles the reference itself
    checked = set()
    for question in questions(direction):
        for name, adapter in contestants.items():
            try:
                verdict = fakequant.compare(question, CPU, adapter)
            except problems.Unsupported:
                continue
            assert verdict.accepted, (question, name, verdict.text)
            if name == "quantkern":
                assert verdict.text == "equal", question
            checked.add(name)
    assert checked == set(contestants)


@pytest.mark.parametrize("question", questions("both"), ids=lambda question: "-".join(question.labels.values()))
def test_a_wrong_contestant_is_found_out(question: fakequant.Question) -> None:
    def wrong_value(p: problems.Problem) -> Callable[[], Tensor]:
        right = peers.reference_adapter(p)
        return lambda: right() * 1.05

    def wrong_gradient(p: problems.Problem) -> Callable[[], Tensor]:
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
        list(SHAPES), list(problems.OPERATIONS), ["tensor", "channel"], ["forward"], "float32"
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


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(peers, "missing", lambda: ["nni"])
    fakequant.main(["--list"])
    printed = capsys.readouterr().out
    assert "not installed, so not compared: nni" in printed
    assert all(name in printed for name in (*SHAPES, *problems.OPERATIONS, "torch.compile"))
