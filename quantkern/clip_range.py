"""From a histogram to the range that a grid of few values should cover.

Every function takes histograms, one a row, and returns the lower and upper ends of the ranges, one a row. They run
once a tensor, when calibration is over.

Sources: Migacz, "8-bit Inference with TensorRT", 2017 (entropy); Choukroun et al., "Low-bit Quantization of Neural
Networks for Efficient Inference", 2019, and Wu et al., "Integer Quantization for Deep Learning Inference", 2020
(squared error, percentiles).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, wraps

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkern import reference

Ranges = tuple[Tensor, Tensor]

PARTS = 64
"""How many parts of a range are tried at a time."""
COARSE_BINS = 512
"""Bins are merged to so many while all parts of a range are tried; refining looks at all bins."""
FINE_PARTS = 9
"""How many places around the best part, up to its neighbours, are tried to refine it."""
MOST_ELEMENTS = 1 << 22
"""Rows are taken together as long as a temporary tensor has no more elements."""
SMOOTHING = 1e-4
"""The share of probability that bins get which a coarse distribution leaves empty (entropy)."""


@dataclass(frozen=True)
class Levels:
    """The integers of a grid, and whether it has the same range on both sides of 0."""

    quant_min: int
    quant_max: int
    symmetric: bool

    def scale(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the grids for the ranges [low, high], as float32 has them."""
        bounds = self.quant_min, self.quant_max, self.symmetric
        scale, zero_point = reference.choose_scale(low.float(), high.float(), *bounds)
        return scale.to(low.dtype), zero_point


