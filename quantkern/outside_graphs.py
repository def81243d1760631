"""Calls that torch.compile leaves out of its graphs. Imported when the first is made: it brings the compiler along."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call_outside_graphs(function: Callable[..., T], *arguments: object) -> T:
    """``function(*arguments)``, eagerly."""
    return function(*arguments)
