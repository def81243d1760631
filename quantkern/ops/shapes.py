"""What the results of operations on real numbers look like, for torch: their shapes, types and strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkern.ops.library import check_device
from quantkern.reference import narrowed


def _shapes_of(x: Tensor, with_mask: bool, **parameters: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and its mask of one bit an element, or none."""
    for name, value in parameters.items():
        if value is not None:
            check_device(value, x, name)
    return torch.empty_like(x), x.new_empty([(x.numel() + 7) // 8 if with_mask else 0], dtype=torch.uint8)


_MaybeTensor = Tensor | None
_MaybeAxis = int | None


def _fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: _MaybeAxis = None,
    step: _MaybeTensor = None,
    start_step: int = 0,
    with_mask: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    y, mask = _shapes_of(x, with_mask, scale=scale, zero_point=zero_point, step=step)
    return narrowed(y, dtype), mask


def _fake_quantize_number(
    x: Tensor, scale: float, zero_point: float, quant_min: int, quant_max: int, with_mask: bool = False
) -> tuple[Tensor, Tensor]:
    return _shapes_of(x, with_mask)


def _fake_quantize_weight(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    axis: _MaybeAxis = None,
    step: _MaybeTensor = None,
    start_step: int = 0,
    with_mask: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    y, mask = _shapes_of(x, with_mask, scale=scale, zero_point=zero_point, step=step)
    return narrowed(y, dtype), mask


def _fake_quantize_activation(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    observing: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    ema_decay: float,
    axis: _MaybeAxis = None,
    step: _MaybeTensor = None,
    start_step: int = 0,
    with_mask: bool = False,
    lower: float | None = None,
    upper: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    state = {"running_min": running_min, "running_max": running_max, "scale": scale, "zero_point": zero_point}
    y, mask = _shapes_of(x, with_mask, **state, observing=observing, step=step)
    return narrowed(y, dtype), mask


def _register(name: str, overload: str, shapes: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """The same shape function serves an operator (its y) and its forward kernel (y and mask)."""
    torch.library.register_fake(f"quantkern::{name}{overload}", lambda *a, **k: shapes(*a, **k)[0])
    torch.library.register_fake(f"quantkern::{name}_forward{overload}", shapes)


_register("fake_quantize", "", _fake_quantize)
_register("fake_quantize", ".number", _fake_quantize_number)
_register("fake_quantize_weight", "", _fake_quantize_weight)
_register("fake_quantize_activation", "", _fake_quantize_activation)


def _backward(grad: Tensor, mask: Tensor, strides: list[int]) -> Tensor:
    check_device(mask, grad, "mask")
    return grad.new_empty_strided(grad.shape, strides)


def _backward_in_place(grad: Tensor, mask: Tensor) -> None:
    check_device(mask, grad, "mask")


torch.library.register_fake("quantkern::fake_quantize_backward", _backward)
torch.library.register_fake("quantkern::fake_quantize_backward_", _backward_in_place)


def _clip(x: Tensor, lower: float, upper: float, with_mask: bool = False) -> tuple[Tensor, Tensor]:
    return _shapes_of(x, with_mask)


def _clip_in_place(x: Tensor, lower: float, upper: float, with_mask: bool = False) -> Tensor:
    return _shapes_of(x, with_mask)[1]


def _to_codes(
    x: Tensor, scale: Tensor, zero_point: _MaybeTensor, quant_min: int, quant_max: int, axis: _MaybeAxis
) -> tuple[Tensor, Tensor]:
    codes, _ = _shapes_of(x, False, scale=scale, zero_point=zero_point)
    return torch.empty_like(codes, dtype=torch.uint8), scale.new_empty([2 * scale.numel() + 1])


def _from_codes(codes: Tensor, parameters: Tensor, quant_min: int, axis: _MaybeAxis) -> Tensor:
    check_device(parameters, codes, "parameters")
    return torch.empty_like(codes, dtype=torch.float32)


_register("clip_activation", "", _clip)
torch.library.register_fake("quantkern::clip_activation_", _clip_in_place)
torch.library.register_fake("quantkern::to_codes", _to_codes)
torch.library.register_fake("quantkern::from_codes", _from_codes)


def _lsq(
    x: Tensor,
    scale: Tensor,
    quant_min: int,
    quant_max: int,
    grad_scale: float,
    axis: _MaybeAxis = None,
    zero_point: _MaybeTensor = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return _lsq_forward(x, scale, quant_min, quant_max, axis, zero_point, dtype)


def _lsq_forward(
    x: Tensor, scale: Tensor, quant_min: int, quant_max: int, axis: _MaybeAxis, zero_point: _MaybeTensor,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    return narrowed(_shapes_of(x, False, scale=scale, zero_point=zero_point)[0], dtype)


def _lsq_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    quant_min: int,
    quant_max: int,
    grad_scale: float,
    axis: _MaybeAxis,
    zero_point: _MaybeTensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, _ = _shapes_of(x, False, grad=grad, scale=scale, zero_point=zero_point)
    dzero = scale.new_empty([0]) if zero_point is None else scale.new_empty(zero_point.shape)
    return dx, scale.new_empty(scale.shape), dzero


def _lsq_backward_in_place(grad: Tensor, x: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _lsq_backward(grad, x, scale, *rest)[1:]


torch.library.register_fake("quantkern::lsq", _lsq)
torch.library.register_fake("quantkern::lsq_forward", _lsq_forward)
torch.library.register_fake("quantkern::lsq_backward", _lsq_backward)
torch.library.register_fake("quantkern::lsq_backward_", _lsq_backward_in_place)


def _like(
    xs: Sequence[Tensor], dtype: torch.dtype | None = None, **parameters: Sequence[Tensor | None]
) -> list[Tensor]:
    """One result for each x, after a look at where they and their parameters lie."""
    for x in xs:
        if x.device != xs[0].device:
            where = f"{xs[0].device} and {x.device}"
            raise ValueError(f"xs must lie on one device, got {where}; call the operation once a device")
    results = [_shapes_of(x, False, **{name: p[i] for name, p in parameters.items()})[0] for i, x in enumerate(xs)]
    return [narrowed(y, dtype) for y in results]


def _fake_quantize_weights(
    xs: list[Tensor], scales: list[Tensor], zero_points: list[Tensor], low: Any, high: Any, symmetric: Any, axes: Any,
    steps: list[_MaybeTensor], start_steps: Any, dtype: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    return _like(xs, dtype, scale=scales, zero_point=zero_points, step=steps)


def _fake_quantize_weights_kept(
    xs: list[Tensor], scales: list[Tensor], zero_points: list[Tensor], low: list[int], high: list[int],
    symmetric: list[bool], axes: Any, steps: Any, start_steps: Any, dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    clips = [not (same and a == -b) for a, b, same in zip(low, high, symmetric, strict=True)]
    wanted = [clip and x.requires_grad and torch.is_grad_enabled() for clip, x in zip(clips, xs, strict=True)]
    return _like(xs, dtype, scale=scales), [_shapes_of(x, mask)[1] for x, mask in zip(xs, wanted, strict=True)]


def _fake_quantize_weights_forward(
    xs: list[Tensor], ys: list[Tensor], masks: list[Tensor], scales: list[Tensor], zero_points: list[Tensor], *rest: Any
) -> None:
    _like(xs, y=ys, mask=masks, scale=scales, zero_point=zero_points)


def _lsq_weights(
    xs: list[Tensor], scales: list[Tensor], low: Any, high: Any, grad_scales: Any, axes: Any,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    return _like(xs, dtype, scale=scales)


def _lsq_weights_forward(xs: list[Tensor], ys: list[Tensor], scales: list[Tensor], *rest: Any) -> None:
    _like(xs, y=ys, scale=scales)


torch.library.register_fake("quantkern::fake_quantize_weights", _fake_quantize_weights)
torch.library.register_fake("quantkern::fake_quantize_weights_kept", _fake_quantize_weights_kept)
torch.library.register_fake("quantkern::fake_quantize_weights_forward", _fake_quantize_weights_forward)
torch.library.register_fake("quantkern::lsq_weights", _lsq_weights)
torch.library.register_fake("quantkern::lsq_weights_forward", _lsq_weights_forward)


def _dorefa_weight_forward(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty([], dtype=torch.float32)


def _dorefa_weight_backward(grad: Tensor, x: Tensor, largest: Tensor) -> Tensor:
    return _shapes_of(x, False, grad=grad, largest=largest)[0]


def _dorefa_activation(x: Tensor, bits: int, with_mask: bool = False) -> tuple[Tensor, Tensor]:
    return _shapes_of(x, with_mask)


def _dorefa_gradient(grad: Tensor, bits: int, seed: Tensor) -> Tensor:
    return _shapes_of(grad, False, seed=seed)[0]


_register("dorefa_activation", "", _dorefa_activation)
_register("dorefa_weight", "", _dorefa_weight_forward)
torch.library.register_fake("quantkern::dorefa_weight_backward", _dorefa_weight_backward)
torch.library.register_fake("quantkern::dorefa_gradient", _dorefa_gradient)


def _binarize(x: Tensor, clip_gradient: bool = True) -> Tensor:
    return torch.empty_like(x)


torch.library.register_fake("quantkern::binarize", _binarize)
torch.library.register_fake("quantkern::binarize_forward", _shapes_of)


def _observe_range(x: Tensor, axis: int | None, ema_decay: float | None, *state: Tensor) -> None:
    _observe_histogram(x, axis, *state)


def _observe_histogram(x: Tensor, axis: int | None, *state: Tensor) -> None:
    for value in state:
        check_device(value, x, "the state")


def _histogram_range(
    counts: Tensor, edges: Tensor, low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(low), torch.empty_like(low)


torch.library.register_fake("quantkern::observe_range", _observe_range)
torch.library.register_fake("quantkern::observe_histogram", _observe_histogram)
torch.library.register_fake("quantkern::histogram_range", _histogram_range)
