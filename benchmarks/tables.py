"""Figures as text, tables and plots."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.harness import Case, Excluded, Result


def figure(value: float | None, suffix: str = "") -> str:
    """Three significant digits.

    >>> figure(0.012345), figure(12.345), figure(1234.5, "x"), figure(None)
    ('0.0123', '12.3', '1234x', '-')
    """
    if value is None:
        return "-"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}{suffix}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}{suffix}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> None:
    """A table, all but the first ``text_columns`` aligned right; drawn by rich where it is installed and it fits.

    On a narrow terminal and in a file rich would cut the figures short, so there the table is plain.
    """
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        console = None
    else:
        console = Console()
    if console is None or not console.is_terminal or sum(widths) + 3 * len(widths) + 1 > console.width:
        print(f"\n{title}")
        for row in (columns, ["-" * width for width in widths], *rows):
            cells = (
                c.ljust(w) if i < text_columns else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            print("  ".join(cells).rstrip())
        return
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < text_columns else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_case(case: Case, results: Sequence[Result], excluded: Sequence[Excluded]) -> None:
    """All figures of one case."""
    columns = [
        "contestant",
        "p20 ms",
        "p50 ms",
        "p80 ms",
        "ns/element",
        "GB/s",
        "B/element",
        f"x {case.floor}",
        "x ours",
        "check",
    ]
    rows = [
        [
            one.contestant,
            *(figure(value) for value in (one.p20_ms, one.p50_ms, one.p80_ms, one.ns_per_element, one.gb_per_s)),
            figure(one.bytes_per_element),
            figure(one.to_floor),
            figure(one.to_ours),
            one.check,
        ]
        for one in sorted(results, key=lambda one: one.p50_ms)
    ]
    print_table(case.name, columns, rows)
    for one in excluded:
        print(f"  not timed: {one.contestant}: {one.reason}")
    sys.stdout.flush()


def print_summary(title: str, results: Sequence[Result], floor: str = "copy", ours: str = "quantkern") -> None:
    """One row a case: the floor's and our time, ours over the floor, in bytes an element, and each peer's over ours."""
    if not results:
        print("nothing was timed")
        return
    cases: dict[str, dict[str, Result]] = {}
    for result in results:
        cases.setdefault(" ".join(result.labels.values()), {})[result.contestant] = result
    peers = [name for name in dict.fromkeys(one.contestant for one in results) if name not in (floor, ours)]
    columns = [*results[0].labels, f"{floor} ms", f"{ours} ms", f"{ours}/{floor}", "B/element"]
    columns += [f"{name}/{ours}" for name in peers]
    rows = []
    for timed in cases.values():
        labels = next(iter(timed.values())).labels
        row = list(labels.values())
        row += [figure(timed[name].p50_ms) if name in timed else "-" for name in (floor, ours)]
        row.append(figure(timed[ours].to_floor) if ours in timed else "-")
        row.append(figure(timed[ours].bytes_per_element) if ours in timed else "-")
        row += [ratio(timed[name]) if name in timed else "-" for name in peers]
        rows.append(row)
    print_table(title, columns, rows, text_columns=len(results[0].labels))
    for line in notes(results):
        print(line)


def ratio(result: Result) -> str:
    """A contestant's time over ours, with a star where it computes something else."""
    return figure(result.to_ours, "x") + ("*" if result.other_work else "")


def notes(results: Iterable[Result]) -> list[str]:
    """What the stars mean: one line for every contestant and difference."""
    return list(dict.fromkeys(f"* {one.contestant}: {one.other_work}" for one in results if one.other_work))


def require_matplotlib() -> ModuleType:
    """matplotlib.pyplot, or an end with the command that installs it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    return plt


def plot(path: Path, title: str, results: Sequence[Result]) -> None:
    """A bar chart of the medians on a logarithmic scale, one group a case; whiskers from p20 to p80."""
    plt = require_matplotlib()
    cases = list(dict.fromkeys(" ".join(one.labels.values()) for one in results))
    names = list(dict.fromkeys(one.contestant for one in results))
    height = 0.8 / max(len(names), 1)
    chart, axes = plt.subplots(figsize=(10, 1.5 + len(cases) * max(0.5, 0.16 * len(names))))
    for i, name in enumerate(names):
        timed = {" ".join(one.labels.values()): one for one in results if one.contestant == name}
        places = [j + (i - (len(names) - 1) / 2) * height for j, case in enumerate(cases) if case in timed]
        chosen = [timed[case] for case in cases if case in timed]
        whiskers = [[one.p50_ms - one.p20_ms for one in chosen], [one.p80_ms - one.p50_ms for one in chosen]]
        axes.barh(places, [one.p50_ms for one in chosen], height, xerr=whiskers, label=name, color=f"C{i % 10}")
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(len(cases) - 0.5, -0.5)  # the first case on top
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds (median; whiskers p20 to p80)")
    axes.set_title(title)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    chart.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(path, dpi=130)
    plt.close(chart)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
