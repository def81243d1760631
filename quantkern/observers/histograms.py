"""Observers that remember a histogram, and choose a range when they are asked."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkern import clip_range
from quantkern.clip_range import Histogram, Levels
from quantkern.observers.base import Observer, ObserverSpec, has_loops, power_of_two

BINS = 4096
"""Of a histogram of a whole tensor. Half of them at least are in use when the range has been reached."""
CHANNEL_BINS = 1024
"""Of each channel's histogram."""
MOST_AT_ONCE = 1 << 24
"""A float32 counts exactly up to here, and temporary tensors have no more elements."""
SMALLEST_EXPONENT = -124
"""Of a bin's width: 2^-124 and its reciprocal are float32 numbers with room on both sides."""
LARGEST_EXPONENT = 124


class HistogramObserver(Observer):
    """Counts values in bins and takes the range with the smallest squared error, both ends searched on their own.

    State besides the observer's: ``counts``, int64 [rows, bins], a row for the tensor or for each channel;
    ``exponent`` and ``origin``, int64 [rows]: bin i of a row holds the values in (w * (origin + i - 1),
    w * (origin + i)] with w = 2^exponent. For tensors without negative values the bin that ends at 0 holds exactly
    the zeros. Equal to what one histogram of all values over the final bins would be.

    >>> observer = HistogramObserver(ObserverSpec(4, "uint", "per_tensor_affine"))
    >>> x = torch.cat([torch.linspace(0, 1, 10000), torch.tensor([20.0])])
    >>> _ = observer(x)
    >>> round(observer.calculate_qparams()[0].item() * 15, 1)  # the error is smallest with the 20 clipped to this
    4.5
    """

    counts: Tensor
    exponent: Tensor
    origin: Tensor

    def __init__(
        self, spec: ObserverSpec, channels: int = 0, device: torch.device | None = None, label: str = "the tensor"
    ) -> None:
        super().__init__(spec, channels, device, label)
        rows, self.bins = (channels, CHANNEL_BINS) if spec.per_channel else (1, BINS)
        self.register_buffer("counts", torch.zeros((rows, self.bins), dtype=torch.int64, device=device))
        self.register_buffer("exponent", torch.full((rows,), SMALLEST_EXPONENT, dtype=torch.int64, device=device))
        self.register_buffer("origin", torch.zeros((rows,), dtype=torch.int64, device=device))

    def resize(self, channels: int) -> None:
        """As ``Observer.resize``."""
        super().resize(channels)
        self.counts.resize_(channels, self.bins).fill_(0)
        self.exponent.resize_(channels).fill_(SMALLEST_EXPONENT)
        self.origin.resize_(channels).fill_(0)

    def take_in(self, x: Tensor, axis: int | None) -> None:
        """As ``Observer.take_in``."""
        if not has_loops(x):
            super().take_in(x, axis)
            return
        state = self.low, self.high, self.counts, self.exponent, self.origin, self.batches, self.spoiled
        torch.ops.quantkern.observe_histogram.default(x, axis, *state)

    def grow(self, least: Tensor | None = None) -> None:
        """Merge bins until they hold the range [low, high] and 0.

        least: exponents that the width gets at least.
        """
        low, high = self.low.reshape(-1).clamp(max=0), self.high.reshape(-1).clamp(min=0)
        width = (high.double() - low.double()) / (self.bins - 2)
        needed = torch.where(width > 0, torch.frexp(width).exponent, SMALLEST_EXPONENT)
        least = self.exponent if least is None else least
        exponent = torch.maximum(least, needed.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT).long())
        self.merge(exponent, (low * power_of_two(-exponent)).ceil().long())

    def merge(self, exponent: Tensor, origin: Tensor) -> None:
        """Move the counts to bins of another width (the same or a larger one) and origin."""
        edge = torch.arange(self.bins, device=self.counts.device) + self.origin.unsqueeze(1)
        # Bin n ends at n times the old width and lies in the bin that ends at ceil(n / 2^shift) times the new one.
        merged = -(-edge >> (exponent - self.exponent).unsqueeze(1).clamp(max=62)) - origin.unsqueeze(1)
        index = merged.clamp(0, self.bins - 1)  # only bins that hold nothing lie outside
        self.counts.copy_(torch.zeros_like(self.counts).scatter_add_(1, index, self.counts))
        self.exponent.copy_(exponent)
        self.origin.copy_(origin)

    def count(self, rows: Tensor) -> None:
        """Take every value into its bin."""
        if self.spec.per_channel:
            self.count_channels(rows)
            return
        scale, origin = power_of_two(-self.exponent), self.origin.float()
        for part in torch.split(rows.reshape(-1), MOST_AT_ONCE):  # type: ignore[no-untyped-call]
            self.counts[0] += count_of(part.mul(scale).ceil_().sub_(origin), self.bins)

    def count_channels(self, rows: Tensor) -> None:
        """Take every value into its bin of its row."""
        scale, origin = power_of_two(-self.exponent).unsqueeze(1), self.origin.float().unsqueeze(1)
        first = torch.arange(len(rows), device=rows.device).unsqueeze(1) * self.bins
        for columns in torch.split(rows, max(1, MOST_AT_ONCE // len(rows)), 1):  # type: ignore[no-untyped-call]
            # Spoiled values must not leave their row; calculate_qparams() refuses the batch.
            bins = columns.mul(scale).ceil_().sub_(origin).clamp_(0, self.bins - 1).nan_to_num_(0.0)
            index = (bins.long() + first).reshape(-1)
            found = self.counts.new_zeros(self.counts.numel()).scatter_add_(0, index, torch.ones_like(index))
            self.counts += found.reshape(self.counts.shape)

    def over_ranks(self) -> Observer:
        """As ``Observer.over_ranks``; the counts are added up in common bins."""
        whole = super().over_ranks()
        assert isinstance(whole, HistogramObserver)
        largest = whole.exponent.clone()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        whole.grow(largest)
        torch.distributed.all_reduce(whole.counts)
        return whole

    def histogram(self) -> Histogram:
        """The counts with their edges, as float64."""
        edge = torch.arange(-1, self.bins, device=self.counts.device) + self.origin.unsqueeze(1)
        width = power_of_two(self.exponent).double().unsqueeze(1)
        low, high = self.low.reshape(-1).double(), self.high.reshape(-1).double()
        return Histogram(self.counts.double(), edge.double() * width, low, high)

    def search(self, histogram: Histogram, levels: Levels) -> tuple[Tensor, Tensor]:
        """The ranges for a histogram's rows."""
        if not has_loops(histogram.counts):
            return clip_range.smallest_error(histogram, levels)
        rows = histogram.counts, histogram.edges, histogram.low, histogram.high
        return torch.ops.quantkern.histogram_range.default(  # type: ignore[no-any-return]
            *rows, levels.quant_min, levels.quant_max, levels.symmetric
        )

    def clip_range(self) -> tuple[Tensor, Tensor]:
        """The range that ``search`` finds."""
        low, high = self.search(self.histogram(), Levels(*self.spec.quant_range, self.spec.symmetric))
        return low.reshape(self.low.shape), high.reshape(self.low.shape)


class PercentileObserver(HistogramObserver):
    """From the (100 - percentile)th to the percentile-th percentile of all values; 99.99 unless the rule says.

    >>> observer = PercentileObserver(ObserverSpec(8, "uint", "per_tensor_affine", percentile=90.0))
    >>> _ = observer(torch.linspace(0, 1, 10001))
    >>> round(observer.clip_range()[1].item(), 3)
    0.9
    """

    def search(self, histogram: Histogram, levels: Levels) -> tuple[Tensor, Tensor]:
        """The percentiles; a symmetric grid then covers the larger of both."""
        return clip_range.percentiles(histogram, self.spec.percentile)


class MSEObserver(HistogramObserver):
    """Of 64 equal shrinkings of the range of all values the one with the smallest squared error."""

    def search(self, histogram: Histogram, levels: Levels) -> tuple[Tensor, Tensor]:
        """The best of the shrunk ranges."""
        return clip_range.smallest_error_of_parts(histogram, levels)


class EntropyObserver(HistogramObserver):
    """Of 64 shrinkings the one whose quantized values are distributed most like the real ones (KL divergence).

    Source: Migacz, "8-bit Inference with TensorRT", 2017.
    """

    def search(self, histogram: Histogram, levels: Levels) -> tuple[Tensor, Tensor]:
        """The range with the smallest divergence."""
        return clip_range.smallest_divergence(histogram, levels)


def count_of(index: Tensor, bins: int) -> Tensor:
    """How many of the numbers in ``index`` (float32, whole) are 0, 1, ..., bins - 1; int64 [bins].

    Numbers outside and NaN are left out. Nothing waits for the device.

    >>> count_of(torch.tensor([2.0, 0.0, 2.0]), 4).tolist()
    [1, 0, 2, 0]
    """
    if torch.are_deterministic_algorithms_enabled():
        edges = torch.arange(bins + 1, dtype=index.dtype, device=index.device)
        return torch.searchsorted(index.sort().values, edges).diff()
    return torch.histc(index, bins, 0, bins).long()
