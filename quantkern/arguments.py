"""The checks of arguments that the compiled operators make themselves, for the backends that have none of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkern import ops, reference


def as_parameter(value: Tensor | float, x: Tensor, axis: int | None, dtype: torch.dtype, name: str) -> Tensor:
    """A scale or zero point as a tensor, float32 where it is no integer; the operators check shape and device."""
    if isinstance(value, Tensor):
        kept = value.dtype is dtype or value.dtype is torch.float32
        return value if kept else value.to(torch.float32 if value.is_floating_point() else dtype)
    several = isinstance(value, (list, tuple))
    if several or (isinstance(value, (int, float)) and axis is None):
        numbers: Any = value if several else (value,)
        whole = all(float(number).is_integer() for number in numbers)
        return torch.tensor(value, dtype=dtype if whole else torch.float32, device=x.device)
    expected = "a number or a 1-element tensor" if axis is None else "a vector with one value a channel"
    raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def check_narrow(dtype: torch.dtype | None) -> None:
    """What a float32 tensor may become in the pass that quantizes it."""
    if dtype not in (None, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float16, torch.bfloat16 or None, got {dtype}")


def check_arguments(
    x: Tensor, quant_min: int, quant_max: int, axis: int | None, dtype: torch.dtype | None = None
) -> int | None:
    """The checks of the compiled operators for the backends that have none of their own; returns axis >= 0."""
    check_narrow(dtype)
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}; convert it with x.float()")
    limit = reference.QUANT_LIMIT
    if not -limit <= quant_min < quant_max <= limit:
        raise ValueError(
            f"quant_min must be less than quant_max and both within +-{limit}, "
            f"got quant_min={quant_min}, quant_max={quant_max}"
        )
    return check_axis(x, axis)


def check_axis(x: Tensor, axis: int | None) -> int | None:
    """The axis counted from the front."""
    if axis is None:
        return None
    if not -x.dim() <= axis < x.dim():
        raise IndexError(f"axis must lie in [{-x.dim()}, {x.dim() - 1}] for a {x.dim()}-dimensional x, got {axis}")
    return axis % x.dim()


def check_parameter(value: Tensor, x: Tensor, axis: int | None, name: str) -> None:
    """One value, or one a channel, on x's device."""
    expected = 1 if axis is None else x.shape[axis]
    if value.numel() != expected or value.dim() > 1:
        where = "one value" if axis is None else f"a vector of {expected} values, one a channel of axis {axis}"
        raise ValueError(f"{name} must hold {where}, got shape {list(value.shape)}")
    ops.check_device(value, x, name)


def check_scale_on_host(scale: Tensor) -> None:
    """Positive and finite, its reciprocal too, where nobody has to wait to know it."""
    if scale.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~((scale > 0) & torch.isfinite(scale) & torch.isfinite(1 / scale))
        if bool(bad.any()):
            value = scale.reshape(-1)[bad.reshape(-1)][0].item()
            raise ValueError(f"scale must be positive and finite, got {value}")


def check_zero_point_on_host(zero_point: Tensor, quant_min: int, quant_max: int) -> None:
    """Within the quantized range, where nobody has to wait to know it."""
    if zero_point.device.type == "cpu" and zero_point.dtype is torch.int32 and not torch.compiler.is_compiling():
        bad = (zero_point < quant_min) | (zero_point > quant_max)
        if bool(bad.any()):
            value = zero_point.reshape(-1)[bad.reshape(-1)][0].item()
            raise ValueError(f"zero_point must lie in [{quant_min}, {quant_max}], got {value}")
