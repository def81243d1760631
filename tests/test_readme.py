"""README's example runs, and its table says what the result file says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"## Example\n```python\n(.*?)```", README.read_text(), re.S)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(code.group(1), "README.md", "exec"), {})
    scale, largest = (float(word) for word in capsys.readouterr().out.split())
    assert scale > 0 and largest > 0
    assert (tmp_path / "model.pth").exists() and (tmp_path / "calibration.pth").exists()


def test_the_tables_are_what_was_measured() -> None:
    from benchmarks import report

    for page in report.PAGES:
        text = page.read_text()
        assert report.update(text) == text, "run python -m benchmarks.report"


def test_the_commands_are_marked() -> None:
    assert re.findall(r"<!-- command: (\w+) -->", README.read_text()) == ["quickstart", "tests"]
