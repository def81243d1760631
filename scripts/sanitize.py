"""Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests of operations.

The build is one of its own, in build/sanitize; the source tree's extension is left alone. Floating-point conversions
are checked too. Exit status 1 when a sanitizer reports something or a test fails.

    python scripts/sanitize.py [PYTEST ARGUMENTS]      the selection below, or what pytest is told to run instead
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "sanitize"
CHECKS = "address,undefined"
TRACES = {b"__asan_report_load": "AddressSanitizer", b"__ubsan_handle": "UndefinedBehaviorSanitizer"}
"""What an extension with these checks calls."""

SELECTION = [
    [
        "tests/test_ops.py",
        "-k",
        "results_and_gradients or any_strides or channels_last or empty or bad_input",
    ],
    ["tests/test_binary_ops.py"],
    ["tests/test_threads.py", "-k", "matmul or conv2d or number or rows or affine or without_a_twin"],
    ["tests/test_observers.py", "-k", "the_loops or the_search"],
    ["tests/test_lean_backward.py", "-k", "codes"],
    ["tests/test_learned.py"],
]
"""Every operation on every instruction set that the processor has. Compilers and Triton are left out: they run code of
theirs."""

MISTAKES = {
    "heap-buffer-overflow": "int* p = new int[4]; const int x = p[n]; delete[] p; return x;",
    "shift exponent 40": "return 1 << 10 * n;",
}
"""What a sanitizer says about the body of a function that is wrong when n is 4."""

CALL = "import ctypes, quantkern; print(quantkern.__file__); ctypes.CDLL({path!r}).mistake(4)"


def build() -> None:
    """Compile what has changed since the last time."""
    environment = {**os.environ, "QUANTKERN_SANITIZE": CHECKS, "QUANTKERN_CUDA": "0"}
    folders = ["--build-temp", str(FOLDER / "objects"), "--build-lib", str(FOLDER / "lib")]
    subprocess.run([sys.executable, "setup.py", "-q", "build", *folders], cwd=ROOT, env=environment, check=True)
    (extension,) = (FOLDER / "lib" / "quantkern").glob("_C*.so")
    code = extension.read_bytes()
    for trace, name in TRACES.items():
        if trace not in code:
            raise SystemExit(f"{extension} was built without {name}")


def compiler() -> str:
    """The one that torch's extension builder takes."""
    return os.environ.get("CXX") or shutil.which("c++") or "g++"


def environment() -> dict[str, str]:
    """For Python with the sanitizers loaded first."""
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        path = subprocess.check_output([compiler(), f"-print-file-name={name}"], text=True).strip()
        if not Path(path).is_absolute():
            raise SystemExit(f"{compiler()} has no {name}; install gcc's sanitizers (on Debian: part of libgcc-12-dev)")
        libraries.append(str(Path(path).resolve()))
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        # Python keeps much memory to the end. A wild access ends the process; the rest is noted and goes on.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": f"{FOLDER / 'lib'}{os.pathsep}{ROOT}",  # tests import benchmarks/ as well
        "PYTHONDONTWRITEBYTECODE": "1",
    }


REPORT = re.compile(r"^(?:.*: runtime error: .*|==\d+==ERROR: .*)(?:\n.*){0,1}(?:\n +#\d+ .*){0,9}", re.M)


def found(output: str) -> list[str]:
    """Every report in what a process printed, with the innermost functions."""
    return list(dict.fromkeys(REPORT.findall(output)))


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the tested copy of the package: Python starts in its folder, not in the source tree."""
    return subprocess.run(
        [sys.executable, "-u", *arguments],
        cwd=FOLDER / "lib",
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def check_that_findings_are_found() -> None:
    """Mistakes made on purpose, beside the package that is tested."""
    for index, (report, code) in enumerate(MISTAKES.items()):
        source, library = FOLDER / f"mistake{index}.cpp", FOLDER / f"mistake{index}.so"
        source.write_text(f'extern "C" int mistake(int n) {{ {code} }}')
        flags = [f"-fsanitize={CHECKS}", "-shared", "-fPIC", "-o", str(library), str(source)]
        subprocess.run([compiler(), *flags], check=True)
        printed = python("-c", CALL.format(path=str(library))).stdout
        if not any(report in text for text in found(printed)):
            raise SystemExit(f"a mistake made on purpose was not found: {report}. The process printed: {printed}")
        if str(FOLDER / "lib") not in printed:
            raise SystemExit(f"tests would import another quantkern: {printed}")


def run(selections: list[list[str]]) -> int:
    """Run pytest once a selection, print what ran and what was found, and return the exit status."""
    check_that_findings_are_found()
    failed = False
    for selection in selections:
        paths = [str(ROOT / each) if each.startswith("tests/") else each for each in selection]
        started = time.monotonic()
        # -s: pytest would keep what a sanitizer prints during a test that passes.
        done = python("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *paths)
        summary = re.findall(r"^=*\s*(\d+ (?:passed|failed|error).*?)[\s=]*$", done.stdout, re.M)
        outcome = summary[-1] if summary else f"no summary, exit status {done.returncode}"
        reports = found(done.stdout)
        print(f"{' '.join(selection)}\n  {outcome}, {time.monotonic() - started:.0f} s")
        print(f"  sanitizer reports: {len(reports)}", *reports, sep="\n", flush=True)
        if done.returncode:
            print(done.stdout[-6000:])
        failed = failed or bool(done.returncode or reports)
    print("failed" if failed else f"no findings by {CHECKS}")
    return 1 if failed else 0


def main() -> int:
    """Build, then test."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    build()
    return run([sys.argv[1:]] if sys.argv[1:] else SELECTION)


if __name__ == "__main__":
    sys.exit(main())
