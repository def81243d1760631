"""Observers that remember a range."""

from __future__ import annotations

from torch import Tensor

from quantkern import reference
from quantkern.observers.base import Observer


class MinMaxObserver(Observer):
    """From the smallest to the largest value of all batches: nothing is clipped.

    >>> import torch
    >>> from quantkern.observers import ObserverSpec
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
