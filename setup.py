"""Builds quantkern._C: CPU kernels always, CUDA kernels where torch and the toolkit allow.

QUANTKERN_CUDA=auto (default) builds CUDA kernels when torch is a CUDA build and a matching nvcc is found;
1 insists on them, 0 leaves them out. MAX_JOBS limits parallel compilation. QUANTKERN_SANITIZE=address,undefined (what
the compiler's -fsanitize= takes) builds the CPU kernels with these checks; scripts/sanitize.py does that.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.build_py import build_py
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
CUDA_ARCHS = "8.0;9.0a;10.0+PTX"
SANITIZE = os.environ.get("QUANTKERN_SANITIZE", "")


def sources(pattern: str) -> list[str]:
    """Paths below csrc, relative as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in CSRC.glob(pattern))


CPP = sources("*.cpp") + sources("common/*.cpp") + sources("cpu/*.cpp") + sources("autograd/*.cpp")
# No contraction: CPU, CUDA and Triton agree to the last bit.
FLAGS = ["-std=c++20", "-ffp-contract=off", "-fopenmp", "-fvisibility=hidden"]


def nvcc_version(cuda_home: str) -> str | None:
    """The toolkit's version as torch writes it ("13.0"), or None where its nvcc does not run."""
    try:
        text = subprocess.check_output([str(Path(cuda_home) / "bin" / "nvcc"), "--version"], text=True)
    except OSError:
        return None
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else None


def why_no_cuda() -> str | None:
    """The reason why CUDA kernels cannot be built, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install a CUDA build of torch first"
    home = cpp_extension.CUDA_HOME
    if home is None:
        return "no CUDA toolkit was found; install one or set CUDA_HOME to its folder"
    version = nvcc_version(home)
    if version is None or version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"torch was built with CUDA {torch.version.cuda}, the toolkit in {home} has nvcc {version}"
    return None


def wants_cuda() -> bool:
    """Decide from QUANTKERN_CUDA; 1 without what it takes is an error, not a smaller build."""
    choice = os.environ.get("QUANTKERN_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"QUANTKERN_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return False
    reason = why_no_cuda()
    if choice == "1" and reason:
        raise SystemExit(f"QUANTKERN_CUDA=1, but CUDA kernels cannot be built: {reason}")
    return reason is None


def sanitize(checks: str) -> object:
    """The extension with the compiler's run-time checks, without CUDA; it never comes into the source tree."""
    instrument = [f"-fsanitize={checks}"]
    if "undefined" in checks.split(","):
        # Conversions of floating-point numbers are not part of "undefined". torch's classes export no type information.
        instrument += ["-fsanitize=float-cast-overflow", "-fno-sanitize=vptr"]
    compiled = [*FLAGS, "-O1", "-g1", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS", *instrument]
    return cpp_extension.CppExtension(
        "quantkern._C",
        CPP,
        extra_compile_args=compiled,
        extra_link_args=["-fopenmp", *instrument],
    )


def extension() -> object:
    """The one extension module."""
    if SANITIZE:
        return sanitize(SANITIZE)
    cuda = wants_cuda()
    # -g0: torch's headers make huge debug sections.
    flags = {"cxx": ["-O3", "-g0", *FLAGS]}
    if not cuda:
        return cpp_extension.CppExtension(
            "quantkern._C", CPP, extra_compile_args=flags, extra_link_args=["-fopenmp", "-s"]
        )
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    flags["cxx"].append(f'-DQK_CUDA_ARCHS="{archs}"')
    flags["nvcc"] = ["-O3", "-std=c++17", "--fmad=false", "-lineinfo"]
    return cpp_extension.CUDAExtension(
        "quantkern._C",
        CPP + sources("cuda/*.cpp") + sources("cuda/*.cu"),
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
    )


def record_torch() -> None:
    """Note which torch the extension belongs to, so that importing it beside another one can say so."""
    text = f'"""Written by setup.py."""\n\nTORCH_VERSION = "{torch.__version__}"\n'
    (ROOT / "quantkern" / "_built_for.py").write_text(text)


class BuildPy(build_py):
    """Takes the record of torch's version into the package."""

    def run(self) -> None:
        record_torch()
        super().run()


class BuildExt(cpp_extension.BuildExtension):
    """Also leaves the extension in the source tree: Python started there imports that copy of the package."""

    def run(self) -> None:
        record_torch()
        super().run()
        if not self.inplace and not SANITIZE:
            for built in self.get_outputs():
                shutil.copy2(built, ROOT / "quantkern" / Path(built).name)


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExt, "build_py": BuildPy})
