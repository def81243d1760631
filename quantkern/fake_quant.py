"""The modules that own what quantization knows about one tensor: scale, zero point, range, step counter.

Whoever owns the state also says it in a calibration dict and reads it from there; the keys are NNI's, and all that
NNI leaves out besides. While ``step`` < the rule's quant_start_step a module is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantkern import functional, reference
from quantkern.ahead import autocast_dtype
from quantkern.config import TensorSpec, is_int

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
