"""The public functions; those of binary networks are in ``quantkern.binary`` and here by name, as are those of
``quantkern.weight_lists``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quantkern import ops, reference
from quantkern import triton as triton_twins
from quantkern.backend import Backend, resolve
from quantkern.binary import (
    arrange_signs,
    binarize,
    binary_conv2d,
    binary_conv2d_sign,
    binary_linear,
    binary_matmul,
    binary_matmul_sign,
    pack_signs,
    packed_max_pool2d,
    sign_conv2d,
    sign_linear,
    unpack_signs,
)
from quantkern.clipping import clip_activation
from quantkern.triton_autograd import run_triton
from quantkern.weight_lists import fake_quantize_weights, lsq_weights

__all__ = [
    "arrange_signs",
    "binarize",
    "binary_conv2d",
    "binary_conv2d_sign",
    "binary_linear",
    "binary_matmul",
    "binary_matmul_sign",
    "clip_activation",
    "dorefa_activation",
    "dorefa_gradient",
    "dorefa_weight",
    "fake_quantize",
    "fake_quantize_activation",
    "fake_quantize_weight",
    "fake_quantize_weights",
    "lsq",
    "lsq_weights",
    "pack_signs",
    "packed_max_pool2d",
    "quantize_gradient",
    "sign_conv2d",
    "sign_linear",
    "unpack_signs",
]

_OPS = torch.ops.quantkern
_FAKE_QUANTIZE = _OPS.fake_quantize.default
_FAKE_QUANTIZE_NUMBER = _OPS.fake_quantize.number
_FAKE_QUANTIZE_WEIGHT = _OPS.fake_quantize_weight.default
_FAKE_QUANTIZE_ACTIVATION = _OPS.fake_quantize_activation.default
_LSQ = _OPS.lsq.default
_DOREFA_WEIGHT = _OPS.dorefa_weight.default
_DOREFA_ACTIVATION = _OPS.dorefa_activation.default
_DOREFA_GRADIENT = _OPS.dorefa_gradient.default


def _as_parameter(value: Tensor | float, x: Tensor, axis: int | None, dtype: torch.dtype, name: str) -> Tensor:
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


def _check_parameter(value: Tensor, x: Tensor, axis: int | None, name: str) -> None:
    expected = 1 if axis is None else x.shape[axis]
    if value.numel() != expected or value.dim() > 1:
        where = "one value" if axis is None else f"a vector of {expected} values, one a channel of axis {axis}"
        raise ValueError(f"{name} must hold {where}, got shape {list(value.shape)}")
    ops.check_device(value, x, name)


def _check_scale_on_host(scale: Tensor) -> None:
    if scale.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~((scale > 0) & torch.isfinite(scale) & torch.isfinite(1 / scale))
        if bool(bad.any()):
            value = scale.reshape(-1)[bad.reshape(-1)][0].item()
            raise ValueError(f"scale must be positive and finite, got {value}")


def _check_zero_point_on_host(zero_point: Tensor, quant_min: int, quant_max: int) -> None:
    if zero_point.device.type == "cpu" and zero_point.dtype is torch.int32 and not torch.compiler.is_compiling():
        bad = (zero_point < quant_min) | (zero_point > quant_max)
        if bool(bad.any()):
            value = zero_point.reshape(-1)[bad.reshape(-1)][0].item()
            raise ValueError(f"zero_point must lie in [{quant_min}, {quant_max}], got {value}")


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
        scale = _as_parameter(scale, x, axis, torch.float32, "scale")
        zero_point = _as_parameter(zero_point, x, axis, torch.int32, "zero_point")
        return _FAKE_QUANTIZE(x, scale, zero_point, quant_min, quant_max, axis, step, start_step, dtype)  # type: ignore[no-any-return]
    axis = check_arguments(x, quant_min, quant_max, axis, dtype)
    if isinstance(zero_point, (int, float)) and not quant_min <= zero_point <= quant_max:
        raise ValueError(f"zero_point must lie in [{quant_min}, {quant_max}], got {zero_point}")
    if isinstance(scale, (int, float)) and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    scale = _as_parameter(scale, x, axis, torch.float32, "scale")
    zero_point = _as_parameter(zero_point, x, axis, torch.int32, "zero_point")
    for value, name in ((scale, "scale"), (zero_point, "zero_point")):
        _check_parameter(value, x, axis, name)
    _check_scale_on_host(scale)
    _check_zero_point_on_host(zero_point, quant_min, quant_max)
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
        _check_parameter(value, x, axis, name)
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
        _check_parameter(value, x, axis, name)
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


class _TritonLsq(torch.autograd.Function):
    """The learned step size on the Triton kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, *settings: Any) -> Tensor:
        *ctx.settings, dtype = settings
        quant_min, quant_max, _, axis = ctx.settings
        ctx.save_for_backward(x, scale, zero_point)
        y: Tensor = triton_twins.lsq_forward(x, scale, quant_min, quant_max, axis, zero_point, dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        quant_min, quant_max, grad_scale, axis = ctx.settings
        dx, dscale, dzero = triton_twins.lsq_backward(
            grads[0], x, scale, quant_min, quant_max, grad_scale, axis, zero_point
        )
        return dx, dscale, None if zero_point is None else dzero, None, None, None, None, None


def lsq(
    x: Tensor,
    scale: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    grad_scale: float | None = None,
    zero_point: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """Fake-quantize x with a step size that is learned by gradient descent.

    With v = x / scale, p = v + zero_point and inside meaning quant_min < p < quant_max::

        y = (clamp(rint(v) + zero_point, quant_min, quant_max) - zero_point) * scale
        dy/dx = 1 inside, else 0
        dy/dscale = rint(v) - v inside, quant_min - zero_point below, quant_max - zero_point above
        dy/dzero_point = 0 inside, else -scale

    The last two are summed over all elements of a channel, in one pass with dy/dx, and multiplied by grad_scale.
    Source: Esser et al., "Learned Step Size Quantization", 2020, eq. 1 to 3 and 5; the learned zero point after
    Bhalgat et al., "LSQ+", 2020, with the offset counted in steps, so that 0 stays exact.

    Args:
        x: floating-point tensor, as in ``fake_quantize``. Only x itself is saved for the backward.
        scale: positive float32 tensor, 1 element, or [channels] with ``axis``; receives a gradient.
        quant_min, quant_max, axis, dtype, backend: as in ``fake_quantize``.
        grad_scale: factor of the gradients of scale and zero point; None: 1 / sqrt(N * quant_max), N the number of
            elements that share a scale (section 2.2).
        zero_point: float32 tensor shaped like scale that is learned too; None: 0.

    Returns:
        A tensor like x. The sums are added in a fixed order: the same bits whatever the number of threads.

    Raises:
        TypeError, ValueError, IndexError: as ``fake_quantize``.

    >>> x = torch.tensor([-0.9, 0.3, 0.8, 9.0], requires_grad=True)
    >>> scale = torch.tensor(0.5, requires_grad=True)
    >>> y = lsq(x, scale, quant_min=-2, quant_max=1, grad_scale=1.0)
    >>> y.tolist()
    [-1.0, 0.5, 0.5, 0.5]
    >>> y.sum().backward()
    >>> x.grad.tolist(), round(scale.grad.item(), 4)
    ([1.0, 1.0, 0.0, 0.0], 2.2)
    """
    chosen = resolve(x, backend)
    if grad_scale is None:
        grad_scale = reference.lsq_grad_scale(x, quant_max, check_axis(x, axis))
    if chosen is Backend.NATIVE:
        return _LSQ(x, scale, quant_min, quant_max, grad_scale, axis, zero_point, dtype)  # type: ignore[no-any-return]
    axis = check_arguments(x, quant_min, quant_max, axis, dtype)
    for value, name in ((scale, "scale"), (zero_point, "zero_point")):
        if value is not None:
            _check_parameter(value, x, axis, name)
    _check_scale_on_host(scale)
    if chosen is Backend.TRITON:
        y: Tensor = _TritonLsq.apply(x, scale, zero_point, quant_min, quant_max, grad_scale, axis, dtype)  # type: ignore[no-untyped-call]
        return y
    return reference.narrowed(reference.lsq(x, scale, quant_min, quant_max, axis, grad_scale, zero_point), dtype)


def check_bits(x: Tensor, bits: int) -> None:
    """The checks of the DoReFa operators for the backends that have none of their own."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"DoReFa takes float32, float16 and bfloat16 tensors, got {x.dtype}; convert it with x.float()")
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must lie in [1, 16], got {bits}")


class _TritonDorefaWeight(torch.autograd.Function):
    """DoReFa's weight transform on the Triton kernels."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, bits: int) -> Tensor:
        y: Tensor
        y, largest = triton_twins.dorefa_weight_forward(w, bits)
        ctx.bits = bits
        ctx.save_for_backward(w, largest)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        w, largest = ctx.saved_tensors
        return grads[0] if ctx.bits == 1 else triton_twins.dorefa_weight_backward(grads[0], w, largest), None


def dorefa_weight(w: Tensor, bits: int, *, backend: Backend = Backend.AUTO) -> Tensor:
    """DoReFa-Net's weights: tanh, scaled to [0, 1] by its maximum, rounded to bits, back to [-1, 1].

    ::

        bits > 1   y = 2 * q(tanh(w) / (2 * max|tanh(w)|) + 1/2) - 1,  q(z) = rint(z * n) / n,  n = 2^bits - 1
        bits = 1   y = sign(w) * mean|w|, sign(0) = +1

    The gradient passes the rounding and goes truly through tanh and the maximum, shared equally where several weights
    attain it; with one bit it passes whole. Source: Zhou et al., "DoReFa-Net", 2016, section 2.3, eq. 9 and 7.

    Args:
        w: float32, float16 or bfloat16 tensor of any shape and strides. Only w itself is saved.
        bits: 1 to 16.
        backend: which kernels run, see ``Backend``.

    Returns:
        A tensor like w; its values are quantized in float32. An all-zero w has no gradient.

    Raises:
        TypeError: w has another dtype. ValueError: bits out of range.

    >>> [round(v, 3) for v in dorefa_weight(torch.tensor([-1.0, -0.1, 0.4]), bits=2).tolist()]
    [-1.0, -0.333, 0.333]
    >>> dorefa_weight(torch.tensor([-1.0, 0.0, 0.5]), bits=1).tolist()
    [-0.5, 0.5, 0.5]
    """
    chosen = resolve(w, backend)
    if chosen is Backend.NATIVE:
        return _DOREFA_WEIGHT(w, bits)  # type: ignore[no-any-return]
    check_bits(w, bits)
    if chosen is Backend.TRITON:
        y: Tensor = _TritonDorefaWeight.apply(w, bits)  # type: ignore[no-untyped-call]
        return y
    return reference.dorefa_weight(w, bits)


def dorefa_activation(x: Tensor, bits: int, *, backend: Backend = Backend.AUTO) -> Tensor:
    """DoReFa-Net's activations: clip to [0, 1] and round to bits.

    y = rint(clip(x, 0, 1) * n) / n with n = 2^bits - 1; the gradient passes where 0 <= x <= 1 and costs one saved bit
    an element. Source: Zhou et al. 2016, section 2.4.

    Args:
        x: float32, float16 or bfloat16 tensor of any shape and strides.
        bits, backend: as in ``dorefa_weight``.

    Raises:
        TypeError: x has another dtype. ValueError: bits out of range.

    >>> dorefa_activation(torch.tensor([-0.5, 0.3, 0.6, 2.0]), bits=1).tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    chosen = resolve(x, backend)
    if chosen is Backend.NATIVE:
        return _DOREFA_ACTIVATION(x, bits)  # type: ignore[no-any-return]
    check_bits(x, bits)
    if chosen is Backend.TRITON:
        return run_triton(triton_twins.dorefa_activation_forward, x, bits)
    return reference.dorefa_activation(x, bits)


class _DorefaGradient(torch.autograd.Function):
    """The identity whose backward quantizes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, seed: Tensor, backend: Backend) -> Tensor:
        ctx.bits, ctx.backend = bits, backend
        ctx.save_for_backward(seed)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (seed,) = ctx.saved_tensors
        return quantize_gradient(grads[0], ctx.bits, seed, backend=ctx.backend), None, None, None


def quantize_gradient(grad: Tensor, bits: int, seed: Tensor, *, backend: Backend = Backend.AUTO) -> Tensor:
    """What the backward of ``dorefa_gradient`` does to a gradient; seed is a 1-element int64 tensor beside it.

    >>> quantize_gradient(torch.tensor([-1.0, 0.0, 1.0]), 8, torch.tensor(3)).abs().max().item() <= 1.0
    True
    """
    chosen = resolve(grad, backend)
    if chosen is Backend.NATIVE:
        return _DOREFA_GRADIENT(grad, bits, seed)  # type: ignore[no-any-return]
    check_bits(grad, bits)
    ops.check_device(seed, grad, "seed")
    if chosen is Backend.TRITON:
        quantized: Tensor = triton_twins.quantize_gradient(grad, bits, seed)
        return quantized
    return reference.dorefa_gradient(grad, bits, int(seed.item()))


def dorefa_gradient(
    x: Tensor, bits: int, seed: Tensor | int | None = None, *, backend: Backend = Backend.AUTO
) -> Tensor:
    """x itself; its gradient comes back quantized to bits, with random rounding.

    For every sample (first axis) with M = max|g| over its other axes::

        g' = 2 M (q(g / (2 M) + 1/2 + noise) - 1/2),   noise uniform in [-1/2, 1/2) / n,   n = 2^bits - 1

    g' is 0 where M is 0; a sample whose M is not finite passes unchanged, so that loss scaling can see it. The noise
    is word i of the stream Philox4x32-10(seed) for element i in memory order: the same bits on every backend. Source:
    Zhou et al. 2016, section 2.5, eq. 12; Salmon et al. 2011 for Philox.

    Args:
        x: float32, float16 or bfloat16 tensor of any shape and strides.
        bits: 1 to 16.
        seed: an integer, or a 1-element int64 tensor on x's device; None draws one from torch's generator.
        backend: as in ``dorefa_weight``.

    Raises:
        TypeError: x has another dtype. ValueError: bits out of range, seed on another device.

    >>> x = torch.tensor([0.2, 0.7], requires_grad=True)
    >>> dorefa_gradient(x, bits=8, seed=1).sum().backward()
    >>> bool(((x.grad - 1).abs() <= 2 / 255).all())
    True
    """
    check_bits(x, bits)
    if seed is None:
        seed = torch.randint(1 << 62, (), device=x.device)
    elif isinstance(seed, int):
        seed = torch.tensor(seed, device=x.device)
    y: Tensor = _DorefaGradient.apply(x, bits, seed, backend)  # type: ignore[no-untyped-call]
    return y
