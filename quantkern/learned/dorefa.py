"""The modules of DoReFa-Net: transforms of weights, activations and gradients that have no scale to keep."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkern import functional
from quantkern.config import TensorSpec
from quantkern.fake_quant import FakeQuant


@dataclass(frozen=True)
class DorefaSpec(TensorSpec):
    """``seed`` None: the noise of gradients comes from torch's generator."""

    seed: int | None = None


class DorefaQuant(FakeQuant):
    """What the three have in common: nothing is known about a tensor but its bits."""

    spec: DorefaSpec

    def extra_repr(self) -> str:
        """The rule, for ``print(model)``."""
        return f"{self.spec.bits} bits"

    def settings(self, name: str) -> dict[str, Any]:
        """The bits."""
        return {f"{name}_bits": self.spec.bits}


class DorefaWeight(DorefaQuant):
    """A parametrization: the weight through tanh on a grid in [-1, 1]; its signs times their mean with one bit."""

    def __init__(self, label: str, spec: DorefaSpec, weight: Tensor) -> None:
        super().__init__(label, spec, weight.device)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on its grid."""
        return functional.dorefa_weight(weight, self.spec.bits)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to ``layer.weight`` sets the float weight."""
        return weight


class DorefaActivation(DorefaQuant):
    """An input or output clipped to [0, 1] and rounded."""

    def __init__(self, label: str, spec: DorefaSpec, channels: int, device: torch.device) -> None:
        super().__init__(label, spec, device)

    def forward(self, x: Tensor) -> Tensor:
        """x on its grid."""
        return functional.dorefa_activation(x, self.spec.bits)


class DorefaGradient(DorefaQuant):
    """The identity in training whose gradient comes back quantized.

    With a seed in the rule every call counts on the device, and the noise depends on the seed, the layer's name and
    the count only: a run that goes on from a state_dict has the noise of one that was never interrupted.
    """

    calls: Tensor | None

    def __init__(self, label: str, spec: DorefaSpec, channels: int, device: torch.device) -> None:
        super().__init__(label, spec, device)
        counter = None if spec.seed is None else torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("calls", counter)
        # One seed gives every layer noise of its own.
        self.first_seed = (zlib.crc32(label.encode()) >> 1 << 32) ^ (spec.seed or 0)

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        if not self.training or not torch.is_grad_enabled():
            return x
        if self.calls is None:
            return functional.dorefa_gradient(x, self.spec.bits)
        seed = self.calls + self.first_seed
        # The counter is computed from the seed: a compiled backward that computed the seed again from a counter
        # which has gone on meanwhile would draw other noise.
        self.calls.copy_(seed - (self.first_seed - 1))
        return functional.dorefa_gradient(x, self.spec.bits, seed)
