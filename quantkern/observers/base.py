"""What every observer is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkern import reference
from quantkern.backend import Backend, resolve
from quantkern.config import TensorSpec


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
    """Whether observing x has a loop of its own, instead of operations of torch."""
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
