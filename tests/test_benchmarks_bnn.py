"""benchmarks.bnn: every contestant is right, wrong ones are found, and the tables say what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, so that the installed quantkern is the one tested

from benchmarks import binary_contestants, binary_networks, binary_peers, bnn, harness, problems, report  # noqa: E402
from benchmarks.shapes import CONVOLUTIONS, Convolution, Product, Shape  # noqa: E402

CPU = torch.device("cpu")
SMALL = Product("small", 5, 70, 100, "a test")
STRIDED = Convolution("strided", 2, 40, 9, 33, 3, 2, 1, "a test")
POINT = Convolution("point", 1, 32, 5, 8, 1, 1, 0, "a test")
TRAINED = Convolution("trained", 2, 64, 12, 16, 3, 1, 1, "a test")


def small_cases() -> Iterator[harness.Case]:
    """Every kind of case in small."""
    yield bnn.product("matmul", SMALL, CPU)
    yield bnn.product("linear", SMALL, CPU)
    yield bnn.convolution(STRIDED, CPU)
    yield bnn.convolution(POINT, CPU)
    yield bnn.packing(Shape("rows", (6, 64), "activation", 1, "a test"), CPU)
    yield bnn.packing(Shape("nhwc", (2, 32, 5, 6), "activation", 1, "a test", channels_last=True), CPU)
    yield bnn.training(TRAINED, CPU)
    yield binary_networks.vgg("batch-1", 0.125, CPU)


def test_every_contestant_is_right_and_ours_are_equal_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> object:
        raise problems.Unsupported("is not asked")

    monkeypatch.setattr(binary_peers, "larq_conv2d", absent)  # its conversion takes ten seconds a case
    expected = {
        "matmul": {"quantkern", "quantkern packed", "quantkern not arranged", "float x@w.T", "float w@x.T"},
        "linear": {"quantkern", "quantkern packed", "quantkern sign"},
        "conv2d": {"quantkern", "quantkern channels_last", "quantkern packed", "quantkern sign", "float"},
        "pack_signs": {"floor", "copy", "quantkern", "numpy.packbits"},
        "training": {"quantkern", "float simulation", "float layer"},
        "vgg": {"quantkern", "quantkern channels_last", "float", "float channels_last", "simulation"},
    }
    seen = set()
    for case in small_cases():
        operation = case.labels["operation"]
        seen.add(operation)
        names = {one.name for one in case.contestants}
        assert case.floor in names and case.ours in names
        assert expected[operation] <= names, (case.name, case.unavailable)
        for one in case.contestants:
            one.run()
            if one.check is None:
                assert one.name == "copy"
                continue
            verdict = one.check()
            assert verdict.accepted, (case.name, one.name, verdict.text)
            if one.name.startswith("quantkern"):
                assert verdict.text.startswith("equal"), (case.name, one.name)
    assert seen == set(bnn.OPERATIONS)


def test_differences_are_found() -> None:
    right = torch.tensor([[3.0, -1.0], [1.0, 5.0]])
    assert binary_contestants.difference(right.to(torch.int32), right).accepted
    wrong = binary_contestants.difference(right + torch.tensor([[0.0, 0.0], [0.0, 2.0]]), right)
    assert not wrong.accepted and "0.25 of all differ" in wrong.text
    assert not binary_contestants.difference(right[:1], right).accepted
    assert not binary_contestants.difference(torch.full_like(right, torch.nan), right).accepted
    assert not binary_contestants.rounded(right + 2, right).accepted
    assert binary_contestants.rounded(right + 1e-4, right).text == "equal when rounded"
    assert binary_contestants.rounded(right, right).text == "equal"


@pytest.mark.parametrize("axis", [0, 1])
def test_wrong_signs_are_found(axis: int) -> None:
    sums = torch.tensor([[3.0, -1.0, 2.0], [1.0, 5.0, 0.0], [-4.0, 1.0, 2.0]])
    at, flipped = torch.tensor([1, 1, 1], dtype=torch.int32), torch.tensor([False, True, False])
    rows = sums if axis == 1 else sums.t()
    bits = (rows >= 1) != flipped
    packed = binary_contestants.packed_signs(torch.where(bits, 1.0, -1.0))
    check = binary_contestants.check_signs(lambda: sums, at, flipped, axis)
    assert check(packed).accepted
    assert not check(packed ^ 1).accepted


def test_what_is_kept_for_the_backward_is_counted() -> None:
    case = bnn.training(TRAINED, CPU)
    figures = {one.name: one.check().figures for one in case.contestants if one.check and one.name != "floor"}
    elements = 2 * 64 * 12 * 12
    weights = 16 * 64 * 9
    assert figures["float layer"]["saved_bytes"] == 8 * elements
    assert figures["float simulation"]["saved_bytes"] == 8 * elements + 4 * weights
    assert figures["quantkern"]["saved_bytes"] == 2 * elements // 8 + weights // 8
    assert figures["quantkern"]["saved_bytes"] <= figures["float layer"]["saved_bytes"] / 16


def test_shared_memory_and_parameters_are_not_counted_twice() -> None:
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)

    def forward() -> Tensor:
        y = torch.sin(x)  # keeps x
        return (y * y) @ weight  # keeps y once, and the product

    assert bnn.saved_bytes(forward, (weight,)) == 3 * x.nbytes


@pytest.mark.parametrize("shape", [STRIDED, POINT, *CONVOLUTIONS.values()], ids=lambda shape: shape.name)
def test_sizes_of_convolutions(shape: Convolution) -> None:
    x = torch.empty(shape.batch, shape.channels, shape.size, shape.size, device="meta")
    weight = torch.empty(shape.outputs, shape.channels, shape.kernel, shape.kernel, device="meta")
    y = torch.nn.functional.conv2d(x, weight, None, shape.stride, shape.padding)
    assert tuple(y.shape) == (shape.batch, shape.outputs, shape.out_size, shape.out_size)
    assert shape.macs == y.numel() * weight[0].numel()


def test_a_peer_that_fails_is_reported_and_ours_is_not_excused() -> None:
    def fails() -> binary_contestants.Step:
        raise RuntimeError("no kernel\nand more")

    def refuses() -> binary_contestants.Step:
        raise problems.Unsupported("is not installed")

    entries = binary_contestants.Entries()
    entries.add("int8", fails)
    entries.add("larq", refuses)
    assert entries.unavailable == {"int8": "RuntimeError: no kernel", "larq": "is not installed"}
    assert not entries.contestants
    with pytest.raises(RuntimeError, match="no kernel"):
        entries.add("quantkern", fails)


def test_bitorch_engine_gets_its_own_order_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(x: Tensor, packed: Tensor, m: int, n: int, k: int, _: bool) -> Tensor:
        words = packed.view(k // 32, 1, n) >> torch.arange(32).view(1, 32, 1)
        weight = (2.0 * (words & 1) - 1).reshape(k, n)
        return binary_contestants.signs(x) @ weight

    extension = ModuleType("binary_linear_cpp")
    extension.forward = linear  # type: ignore[attr-defined]
    for name in ("bitorch_engine", "bitorch_engine.extensions"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "bitorch_engine.extensions.binary_linear_cpp", extension)
    x, weight = torch.randn(3, 96), torch.randn(64, 96)
    expected = binary_contestants.signs(x) @ binary_contestants.signs(weight).t()
    assert torch.equal(binary_peers.bitorch_linear(x, weight)(), expected)
    with pytest.raises(problems.Unsupported, match="multiples of 32"):
        binary_peers.bitorch_linear(x[:, :40], weight[:, :40])


def test_absent_peers_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(1, 32, 4, 4), torch.randn(8, 32, 3, 3)
    for name in ("binary_linear_cpp", "binary_conv_cpp"):
        monkeypatch.setitem(sys.modules, f"bitorch_engine.extensions.{name}", None)
    monkeypatch.setattr(binary_peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(problems.Unsupported, match="setup.py develop"):
        binary_peers.bitorch_conv2d(x, weight, 1, 1)
    with pytest.raises(problems.Unsupported, match="pip install"):
        binary_peers.larq_conv2d(x, weight, 1, 1, 1)


def result(operation: str, contestant: str, ms: float, **more: object) -> harness.Result:
    """A result of that many milliseconds, ours taking 2."""
    values: dict[str, object] = {
        "labels": {"operation": operation, "shape": "s", "size": "1"}, "contestant": contestant, "samples": 7,
        "repeats": 1, "p20_ms": ms, "p50_ms": ms, "p80_ms": ms, "ns_per_element": 1.0, "gb_per_s": 1.0,
        "to_floor": None, "to_ours": ms / 2, "check": "equal", "figures": {},
    }  # fmt: skip
    return harness.Result(**{**values, **more})  # type: ignore[arg-type]


RESULTS = [
    result("conv2d", "quantkern", 2.0),
    result("conv2d", "quantkern packed", 1.0),
    result("conv2d", "float", 40.0),
    result("conv2d", "float channels_last", 30.0),
    result("conv2d", "larq", 60.0),
    result("conv2d", "bitorch-engine", 200.0, other_work=binary_peers.PADS_WITH_MINUS_ONE),
    result("pack_signs", "floor", 1.0),
    result("pack_signs", "copy", 3.0, to_floor=3.0),
    result("pack_signs", "quantkern", 2.0, to_floor=2.0),
    result("vgg", "quantkern", 2.0, figures={"megabytes": 2.0}),
    result("vgg", "float", 10.0, figures={"megabytes": 50.0}),
    result("training", "quantkern", 2.0, figures={"saved_bytes": 1e6}),
    result("training", "float layer", 3.0, figures={"saved_bytes": 16e6}),
]


def test_speedups_are_over_the_fastest_float() -> None:
    columns, rows = report.speedups(RESULTS)
    table = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    assert list(table) == ["conv2d", "vgg", "training"]
    assert table["conv2d"] == {
        "operation": "conv2d",
        "shape": "s",
        "fastest float": "float channels_last",
        "ours, packed inputs": "30.0x",
        "ours, packing included": "15.0x",
        "ours, packed signs out": "",
        "bitorch-engine": "100x*",
        "larq": "30.0x",
    }
    assert table["vgg"]["ours, packing included"] == "5.00x"


def test_the_other_figures() -> None:
    _, rows = report.packed_figures(RESULTS)
    assert [row[1:] for row in rows] == [
        ["", "copying 3.00x", "2.00x"],
        ["2.00", "50.0", "25.0x"],
        ["1.00", "16.0", "16.0x"],
    ]
    assert "s" in rows[0][0] and "state_dict" in rows[1][0] and "kept for the backward" in rows[2][0]


def test_whole_run_writes_its_results_and_the_readme_s_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bnn, "PRODUCTS", {"512": SMALL})
    monkeypatch.setattr(bnn, "PACKINGS", {"rows-8192": Shape("rows-8192", (16, 64), "activation", 1, "a test")})
    path = tmp_path / "bnn-here.json"
    threads = torch.get_num_threads()
    options = "--ops matmul,pack_signs,vgg --shapes 512,rows-8192,batch-1 --width 0.125 --seconds 0 --threads 1"
    try:
        bnn.main([*options.split(), "--json", str(path)])
    finally:
        torch.set_num_threads(threads)
    document, results, excluded = harness.read_json(path)
    assert document["benchmark"] == "bnn" and document["arguments"]["width"] == 0.125
    assert "bitorch-engine" in document["versions"]
    assert not [one for one in excluded if one.contestant.startswith(("quantkern", "float"))]
    (ours,) = [one for one in results if one.labels["operation"] == "matmul" and one.contestant == "quantkern"]
    assert ours.figures["macs"] == 5 * 70 * 100
    assert ours.to_floor is not None
    assert ours.floor_bytes_per_element * 5 * 70 == pytest.approx(4 * (5 + 70) * 4 + 4 * 5 * 70)
    printed = capsys.readouterr().out
    assert "how many times as fast as the fastest float contestant" in printed and "x floor" in printed
    assert "time of pack_signs over reading rows-8192" in printed
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    text = report.update("before\n<!-- table: bnn-here -->\nold\n<!-- end -->\nafter\n")
    assert "old" not in text and text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[:3]] == ["operation", "matmul", "vgg"]
    assert len({line.count("|") for line in lines[:3]}) == 1
    assert json.loads(path.read_text())["machine"]["quantkern"] in text


def test_every_shape_belongs_to_an_operation() -> None:
    assert len(set(bnn.SHAPES)) == len(bnn.SHAPES)
    assert set(bnn.TRAINED) <= set(CONVOLUTIONS)
    assert not list(bnn.cases(["matmul", "vgg"], ["conv-256x28"], CPU))


@pytest.mark.parametrize(("arguments", "message"), [(["--ops", "matmull"], "matmull"), (["--shapes", "1023"], "1023")])
def test_unknown_choices_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bnn.main(arguments)
    assert message in capsys.readouterr().err
