"""Observers that remember a range."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkern import reference
from quantkern.observers.base import Observer, has_loops


class RangeObserver(Observer):
    """What both have in common: on the CPU a batch is taken in by one operation."""

    def ema_decay(self) -> float | None:
        """The weight of the past in a moving average; None: the smallest and largest value count."""
        return None

    def take_in(self, x: Tensor, axis: int | None) -> None:
        """As ``Observer.take_in``."""
        if not has_loops(x):
            super().take_in(x, axis)
            return
        state = self.low, self.high, self.batches, self.spoiled
        torch.ops.quantkern.observe_range.default(x, axis, self.ema_decay(), *state)


class MinMaxObserver(RangeObserver):
    """From the smallest to the largest value of all batches: nothing is clipped.

    >>> import torch
    >>> from quantkern.observers import ObserverSpec
    >>> observer = MinMaxObserver(ObserverSpec(8, "int", "per_tensor_symmetric"))
    >>> _ = observer(torch.tensor([-2.54, 1.0]))
    >>> round(observer.calculate_qparams()[0].item(), 6)
    0.02
    """


class MovingAverageObserver(RangeObserver):
    """A moving average of each batch's smallest and largest value; the rule's ema_decay is the weight of the past.

    Source: Jacob et al. 2018, section 3.1. The first batch stands for the past too.
    """

    def ema_decay(self) -> float | None:
        """As ``RangeObserver.ema_decay``."""
        return self.spec.ema_decay

    def widen(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The averages after a batch."""
        return reference.update_running(self.low, self.high, low, high, self.spec.ema_decay)
