"""The modules of binary networks: they keep nothing, a sign needs no scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantkern import functional
from quantkern.config import TensorSpec
from quantkern.fake_quant import FakeQuant


class BinaryQuant(FakeQuant):
    """What both have in common: nothing is known about a tensor but that it has one bit."""

    def extra_repr(self) -> str:
        """The rule, for ``print(model)``."""
        return "1 bit"

    def settings(self, name: str) -> dict[str, Any]:
        """The bits, a Python number."""
        return {f"{name}_bits": self.spec.bits}


class BinaryWeight(BinaryQuant):
    """A parametrization: the weight's signs; the whole gradient passes, since the weight itself is clipped."""

    def __init__(self, label: str, spec: TensorSpec, weight: Tensor) -> None:
        super().__init__(label, spec, weight.device)

    def forward(self, weight: Tensor) -> Tensor:
        """+1 or -1."""
        return functional.binarize(weight, clip_gradient=False)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to ``layer.weight`` sets the real weight."""
        return weight


class BinaryActivation(BinaryQuant):
    """The signs of an input or output; the gradient passes where it lies in [-1, 1]."""

    def __init__(self, label: str, spec: TensorSpec, channels: int, device: torch.device) -> None:
        super().__init__(label, spec, device)

    def forward(self, x: Tensor) -> Tensor:
        """+1 or -1."""
        return functional.binarize(x)


def real_weights(layers: list[nn.Module]) -> list[Tensor]:
    """The weights behind the signs, which training moves.

    One that another parametrization made before its sign was taken is not a parameter and left out.
    """
    found = []
    for layer in layers:
        if parametrize.is_parametrized(layer, "weight"):
            entries: Any = layer.parametrizations["weight"]  # type: ignore[index]
            if len(entries) == 1 and isinstance(entries[0], BinaryWeight):
                found.append(entries.original)
    return found


class WeightClipper:
    """Keeps the real weights of binary layers in [-1, 1]; as step post-hook of an optimizer after each step."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers = layers

    @torch.no_grad()
    def __call__(self, *_: object) -> None:
        """Clip them all, at once and in place."""
        weights = real_weights(self.layers)
        if weights:
            torch._foreach_clamp_min_(weights, -1.0)
            torch._foreach_clamp_max_(weights, 1.0)
