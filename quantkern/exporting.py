"""Whether torch.export is at work."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """As torch.compiler.is_exporting(), which in a graph of torch.compile says yes in torch 2.11.

    >>> is_exporting()
    False
    """
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag
