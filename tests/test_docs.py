"""docs/: every Python example runs and prints what the page says, every link and every file named exists."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkern
from quantkern import reset_quant_scheme_dtype
from quantkern.config import SELECTING_KEYS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.M | re.S)
FOLDERS = ("csrc", "quantkern", "tests", "benchmarks", "examples", "scripts", "docs")

sys.path.append(str(ROOT / "scripts"))

from mkdocs_hooks import MARKER, as_markdown, with_tables  # noqa: E402


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """(language, text, line) of every fenced block."""
    text = page.read_text()
    return [(m.group(2), m.group(3), text.count("\n", 0, m.start(3))) for m in FENCE.finditer(text)]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


WITH_EXAMPLES = [page for page in PAGES if any(language == "python" for language, _, _ in blocks(page))]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name_of)
def test_examples_run_and_print_what_the_page_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page share one namespace; a block ``output`` is what the block before it prints."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    try:
        for language, text, line in blocks(page):
            if language == "python":
                code = "\n" * line + text  # errors then name the line of the page
                out = io.StringIO()
                with contextlib.redirect_stdout(out), warnings.catch_warnings():
                    warnings.filterwarnings("error", category=UserWarning, module="__main__")
                    exec(compile(code, str(page), "exec"), scope)
                printed = out.getvalue()
            elif language == "output":
                assert printed.splitlines() == text.splitlines(), f"{page}:{line}"
    finally:
        reset_quant_scheme_dtype()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_pages_of_quantizers_have_examples() -> None:
    pages = {page.stem for page in WITH_EXAMPLES if page.parent.name == "quantizers"}
    assert pages == {"naive", "qat", "lsq", "dorefa", "bnn", "observer"}


def test_every_block_has_a_language() -> None:
    known = {"python", "output", "text", "bash", "console", "yaml"}
    found = {(name_of(page), language) for page in PAGES for language, _, _ in blocks(page) if language not in known}
    assert not found


def anchor(heading: str) -> str:
    """The anchor that mkdocs makes of a heading."""
    plain = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"(?<!\!)\[[^]]*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, fragment = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.is_file() and other.is_relative_to(DOCS), f"{name_of(page)}: {target}"
        if fragment and other.parent.name != "api":  # there mkdocstrings makes them, and mkdocs --strict checks them
            headings = re.findall(r"^#+ (.*)$", prose(other), re.M)
            assert fragment in map(anchor, headings), f"{name_of(page)}: {target}"
    for picture in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", prose(page)):
        assert (ROOT / "benchmarks" / picture).is_file(), f"{name_of(page)}: {picture}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    """In the prose and in commands: paths from the root, tests by file and name, modules that ``python -m`` runs."""
    text = page.read_text()
    for path, test in re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./*-]*\w)(?:::(\w+))?", text):
        assert any(ROOT.glob(path)), f"{name_of(page)}: {path}"
        if test:
            assert f"def {test}(" in (ROOT / path).read_text(), f"{name_of(page)}: {path}::{test}"
    for module in re.findall(r"python -m ((?:benchmarks|tests|quantkern)[\w.]*)", text):
        stem = ROOT.joinpath(*module.split("."))
        assert stem.with_suffix(".py").is_file() or (stem / "__main__.py").is_file(), f"{name_of(page)}: {module}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_come_from_readme(page: Path) -> None:
    text = page.read_text()
    filled = with_tables(text, (ROOT / "README.md").read_text())
    assert not MARKER.search(filled)
    tables = [name for name in MARKER.findall(text) if not name.startswith("command")]
    assert filled.count("\n|---") >= len(tables)


def test_a_table_that_readme_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="README.md has no table 'table: no-such'; it has table: here"):
        with_tables("<!-- table: no-such -->\n", "<!-- table: here -->\n| x |\n<!-- end -->\n")


def test_the_navigation_has_every_page() -> None:
    listed = re.findall(r"- (?:\w+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == [name_of(page) for page in PAGES]


@pytest.mark.parametrize("module", ["functional", "nn", "export", "report"])
def test_the_reference_has_every_public_name(module: str) -> None:
    text = (DOCS / "api" / f"{module}.md").read_text()
    for name in importlib.import_module(f"quantkern.{module}").__all__:
        assert f"::: quantkern.{module}.{name}\n" in text, name


def test_the_reference_has_the_names_of_the_package() -> None:
    listed = set(re.findall(r"^::: quantkern\.([\w.]+)$", "\n".join(p.read_text() for p in PAGES), re.M))
    modules = {"functional", "nn", "reference"}
    assert {name for name in quantkern.__all__ if name not in modules} - {one.split(".")[-1] for one in listed} == set()


def test_every_docstring_of_the_reference_becomes_markdown() -> None:
    """No doctest is left outside of a fence, where Markdown takes ``>>>`` for quotations."""
    for path in (ROOT / "quantkern").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                outside = re.sub(r"```(?:pycon|text)\n.*?\n```", "", as_markdown(text), flags=re.S)
                assert ">>>" not in outside and "::\n" not in outside, f"{path}: {node}"


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first is not None and first.group(1) == quantkern.__version__


QUANTIZERS = {
    "Naive": quantkern.NaiveQuantizer,
    "QAT": quantkern.QAT_Quantizer,
    "LSQ": quantkern.LsqQuantizer,
    "DoReFa": quantkern.DoReFaQuantizer,
    "BNN": quantkern.BNNQuantizer,
    "Observer": quantkern.ObserverQuantizer,
}


def marked(heading: str) -> dict[str, set[str]]:
    """By quantizer, what a table of docs/migrating.md says that it has."""
    section = (DOCS / "migrating.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    return {
        name: {row[0].strip("`") for row in rows[2:] if row[1 + place] == "yes"}
        for place, name in enumerate(rows[0][1 : 1 + len(QUANTIZERS)])
    }


def test_the_table_of_keys_is_what_the_quantizers_take() -> None:
    forms = {name: kind.form(object.__new__(kind)) for name, kind in QUANTIZERS.items()}
    assert marked("Keys of a rule") == {
        name: {*SELECTING_KEYS, *form.keys, *form.extras} for name, form in forms.items()
    }


def test_the_table_of_arguments_is_what_the_constructors_take() -> None:
    signatures = {name: inspect.signature(kind).parameters for name, kind in QUANTIZERS.items()}
    assert marked("Arguments of the constructors") == {name: set(found) for name, found in signatures.items()}
