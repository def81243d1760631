"""Compiles every CUDA kernel for every architecture and reads the compiler's resource report; needs no GPU.

Fails when a kernel does not compile, warns, spills registers or needs a stack frame (local memory, slow). Where torch
is installed the torch-aware entries are checked for syntax as well, also against a torch without CUDA.

    python scripts/check_cuda.py [--allow-missing]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
ARCHS = ("80", "90a", "100")
FLAGS = ["-O3", "-std=c++17", "--fmad=false", "-lineinfo"]
"""As in setup.py."""
TORCH_DEFINES = [
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
]
"""What torch's extension builder adds."""


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one architecture; stack and spills in bytes a thread."""

    kernel: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def uses_local_memory(self) -> bool:
        """Whether the kernel reads or writes thread-local memory."""
        return self.stack + self.spill_stores + self.spill_loads > 0


REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>[^']+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def parse_report(text: str) -> list[Resources]:
    """The kernels in the output of ``nvcc -Xptxas -v``."""
    return [
        Resources(
            kernel=found["kernel"],
            arch=found["arch"],
            registers=int(found["registers"]),
            stack=int(found["stack"]),
            spill_stores=int(found["stores"]),
            spill_loads=int(found["loads"]),
        )
        for found in REPORT.finditer(text)
    ]


def readable_names(kernels: list[str]) -> dict[str, str]:
    """Mangled names as ``kernel<types>``, where c++filt is installed."""
    tool = shutil.which("c++filt")
    if tool is None or not kernels:
        return {name: name for name in kernels}
    text = subprocess.run([tool, *kernels], capture_output=True, text=True, check=True).stdout
    return {name: shorten(long) for name, long in zip(kernels, text.splitlines(), strict=True)}


def shorten(name: str) -> str:
    """``void space::kernel<T, (space::Enum)1>(...)`` as ``kernel<T, 1>``."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ").replace("quantkern::cuda::", "")
    return re.sub(r"\(\w+\)(\d)", r"\1", name[: name.find("(", name.rfind(">") if ">" in name else 0)])


def run(command: list[str]) -> tuple[int, str]:
    """Exit status and everything the command printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def compile_kernels(nvcc: str, source: Path, folder: Path) -> tuple[int, str]:
    """One .cu file for every architecture."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    checks = ["-Xptxas", "-v", "-Werror", "all-warnings"]
    output = str(folder / f"{source.stem}.o")
    return run([nvcc, *FLAGS, *TORCH_DEFINES, *targets, *checks, "-c", str(source), "-o", output])


def toolkit_includes(nvcc: str, folder: Path) -> list[str]:
    """The include options nvcc gives to the host compiler."""
    probe = folder / "probe.cu"
    probe.write_text("\n")
    _, text = run([nvcc, "--dryrun", "-c", str(probe)])
    found = re.search(r'INCLUDES="?(.*?)"?\s*$', text, re.MULTILINE)
    return found.group(1).split() if found else []


def check_entry(source: Path, includes: list[str]) -> tuple[int, str]:
    """Syntax of a torch-aware .cpp file."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return 1, "no C++ compiler was found; install g++"
    return run([compiler, "-fsyntax-only", "-std=c++20", "-Wall", *includes, str(source)])


def torch_includes(folder: Path) -> list[str]:
    """torch's headers, with the file that a torch without CUDA leaves out; empty without torch."""
    try:
        from torch.utils.cpp_extension import include_paths
    except ImportError:
        return []
    stub = folder / "stub" / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    stub.parent.mkdir(parents=True)
    stub.write_text("#pragma once\n")
    return [*(f"-isystem{path}" for path in include_paths()), f"-I{folder / 'stub'}"]


def print_table(rows: list[Resources]) -> None:
    """One line a kernel, one column an architecture: registers, and local memory where there is any."""
    names = readable_names(sorted({row.kernel for row in rows}))
    cells = {(row.kernel, row.arch): row for row in rows}
    width = max(map(len, names.values()), default=6)
    print(f"{'kernel (registers a thread)':<{width}}", *(f"{'sm_' + arch:>8}" for arch in ARCHS))
    for kernel, name in sorted(names.items(), key=lambda item: item[1]):
        texts = []
        for arch in ARCHS:
            row = cells.get((kernel, f"sm_{arch}"))
            texts.append("-" if row is None else f"{row.registers}{'!' if row.uses_local_memory else ''}")
        print(f"{name:<{width}}", *(f"{text:>8}" for text in texts))


def check(nvcc: str) -> int:
    """Compile, report, and return the exit status."""
    failures = []
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as pool:
        folder = Path(temporary)
        kernels, entries = sorted(SOURCES.glob("*.cu")), sorted(SOURCES.glob("*.cpp"))
        headers = torch_includes(folder)
        includes = [*headers, *toolkit_includes(nvcc, folder)]
        compiled = [pool.submit(compile_kernels, nvcc, source, folder) for source in kernels]
        parsed = [pool.submit(check_entry, source, includes) for source in entries] if headers else []
        rows: list[Resources] = []
        for source, job in zip(kernels + entries, compiled + parsed, strict=False):
            status, text = job.result()
            rows += parse_report(text)
            if status:
                failures.append(f"{source.relative_to(ROOT)} does not compile:\n{text.strip()}")
    print_table(rows)
    names = readable_names([row.kernel for row in rows])
    failures += [
        f"{names[row.kernel]} on {row.arch}: {row.stack} bytes of stack, {row.spill_stores} of spill stores, "
        f"{row.spill_loads} of spill loads; it must use registers alone"
        for row in rows
        if row.uses_local_memory
    ]
    if len(rows) % len(ARCHS) or not rows:
        failures.append(f"the report names {len(rows)} kernels, not the same ones for all {len(ARCHS)} architectures")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    outcome = f"{len(entries)} checked for syntax" if headers else "skipped: torch is not installed"
    print(f"torch-aware entries: {outcome}")
    print("failed" if failures else f"{len(rows)} kernels, no spills, no stack frames")
    return 1 if failures else 0


def main() -> int:
    """Find nvcc and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allow-missing", action="store_true", help="succeed where nvcc is not installed")
    options = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        if options.allow_missing:
            print("skipped: no nvcc")
            return 0
        print("error: no nvcc in PATH; install the CUDA toolkit, or pass --allow-missing to do without this check")
        return 1
    return check(nvcc)


if __name__ == "__main__":
    sys.exit(main())
