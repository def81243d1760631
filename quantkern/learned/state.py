"""The state of a learned scale: parameters, checkpoints and calibration dicts. ``lsq`` quantizes with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkern.config import TensorSpec, is_int
from quantkern.fake_quant import Grid, ScaledFakeQuant, is_recorded
from quantkern.learned.initial_scale import initial_scale
from quantkern.reference import SMALLEST_SCALE

FLOOR = 1e-3
"""A scale never gets smaller than this part of its initial value: it stays positive and can grow again."""


@dataclass(frozen=True)
class LsqSpec(TensorSpec):
    """How a tensor with a learned scale is quantized; dtype 'auto' is decided by the first training batch."""

    init: str = "paper"
    grad_scale: str = "paper"
    signed: bool | str = "auto"
    offset: bool = False
    full_range: bool = True


class LearnedState(ScaledFakeQuant):
    """A scale that is a parameter, a zero point that is one where the scheme is affine, and what guards them."""

    spec: LsqSpec
    scale: nn.Parameter
    zero_point: nn.Parameter | None
    floor: Tensor
    initialized: Tensor

    def __init__(self, label: str, spec: LsqSpec, channels: int, device: torch.device) -> None:
        super().__init__(label, spec, device)
        shape = (channels,) if spec.per_channel else ()
        self.scale = nn.Parameter(torch.ones(shape, device=device))
        self.register_parameter(
            "zero_point", None if spec.symmetric else nn.Parameter(torch.zeros(shape, device=device))
        )
        self.register_buffer("floor", torch.zeros(shape, device=device))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))
        self.ready, self.started = False, not spec.start_step

    def counted(self) -> None:
        """Whether quant_start_step is reached."""
        super().counted()
        self.started = self.steps_done >= self.spec.start_step

    def stepped(self) -> None:
        """Count on the host too, which has to know when the scale starts; a break in the graph lets it."""
        if self.started or (self.step is not None and is_recorded(self.step)):
            super().stepped()
        elif torch.compiler.is_compiling():
            raise RuntimeError(
                f"{self.label}: a compiled forward cannot say when quant_start_step is reached: give the quantizer the "
                "optimizer, which then counts, or compile after that step, or without fullgraph=True"
            )
        else:  # not super(), which without fullgraph=True is a compiled function again
            self.count()

    def is_observed(self) -> bool:
        """Whether the scale has been initialised or loaded. Waits for the device."""
        return not self.initialized.is_meta and bool(self.initialized)

    def has_seen(self) -> bool:
        """As ``is_observed``."""
        return self.ready or self.is_observed()

    def code_grid(self) -> Grid | None:
        """See ``FakeQuant.code_grid``; a learned zero point is no integer."""
        known = self.ready and self.zero_point is None
        return (self.scale.detach(), None, *self.spec.quant_range, self.spec.axis) if known else None

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """The scale, its floor at least, and the zero point, which lies on the grid."""
        low, high = self.spec.quant_range
        zero_point = None if self.zero_point is None else self.zero_point.clamp(low, high)
        return torch.maximum(self.scale, self.floor), zero_point

    def set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take over scale and zero point as the state from which learning goes on."""
        with torch.no_grad():
            self.scale.copy_(scale.reshape(self.scale.shape))
            if self.zero_point is not None:
                self.zero_point.copy_(zero_point.reshape(self.scale.shape))
            self.floor.copy_((self.scale * FLOOR).clamp(min=SMALLEST_SCALE))
            self.initialized.fill_(True)

    def spec_for(self, negative: bool) -> LsqSpec:
        """The rule with its dtype decided, for a tensor that is or is not negative somewhere."""
        return self.spec

    def decide_sign(self, negative: bool) -> None:
        """Make ``spec_for`` the spec."""
        self.spec = self.spec_for(negative)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.ready = self.is_observed()
        self.read_steps()

    def check_state(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """What in a state_dict contradicts the shapes and the rule here."""
        problems = []
        for name in ("scale", "zero_point", "floor"):
            value = state_dict.get(prefix + name)
            if value is not None and not (value.dim() == self.scale.dim() and self.fits(value.numel())):
                expected = f"{list(self.scale.shape)} ({self.spec.scheme})"
                problems.append(f"{prefix}{name} has shape {list(value.shape)}, expected {expected}")
        return problems

    def calibration(self, name: str) -> dict[str, Any]:
        """Settings, and once there is a scale: scale and zero point."""
        entry = self.settings(name)
        if self.is_observed():
            scale, zero_point = self.grid()
            zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
            entry.update(self.entries(name, scale.detach().cpu(), zero_point.detach().cpu()))
        return entry

    def entries(self, name: str, scale: Tensor, zero_point: Tensor) -> dict[str, Any]:
        """Scale and zero point as 1-d tensors, as NNI writes those of weights."""
        return {f"{name}_scale": scale.reshape(-1).clone(), f"{name}_zero_point": zero_point.reshape(-1).clone()}

    def read_settings(self, name: str, given: Mapping[str, Any], problems: list[str]) -> None:
        """The bits must agree; another dtype, scheme and range is converted."""
        key = f"{name}_bits"
        if key in given and given[key] != self.spec.bits:
            problems.append(f"{self.label}: {key} is {given[key]!r}, this quantizer's rule says {self.spec.bits!r}")
        for key in (f"{name}_qmin", f"{name}_qmax"):
            if key in given and not is_int(given[key]):
                problems.append(f"{self.label}: {key} is {given[key]!r}, expected an integer")

    def read_calibration(self, name: str, given: Mapping[str, Any], problems: list[str]) -> Callable[[], None]:
        """Check the entries of ``given``; the returned function then takes them over.

        A scale of the grid here is taken as it is. For another grid (NNI's and ``QAT_Quantizer``'s have other zero
        points) the scale becomes the smallest that holds the range which the dict states or its scale implies.
        """
        before = len(problems)
        self.read_settings(name, given, problems)
        keys = (f"{name}_scale", f"{name}_zero_point", f"tracked_min_{name}", f"tracked_max_{name}")
        scale, zero_point, low, high = (self.read_tensor(key, given, problems) for key in keys)
        if len(problems) > before or (scale is None and (low is None or high is None)):
            return lambda: None
        if len({tuple(value.shape) for value in (scale, zero_point, low, high) if value is not None}) > 1:
            problems.append(f"{self.label}: {', '.join(keys)} have different numbers of values")
        elif scale is not None and bool((scale < 0).any()):
            problems.append(f"{self.label}: {keys[0]} is {given[keys[0]]!r}, expected positive values")
        elif low is not None and high is not None and bool((low > high).any()):
            found = f"{keys[2]} is {given[keys[2]]!r} and {keys[3]} is {given[keys[3]]!r}"
            problems.append(f"{self.label}: {found}, expected a smallest and a largest value")
        if len(problems) > before or (scale is not None and bool((scale == 0).any())):
            return lambda: None  # NNI writes zeros for a tensor that was never quantized
        shifted = zero_point is not None and bool(zero_point.any())
        first, last = (0, 2**self.spec.bits - 1) if shifted else self.spec.quant_range
        first, last = given.get(f"{name}_qmin", first), given.get(f"{name}_qmax", last)
        if low is None or high is None:
            assert scale is not None
            zero = torch.zeros_like(scale) if zero_point is None else zero_point
            low, high = (first - zero) * scale, (last - zero) * scale
        negative = bool((low < 0).any()) or given.get(f"{name}_dtype") == "int"
        spec = self.spec_for(negative)
        same = spec.quant_range[1] == last and not (spec.symmetric and shifted)
        bounds = torch.stack([low.reshape(-1), high.reshape(-1)], 1).float()
        new_scale, new_zero_point = initial_scale(bounds, *spec.quant_range, 0, "minmax", spec.symmetric)
        if scale is not None and same and (zero_point is not None or spec.symmetric):
            alive = scale.reshape(-1) > SMALLEST_SCALE  # a channel of zeros has the scale of the others to start with
            new_scale = torch.where(alive, scale.reshape(-1), new_scale)
            if zero_point is not None:
                new_zero_point = torch.where(alive, zero_point.reshape(-1), new_zero_point)
        return self._taker(negative, new_scale, new_zero_point)

    def _taker(self, negative: bool, scale: Tensor, zero_point: Tensor) -> Callable[[], None]:
        def take() -> None:
            self.decide_sign(negative)
            if scale.numel() != self.scale.numel():
                self.resize(scale.numel())
            self.set_grid(scale, zero_point)
            self.ready = True

        return take if bool((scale > 0).all()) else lambda: None
