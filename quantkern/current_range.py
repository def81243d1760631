"""A weight on the grid of its own current range."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkern import functional, reference
from quantkern.ahead import Ahead, compute_ranged, ranged_result
from quantkern.config import TensorSpec, is_int
from quantkern.exporting import is_exporting
from quantkern.fake_quant import RangedFakeQuant


class WeightFakeQuant(RangedFakeQuant):
    """A parametrization: the weight on the grid of its own current range, in training and in evaluation.

    After a calibration dict was loaded, evaluation uses the loaded scale and zero point until the next training
    forward. Until then a state_dict has the entry ``loaded``, so that whoever loads it does so too.
    """

    compute_ahead = staticmethod(compute_ranged)

    def __init__(self, label: str, spec: TensorSpec, weight: Tensor) -> None:
        super().__init__(label, spec, weight.shape[spec.axis] if spec.axis is not None else 1, weight.device)
        self.loaded = False
        self.ahead = Ahead()

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on its grid."""
        spec = self.spec
        ready = ranged_result(self, weight)
        if ready is not None:
            return ready
        if self.loaded:
            if not self.training:
                return self.quantize(weight, spec.axis)
            self.loaded = False
        low, high = spec.quant_range
        if not self.training and is_exporting():
            return self.on_current_grid(weight)
        return functional.fake_quantize_weight(
            weight, self.scale, self.zero_point, low, high, spec.symmetric, spec.axis,
            step=self.step, start_step=spec.start_step, dtype=self.narrow(weight),
        )  # fmt: skip

    def on_current_grid(self, weight: Tensor) -> Tensor:
        """The same numbers without writing the state, which an exported program shall not do."""
        spec = self.spec
        low, high = reference.min_max(weight, spec.axis)
        scale, zero_point = reference.choose_scale(low.float(), high.float(), *spec.quant_range, spec.symmetric)
        return functional.fake_quantize(
            weight, scale, zero_point, *spec.quant_range, spec.axis, step=self.step, start_step=spec.start_step
        )

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to ``layer.weight`` sets the float weight."""
        return weight

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.loaded:
            destination[prefix + "loaded"] = torch.ones((), dtype=torch.bool, device=self.scale.device)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        rest = dict(state_dict)
        loaded = rest.pop(prefix + "loaded", None) is not None  # neither a parameter nor a buffer: strictly, unexpected
        super()._load_from_state_dict(rest, prefix, *args)
        if prefix + "scale" in rest:
            self.loaded = loaded

    def calibration(self, name: str) -> dict[str, Any]:
        """Settings, scale and zero point, the latter two as 1-d tensors as NNI writes them."""
        scale, zero_point = (value.detach().cpu().reshape(-1).clone() for value in (self.scale, self.zero_point))
        return {**self.settings(name), f"{name}_scale": scale, f"{name}_zero_point": zero_point}

    def state_range(self, name: str, given: Mapping[str, Any], weight: Tensor) -> Mapping[str, Any]:
        """``given`` with a range of integers where it has none: NNI writes scale and zero point alone.

        They may belong to -127..127 or to 0..255. Taken is what clips the weight least, the rule's own where equal.
        """
        keys = tuple(f"{name}_{key}" for key in ("qmin", "qmax", "dtype"))
        scale, zero_point = (self.read_tensor(f"{name}_{key}", given, []) for key in ("scale", "zero_point"))
        if scale is None or zero_point is None or any(key in given for key in keys) or not weight.numel():
            return given
        rows = weight.detach().double().cpu()
        rows = rows.reshape(1, -1) if self.spec.axis is None else rows.movedim(self.spec.axis, 0).flatten(1)
        low, high = rows.amin(1), rows.amax(1)

        def clipped(ends: tuple[int, int]) -> float:
            lowest, highest = ((end - zero_point) * scale for end in ends)
            return float(torch.maximum(lowest - low, high - highest).amax().clamp(min=0))

        half = 2 ** (self.spec.bits - 1)
        ranges = [self.spec.quant_range, (1 - half, half - 1), (0, 2 * half - 1)]
        holding = [(a, b) for a, b in ranges if a <= zero_point.amin() and zero_point.amax() <= b]
        if not holding:
            return given
        first, last = min(holding, key=clipped)
        return {**given, keys[0]: first, keys[1]: last}

    def read_calibration(self, name: str, given: Mapping[str, Any], problems: list[str]) -> Callable[[], None]:
        """Check the entries of ``given``; the returned function then takes them over."""
        self.read_settings(name, given, problems)
        scale = self.read_tensor(f"{name}_scale", given, problems)
        zero_point = self.read_tensor(f"{name}_zero_point", given, problems)
        if scale is None or zero_point is None or bool((scale == 0).any()):
            # NNI writes zeros for a weight that was never quantized: the current range decides, as without a dict.
            return lambda: None
        low, high = self.spec.quant_range
        low, high = given.get(f"{name}_qmin", low), given.get(f"{name}_qmax", high)
        if not (is_int(low) and is_int(high)):
            return lambda: None
        if bool((scale < 0).any()):
            problems.append(f"{self.label}: {name}_scale is {given[f'{name}_scale']!r}, expected positive values")
        if bool((zero_point < low).any()) or bool((zero_point > high).any()):
            value = given[f"{name}_zero_point"]
            problems.append(f"{self.label}: {name}_zero_point is {value!r}, expected values from {low} to {high}")
        if not self.same_grid(name, given, zero_point):
            scale, zero_point = self.own_grid((low - zero_point) * scale, (high - zero_point) * scale)

        def take() -> None:
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
            self.loaded = True

        return take