@dataclass(frozen=True)
class Histogram:
    """How often the values of a tensor fall into bins of equal width; a row for the tensor or for each channel.

    counts: [rows, bins]. edges: [rows, bins + 1], bin i holds the values in (edges[i], edges[i + 1]]. low, high:
    [rows], the smallest and the largest value seen. All float64.
    """

    counts: Tensor
    edges: Tensor
    low: Tensor
    high: Tensor

    @cached_property
    def density_change(self) -> Tensor:
        """At each edge the density below it less the density above it, [rows, bins + 1]."""
        density = self.counts / (self.edges[:, 1:] - self.edges[:, :-1])
        return pad(density, (1, 0)) - pad(density, (0, 1))

    def without_zeros(self) -> Histogram:
        """Without the bin that ends at 0 in rows of no negative value: what it holds is 0, which is on every grid."""
        zeros = (self.edges[:, 1:] == 0) & (self.low >= 0).unsqueeze(1)
        return Histogram(self.counts.masked_fill(zeros, 0.0), self.edges, self.low, self.high)

    def merged(self, bins: int) -> Histogram:
        """With so many bins at most, neighbours merged."""
        step = -(-self.counts.shape[1] // bins)
        counts = pad(self.counts, (0, -self.counts.shape[1] % step))
        edges = self.edges[:, :1] + (self.edges[:, 1:2] - self.edges[:, :1]) * step * torch.arange(
            counts.shape[1] // step + 1, dtype=counts.dtype, device=counts.device
        )
        return Histogram(counts.reshape(len(counts), -1, step).sum(2), edges, self.low, self.high)

    def trimmed(self) -> Histogram:
        """Without the bins at both ends that hold nothing in any row."""
        filled = self.counts.any(0).nonzero().squeeze(1).tolist()
        first, last = (filled[0], filled[-1] + 1) if filled else (0, 1)
        return Histogram(self.counts[:, first:last], self.edges[:, first : last + 1], self.low, self.high)

    def rows(self, chosen: slice) -> Histogram:
        """Some of the rows."""
        return Histogram(*(getattr(self, field.name)[chosen] for field in fields(self)))


def in_parts(search: Callable[[Histogram, Levels], Ranges]) -> Callable[[Histogram, Levels], Ranges]:
    """``search`` on as many rows at a time as memory should be spent on."""

    @wraps(search)
    def run(histogram: Histogram, levels: Levels) -> Ranges:
        count, bins = histogram.counts.shape
        step = max(1, MOST_ELEMENTS // (PARTS * bins))
        found = [search(histogram.rows(slice(i, i + step)), levels) for i in range(0, count, step)]
        low, high = (torch.cat(ends) for ends in zip(*found, strict=True))
        return low, high

    return run


def error_integral(steps: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """The integral from 0 to x of (t - q(t))^2 over t, in units of a grid's step: t, x and q are numbers of steps.

    q(t) is the integer nearest to t from ``first`` to ``last``, which 0 is one of. With r = q(x) it is
    r / 12 + (x - r)^3 / 3: every whole step within the grid contributes 1 / 12, what lies outside a third of its
    distance to the end, cubed.

    >>> error_integral(torch.tensor([3.0]), torch.tensor(0.0), torch.tensor(2.0)).item() == 2 / 12 + 1 / 3
    True
    """
    nearest = torch.clamp(steps, first, last).round_()
    rest = steps - nearest
    return (rest * rest).mul_(rest).div_(3).add_(nearest, alpha=1 / 12)


def squared_errors(histogram: Histogram, low: Tensor, high: Tensor, levels: Levels) -> Tensor:
    """The summed squared error that the grids for [low, high], [rows, candidates], make; shaped like ``low``.

    The values are taken as evenly spread within each bin, for which the error is exact: no search is misled by the
    few places where a bin's middle happens to lie.
    """
    scale, zero_point = levels.scale(low, high)
    steps = histogram.edges.unsqueeze(1) / scale.unsqueeze(2)
    ends = ((end - zero_point).to(steps.dtype).unsqueeze(2) for end in (levels.quant_min, levels.quant_max))
    integral = error_integral(steps, *ends)
    # The sum over the bins of density * (integral at the end - integral at the start), by edges.
    return (integral @ histogram.density_change.unsqueeze(2)).squeeze(2) * scale**3


def parts_of(low: Tensor, count: int = PARTS) -> Tensor:
    """1, (count - 1) / count, ..., 1 / count."""
    return torch.arange(count, 0, -1, dtype=low.dtype, device=low.device) / count


def pick(score: Tensor, *values: Tensor) -> list[Tensor]:
    """Of each row, [rows, candidates], the first value that has the smallest score; [rows, 1]."""
    best = score.argmin(1, keepdim=True)
    return [value.gather(1, best) for value in values]


@in_parts
def smallest_error_of_parts(histogram: Histogram, levels: Levels) -> Ranges:
    """Of 64 equal shrinkings of the whole range the one with the smallest squared error."""
    plain = histogram.without_zeros().trimmed()
    parts = parts_of(plain.low).expand(len(plain.low), -1)
    low, high = (plain.low.clamp(max=0).unsqueeze(1) * parts, plain.high.clamp(min=0).unsqueeze(1) * parts)
    low, high = pick(squared_errors(plain, low, high, levels), low, high)
    return low.squeeze(1), high.squeeze(1)


@in_parts
def smallest_error(histogram: Histogram, levels: Levels) -> Ranges:
    """The range with the smallest squared error, both ends searched on their own.

    Starts with the best of 64 parts of the range, of its upper end, and of its lower end; then moves one end at a
    time, over all its parts and, in quarters of them, around the best.
    """
    plain = histogram.without_zeros()
    coarse = plain.merged(COARSE_BINS)
    bottom, top = plain.low.clamp(max=0).unsqueeze(1), plain.high.clamp(min=0).unsqueeze(1)
    if levels.symmetric:
        top = torch.maximum(-bottom, top)
        bottom = -top
    parts = parts_of(bottom).expand(len(bottom), -1)

    def best(seen: Histogram, lower: Tensor, upper: Tensor) -> list[Tensor]:
        return pick(squared_errors(seen, bottom * lower, top * upper, levels), lower, upper)

    def around(part: Tensor) -> Tensor:
        offsets = torch.linspace(-1 / PARTS, 1 / PARTS, FINE_PARTS, dtype=part.dtype, device=part.device)
        return torch.cat([part, (part + offsets).clamp(0, 1)], 1)

    if levels.symmetric or not bool(((bottom < 0) & (top > 0)).any()):
        lower, upper = best(coarse, parts, parts)
        lower, upper = best(plain, around(lower), around(upper))
    else:
        whole = torch.ones_like(parts)
        lower, upper = best(coarse, torch.cat([parts, parts, whole], 1), torch.cat([parts, whole, parts], 1))
        lower, upper = best(coarse, lower.expand(-1, PARTS + 1), torch.cat([upper, parts], 1))
        lower, upper = best(coarse, torch.cat([lower, parts], 1), upper.expand(-1, PARTS + 1))
        lower, upper = best(plain, lower.expand(-1, FINE_PARTS + 1), around(upper))
        lower, upper = best(plain, around(lower), upper.expand(-1, FINE_PARTS + 1))
    return (bottom * lower).squeeze(1), (top * upper).squeeze(1)


def divergences(histogram: Histogram, low: Tensor, high: Tensor, levels: Levels) -> Tensor:
    """KL divergence of the quantized distribution from the real one, for ranges [rows, candidates].

    The real distribution is cut at the ends of the grid, with what lies outside added to the outermost bins inside.
    The quantized one gives all bins of one level that hold anything the same share of what they hold together.
    """
    edges, counts = histogram.edges.unsqueeze(1), histogram.counts.unsqueeze(1)
    # The middle of an outermost bin may lie beyond every value in it.
    middle = ((edges[..., 1:] + edges[..., :-1]) / 2).clamp(
        histogram.low.reshape(-1, 1, 1), histogram.high.reshape(-1, 1, 1)
    )
    scale, zero_point = (value.unsqueeze(2) for value in levels.scale(low, high))
    level = (middle / scale).round() + zero_point
    below, above = level < levels.quant_min, level > levels.quant_max
    inside = ~(below | above)
    index = (level.clamp(levels.quant_min, levels.quant_max) - levels.quant_min).long()
    kept = counts * inside
    filled = (kept > 0).to(kept.dtype)
    empty = kept.new_zeros(*index.shape[:2], levels.quant_max - levels.quant_min + 1)
    mass, bins = (empty.scatter_add(2, index, value) for value in (kept, filled))
    quantized = (mass / bins.clamp(min=1)).gather(2, index) * filled
    positions = torch.arange(counts.shape[-1], device=counts.device)
    real = kept
    for outside, end in (
        (counts * below, torch.where(inside, positions, len(positions)).amin(2, keepdim=True)),
        (counts * above, torch.where(inside, positions, -1).amax(2, keepdim=True)),
    ):
        real = real.scatter_add(2, end.clamp(0, len(positions) - 1), outside.sum(2, keepdim=True))
    smallest = SMOOTHING / len(positions)
    real, quantized = (value / value.sum(2, keepdim=True).clamp(min=1) for value in (real, quantized))
    terms = real * (real.clamp(min=1e-300).log() - quantized.clamp(min=smallest).log())
    return torch.where(inside.any(2), terms.sum(2), torch.inf)


@in_parts
def smallest_divergence(histogram: Histogram, levels: Levels) -> Ranges:
    """Of 64 equal shrinkings of the whole range the one whose quantized distribution is nearest to the real one."""
    plain = histogram.without_zeros().trimmed()
    low, high = plain.low.clamp(max=0).unsqueeze(1), plain.high.clamp(min=0).unsqueeze(1)
    parts = parts_of(low).expand(len(low), -1)
    step = max(1, MOST_ELEMENTS // (len(low) * (levels.quant_max - levels.quant_min + 1)))
    groups: tuple[Tensor, ...] = torch.split(parts, step, 1)  # type: ignore[no-untyped-call]
    score = torch.cat([divergences(plain, low * p, high * p, levels) for p in groups], 1)
    low, high = pick(score, low * parts, high * parts)
    return low.squeeze(1), high.squeeze(1)


def percentiles(histogram: Histogram, percentile: float) -> Ranges:
    """The values that 100 - ``percentile`` and ``percentile`` percent of all lie below, linear within a bin."""
    total = histogram.counts.cumsum(1)
    width = histogram.edges[:, 1:] - histogram.edges[:, :-1]
    ends = []
    for share, right in ((1 - percentile / 100, True), (percentile / 100, False)):
        target = total[:, -1:] * share
        index = torch.searchsorted(total, target, right=right).clamp(max=total.shape[1] - 1)
        before, inside = (total - histogram.counts).gather(1, index), histogram.counts.gather(1, index)
        part = ((target - before) / inside.clamp(min=1)).clamp(0, 1)
        value = histogram.edges.gather(1, index) + part * width.gather(1, index)
        ends.append(torch.minimum(torch.maximum(value.squeeze(1), histogram.low), histogram.high))
    return ends[0], ends[1]
