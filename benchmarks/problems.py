"""What a contestant is asked to do, and what it may answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantkern import reference

FAKE_QUANTIZE, WEIGHT, ACTIVATION = "fake_quantize", "weight", "activation"
OPERATIONS = {
    FAKE_QUANTIZE: "fake-quantize with a given scale and zero point",
    WEIGHT: "min and max of the tensor, scale (symmetric, -127..127), fake-quantize",
    ACTIVATION: "min and max, moving average (decay 0.99), scale and zero point (affine, 0..255), fake-quantize",
}
LSQ, DOREFA_WEIGHT, DOREFA_ACTIVATION = "lsq", "dorefa_weight", "dorefa_activation"

EMA_DECAY = 0.99


class Unsupported(Exception):
    """The library has no operation for this problem."""


@dataclass
class Problem:
    """The work: an operation on a tensor of its own, and the numbers that all contestants share.

    x: the tensor, an nn.Parameter; its values may change between calls, the object does not.
    scale, zero_point: of ``fake_quantize``; the other operations find their own.
    axis: None quantizes per tensor.
    """

    operation: str
    x: nn.Parameter
    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    symmetric: bool
    axis: int | None

    @property
    def channels(self) -> int:
        """How many scales there are."""
        return 1 if self.axis is None else self.x.shape[self.axis]

    def state(self) -> dict[str, Tensor]:
        """Fresh device state: range (nothing seen), scale and zero point, one value a channel."""
        device = self.x.device
        return {
            "running_min": torch.full((self.channels,), torch.inf, device=device),
            "running_max": torch.full((self.channels,), -torch.inf, device=device),
            "scale": torch.ones(self.channels, device=device),
            "zero_point": torch.zeros(self.channels, dtype=torch.int32, device=device),
        }


Adapter = Callable[[Problem], Callable[[], Tensor]]
ROUNDS_FIRST = "clips the rounded value, so that gradient passes up to half a step outside the range"


@dataclass(frozen=True)
class Learner:
    """A way to do an operation whose gradients count.

    step: does it once and returns y.
    inputs: what receives a gradient: x, then the scale where there is one, in the library's own form.
    scale_factor: the library's gradient of its scale times this is that of ``quantkern.reference``.
    departs: in what it is known to differ from the reference ("y", "gradient" of x, "scale": its gradient), and how.
    """

    step: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    scale_factor: float = 1.0
    departs: dict[str, str] = field(default_factory=dict)


def over_channels(parameter: Tensor, p: Problem) -> Tensor:
    """A number a channel beside the elements of x."""
    return reference.along_axis(parameter, p.x, p.axis)


def layer_for(x: Tensor) -> tuple[type[nn.Module], dict[str, Any], Tensor]:
    """The class and arguments of the layer whose weight has x's shape, and an input it takes."""
    if x.dim() == 4:
        arguments = {"in_channels": x.shape[1], "out_channels": x.shape[0], "kernel_size": tuple(x.shape[2:])}
        return nn.Conv2d, {**arguments, "bias": False}, x.new_zeros(1, *x.shape[1:])
    if x.dim() == 2:
        arguments = {"in_features": x.shape[1], "out_features": x.shape[0]}
        return nn.Linear, {**arguments, "bias": False}, x.new_zeros(1, x.shape[1])
    raise Unsupported(f"no layer has a weight of {x.dim()} dimensions")
