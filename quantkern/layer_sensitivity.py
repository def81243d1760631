"""How much a model suffers when one of its layers is quantized and the others stay float."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkern.attach import Attachment, fake_quants
from quantkern.config import TensorSpec, is_int
from quantkern.fake_quant import FakeQuant
from quantkern.files import Target
from quantkern.layer_plans import op_type, plan_layers
from quantkern.layer_quantizers import kind_of, visit_tensors
from quantkern.observed import ObservedActivation, ObservedWeight
from quantkern.observers import Observer, ObserverSpec
from quantkern.progress import Progress
from quantkern.quantizers import ObserverQuantizer
from quantkern.quantizers.observer import observer_form, run_batch
from quantkern.report import drawing, plotting
from quantkern.report.table import Column, Table, number

Metric = str | Callable[[nn.Module], float]
BITS = (8, 6, 4, 3, 2)


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer. ``values``: bits -> the metric while only this layer is quantized; ``drops``: bits -> what it costs.

    For 'sqnr' a drop is the noise in the model's outputs, in parts of their power; else the float model's metric minus
    the value. weights: how many numbers its weight has.
    """

    layer: str
    kind: str
    weights: int
    values: Mapping[int, float]
    drops: Mapping[int, float]

    @property
    def mean_drop(self) -> float:
        """Over all bit widths; what layers are sorted by."""
        return math.fsum(self.drops.values()) / len(self.drops)


