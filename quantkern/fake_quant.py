"""The modules that own what quantization knows about one tensor: scale, zero point, range, step counter.

Whoever owns the state also says it in a calibration dict and reads it from there; the keys are NNI's, and all that
NNI leaves out besides. While ``step`` < the rule's quant_start_step a module is the identity.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantkern import functional, reference
from quantkern.ahead import Ahead, autocast_dtype, compute_ranged, ranged_result
from quantkern.config import TensorSpec, is_int


def _numbers(value: Tensor) -> float | list[float]:
    """A number per tensor, a list per channel."""
    return value.tolist()  # type: ignore[no-any-return]


Grid = tuple[Tensor, Tensor | None, int, int, int | None]
"""Scale, integer zero point (None: 0), quant_min, quant_max and axis."""


def is_recorded(tensor: Tensor) -> bool:
    """Whether this runs only to become part of a CUDA graph: replays run on the device alone, without the host."""
    return not torch.compiler.is_compiling() and tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class FakeQuant(nn.Module):
    """What all of them have in common: the rule, the step counter, the rule's part of a calibration dict."""

    step: Tensor | None
    steps_done = 0
    narrows = False
    """Whether all that happens to the result is a product that autocast computes in 16 bits."""

    def __init__(self, label: str, spec: TensorSpec, device: torch.device) -> None:
        super().__init__()
        self.label, self.spec = label, spec
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device) if spec.start_step else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuant:
        """Follow the model to another device, but stay float32 when it becomes half or double."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def narrow(self, x: Tensor) -> torch.dtype | None:
        """What a float32 x shall become in the pass that quantizes it."""
        return autocast_dtype(x) if self.narrows else None

    def is_observed(self) -> bool:
        """Whether it knows its scale, or needs none. May wait for the device."""
        return True

    def code_grid(self) -> Grid | None:
        """The grid of what the last forward returned, where that is a scale times integers."""
        return None

    def follow(self, sibling: FakeQuant) -> None:
        """Take over what all tensors of a layer have in common."""
        if self.step is not None and sibling.step is not None:
            self.step.copy_(sibling.step)
            self.steps_done = sibling.steps_done
            self.counted()

    def stepped(self) -> None:
        """Count on the host what was counted on the device, for what the host must decide without waiting.

        Not in compiled forwards, which would be compiled again for every number, nor in a CUDA graph.
        """
        if not (torch.compiler.is_compiling() or (self.step is not None and is_recorded(self.step))):
            self.count()

    def count(self) -> None:
        """One step more on the host."""
        self.steps_done += 1
        self.counted()

    def read_steps(self) -> None:
        """Learn from the device how many steps are done; waits for it."""
        if self.step is not None and not self.step.is_meta:
            self.steps_done = int(self.step)
            self.counted()

    def counted(self) -> None:
        """Called when ``steps_done`` has changed."""

    def settings(self, name: str) -> dict[str, Any]:
        """The part of a calibration dict that a rule decides."""
        low, high = self.spec.quant_range
        values = (self.spec.bits, self.spec.dtype, self.spec.scheme, low, high, self.spec.axis)
        keys = ("bits", "dtype", "scheme", "qmin", "qmax", "axis")
        return {f"{name}_{key}": value for key, value in zip(keys, values, strict=True)}

    def read_settings(self, name: str, given: Mapping[str, Any], problems: list[str]) -> None:
        """Note every setting in which ``given`` contradicts the rule."""
        for key, own in self.settings(name).items():
            if key in given and given[key] != own:
                problems.append(f"{self.label}: {key} is {given[key]!r}, this quantizer's rule says {own!r}")

    def calibration(self, name: str) -> dict[str, Any]:
        """This tensor's part of a calibration dict."""
        return self.settings(name)

    def read_calibration(self, name: str, given: Mapping[str, Any], problems: list[str]) -> Callable[[], None]:
        """Check the entries of ``given``; the returned function then takes them over."""
        self.read_settings(name, given, problems)
        return lambda: None


