"""What is remembered of a tensor over many batches, and the scale and zero point that follow from it.

Observing is a few torch operations on the tensor's device, which never wait for it; for histograms on the CPU it is one
of our own. A histogram has a fixed number of bins whose width is a power of two and whose edges are
multiples of it: when the range grows, bins are merged, so the counts are exact and do not depend on the order of the
batches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkern import clip_range, reference
from quantkern.backend import Backend, resolve
from quantkern.clip_range import Histogram, Levels
from quantkern.config import TensorSpec

BINS = 4096
"""Of a histogram of a whole tensor. Half of them at least are in use when the range has been reached."""
CHANNEL_BINS = 1024
"""Of each channel's histogram."""
MOST_AT_ONCE = 1 << 24
"""A float32 counts exactly up to here, and temporary tensors have no more elements."""
SMALLEST_EXPONENT = -124
"""Of a bin's width: 2^-124 and its reciprocal are float32 numbers with room on both sides."""
LARGEST_EXPONENT = 124


@dataclass(frozen=True)
class ObserverSpec(TensorSpec):
    """How a tensor is observed and then quantized.

    observer: one of ``OBSERVERS``. percentile: for that observer. reduce_range: leave out the upper half of the
    range of integers, which instructions for 8-bit products on older processors need so as not to overflow.

    >>> ObserverSpec(8, "uint", "per_tensor_affine", reduce_range=True).quant_range
    (0, 127)
    >>> ObserverSpec(8, "int", "per_tensor_symmetric", reduce_range=True).quant_range
    (-63, 63)
    """

    observer: str = ""
    percentile: float = 99.99
    reduce_range: bool | None = None

    @property
    def quant_range(self) -> tuple[int, int]:
        """quant_min and quant_max; with reduce_range those of one bit less."""
        bits = self.bits - bool(self.reduce_range)
        return (0, 2**bits - 1) if self.dtype == "uint" else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32, exactly on every device; for integers from -126 to 127.

    >>> power_of_two(torch.tensor([-3, 0, 20])).tolist()
    [0.125, 1.0, 1048576.0]
    """
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def usable_scale(scale: Tensor) -> Tensor:
    """The scale of a tensor or channel of zeros is 1, or the largest of the other channels.

    Any scale holds zeros; this one also makes sense for a value that was not seen, and in a product of two scales.

    >>> usable_scale(torch.tensor([0.5, torch.finfo(torch.float32).tiny])).tolist()
    [0.5, 0.5]
    """
    alive = scale > reference.SMALLEST_SCALE
    largest = torch.where(alive, scale, 0.0).amax() if scale.numel() else scale.new_zeros(())
    return torch.where(alive, scale, torch.where(largest > 0, largest, 1.0))


def has_loops(x: Tensor) -> bool:
    """Whether histograms of x have a loop of their own, instead of operations of torch."""
    return x.device.type == "cpu" and resolve(x, Backend.AUTO) is Backend.NATIVE


class Observer(nn.Module):
    """Sees batches of a tensor and says which scale and zero point suit them.

    The subclasses are named in ``OBSERVERS``. Called with a tensor it takes it in and returns it unchanged.

    Args:
        spec: bits, dtype, scheme, axis and what the observer needs to know.
        channels: with a per-channel scheme their number; 0: the first batch tells.
        device: where the state lives; the tensors must be there too.
        label: what errors call the tensor.

    State: ``low`` and ``high``, float32, 0-d or [channels]; ``batches``, the number of batches so far; ``spoiled``,
    the first one with a NaN or an infinity in it, counted from 1, or 0. Empty batches do not count.
    """

    low: Tensor
    high: Tensor
    batches: Tensor
    spoiled: Tensor

    def __init__(
        self, spec: ObserverSpec, channels: int = 0, device: torch.device | None = None, label: str = "the tensor"
    ) -> None:
        super().__init__()
        self.spec, self.label = spec, label
        shape = (channels,) if spec.per_channel else ()
        self.register_buffer("low", torch.full(shape, math.inf, device=device))
        self.register_buffer("high", torch.full(shape, -math.inf, device=device))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("spoiled", torch.zeros((), dtype=torch.int64, device=device))

    def extra_repr(self) -> str:
        """The rule, for ``print(model)``."""
        return f"{self.spec.bits} bits, {self.spec.dtype}, {self.spec.scheme}"

    def has_seen(self) -> bool:
        """Whether there was a batch. Waits for the device."""
        return bool(self.batches > 0)

    def forward(self, x: Tensor) -> Tensor:
        """Take x in; x itself."""
        self.observe(x, self.spec.axis)
        return x

    @torch.no_grad()
    def observe(self, x: Tensor, axis: int | None = None) -> None:
        """Take a batch in: float16, bfloat16, float32 or float64; per channel along ``axis``."""
        if not x.numel():
            return
        if axis is not None and x.shape[axis] != self.low.numel():
            if self.has_seen():
                expected = f"{self.low.numel()} channels on axis {axis} as in earlier batches"
                raise ValueError(f"{self.label} has shape {list(x.shape)}, expected {expected}")
            self.resize(x.shape[axis])
        self.take_in(x.detach(), axis)

    def take_in(self, x: Tensor, axis: int | None) -> None:
        """``observe`` for a tensor that has values and the right number of channels."""
        rows = x.float()
        if axis is not None:
            rows = rows.movedim(axis, 0).unsqueeze(-1).flatten(1)
        low, high = torch.aminmax(rows) if axis is None else torch.aminmax(rows, dim=1)
        self.batches += 1
        usable = (torch.isfinite(low) & torch.isfinite(high)).all()
        first = ~usable & (self.spoiled == 0)
        self.spoiled.copy_(torch.where(first, self.batches, self.spoiled))
        new_low, new_high = self.widen(low, high)
        self.low.copy_(torch.where(usable, new_low, self.low))
        self.high.copy_(torch.where(usable, new_high, self.high))
        self.grow()
        self.count(rows)

    def widen(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The range after a batch with the range [low, high]."""
        return torch.minimum(low, self.low), torch.maximum(high, self.high)

    def grow(self) -> None:
        """Called after the range may have changed."""

    def count(self, rows: Tensor) -> None:
        """Look at the values themselves: float32, of any shape per tensor, [channels, elements] per channel."""

    def clip_range(self) -> tuple[Tensor, Tensor]:
        """The range that the grid should cover, shaped as ``low``; float32 or float64."""
        return self.low, self.high

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32) of what has been seen, 0-d or [channels].

        Raises:
            RuntimeError: nothing has been seen. ValueError: a batch held NaN or an infinity.
        """
        if not self.has_seen():
            raise RuntimeError(f"{self.label} has not been seen: run batches through the observer first")
        spoiled = self.damage()
        if spoiled:
            raise ValueError(spoiled)
        low, high = (value.float() for value in self.clip_range())
        scale, zero_point = reference.choose_scale(low, high, *self.spec.quant_range, self.spec.symmetric)
        return usable_scale(scale), zero_point

    def damage(self) -> str:
        """Which batch cannot be used, in words; empty when all can."""
        number, count = int(self.spoiled), int(self.batches)
        if not number:
            return ""
        return f"{self.label} holds NaN or infinity" + (f" in batch {number} of {count}" if count > 1 else "")

    def resize(self, channels: int) -> None:
        """Become the state of ``channels`` channels that have seen nothing, in the same tensors."""
        self.low.resize_(channels).fill_(math.inf)
        self.high.resize_(channels).fill_(-math.inf)

    def over_ranks(self) -> Observer:
        """What all ranks of torch.distributed have seen together, as a new observer; all must call it."""
        whole = copy.deepcopy(self)
        operations = torch.distributed.ReduceOp
        for tensor, operation in (
            (whole.low, operations.MIN),
            (whole.high, operations.MAX),
            (whole.batches, operations.SUM),
            (whole.spoiled, operations.MAX),
        ):
            torch.distributed.all_reduce(tensor, operation)
        return whole

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Observer:
        """Follow the model to another device, but stay float32 when it becomes half or double."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        low: Any = state_dict.get(prefix + "low")
        other = isinstance(low, Tensor) and low.dim() == self.low.dim() == 1 and low.shape != self.low.shape
        if other and not self.has_seen():
            self.resize(low.numel())
        super()._load_from_state_dict(state_dict, prefix, *args)


