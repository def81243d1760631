"""An input or output on the grid of a moving average of its range."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkern import functional
from quantkern.config import TensorSpec
from quantkern.fake_quant import RangedFakeQuant


def _numbers(value: Tensor) -> float | list[float]:
    """A number per tensor, a list per channel."""
    return value.tolist()  # type: ignore[no-any-return]


class ActivationFakeQuant(RangedFakeQuant):
    """An input or output on the grid of a moving average of its range, which every training forward renews.

    Evaluation uses the stored scale and zero point; a tensor that no training forward has seen stays float there,
    with a warning. Per channel the state may be empty until the first tensor tells the number of channels.
    """

    running_min: Tensor
    running_max: Tensor
    observing: Tensor

    def __init__(self, label: str, spec: TensorSpec, channels: int, device: torch.device) -> None:
        super().__init__(label, spec, channels, device)
        self.register_buffer("running_min", torch.full_like(self.scale, math.inf))
        self.register_buffer("running_max", torch.full_like(self.scale, -math.inf))
        self.register_buffer("observing", torch.ones((), dtype=torch.bool, device=device))
        self.observed = self.warned = False

    def is_observed(self) -> bool:
        """Whether every channel has a range. Waits for the device."""
        if self.scale.is_meta or not self.scale.numel():
            return False
        return bool((self.running_min <= self.running_max).all())

    def train(self, mode: bool = True) -> ActivationFakeQuant:
        """Switch between following the range (training) and using it (evaluation)."""
        super().train(mode)
        if not mode:  # asked here, once, so that no forward has to wait for the device
            self.observed, self.warned = self.is_observed(), False
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x on its grid; in training x is taken into the range first."""
        if not self.training and not self.observed:
            if not self.warned and not torch.compiler.is_compiling():
                self.warned = True
                warnings.warn(
                    f"{self.label} has no range yet and stays float: run a training batch or load a calibration dict",
                    UserWarning,
                    stacklevel=2,
                )
            return x
        spec, axis = self.spec, self.match_axis(x)
        if not self.training:
            return self.quantize(x, axis)
        low, high = spec.quant_range
        clip = None if torch.compiler.is_compiling() else self.__dict__.pop("clip", None)
        return functional.fake_quantize_activation(
            x, self.running_min, self.running_max, self.scale, self.zero_point, self.observing,
            low, high, spec.symmetric, spec.ema_decay, axis,
            step=self.step, start_step=spec.start_step, clip=clip, dtype=self.narrow(x),
        )  # fmt: skip

    def clips(self) -> bool:
        """Whether the next forward can clip what it gets: one that takes it into the range can."""
        return self.training and type(self).forward is ActivationFakeQuant.forward

    def has_seen(self) -> bool:
        """Whether any channel has a range."""
        return bool((self.running_min <= self.running_max).any())

    def resize(self, channels: int) -> None:
        """Become the state of ``channels`` channels that have seen nothing, in the same tensors."""
        starts = ((self.scale, 1), (self.zero_point, 0), (self.running_min, math.inf), (self.running_max, -math.inf))
        for buffer, start in starts:
            buffer.resize_(channels).fill_(start)

    def fits(self, channels: int) -> bool:
        """Whether the state can take this many values; as long as it is empty, any number per channel."""
        return super().fits(channels) or (self.spec.per_channel and channels > 0 and not self.is_observed())

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        scale = state_dict.get(prefix + "scale")
        loaded = scale.numel() if isinstance(scale, Tensor) and scale.dim() == 1 and self.spec.per_channel else None
        if loaded is not None and loaded != self.scale.numel() and self.fits(loaded):
            self.resize(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.observed = self.is_observed()

    def calibration(self, name: str) -> dict[str, Any]:
        """Settings, and once there is a range: the range, scale and zero point as numbers or lists of them."""
        entry = self.settings(name)
        if self.is_observed():
            entry[f"tracked_min_{name}"] = _numbers(self.running_min)
            entry[f"tracked_max_{name}"] = _numbers(self.running_max)
            entry[f"{name}_scale"] = _numbers(self.scale)
            entry[f"{name}_zero_point"] = _numbers(self.zero_point)
        return entry

    def read_calibration(self, name: str, given: Mapping[str, Any], problems: list[str]) -> Callable[[], None]:
        """Check the entries of ``given``; the returned function then takes them over.

        An NNI dict has the range only; the scale and zero point follow from it.
        """
        before = len(problems)
        self.read_settings(name, given, problems)
        keys = (f"tracked_min_{name}", f"tracked_max_{name}", f"{name}_scale", f"{name}_zero_point")
        low, high, scale, zero_point = (self.read_tensor(key, given, problems) for key in keys)
        if len(problems) > before or (low is None and high is None):
            return lambda: None
        if low is None or high is None or low.shape != high.shape or bool((low > high).any()):
            found = f"{keys[0]} is {given.get(keys[0])!r} and {keys[1]} is {given.get(keys[1])!r}"
            problems.append(f"{self.label}: {found}, expected a smallest and a largest value")
            return lambda: None
        if scale is None or zero_point is None or not self.same_grid(name, given, zero_point):
            scale, zero_point = self.own_grid(low, high)
        elif scale.shape != low.shape or zero_point.shape != low.shape or bool((scale <= 0).any()):
            problems.append(
                f"{self.label}: {keys[2]} is {given[keys[2]]!r}, expected as many positive values as ranges"
            )
        new = {"running_min": low, "running_max": high, "scale": scale, "zero_point": zero_point}

        def take() -> None:
            if low.shape != self.scale.shape:
                self.resize(low.numel())
            for buffer_name, value in new.items():
                getattr(self, buffer_name).copy_(value)
            self.observed = True

        return take
