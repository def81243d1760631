"""What can be said about the CUDA sources without a compiler, and the tools that look at them with one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
KERNEL_FILES = sorted(CUDA.glob("*.cu"))
DEVICE_FILES = sorted([*KERNEL_FILES, *CUDA.glob("*.cuh")])
LONGEST_KERNEL = 40


def load_check_cuda() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_cuda", ROOT / "scripts" / "check_cuda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_cuda"] = module
    spec.loader.exec_module(module)
    return module


check_cuda = load_check_cuda()


def header_comment(path: Path) -> str:
    lines = path.read_text().splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("//"))
    return "\n".join(lines[:count])


def kernels(text: str) -> dict[str, int]:
    """Name -> lines from ``__global__`` to the closing brace in the first column."""
    found = {}
    for match in re.finditer(r"^__global__.*?^}", text, re.MULTILINE | re.DOTALL):
        name = re.search(r"(\w+_kernel)\(", match.group())
        assert name is not None, f"a kernel's name ends in _kernel: {match.group()[:80]}"
        found[name.group(1)] = match.group().count("\n") + 1
    return found


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_header_says_what_a_reader_needs(path: Path) -> None:
    comment = header_comment(path)
    for word in ("Layout", "Grid", "Bytes an element", "Numerics"):
        assert re.search(rf"^// {word}\b", comment, re.MULTILINE), f"{path.name}: no line about {word!r} at the top"


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_kernels_are_short(path: Path) -> None:
    found = kernels(path.read_text())
    assert found, f"{path.name} has no kernel"
    assert {name: lines for name, lines in found.items() if lines > LONGEST_KERNEL} == {}


@pytest.mark.parametrize("path", DEVICE_FILES, ids=lambda path: path.name)
def test_no_torch_below_the_launchers(path: Path) -> None:
    assert not re.search(r"ATen|torch/|c10", path.read_text())


def test_no_kernel_is_launched_unchecked() -> None:
    """launch() returns the error of every launch; <<<>>> would return none."""
    assert [path.name for path in DEVICE_FILES if "<<<" in path.read_text()] == []


def test_flags_are_those_of_the_build() -> None:
    setup = (ROOT / "setup.py").read_text()
    assert [flag for flag in check_cuda.FLAGS if f'"{flag}"' not in setup] == []


SAMPLE = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 0 barriers
ptxas info    : Compile time = 54.444 ms
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90a'
ptxas info    : Function properties for _Z1bPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 256 bytes smem
"""


def test_report_is_read() -> None:
    first, second = check_cuda.parse_report(SAMPLE)
    assert (first.kernel, first.arch, first.registers, first.uses_local_memory) == ("_Z1aPf", "sm_80", 31, False)
    assert (second.kernel, second.arch, second.registers) == ("_Z1bPf", "sm_90a", 255)
    assert (second.stack, second.spill_stores, second.spill_loads) == (16, 8, 12)
    assert second.uses_local_memory


@pytest.mark.parametrize(
    ("long", "short"),
    [
        ("void quantkern::cuda::(anonymous namespace)::k_kernel<float, (quantkern::cuda::(anonymous namespace)::G)1>"
         "(float const*, long)", "k_kernel<float, 1>"),
        ("quantkern::cuda::(anonymous namespace)::plain_kernel(quantkern::cuda::RangePlan, int*)", "plain_kernel"),
    ],
)  # fmt: skip
def test_names_are_readable(long: str, short: str) -> None:
    assert check_cuda.shorten(long) == short


def test_missing_compiler_is_said(tmp_path: Path) -> None:
    script = str(ROOT / "scripts" / "check_cuda.py")
    outcomes = [
        subprocess.run(
            [sys.executable, script, *options], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
        )
        for options in ([], ["--allow-missing"])
    ]
    assert [outcome.returncode for outcome in outcomes] == [1, 0]
    assert "no nvcc in PATH" in outcomes[0].stdout
    assert outcomes[1].stdout == "skipped: no nvcc\n"


GPU_CHECK = ROOT / "scripts" / "gpu_check.sh"


@pytest.mark.parametrize("arguments", [[], ["out", "test"], ["out", "bench", "more"]], ids=str)
def test_gpu_check_wants_a_folder_and_a_stage(arguments: list[str], tmp_path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(GPU_CHECK)], check=False).returncode == 0
    run = subprocess.run(["bash", GPU_CHECK, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 2 and not [*tmp_path.iterdir()]
    assert "usage:" in run.stderr and "[build] [tests] [sanitize] [bench]" in run.stderr


STAGES = {
    "build tests": ["build", "device", "operations", "suite"],
    "sanitize": ["build", "memcheck", "racecheck"],
    "bench": ["build", "train_step", "bnn", "lsq", "fakequant"],
}


def run_gpu_check(tmp_path: Path, stages: str, fails: str) -> list[tuple[str, str]]:
    """What the summary says of every part, with commands that only say how they were called; one of them fails."""
    folder, out = tmp_path / "bin", tmp_path / "out"
    folder.mkdir()
    for name in ("python3", "nvcc", "nvidia-smi", "compute-sanitizer"):
        (folder / name).write_text(f'#!/bin/sh\necho "$0 $*"\ncase "$*" in *--ignore*) ;; *{fails}*) exit 7 ;; esac\n')
        (folder / name).chmod(0o755)
    path = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", GPU_CHECK, out, *stages.split()]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=path)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "setup.py build_py build_ext --inplace" in (out / "build.log").read_text()
    summary = out / f"summary-{stages.replace(' ', '-') or 'build-tests-sanitize-bench'}.txt"
    parts = {part for own in STAGES.values() for part in own}
    lines = [line.split(maxsplit=3) for line in summary.read_text().splitlines()]
    return [(line[0], line[3]) for line in lines if line[0] in parts]


@pytest.mark.parametrize("stages", STAGES)
def test_gpu_check_goes_on_after_a_part_that_failed(stages: str, tmp_path: Path) -> None:
    """The second part of the stage fails."""
    parts = STAGES[stages]
    fails = {"device": "test_triton", "train_step": "train_step", "memcheck": "memcheck"}[parts[1]]
    verdicts = ["ok", "FAILED: exit status 7", *["ok"] * (len(parts) - 2)]
    assert run_gpu_check(tmp_path, stages, fails) == [*zip(parts, verdicts, strict=True)]
    files = len([*(tmp_path / "out").iterdir()])
    assert files + (4 if stages == "bench" else 0) <= 8  # the benchmarks write four files of their own


def test_gpu_check_runs_all_stages_after_one_build(tmp_path: Path) -> None:
    assert [name for name, _ in run_gpu_check(tmp_path, "", "train_step")] == [
        *STAGES["build tests"], *STAGES["sanitize"][1:], *STAGES["bench"][1:],
    ]  # fmt: skip
