"""How a quantizer's report is shown: tables, colours, the page of HTML, charts, files."""

from __future__ import annotations

import copy
import io
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from reported_networks import BOTH, Net, batch, make, train
from torch import nn

from quantkern import (
    LsqQuantizer,
    NaiveQuantizer,
    QAT_Quantizer,
)
from quantkern.files import replaced


def test_plain_table() -> None:
    quantizer = make("qat")
    few = LsqQuantizer(Net(), [{**BOTH, "quant_bits": 4}])
    train(few.bound_model)
    assert "see" not in quantizer.report().plain()
    text = few.report(batch(), min_sqnr=200.0).plain()
    lines = text.splitlines()
    assert lines[0].startswith("LsqQuantizer: 6 quantized tensors in 3 layers")
    assert lines[2].split() == [
        *("layer", "tensor", "bits", "dtype", "scheme", "scale", "zero", "range", "clipped", "%", "SQNR", "dB"),
        *("gradient", "of", "scale", "see"),
    ]
    assert text.isascii() and max(map(len, lines[2:9])) <= 140
    assert lines[lines.index("Warnings") + 1].startswith("  1. conv1: the first layer")


def test_warnings_that_many_tensors_share_are_one_line() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    report = QAT_Quantizer(model, [BOTH]).report()
    assert len(report.warnings) == 12
    (line,) = report.table().notes
    assert line.startswith("0.input, 1.input, ") and "7.input and 4 more: no range seen" in line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_need_rich_and_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="rich is not installed (pip install rich)")
    report = make("lsq").report(batch())
    assert str(report) == report.plain() == repr(report)
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in str(report) and "conv1" in str(report) and "Warnings" in str(report)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert str(report) == report.plain()


def test_a_narrow_terminal_gets_fewer_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    report = make("lsq").report(batch(), min_sqnr=200.0)
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setenv("COLUMNS", "90")
    lines = str(report).splitlines()
    assert lines[0].endswith("(no room for: zero, dtype, scale, scheme)")
    assert "SQNR dB" in lines[2] and "see" in lines[2] and "zero" not in lines[2]
    assert max(map(len, lines[2 : lines.index("Warnings")])) <= 90
    monkeypatch.setenv("COLUMNS", "20")
    assert str(report).splitlines()[2].split()[:3] == ["layer", "tensor", "bits"]  # the rest cannot be left out


class Checker(HTMLParser):
    """Counts elements and fails on one that is not closed in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


def test_html_is_one_whole_page(tmp_path: Path) -> None:
    report = make("lsq").report(batch())
    report.to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = parse(text)
    assert page.count["svg"] == 12 and page.count["figure"] == 6 and page.count["table"] == 1
    assert page.count["tr"] == 7 and page.count["td"] == 6 * page.count["th"]
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.count) and "http" not in text
    assert "color-scheme: light dark" in text
    assert any("first layer" in part for part in page.text)
    notebook = parse(report._repr_html_())
    assert notebook.count["svg"] == 6 and "html" not in notebook.count


def test_html_escapes_names(tmp_path: Path) -> None:
    model = nn.Module()
    model.add_module("a<b>&", nn.Linear(2, 2))
    report = NaiveQuantizer(model).report()
    report.to_html(tmp_path / "report.html")
    assert "a<b>&.weight" in parse((tmp_path / "report.html").read_text()).text


def test_clipped_bars_have_another_colour() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    quantizer = QAT_Quantizer(model, [{**BOTH, "quant_types": ["input"]}])
    model(torch.rand(8, 4))
    inside, outside = quantizer.report(torch.rand(8, 4) / 2), quantizer.report(torch.rand(8, 4) * 4)
    assert 'fill="#d9534f"' not in inside._repr_html_() and 'fill="#d9534f"' in outside._repr_html_()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_plot(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install matplotlib)")
    path = tmp_path / f"report{suffix}"
    make("bnn" if suffix == ".svg" else "qat").report(batch()).plot(path)
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert path.read_bytes().startswith(starts[suffix]) and list(tmp_path.iterdir()) == [path]


def test_plot_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = QAT_Quantizer(Net(), [{**BOTH, "quant_types": ["input"]}])
    with pytest.raises(ValueError, match="nothing in this report was measured"):
        quantizer.report().plot(tmp_path / "report.png")
    report = make("qat").report(batch())
    with pytest.raises(ValueError, match=r"path must end in \.png, \.svg, \.pdf, got 'report\.bmp'"):
        report.plot(tmp_path / "report.bmp")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'quantkern\[report\]'"):
        report.plot(tmp_path / "report.png")
    assert list(tmp_path.iterdir()) == []


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    report = make("naive").report()
    with pytest.raises(OSError, match="cannot write path .*missing"):
        report.to_html(tmp_path / "missing" / "report.html")
    with pytest.raises(IsADirectoryError, match="is the folder"):
        report.to_html(tmp_path)
    with pytest.raises(TypeError, match="path must be a path, got 3"):
        report.to_html(3)  # type: ignore[arg-type]
    target = tmp_path / "old.html"
    target.write_text("old")
    with pytest.raises(KeyError), replaced("path", target) as file:
        file.write_text("half")
        raise KeyError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_report_outlives_its_model() -> None:
    quantizer = make("qat")
    report = quantizer.report(batch())
    text = report.plain()
    train(quantizer.bound_model, 3)
    assert report.plain() == text == copy.deepcopy(report).plain()
