"""What a report holds, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantkern.files import Target, replaced
from quantkern.report import drawing
from quantkern.report.measure import Bars
from quantkern.report.table import Column, Table, number, span

Span = tuple[float, float]
MOST_NAMES = 8
"""A warning that many tensors share names so many of them; ``Report.warnings`` has them all."""


@dataclass(frozen=True)
class Finding:
    """Something to look at. ``code`` names its kind; ``subject`` is a tensor, a layer or a rule."""

    code: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}" if self.subject else self.text


@dataclass(frozen=True)
class Row:
    """One quantized tensor. What is not known is None.

    layer, tensor: names as in a calibration dict; ``tensor`` is 'weight', 'input', 'output', 'gradient', 'input_1'.
    norm: the batch norm folded into the layer; the tensor then is the folded weight, or the batch norm's output.
    bits, dtype, scheme: of the rule; DoReFa and signs have no dtype and 'dorefa' or 'sign' as scheme.
    state: '' while the tensor is quantized, else why it is float.
    scale, zero_point: smallest and largest of all channels. range: smallest and largest value of the grid, or while
    there is none the range seen so far. values: smallest and largest finite value measured.
    saturation: percent of the values that are clipped. sqnr: 10 log10(sum x^2 / sum (x - y)^2) in dB for x and its
    quantized y. agreement: of signs, sum x * y / sqrt(sum x^2 * sum y^2) in percent.
    gradient, scale_gradient: norm of the Parameter's gradient and of its learned scale's. frozen: it asks for none;
    learns: the scale asks for one.
    elements: numbers in a weight. dead_channels: channels with a scale of their own whose values are all the same.
    """

    layer: str
    tensor: str
    bits: int
    dtype: str | None
    scheme: str
    norm: str | None = None
    state: str = ""
    scale: Span | None = None
    zero_point: Span | None = None
    range: Span | None = None
    values: Span | None = None
    saturation: float | None = None
    sqnr: float | None = None
    agreement: float | None = None
    gradient: float | None = None
    scale_gradient: float | None = None
    frozen: bool = False
    learns: bool = False
    elements: int = 0
    dead_channels: int = 0
    not_finite: int = 0
    histogram: Bars | None = None
    warnings: tuple[Finding, ...] = ()

    @property
    def name(self) -> str:
        """Layer and tensor."""
        return f"{self.layer}.{self.tensor}" if self.layer else self.tensor


_COLUMNS = (
    Column("layer", right=False),
    Column("tensor", right=False),
    *(Column("bits"), Column("dtype", right=False, rank=4), Column("scheme", right=False, rank=2)),
    *(Column("scale", rank=3), Column("zero", rank=5), Column("range", rank=1), Column("clipped %")),
    *(Column("SQNR dB"), Column("agree %"), Column("gradient"), Column("of scale")),
    *(Column("state", right=False), Column("see", right=False)),
)


@dataclass(frozen=True, repr=False)
class Report:
    """The rows of a model's quantized tensors and the warnings about them.

    ``print`` shows a table: with colours on a terminal where rich is installed, else plain; ``plain()`` is always
    plain. A notebook shows it with histograms, and so do ``to_html`` (a page) and ``plot`` (a picture).

    Warnings have a ``code``:

    - 'rule': a rule names what the model lacks, selects nothing, or is replaced by a later one.
    - 'first-layer', 'last-layer': the first or last layer with weights has a tensor below 8 bits. The order is that of
      the forward of a measured batch, else that in which the model lists its layers.
    - 'no-gradient': the weight or its learned scale has no gradient, or one of zeros, while others have one.
    - 'batch-norm': a batch norm is not folded (without fold_bn=False), or channels of a folded one have gamma 0.
    - 'no-range': no range or scale yet. 'not-started': quant_start_step is not reached. 'not-compressed': an
      ``ObserverQuantizer`` is still observing. 'not-reached': the batch did not come to the tensor.
    - 'dead-range': all values are the same, of the tensor or of a channel that has a scale of its own.
    - 'saturation', 'sqnr': beyond the thresholds that ``report`` was called with. 'not-finite': NaN or infinity.
    """

    title: str
    rows: tuple[Row, ...]
    warnings: tuple[Finding, ...]
    measured: bool
    any_gradient: bool

    def __str__(self) -> str:
        return self.table().render()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return drawing.STYLE + self._body(large=False)

    def plain(self) -> str:
        """The table as plain text."""
        return self.table().plain()

    def table(self) -> Table:
        """The cells of the table, rounded for people."""
        groups: dict[tuple[str, str], list[str]] = {}
        for finding in self.warnings:
            groups.setdefault((finding.code, finding.text), []).append(finding.subject)
        numbers = {group: index for index, group in enumerate(groups, 1)}
        cells = []
        for index, row in enumerate(self.rows):
            repeated = index > 0 and self.rows[index - 1].layer == row.layer
            layer = "" if repeated else (row.layer or "(model)") + (f" + {row.norm}" if row.norm else "")
            see = ",".join(str(numbers[finding.code, finding.text]) for finding in row.warnings)
            scheme = row.scheme.removeprefix("per_").replace("_", " ")
            cells.append(
                (
                    *(layer, row.tensor, str(row.bits), row.dtype or "-", scheme, span(row.scale)),
                    *(span(row.zero_point), span(row.range), self._percent(row.saturation)),
                    *("-" if row.sqnr is None else f"{row.sqnr:.1f}", self._percent(row.agreement)),
                    *(self._gradient(row), number(row.scale_gradient), row.state, see),
                )
            )
        flagged = frozenset(index for index, row in enumerate(self.rows) if row.warnings)
        notes = tuple(_joined(subjects) + text for (_, text), subjects in groups.items())
        return Table(self.title, _COLUMNS, tuple(cells), flagged, notes).without_empty_columns()

    @staticmethod
    def _percent(value: float | None) -> str:
        return "-" if value is None else "0" if value == 0 else f"{value:.2f}" if value >= 0.005 else "<0.01"

    def _gradient(self, row: Row) -> str:
        if row.tensor != "weight":
            return ""
        if row.gradient is None:
            return "frozen" if row.frozen else "none" if self.any_gradient else "-"
        return number(row.gradient)

    def _body(self, large: bool) -> str:
        pictures = [drawing.picture(row.histogram, row.range, 150, 32) for row in self.rows]
        body = self.table().to_html(pictures if any(pictures) else ())
        if large and any(pictures):
            body += f"<h2>Values before quantization</h2><p>{drawing.LEGEND}</p><div class=figures>"
            for row in self.rows:
                if row.histogram is not None:
                    body += drawing.figure(row.name, row.histogram, row.range)
            body += "</div>"
        return f"<div class=quantkern>{body}</div>"

    def to_html(self, path: Target) -> None:
        """Write one page with the table, the warnings and the histograms. It needs no network and no scripts.

        Raises:
            TypeError, OSError: path cannot be written; a file that was there stays as it is then.
        """
        with replaced("path", path) as file:
            file.write_text(drawing.page(self.title, self._body(large=True)), encoding="utf-8")

    def plot(self, path: Target) -> None:
        """Write a picture: for every measured tensor its values within its range, SQNR and clipped values.

        The suffix chooses the format: .png, .svg or .pdf.

        Raises:
            ImportError: matplotlib is not installed. ValueError: nothing was measured, or another suffix. TypeError,
                OSError: path cannot be written; a file that was there stays as it is then.
        """
        from quantkern.report import plotting

        shown = [row for row in self.rows if row.histogram is not None]
        if not shown:
            raise ValueError("plot(): nothing in this report was measured; give report() a batch")
        plotting.save(path, lambda figure: _draw(figure, self.title, shown), 10, 1.4 + 0.32 * len(shown))


def _joined(subjects: list[str]) -> str:
    """What a warning is about, in front of its text."""
    shown = ", ".join(subjects[:MOST_NAMES])
    more = f" and {len(subjects) - MOST_NAMES} more" if len(subjects) > MOST_NAMES else ""
    return f"{shown}{more}: " if shown else ""


def _draw(figure: Any, title: str, rows: list[Row]) -> None:
    """Three panels that share the tensors as their vertical axis, the first tensor on top."""
    places = range(len(rows))
    values, noise, clipped = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    for place, row in zip(places, rows, strict=True):
        assert row.histogram is not None
        counts, edges = row.histogram.counts, row.histogram.edges
        end = max(map(abs, row.range or row.values or (1.0, 1.0))) or 1.0
        largest = max(counts)
        heights = [0.85 * (count / largest) ** 0.5 for count in counts]
        values.stairs(
            [place + 0.4 - height for height in heights], [edge / end for edge in edges],
            baseline=place + 0.4, fill=True, color=drawing.BARS,
        )  # fmt: skip
        for limit in row.range or ():
            values.plot([limit / end] * 2, [place - 0.42, place + 0.4], color=drawing.ENDS, linewidth=1)
    values.set_yticks(list(places), [row.name for row in rows])
    values.set_ylim(len(rows) - 0.5, -0.6)
    left, right = values.get_xlim()
    values.set_xlim(max(left, -2.5), min(right, 2.5))  # far outliers would leave no room for the rest
    values.set_xlabel("value / end of its range")
    for axes, numbers, label in (
        (noise, [row.sqnr for row in rows], "SQNR (dB)"),
        (clipped, [row.saturation for row in rows], "clipped (%)"),
    ):
        shown = [value if value is not None and value != float("inf") else 0.0 for value in numbers]
        colours = [drawing.ENDS if row.warnings else drawing.BARS for row in rows]
        axes.barh(list(places), shown, color=colours, height=0.6)
        axes.set_xlim(0, max(*shown, 0.0, 1.0) * 1.25)
        for place, value in zip(places, numbers, strict=True):
            text = " -" if value is None else f" {value:.1f}"
            axes.text(shown[place], place, text, va="center", fontsize=8)
        axes.set_xlabel(label)
    figure.suptitle(title, fontsize=10)
