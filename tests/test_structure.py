"""The house rules that a machine can check: who imports whom, file names, what an unusable build says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import quantkern

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "quantkern"

LEVELS = [
    {"settings", "config", "reference", "ops", "progress", "files", "outside_graphs", "exporting", "_C", "_built_for"},
    {"clip_range", "watching", "layer_plans"},
    {"triton"},
    {"backend"},
    {"triton_autograd", "arguments"},
    {"binary", "clipping"},
    {"affine", "learned_step", "dorefa"},
    {"weight_lists"},
    {"functional"},
    {"ahead"},
    {"fake_quant", "current_range", "running_range", "learned", "binarized", "observers", "observed"},
    {"layer_quantizers"},
    {"lean_backward"},
    {"all_weights", "attach", "bn_fold", "ranks"},
    {"nn"},
    {"export", "report"},
    {"quantizers"},
    {"layer_sensitivity", "health"},
]
"""A module may import from its own level and those above it in this list, never from one further down."""

FORBIDDEN = {"utils", "helpers", "misc", "common", "python", "modules", "v2"}


def level_of(name: str) -> int:
    for level, names in enumerate(LEVELS):
        if name in names:
            return level
    raise AssertionError(f"quantkern.{name} has no place in LEVELS: decide who may import it")


def imported_by(path: Path) -> set[str]:
    """The parts of quantkern that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("quantkern.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "quantkern":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("quantkern."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    for name in imported_by(path):
        assert level_of(name) <= level_of(own), f"{own} must not import {name}"


INCLUDES = {
    "numerics": {"numerics"},
    "common": {"numerics", "common"},
    "cpu": {"numerics", "common", "cpu"},
    "cuda": {"numerics", "common", "cuda"},
    "autograd": {"numerics", "common", "autograd"},
}


@pytest.mark.parametrize("folder", INCLUDES)
def test_includes_go_one_way(folder: str) -> None:
    for path in (ROOT / "csrc" / folder).iterdir():
        text = path.read_text()
        for other in re.findall(r'#include "\.\./(\w+)/', text):
            assert other in INCLUDES[folder], f"{path.name} includes {other}"
        torch_free = folder == "numerics" or path.suffix in (".cu", ".cuh") or "_loops" in path.name
        if torch_free:
            assert not re.search(r"#include <(ATen|c10|torch)/", text), f"{path.name} sees torch"


def test_no_file_has_a_name_that_says_nothing() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        assert Path(name).stem not in FORBIDDEN, name


LONGEST = 400


def lines_of_sources() -> dict[str, int]:
    """Every source file that git knows or would take, and how many lines it has."""
    folders = ("quantkern", "csrc", "tests", "benchmarks", "scripts", "examples")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    sources = {name for name in listed.stdout.splitlines() if re.search(r"\.(py|cpp|h|cu|cuh|sh)$", name)}
    return {name: len((ROOT / name).read_text().splitlines()) for name in sources if (ROOT / name).exists()}


def test_no_file_is_too_long() -> None:
    found = {name: lines for name, lines in lines_of_sources().items() if lines > LONGEST}
    assert not found, f"split them, the limit is {LONGEST} lines: {found}"


def test_an_extension_for_another_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkern import _built_for, ops

    monkeypatch.setattr(_built_for, "TORCH_VERSION", "1.2.3")
    with pytest.raises(ImportError, match=r"built for torch 1\.2\.3, but torch .* pip install --force-reinstall"):
        ops.load()


def test_a_missing_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkern import ops

    monkeypatch.setitem(sys.modules, "quantkern._built_for", None)
    monkeypatch.delattr(quantkern, "_built_for")
    with pytest.raises(ImportError, match="compiled kernels are missing from .* pip install"):
        ops.load()


def test_the_version_stands_in_one_place() -> None:
    """In quantkern/__init__.py; the build reads it there (tests/test_docs.py compares the changelog)."""
    text = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "quantkern.__version__" }' in text
    assert not re.search(r'^version = "', text, re.M)
    found = subprocess.run(
        ["git", "grep", "-lF", f'"{quantkern.__version__}"', "--", "*.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout.split() in ([], ["quantkern/__init__.py"])
