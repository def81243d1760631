"""Pictures drawn by matplotlib, which is loaded here only and without its windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quantkern.files import Target, replaced, target_of

SUFFIXES = (".png", ".svg", ".pdf")


def save(path: Target, draw: Callable[[Any], None], width: float, height: float) -> None:
    """Give ``draw`` a new figure of that many inches and write it.

    Raises:
        ImportError: matplotlib is not installed. ValueError: a suffix other than .png, .svg and .pdf.
    """
    target = target_of("path", path)
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path must end in {', '.join(SUFFIXES)}, got {target.name!r}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install 'quantkern[report]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    with replaced("path", target) as file:
        figure.savefig(file, dpi=130)
