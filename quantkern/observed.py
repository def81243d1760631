"""The modules of post-training quantization: float while they observe, then on a grid that no longer changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkern.current_range import WeightFakeQuant
from quantkern.fake_quant import FakeQuant, RangedFakeQuant
from quantkern.observers import Observer, ObserverSpec, make_observer
from quantkern.running_range import ActivationFakeQuant

Grid = tuple[Tensor, Tensor]


def ends_of(module: RangedFakeQuant) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of a module's grid, which NNI calls the tracked range."""
    low, high = module.spec.quant_range
    return (low - module.zero_point) * module.scale, (high - module.zero_point) * module.scale


def nni_entries(name: str, module: RangedFakeQuant) -> dict[str, Any]:
    """NNI's names for the range of integers."""
    low, high = module.spec.quant_range
    return {f"tracked_qmin_{name}": low, f"tracked_qmax_{name}": high}


class ObservedWeight(WeightFakeQuant):
    """A parametrization: the float weight, and from ``freeze`` on the weight on a grid that stays.

    ``ready`` mirrors on the host what the buffer ``frozen`` says.
    """

    spec: ObserverSpec
    frozen: Tensor

    def __init__(self, label: str, spec: ObserverSpec, weight: Tensor) -> None:
        super().__init__(label, spec, weight)
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool, device=weight.device))
        self.ready = False

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, on its grid once there is one."""
        return self.quantize(weight, self.spec.axis) if self.ready else weight

    def observe(self, weight: Tensor) -> Observer:
        """An observer that has seen the weight."""
        observer = make_observer(self.spec, self.scale.numel(), weight.device, self.label)
        observer.observe(weight, self.spec.axis)
        return observer

    def freeze(self, grid: Grid) -> None:
        """Quantize with this scale and zero point from now on."""
        with torch.no_grad():
            for buffer, value in zip((self.scale, self.zero_point), grid, strict=True):
                buffer.copy_(value)
            self.frozen.fill_(True)
        self.ready = True

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.ready = bool(self.frozen)

    def calibration(self, name: str) -> dict[str, Any]:
        """Settings, and once there is a grid: scale, zero point and the range, which NNI names too."""
        if not self.ready:
            return self.settings(name)
        low, high = (value.cpu().tolist() for value in ends_of(self))
        range_of = {f"tracked_min_{name}": low, f"tracked_max_{name}": high}
        return {**super().calibration(name), **range_of, **nni_entries(name, self)}

    def read_calibration(self, name: str, given: Mapping[str, Any], problems: list[str]) -> Callable[[], None]:
        """Check the entries of ``given``; the returned function then takes them over. NNI writes the range only."""
        if f"{name}_scale" in given:
            take = super().read_calibration(name, given, problems)
        else:
            take = self.read_range(name, given, problems)

        def freeze() -> None:
            take()
            if self.loaded:
                self.freeze((self.scale, self.zero_point))

        return freeze

    def read_range(self, name: str, given: Mapping[str, Any], problems: list[str]) -> Callable[[], None]:
        """As ``read_calibration``, for a dict that has no scale."""
        self.read_settings(name, given, problems)
        low, high = (self.read_tensor(f"tracked_{end}_{name}", given, problems) for end in ("min", "max"))
        if low is None or high is None:
            return lambda: None
        if low.shape != high.shape or bool((low > high).any()):
            found = " and ".join(
                f"tracked_{end}_{name} is {given[f'tracked_{end}_{name}']!r}" for end in ("min", "max")
            )
            problems.append(f"{self.label}: {found}, expected a smallest and a largest value")
            return lambda: None
        scale, zero_point = self.own_grid(low, high)

        def take() -> None:
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
            self.loaded = True

        return take


class ObservedActivation(ActivationFakeQuant):
    """An input or output: observed and passed on as it is, and from ``freeze`` on put on a grid that stays.

    ``ready`` mirrors on the host what the buffer ``frozen`` says; ``watching`` False lets batches pass unobserved.
    """

    spec: ObserverSpec
    frozen: Tensor

    def __init__(self, label: str, spec: ObserverSpec, channels: int, device: torch.device) -> None:
        super().__init__(label, spec, channels, device)
        self.observer = make_observer(spec, channels, device, label)
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool, device=device))
        self.ready, self.watching = False, True

    def follow(self, sibling: FakeQuant) -> None:
        """A tensor that appears when its siblings are frozen is frozen as well: it stays float."""
        super().follow(sibling)
        if isinstance(sibling, ObservedActivation):
            self.watching = sibling.watching
            if sibling.ready:
                self.freeze(None)

    def has_seen(self) -> bool:
        """Whether the number of channels is known from a tensor."""
        return super().has_seen() or self.observer.has_seen()

    def resize(self, channels: int) -> None:
        """Become the state of ``channels`` channels that have seen nothing, in the same tensors."""
        super().resize(channels)
        self.observer.resize(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x itself, which is observed; once frozen, x on its grid."""
        if self.ready:
            if self.observed:
                return self.quantize(x, self.match_axis(x))
            if not self.warned and not torch.compiler.is_compiling():
                self.warned = True
                text = f"{self.label} was not seen in calibration and stays float"
                warnings.warn(text, UserWarning, stacklevel=2)
            return x
        if self.watching:
            if self.training:
                raise RuntimeError(
                    f"{self.label}: the model is in training mode; calibration needs it as it is in inference, "
                    "call model.eval() first"
                )
            self.observer.observe(x, self.match_axis(x))
        return x

    def freeze(self, grid: Grid | None) -> None:
        """Quantize with this scale and zero point from now on; with None the tensor stays float."""
        with torch.no_grad():
            if grid is not None:
                if grid[0].shape != self.scale.shape:
                    self.resize(grid[0].numel())
                self.scale.copy_(grid[0])
                self.zero_point.copy_(grid[1])
                for buffer, value in zip((self.running_min, self.running_max), ends_of(self), strict=True):
                    buffer.copy_(value)
                self.observed = True
            self.frozen.fill_(True)
        self.ready = True

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.ready = bool(self.frozen)

    def calibration(self, name: str) -> dict[str, Any]:
        """As of every input and output, with NNI's names for the range of integers."""
        entry = super().calibration(name)
        return {**entry, **nni_entries(name, self)} if self.is_observed() else entry

    def read_calibration(self, name: str, given: Mapping[str, Any], problems: list[str]) -> Callable[[], None]:
        """Check the entries of ``given``; the returned function then takes them over, and observing is over."""
        take = super().read_calibration(name, given, problems)

        def freeze() -> None:
            take()
            if self.observed:
                self.frozen.fill_(True)
                self.ready = True

        return freeze
