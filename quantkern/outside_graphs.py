"""Calls that torch.compile leaves out of its graphs. Imported when the first is made: it brings the compiler along."""

from __future__ import annotations

from collections.abc import Callable

import torch


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call_outside_graphs(function: Callable[..., None], *arguments: object) -> None:
    """``function(*arguments)``, eagerly."""
    function(*arguments)
