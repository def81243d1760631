"""Observers of given tensors, and the error of a grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkern import reference
from quantkern.clip_range import Levels
from quantkern.observers import OBSERVERS, Observer, ObserverSpec

EVERY = sorted(OBSERVERS)
WITH_BINS = [name for name in EVERY if name not in ("minmax", "moving_average")]


def spec(name: str = "histogram", bits: int = 8, **more: Any) -> ObserverSpec:
    settings = {"dtype": "uint", "scheme": "per_tensor_affine", **more}
    return ObserverSpec(bits, observer=name, **settings)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(observer: Observer, batches: list[Tensor], axis: int | None = None) -> Observer:
    for batch in batches:
        observer.observe(batch, axis)
    return observer


def error(x: Tensor, scale: Tensor, zero_point: Tensor, levels: Levels) -> float:
    y = reference.quantize(x, scale, zero_point, levels.quant_min, levels.quant_max)[0]
    return float((y - x).double().square().mean())
