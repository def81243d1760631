"""Notices that a quantized layer was replaced while the model trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

Place = tuple[nn.Module, str, nn.Module]
"""A module, the name of a child, and the layer that was quantized there."""


class StillThere:
    """Forward pre-hook of a model: a warning in the first training forward after a quantized layer was replaced.

    What took the layer's place trains in float. ``export_model``, ``report`` and ``compress`` refuse such a model.
    """

    def __init__(self, model: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> None:
        self.layers = list(layers)
        own = {id(layer) for _, layer in self.layers}
        self.places: list[Place] = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child is not None and id(child) in own
        ]

    def __call__(self, model: nn.Module, args: Any) -> None:
        """Look, at the cost of a dict lookup a layer; a compiler has looked at its modules already."""
        if torch.compiler.is_compiling() or not model.training or getattr(model, "_is_replica", False):
            return
        if all(parent._modules.get(name) is layer for parent, name, layer in self.places):
            return
        present = set(model.modules())
        gone = [name for name, layer in self.layers if layer not in present]
        self.places = [place for place in self.places if place[0]._modules.get(place[1]) is place[2]]
        if gone:
            warnings.warn(
                f"{', '.join(map(repr, gone))} replaced after quantization: what took the place trains in float, and "
                "export_model() will refuse this model. Change a model first, then quantize it, or put the layer back",
                UserWarning,
                stacklevel=2,
            )
