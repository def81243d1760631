"""One table for people: plain text, colours on a terminal that has rich, HTML."""

from __future__ import annotations

import html
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace


def number(value: float | None, digits: int = 3) -> str:
    """A few significant digits; a dash where there is no number.

    >>> number(0.123456), number(12345.0), number(None), number(float("inf"))
    ('0.123', '12345', '-', 'inf')
    """
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e6 else f"{value:.{digits}g}"


def span(values: tuple[float, float] | None, digits: int = 3) -> str:
    """One number where both are the same.

    >>> span((0.5, 0.5)), span((0.25, 0.5)), span(None)
    ('0.5', '0.25..0.5', '-')
    """
    if values is None:
        return "-"
    low, high = (number(value, digits) for value in values)
    return low if low == high else f"{low}..{high}"


@dataclass(frozen=True)
class Column:
    """A heading, and whether its cells hold numbers, which stand to the right.

    rank: on a narrow terminal columns of the highest rank are left out first; those of rank 0 stay.
    """

    title: str
    right: bool = True
    rank: int = 0


@dataclass(frozen=True)
class Table:
    """Cells as text. ``flagged``: the rows to look at; ``notes``: numbered lines below."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    flagged: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def without_empty_columns(self) -> Table:
        """Leave out the columns that have nothing in any row."""
        return self._with([i for i in range(len(self.columns)) if any(row[i] not in ("", "-") for row in self.rows)])

    def _with(self, kept: Sequence[int]) -> Table:
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[i] for i in kept), rows=rows)

    def _widths(self) -> list[int]:
        return [max(len(column.title), *(len(row[i]) for row in self.rows), 0) for i, column in enumerate(self.columns)]

    def fitted(self, width: int) -> Table:
        """The table without the columns for which ``width`` characters have no room; its title names them.

        >>> table = Table("T", (Column("name"), Column("zero", rank=1)), (("weight", "0"),))
        >>> table.fitted(16) == table, table.fitted(13).title
        (True, 'T (no room for: zero)')
        """
        kept, left_out = list(range(len(self.columns))), []
        widths = [wide + 2 for wide in self._widths()]
        while sum(widths[i] for i in kept) + 2 > width and any(self.columns[i].rank for i in kept):
            least = max(kept, key=lambda i: self.columns[i].rank)
            kept.remove(least)
            left_out.append(self.columns[least].title)
        if not left_out:
            return self
        return replace(self._with(kept), title=f"{self.title} (no room for: {', '.join(left_out)})")

    def _notes(self) -> list[str]:
        return [f"{index:3d}. {text}" for index, text in enumerate(self.notes, 1)]

    def plain(self) -> str:
        """The table as text of ASCII signs.

        >>> print(Table("Two rows", (Column("name", False), Column("bits")), (("a", "8"), ("long", "16"))).plain())
        Two rows
        <BLANKLINE>
        name  bits
        ----  ----
        a        8
        long    16
        """
        cells, widths = [tuple(column.title for column in self.columns), *self.rows], self._widths()
        cells.insert(1, tuple("-" * width for width in widths))
        aligned = [
            "  ".join(
                cell.rjust(width) if column.right else cell.ljust(width)
                for cell, width, column in zip(row, widths, self.columns, strict=True)
            ).rstrip()
            for row in cells
        ]
        notes = ["", "Warnings", *self._notes()] if self.notes else []
        return "\n".join([self.title, "", *aligned, *notes])

    def coloured(self) -> str | None:
        """The table with rich's lines and colours; None where rich is missing."""
        try:
            from rich import box
            from rich.console import Console
            from rich.markup import escape
            from rich.table import Table as RichTable
        except ImportError:
            return None
        table = RichTable(title=escape(self.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for column in self.columns:
            table.add_column(escape(column.title), justify="right" if column.right else "left", overflow="fold")
        for index, row in enumerate(self.rows):
            table.add_row(*map(escape, row), style="yellow" if index in self.flagged else None)
        console = Console(file=sys.stdout)
        with console.capture() as capture:
            console.print(table)
            if self.notes:
                console.print("[bold yellow]Warnings[/]")
                for line in self._notes():
                    console.print(escape(line), highlight=False)
        text: str = capture.get()  # Any where rich is not installed
        return text.rstrip("\n")

    def render(self) -> str:
        """On a terminal as wide as that, and ``coloured`` where it can be; else ``plain``."""
        if not sys.stdout.isatty():
            return self.plain()
        table = self.fitted(shutil.get_terminal_size().columns)
        return table.coloured() or table.plain()

    def to_html(self, pictures: Sequence[str] = ()) -> str:
        """A title, a table element, a list of the notes. ``pictures``: markup for one more cell in every row."""
        titles = [(column.title, column.right) for column in self.columns] + ([("values", False)] if pictures else [])
        head = "".join(f"<th{' class=left' if not right else ''}>{html.escape(title)}</th>" for title, right in titles)
        body = []
        for index, row in enumerate(self.rows):
            cells = "".join(
                f"<td{' class=left' if not column.right else ''}>{html.escape(cell)}</td>"
                for cell, column in zip(row, self.columns, strict=True)
            )
            picture = f"<td>{pictures[index]}</td>" if pictures else ""
            body.append(f"<tr{' class=flagged' if index in self.flagged else ''}>{cells}{picture}</tr>")
        notes = "".join(f"<li>{html.escape(text)}</li>" for text in self.notes)
        listed = f"<h2>Warnings</h2><ol>{notes}</ol>" if notes else ""
        return (
            f"<p>{html.escape(self.title)}</p><div class=scroll><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table></div>{listed}"
        )
