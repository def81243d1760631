"""The compiled operators: loading them is what importing this module does."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

REBUILD = "pip install --force-reinstall --no-deps ."


def load() -> None:
    """Import the extension; a failure says which torch it was built for and how to rebuild it."""
    mend = f"Build them from a checkout of quantkern with: {REBUILD}"
    try:
        from quantkern import _built_for
    except ImportError as error:
        folder = Path(__file__).parents[1]
        raise ImportError(f"quantkern's compiled kernels are missing from {folder}. {mend}") from error
    built, installed = _built_for.TORCH_VERSION, torch.__version__
    if built != installed:
        raise ImportError(f"quantkern's kernels were built for torch {built}, but torch {installed} is here. {mend}")
    try:
        import quantkern._C  # noqa: F401
    except ImportError as error:
        raise ImportError(f"quantkern's compiled kernels do not load ({error}). {mend}") from error


load()


def check_device(value: Tensor, x: Tensor, name: str) -> None:
    """State and parameters must lie where x lies."""
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, x on {x.device}; move it with {name}.to(x.device)")