class MinMaxObserver(Observer):
    """From the smallest to the largest value of all batches: nothing is clipped.

    >>> observer = MinMaxObserver(ObserverSpec(8, "int", "per_tensor_symmetric"))
    >>> _ = observer(torch.tensor([-2.54, 1.0]))
    >>> round(observer.calculate_qparams()[0].item(), 6)
    0.02
    """


class MovingAverageObserver(Observer):
    """A moving average of each batch's smallest and largest value; the rule's ema_decay is the weight of the past.

    Source: Jacob et al. 2018, section 3.1. The first batch stands for the past too.
    """

    def widen(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The averages after a batch."""
        return reference.update_running(self.low, self.high, low, high, self.spec.ema_decay)


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


OBSERVERS: Mapping[str, Callable[..., Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "histogram": HistogramObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "entropy": EntropyObserver,
}
"""What a rule's ``observer`` may be."""


def make_observer(
    spec: ObserverSpec, channels: int = 0, device: torch.device | None = None, label: str = "the tensor"
) -> Observer:
    """The observer that a spec names.

    >>> make_observer(ObserverSpec(8, "uint", "per_tensor_affine", observer="entropy"))
    EntropyObserver(8 bits, uint, per_tensor_affine)
    """
    return OBSERVERS[spec.observer](spec, channels, device, label)
