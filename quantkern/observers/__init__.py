"""What is remembered of a tensor over many batches, and the scale and zero point that follow from it.

Observing is a few torch operations on the tensor's device, which never wait for it; on the CPU it is one of our own.
A histogram has a fixed number of bins whose width is a power of two and whose edges are multiples of it: when the range
grows, bins are merged, so the counts are exact and do not depend on the order of the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from quantkern.observers.base import Observer, ObserverSpec
from quantkern.observers.histograms import EntropyObserver, HistogramObserver, MSEObserver, PercentileObserver
from quantkern.observers.ranges import MinMaxObserver, MovingAverageObserver

__all__ = [
    "OBSERVERS",
    "EntropyObserver",
    "HistogramObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Observer",
    "ObserverSpec",
    "PercentileObserver",
    "make_observer",
]

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