class ScaledFakeQuant(FakeQuant):
    """One that has a scale, per tensor or per channel."""

    scale: Tensor

    def extra_repr(self) -> str:
        """The rule, for ``print(model)``."""
        channels = f", {self.scale.numel()} channels on axis {self.spec.axis}" if self.spec.per_channel else ""
        return f"{self.spec.bits} bits, {self.spec.dtype}, {self.spec.scheme}{channels}"

    def read_tensor(self, key: str, given: Mapping[str, Any], problems: list[str]) -> Tensor | None:
        """``given[key]`` as float64 in the shape of the state here; None when it is absent or wrong."""
        if key not in given:
            return None
        try:
            value = torch.as_tensor(given[key], dtype=torch.float64, device="cpu").detach().reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            problems.append(f"{self.label}: {key} is {given[key]!r}, expected numbers")
            return None
        if not self.spec.per_channel:
            value = value.reshape(()) if value.numel() == 1 else value
        if value.dim() != self.scale.dim() or not (self.fits(value.numel()) and bool(value.isfinite().all())):
            expected = f"{self.scale.numel()} finite values" if self.spec.per_channel else "one finite value"
            problems.append(f"{self.label}: {key} is {given[key]!r}, expected {expected}")
            return None
        return value

    def fits(self, channels: int) -> bool:
        """Whether the state can take this many values."""
        return channels == self.scale.numel()

    def has_seen(self) -> bool:
        """Whether the state of any channel comes from a tensor, which fixes the number of channels."""
        return True

    def resize(self, channels: int) -> None:
        """Become the state of another number of channels; only for a quantizer that has seen nothing."""
        raise NotImplementedError(f"{type(self).__name__} has the number of channels of its weight")

    def match_axis(self, x: Tensor) -> int | None:
        """The channel axis of x; the state takes its number of channels as long as it has seen nothing."""
        axis = self.spec.axis
        if axis is None:
            return None
        shape = list(x.shape)
        if not -x.dim() <= axis < x.dim():
            raise ValueError(
                f"{self.label}: axis {axis} is out of range for a tensor of shape {shape}; "
                "give the rule an 'axis' that fits, or a per-tensor quant_scheme"
            )
        if shape[axis] != self.scale.numel():
            if self.has_seen():
                raise ValueError(
                    f"{self.label}: a tensor of shape {shape} has {shape[axis]} channels on axis {axis}, earlier ones "
                    f"had {self.scale.numel()}; give the rule an 'axis' of constant size, or a per-tensor quant_scheme"
                )
            self.resize(shape[axis])
        return axis % x.dim()


class RangedFakeQuant(ScaledFakeQuant):
    """Scale and zero point are state that follows from a range."""

    zero_point: Tensor

    def __init__(self, label: str, spec: TensorSpec, channels: int, device: torch.device) -> None:
        super().__init__(label, spec, device)
        shape = (channels,) if spec.per_channel else ()
        self.register_buffer("scale", torch.ones(shape, device=device))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32, device=device))

    def read_settings(self, name: str, given: Mapping[str, Any], problems: list[str]) -> None:
        """Bits, axis and granularity must agree; another dtype, symmetry or range of integers is converted."""
        own = self.settings(name)
        converted = [f"{name}_{key}" for key in ("dtype", "qmin", "qmax")]
        for key in (f"{name}_qmin", f"{name}_qmax"):
            if key in given and not is_int(given[key]):
                problems.append(f"{self.label}: {key} is {given[key]!r}, expected an integer")
        scheme = given.get(f"{name}_scheme")
        if isinstance(scheme, str) and scheme.startswith("per_channel") == self.spec.per_channel:
            converted.append(f"{name}_scheme")
        rest = {key: value for key, value in given.items() if key in own and key not in converted}
        super().read_settings(name, rest, problems)

    def same_grid(self, name: str, given: Mapping[str, Any], zero_point: Tensor) -> bool:
        """Whether a scale and zero point of ``given`` mean here what they mean there."""
        return bool((zero_point == zero_point.round()).all()) and all(
            given.get(key, own) == own for key, own in self.settings(name).items()
        )

    def own_grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and zero point that this rule gives the ranges [low, high]."""
        return reference.choose_scale(low.float(), high.float(), *self.spec.quant_range, self.spec.symmetric)

    def code_grid(self) -> Grid | None:
        """See ``FakeQuant.code_grid``."""
        return self.scale, self.zero_point, *self.spec.quant_range, self.spec.axis

    def quantize(self, x: Tensor, axis: int | None) -> Tensor:
        """x on the grid of the scale and zero point stored here."""
        low, high = self.spec.quant_range
        return functional.fake_quantize(
            x, self.scale, self.zero_point, low, high, axis,
            step=self.step, start_step=self.spec.start_step, dtype=self.narrow(x),
        )  # fmt: skip


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
        if not self.training and torch.compiler.is_exporting():
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
