"""Fake-quantization with a scale that is given, that follows from x, or that follows from a moving average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkern import reference
from quantkern import triton as triton_twins
from quantkern.arguments import (
    as_parameter,
    check_arguments,
    check_parameter,
    check_scale_on_host,
    check_zero_point_on_host,
)
from quantkern.backend import Backend, resolve
from quantkern.clipping import clip_activation
from quantkern.triton_autograd import run_triton

_FAKE_QUANTIZE = torch.ops.quantkern.fake_quantize.default
_FAKE_QUANTIZE_NUMBER = torch.ops.quantkern.fake_quantize.number
_FAKE_QUANTIZE_WEIGHT = torch.ops.quantkern.fake_quantize_weight.default
_FAKE_QUANTIZE_ACTIVATION = torch.ops.quantkern.fake_quantize_activation.default


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    *,
    step: Tensor | None = None,
    start_step: int = 0,
    dtype: torch.dtype | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """Quantize and dequantize x, with the straight-through gradient.

    Equivalent to ``torch.fake_quantize_per_tensor_affine`` (or ``_per_channel_affine`` with ``axis``), except that
    NaN stays NaN and infinities saturate. Per element, in float32 for float16, bfloat16 and float32 tensors::

        q = clamp(rint(x * (1 / scale)) + zero_point, quant_min, quant_max)      ties to even
        y = (q - zero_point) * scale
        dy/dx = 1 where the rounded value lies in [quant_min, quant_max], else 0

    Source: Jacob et al. 2018, eq. 1 and section 3; the gradient of rounding after Bengio et al. 2013.

    Args:
        x: floating-point tensor of any shape and strides: float32, float16 or bfloat16, on the CPU also float64.
        scale: step of the grid, in units of x. A positive number or 1-element float32 tensor; with ``axis`` a
            float32 vector [channels].
        zero_point: the q that stands for 0, shaped as ``scale``; int32 or float32.
        quant_min, quant_max: the range of q, integers within +-2**20.
        axis: the dimension of x that holds the channels; None quantizes the whole tensor with one scale.
        step, start_step: with a 1-element int64 tensor ``step``, the result is x itself while step < start_step.
        dtype: float16 or bfloat16: what a float32 x becomes in the same pass, rounded once more, as an autocast region
            needs it; x's gradient is float32. None: the dtype of x, which any other x keeps.
        backend: which kernels run, see ``Backend``.

    Returns:
        A tensor like x. The backward needs one bit an element of saved memory.

    Raises:
        TypeError: x is not floating point, or a parameter has a wrong type.
        ValueError: scale not positive and finite (where the host can see it; elsewhere y is NaN), an empty or too
            wide quantized range, a zero point outside it, parameters of a wrong shape or on another device, another
            dtype.
        IndexError: axis out of range.

    >>> x = torch.tensor([-1.0, 0.26, 0.74, 9.0], requires_grad=True)
    >>> y = fake_quantize(x, scale=0.5, zero_point=0, quant_min=-2, quant_max=7)
    >>> y.tolist()
    [-1.0, 0.5, 0.5, 3.5]
    >>> y.sum().backward()
    >>> x.grad.tolist()
    [1.0, 1.0, 1.0, 0.0]
    """
    chosen = resolve(x, backend)
    if chosen is Backend.NATIVE:
        numbers = type(scale) is float and isinstance(zero_point, (int, float))
        if numbers and axis is None and step is None and dtype is None:
            return _FAKE_QUANTIZE_NUMBER(x, scale, zero_point, quant_min, quant_max)  # type: ignore[no-any-return]
        scale = as_parameter(scale, x, axis, torch.float32, "scale")
        zero_point = as_parameter(zero_point, x, axis, torch.int32, "zero_point")
        return _FAKE_QUANTIZE(x, scale, zero_point, quant_min, quant_max, axis, step, start_step, dtype)  # type: ignore[no-any-return]
    axis = check_arguments(x, quant_min, quant_max, axis, dtype)
    if isinstance(zero_point, (int, float)) and not quant_min <= zero_point <= quant_max:
        raise ValueError(f"zero_point must lie in [{quant_min}, {quant_max}], got {zero_point}")
    if isinstance(scale, (int, float)) and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    scale = as_parameter(scale, x, axis, torch.float32, "scale")
    zero_point = as_parameter(zero_point, x, axis, torch.int32, "zero_point")
    for value, name in ((scale, "scale"), (zero_point, "zero_point")):
        check_parameter(value, x, axis, name)
    check_scale_on_host(scale)
    check_zero_point_on_host(zero_point, quant_min, quant_max)
    if chosen is Backend.TRITON:
        twin = triton_twins.fake_quantize_forward
        return run_triton(twin, x, scale, zero_point, quant_min, quant_max, axis, step, start_step, dtype=dtype)
    y = _delayed(x, reference.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis), step, start_step)
    return reference.narrowed(y, dtype)


def fake_quantize_weight(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    axis: int | None = None,
    *,
    step: Tensor | None = None,
    start_step: int = 0,
    dtype: torch.dtype | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """Fake-quantize x with its own current range, writing the scale and zero point it chose.

    One operation does min/max, scale and zero point, and fake-quantization::

        symmetric  scale = max|x| / ((quant_max - quant_min) / 2); zero_point 0, or the middle of an unsigned range
        affine     scale = (max - min) / (quant_max - quant_min), the range extended to hold 0
                   zero_point = clamp(quant_min - rint(min / scale), quant_min, quant_max)

    With symmetric statistics and quant_min = -quant_max nothing is ever clipped: the backward is the identity and
    saves nothing. Source: Jacob et al. 2018, section 3 (weights use their current range).

    Args:
        x: floating-point tensor, as in ``fake_quantize``.
        scale: float32 tensor that receives the scale: 1 element, or [channels] with ``axis``.
        zero_point: int32 tensor of the same shape that receives the zero point.
        quant_min, quant_max, axis, step, start_step, dtype, backend: as in ``fake_quantize``.
        symmetric: the scheme.

    Returns:
        A tensor like x. An all-zero tensor or channel gets the smallest normal float32 as its scale.

    Raises:
        TypeError, ValueError, IndexError: as ``fake_quantize``.

    >>> scale, zero_point = torch.empty(()), torch.empty((), dtype=torch.int32)
    >>> fake_quantize_weight(torch.tensor([-1.27, 0.5]), scale, zero_point, -127, 127, symmetric=True).tolist()
    [-1.2699999809265137, 0.5]
    >>> round(scale.item(), 6), zero_point.item()
    (0.01, 0)
    """
    chosen = resolve(x, backend)
    if chosen is Backend.NATIVE:
        return _FAKE_QUANTIZE_WEIGHT(  # type: ignore[no-any-return]
            x, scale, zero_point, quant_min, quant_max, symmetric, axis, step, start_step, dtype
        )
    axis = check_arguments(x, quant_min, quant_max, axis, dtype)
    for value, name in ((scale, "scale"), (zero_point, "zero_point")):
        check_parameter(value, x, axis, name)
    if not x.numel():
        return reference.narrowed(x.clone(), dtype)
    if chosen is Backend.TRITON:
        twin = triton_twins.fake_quantize_weight_forward
        needs_mask = not (symmetric and quant_min == -quant_max)
        arguments = (scale, zero_point, quant_min, quant_max, symmetric, axis, step, start_step)
        return run_triton(twin, x, *arguments, needs_mask=needs_mask, dtype=dtype)
    y, new_scale, new_zero_point = reference.fake_quantize_weight(x, quant_min, quant_max, symmetric, axis)
    _write(scale, new_scale)
    _write(zero_point, new_zero_point)
    return reference.narrowed(_delayed(x, y, step, start_step), dtype)


def fake_quantize_activation(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    observing: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    ema_decay: float = 0.99,
    axis: int | None = None,
    *,
    step: Tensor | None = None,
    start_step: int = 0,
    clip: tuple[float, float] | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """Take x into a moving average of its range, then fake-quantize it with the scale of that range.

    One operation, all state on x's device, no host synchronisation::

        running_min = running_min * ema_decay + min(x) * (1 - ema_decay)       and running_max alike
        scale, zero_point from the running range as in ``fake_quantize_weight``
        y = fake_quantize(x, scale, zero_point, quant_min, quant_max)

    The first batch stands for the running range too. A batch without a finite range (empty, all NaN, holding an
    infinity) changes nothing; NaN elements are left out of the range. Source: Jacob et al. 2018, section 3.1.

    Args:
        x: floating-point tensor, as in ``fake_quantize``.
        running_min, running_max: float32 state, 1 element or [channels] with ``axis``; +inf and -inf: nothing seen.
        scale, zero_point: float32 and int32 state of the same shape.
        observing: 1-element bool tensor. While it is 0 the state stands still and x is not read for statistics.
        ema_decay: weight of the past, in (0, 1).
        clip: (lower, upper): everything as of ``clip_activation(x, lower, upper)``, a ReLU for instance, without a pass
            over x of its own.
        quant_min, quant_max, symmetric, axis, step, start_step, dtype, backend: as in ``fake_quantize_weight``.

    Returns:
        A tensor like x; x's values, with its gradient, while step < start_step or nothing has been seen.

    Raises:
        TypeError, ValueError, IndexError: as ``fake_quantize``.

    >>> low, high = torch.tensor(float("inf")), torch.tensor(float("-inf"))
    >>> scale, zero_point = torch.ones(()), torch.zeros((), dtype=torch.int32)
    >>> x = torch.tensor([-1.0, 0.2, 1.55])
    >>> y = fake_quantize_activation(x, low, high, scale, zero_point, torch.tensor(True), 0, 255, symmetric=False)
    >>> round(scale.item(), 4), zero_point.item()
    (0.01, 100)
    """
    lower, upper = (None, None) if clip is None else clip
    chosen = resolve(x, backend)
    if chosen is Backend.NATIVE:
        return _FAKE_QUANTIZE_ACTIVATION(  # type: ignore[no-any-return]
            x,
            running_min,
            running_max,
            scale,
            zero_point,
            observing,
            quant_min,
            quant_max,
            symmetric,
            ema_decay,
            axis,
            step,
            start_step,
            lower,
            upper,
            dtype,
        )
    if clip is not None:
        x = clip_activation(x, *clip, backend=chosen)
    axis = check_arguments(x, quant_min, quant_max, axis, dtype)
    if not 0.0 < ema_decay < 1.0:
        raise ValueError(f"ema_decay must lie in (0, 1), got {ema_decay}")
    state = {"running_min": running_min, "running_max": running_max, "scale": scale, "zero_point": zero_point}
    for name, value in state.items():
        check_parameter(value, x, axis, name)
    if chosen is Backend.TRITON:
        twin = triton_twins.fake_quantize_activation_forward
        settings = (quant_min, quant_max, symmetric, ema_decay, axis, step, start_step)
        return run_triton(twin, x, *state.values(), observing, *settings, dtype=dtype)
    observed = reference.fake_quantize_activation(
        x, running_min, running_max, scale, zero_point, quant_min, quant_max, symmetric, ema_decay, axis
    )
    frozen = reference.fake_quantize_activation(
        x,
        running_min,
        running_max,
        scale,
        zero_point,
        quant_min,
        quant_max,
        symmetric,
        ema_decay,
        axis,
        observing=False,
    )
    on = observing.reshape(()).bool()
    for value, new, old in zip(state.values(), observed[1:], frozen[1:], strict=True):
        _write(value, torch.where(on, new, old))
    y = torch.where(on, observed[0], frozen[0])
    return reference.narrowed(_delayed(x, y, step, start_step), dtype)


def _delayed(x: Tensor, y: Tensor, step: Tensor | None, start_step: int) -> Tensor:
    """y, or x itself before the step from which an operation quantizes."""
    # A counter of one element must not add a dimension to a 0-d x.
    return y if step is None else torch.where(step.reshape(()) >= start_step, y, x)


def _write(target: Tensor, value: Tensor) -> None:
    """Fill a state tensor of one or of many elements."""
    with torch.no_grad():
        target.copy_(value.reshape(target.shape))
