"""HTML pages and small pictures in SVG, in colours that can be read on light and dark ground."""

from __future__ import annotations

import html

from quantkern.report.measure import Bars
from quantkern.report.table import number

BARS, ENDS = "#3d85c6", "#d9534f"
LEGEND = (
    "The height of a bar is the square root of its count. Red lines are the ends of the quantized range; red bars "
    "lie outside and are clipped."
)

STYLE = """<style>
.quantkern {font: 14px/1.45 system-ui, sans-serif}
.quantkern .scroll {overflow-x: auto}
.quantkern table {border-collapse: collapse; font-variant-numeric: tabular-nums}
.quantkern th, .quantkern td {padding: 3px 10px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid rgba(128, 128, 128, .3)}
.quantkern th.left, .quantkern td.left {text-align: left}
.quantkern tr.flagged {background: rgba(240, 173, 78, .18)}
.quantkern h2 {font-size: 16px; margin: 24px 0 8px}
.quantkern li {margin: 4px 0}
.quantkern .figures {display: flex; flex-wrap: wrap; gap: 16px}
.quantkern figure {margin: 0}
.quantkern figcaption {font-weight: 600}
.quantkern svg {display: block}
.quantkern svg text {font: 11px system-ui, sans-serif; fill: currentColor}
</style>"""


def page(title: str, body: str) -> str:
    """A page of its own; the browser chooses light or dark."""
    return (
        "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>{STYLE}"
        "<style>:root {color-scheme: light dark} body {margin: 24px; background: Canvas; color: CanvasText}</style>"
        f"</head><body>{body}</body></html>\n"
    )


def _shapes(bars: Bars, ends: tuple[float, float] | None, width: int, height: int) -> tuple[str, float, float]:
    """The bars, the lines at both ends, and the values at the left and right border."""
    low, high = bars.edges[0], bars.edges[-1]
    if ends is not None:
        low, high = min(low, ends[0]), max(high, ends[1])
    size = (high - low) or 1.0
    largest = max(bars.counts)
    shapes = []
    for count, left, right in zip(bars.counts, bars.edges, bars.edges[1:], strict=False):
        if count:
            tall = max(1.0, height * (count / largest) ** 0.5)
            start, wide = width * (left - low) / size, max(1.0, width * (right - left) / size)
            outside = ends is not None and (right < ends[0] or left > ends[1])
            colour = ENDS if outside else BARS
            shapes.append(
                f'<rect x="{start:.1f}" y="{height - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}" '
                f'fill="{colour}"/>'
            )
    for end in ends or ():
        x = min(max(width * (end - low) / size, 0.75), width - 0.75)
        shapes.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="{ENDS}" stroke-width="1.5"/>')
    shapes.append(f'<line x1="0" x2="{width}" y1="{height}" y2="{height}" stroke="currentColor" stroke-width="1"/>')
    return "".join(shapes), low, high


def picture(bars: Bars | None, ends: tuple[float, float] | None, width: int, height: int) -> str:
    """A histogram without words, for a table's cell."""
    if bars is None:
        return ""
    shapes, low, high = _shapes(bars, ends, width, height)
    label = f"values from {number(low)} to {number(high)}"
    return f'<svg width="{width}" height="{height + 1}" role="img"><title>{label}</title>{shapes}</svg>'


def figure(name: str, bars: Bars, ends: tuple[float, float] | None) -> str:
    """A histogram with its name and the numbers below it."""
    width, height = 300, 110
    shapes, low, high = _shapes(bars, ends, width, height)
    texts = f'<text x="0" y="{height + 14}">{number(low)}</text>'
    texts += f'<text x="{width}" y="{height + 14}" text-anchor="end">{number(high)}</text>'
    if low < 0 < high and 0.15 < -low / (high - low) < 0.85:
        texts += f'<text x="{-low / (high - low) * width:.1f}" y="{height + 14}" text-anchor="middle">0</text>'
    return (
        f"<figure><figcaption>{html.escape(name)}</figcaption>"
        f'<svg width="{width}" height="{height + 18}" role="img">{shapes}{texts}</svg></figure>'
    )