@dataclass(frozen=True, repr=False)
class Sensitivity:
    """What ``sensitivity`` found, the most sensitive layer first; ``print`` shows a table.

    metric: 'sqnr' (dB of the model's outputs), 'accuracy' (percent) or the name of the given function. baseline: the
    metric of the float model, infinite for 'sqnr'. bits: from many to few.
    """

    metric: str
    baseline: float
    bits: tuple[int, ...]
    rows: tuple[LayerSensitivity, ...]

    @property
    def title(self) -> str:
        """What the table shows."""
        if self.metric == "sqnr":
            return "SQNR (dB) of the model's outputs with one layer quantized, most sensitive layer first"
        what = "Top-1 accuracy (%)" if self.metric == "accuracy" else self.metric
        return f"{what} with one layer quantized, minus {self.baseline:.4g} as float, most sensitive layer first"

    def __str__(self) -> str:
        return self.table().render()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"{drawing.STYLE}<div class=quantkern>{self.table().to_html()}</div>"

    def plain(self) -> str:
        """The table as plain text."""
        return self.table().plain()

    def table(self) -> Table:
        """The cells of the table, rounded for people."""
        bits_of = [Column(f"{bits} bits") for bits in self.bits]
        columns = (Column("layer", right=False), Column("type", right=False), Column("weights"), *bits_of)
        cells = []
        for row in self.rows:
            count = f"{row.weights:,}" if row.weights else "-"
            cells.append((row.layer or "(model)", row.kind, count, *(self._cell(row, bits) for bits in self.bits)))
        return Table(self.title, columns, tuple(cells))

    def _cell(self, row: LayerSensitivity, bits: int) -> str:
        if self.metric == "sqnr":
            return f"{row.values[bits]:.1f}"
        change = 0.0 - row.drops[bits]  # not -0.0
        return f"{change:+.2f}" if self.metric == "accuracy" else number(change)

    def suggest(self, min_sqnr: float) -> dict[str, int]:
        """Bits by layer with which all layers together should leave the outputs an SQNR of ``min_sqnr`` dB.

        The noise of the layers is taken as independent, so that it adds up. From the most bits on, the layer goes
        down whose weights save the most bits for the noise it adds, as long as the sum allows it. Check the outcome
        with ``report`` or on labelled data: it is an estimate.

        Raises:
            ValueError: the metric is not 'sqnr', or the most bits are not enough.
        """
        if self.metric != "sqnr":
            raise ValueError(f"suggest() adds up noise and needs metric='sqnr', this sensitivity has {self.metric!r}")
        allowed = 10 ** (-min_sqnr / 10)
        chosen = {row.layer: 0 for row in self.rows}  # indices into bits

        def noise() -> float:
            return math.fsum(row.drops[self.bits[chosen[row.layer]]] for row in self.rows)

        if noise() > allowed:
            reached = -10 * math.log10(noise())
            raise ValueError(
                f"min_sqnr={min_sqnr} dB cannot be kept: with {self.bits[0]} bits everywhere about {reached:.1f} dB "
                "remain; give sensitivity() more bits to choose from"
            )
        while True:
            best, most = None, 0.0
            for row in self.rows:
                place = chosen[row.layer]
                if place + 1 == len(self.bits):
                    continue
                now, then = self.bits[place], self.bits[place + 1]
                added = row.drops[then] - row.drops[now]
                gain = max(row.weights, 1) * (now - then) / max(added, 1e-30)
                if noise() + added <= allowed and gain > most:
                    best, most = row.layer, gain
            if best is None:
                return {layer: self.bits[place] for layer, place in chosen.items()}
            chosen[best] += 1

    def plot(self, path: Target) -> None:
        """Write a picture, layers by bit widths; the suffix chooses the format: .png, .svg or .pdf.

        Raises:
            ImportError: matplotlib is not installed. ValueError: another suffix. TypeError, OSError: path cannot be
                written; a file that was there stays as it is then.
        """
        plotting.save(path, self._draw, 3.5 + 0.9 * len(self.bits), 1.6 + 0.34 * len(self.rows))

    def _draw(self, figure: Any) -> None:
        axes = figure.subplots()
        shown = [[row.values[b] if self.metric == "sqnr" else -row.drops[b] for b in self.bits] for row in self.rows]
        finite = [value for line in shown for value in line if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        cells = [[min(max(value, low), high) if value == value else low for value in line] for line in shown]
        image = axes.imshow(
            cells, aspect="auto", cmap="RdYlBu", alpha=0.7, vmin=low, vmax=high if high > low else low + 1
        )
        for place, row in enumerate(self.rows):
            for column, bits in enumerate(self.bits):
                axes.text(column, place, self._cell(row, bits), ha="center", va="center", fontsize=8, color="black")
        axes.set_xticks(range(len(self.bits)), [f"{bits} bits" for bits in self.bits])
        axes.set_yticks(range(len(self.rows)), [row.layer or "(model)" for row in self.rows])
        figure.colorbar(image, label="SQNR of the outputs (dB)" if self.metric == "sqnr" else "change against float")
        figure.suptitle(self.title.split(",")[0], fontsize=10)


def _with_bits(rules: object, bits: int) -> object:
    """The rules with these bits for everything; weights and inputs where a rule does not say which tensors."""
    if not isinstance(rules, (list, tuple)):
        return rules
    return [
        {"quant_types": ["weight", "input"], **rule, "quant_bits": bits}
        if isinstance(rule, Mapping) and not rule.get("exclude")
        else rule
        for rule in rules
    ]


class _Trial:
    """A copy of the model in evaluation mode, of which one layer at a time is quantized."""

    def __init__(self, model: nn.Module, rules: object, bits: Sequence[int]) -> None:
        self.model = copy.deepcopy(model).eval()
        self.specs: dict[int, dict[str, Mapping[str, TensorSpec]]] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the quantizer below warns once
            for width in bits:
                plans = plan_layers(self.model, _with_bits(rules, width), observer_form())
                self.specs[width] = {plan.name: plan.specs for plan in plans}
        self.quantizer = ObserverQuantizer(self.model, _with_bits(rules, max(bits)))  # type: ignore[arg-type]
        self.attachments: list[Attachment] = self.quantizer._attachments
        self.observers: dict[FakeQuant, Observer] = {}

    def calibrate(self, batches: Iterable[Any]) -> list[list[Tensor]]:
        """Observe every tensor while the whole model is float; its outputs, a list a batch."""
        outputs: list[list[Tensor]] = []
        self.quantizer.calibrate(
            batches, forward=lambda model, batch: outputs.append(_tensors_in(run_batch(model, batch))), progress=False
        )
        self.quantizer.freeze_ranges()
        for attachment in self.attachments:
            for module in fake_quants(attachment.layer):
                if isinstance(module, ObservedWeight):
                    weight = attachment.layer.weight
                    assert isinstance(weight, Tensor)
                    self.observers[module] = module.observe(weight)
                elif isinstance(module, ObservedActivation) and module.observer.has_seen():
                    self.observers[module] = module.observer
        return outputs

    @contextmanager
    def quantized(self, attachment: Attachment, bits: int) -> Iterator[None]:
        """This layer alone has these bits in the block; what was observed serves every number of them."""
        specs = self.specs[bits][attachment.name]
        modules = [module for module in fake_quants(attachment.layer) if module in self.observers]
        for module in modules:
            assert isinstance(module, (ObservedWeight, ObservedActivation))
            spec = specs[kind_of(module.label.rpartition(".")[2])]
            assert isinstance(spec, ObserverSpec)
            observer = copy.copy(self.observers[module])
            module.spec = observer.spec = spec
            module.freeze(observer.calculate_qparams())
        try:
            yield
        finally:
            for module in modules:
                module.ready = False  # type: ignore[assignment]


def _tensors_in(output: object) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(_: str, tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    visit_tensors(output, "output", "_", keep)
    return found


def _sqnr(model: nn.Module, batches: Sequence[Any], expected: Sequence[Sequence[Tensor]]) -> float:
    """Of all floating-point tensors in the model's outputs."""
    signal = noise = 0.0
    for batch, tensors in zip(batches, expected, strict=True):
        for tensor, found in zip(tensors, _tensors_in(run_batch(model, batch)), strict=True):
            signal += float(tensor.square().sum(dtype=torch.float64))
            noise += float((found - tensor).square().sum(dtype=torch.float64))
    if not math.isfinite(noise):
        return -math.inf
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def _accuracy(model: nn.Module, batches: Sequence[Any]) -> float:
    """Percent of right answers; classes are on axis 1 of the first tensor that the model returns."""
    right = count = 0
    for batch in batches:
        if not (isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[1], Tensor)):
            raise TypeError(
                "metric='accuracy' needs batches of (input, labels); give such batches, metric='sqnr', or a function "
                "of the model as metric"
            )
        answers = _tensors_in(run_batch(model, batch))[0].argmax(1)
        right += int((answers == batch[1].to(answers.device)).sum())
        count += batch[1].numel()
    return 100 * right / count


def _check_bits(bits: Sequence[int]) -> tuple[int, ...]:
    widths = tuple(sorted(set(bits), reverse=True)) if all(is_int(width) for width in bits) else ()
    if not widths:
        raise ValueError(f"bits must be numbers of bits such as (8, 4), got {bits!r}")
    return widths


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    config_list: Sequence[Mapping[str, Any]] | None = None,
    *,
    bits: Sequence[int] = BITS,
    metric: Metric = "sqnr",
    steps: int | None = None,
    progress: bool = True,
) -> Sensitivity:
    """What it costs to quantize one layer of a float model at a time, for several bit widths.

    The model stays as it is: a copy of it in evaluation mode is calibrated once with ``batches``, as by
    ``ObserverQuantizer``, and then runs on them once a layer and bit width.

    Args:
        model: a float model, in any mode.
        batches: as for ``ObserverQuantizer.calibrate``: tensors, tuples that start with the model's input, or dicts
            of keyword arguments. They are kept in memory. Labels are only needed for 'accuracy'.
        config_list: rules of an ``ObserverQuantizer`` that say which layers to try, and how; their quant_bits do not
            count. A rule without quant_types means weights and inputs; ``[{"quant_types": ["weight"], "op_types":
            ["default"]}]`` tries weights alone. None: every convolution, linear, bilinear, PReLU and embedding layer.
        bits: the bit widths to try; every rule must allow them.
        metric: 'sqnr': 10 log10(sum y^2 / sum (y - q)^2) in dB, with y the float model's outputs and q those with one
            layer quantized; 'accuracy': top-1 in percent, for batches of (input, labels); or a function of the model
            whose result is better the higher it is.
        steps: so many batches at most; None: all.
        progress: show a progress bar on stderr.

    Returns:
        A ``Sensitivity``: ``print`` shows a table, ``plot(path)`` draws it.

    Raises:
        ConfigError: what is wrong with config_list. ValueError: no batch, NaN in a tensor, or an argument out of
            range. TypeError: batches that do not fit the metric or the model.

    >>> import quantkern
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> found = quantkern.sensitivity(model, torch.randn(4, 16, 8), bits=(8, 2), progress=False)
    >>> found.bits, sorted(row.layer for row in found.rows)
    ((8, 2), ['0', '2'])
    >>> all(row.values[8] > row.values[2] + 15 for row in found.rows)
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not (callable(metric) or metric in ("sqnr", "accuracy")):
        raise ValueError(f"metric must be 'sqnr', 'accuracy' or a function of the model, got {metric!r}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1 or None, got {steps}")
    widths = _check_bits(bits)
    trial = _Trial(model, [{"op_types": ["default"]}] if config_list is None else config_list, widths)
    kept = list(itertools.islice(batches, steps))
    rows = []
    with Progress(len(kept) + len(trial.attachments) * len(widths)) if progress else nullcontext() as bar:

        def advance(text: str) -> None:
            if bar is not None:
                bar.describe(text)
                bar.advance()

        def observed() -> Iterator[Any]:
            for batch in kept:
                yield batch
                advance("calibration")

        expected = trial.calibrate(observed())

        def measure() -> float:
            if callable(metric):
                return float(metric(trial.model))
            return _accuracy(trial.model, kept) if metric == "accuracy" else _sqnr(trial.model, kept, expected)

        baseline = measure()
        for attachment in trial.attachments:
            values: dict[int, float] = {}
            for width in widths:
                with trial.quantized(attachment, width):
                    values[width] = measure()
                advance(f"{attachment.name or op_type(attachment.layer)}, {width} bits")
            drops = {width: 10 ** (-v / 10) if metric == "sqnr" else baseline - v for width, v in values.items()}
            weight = getattr(attachment.layer, "weight", None)
            count = weight.numel() if isinstance(weight, Tensor) else 0
            rows.append(LayerSensitivity(attachment.name, op_type(attachment.layer), count, values, drops))
    rows.sort(key=lambda row: -row.mean_drop)
    name = getattr(metric, "__name__", type(metric).__name__) if callable(metric) else metric
    return Sensitivity(name, baseline, widths, tuple(rows))
