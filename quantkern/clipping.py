"""The activations that clip: ReLU, ReLU6, Hardtanh."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkern import reference
from quantkern import triton as triton_twins
from quantkern.backend import Backend, resolve
from quantkern.binary.checks import check_real
from quantkern.triton_autograd import run_triton

_CLIP_ACTIVATION = torch.ops.quantkern.clip_activation.default


def clip_activation(x: Tensor, lower: float, upper: float, *, backend: Backend = Backend.AUTO) -> Tensor:
    """x within [lower, upper], with one saved bit an element: ReLU (0, inf), ReLU6 (0, 6), Hardtanh (-1, 1).

    y = min(max(x, lower), upper); dy/dx = 1 where lower < x < upper, else 0, as torch's activations have it. They save
    their result, 32 times as much. NaN stays NaN, with gradient 0. Source: Nair and Hinton, "Rectified Linear Units
    Improve Restricted Boltzmann Machines", 2010, section 2.

    Args:
        x: floating-point tensor of any shape and strides: float32, float16 or bfloat16, on the CPU also float64.
        lower, upper: numbers; -inf and inf bound nothing.
        backend: which kernels run, see ``Backend``.

    Raises:
        TypeError: x is not floating point. ValueError: lower is not less than upper.

    >>> x = torch.tensor([-1.0, 0.0, 0.5, 7.0], requires_grad=True)
    >>> y = clip_activation(x, 0.0, 6.0)
    >>> y.tolist()
    [0.0, 0.0, 0.5, 6.0]
    >>> y.sum().backward()
    >>> x.grad.tolist()
    [0.0, 0.0, 1.0, 0.0]
    """
    chosen = resolve(x, backend)
    if chosen is Backend.NATIVE:
        return _CLIP_ACTIVATION(x, lower, upper)  # type: ignore[no-any-return]
    check_real(x, "x")
    if not lower < upper:
        raise ValueError(f"lower must be less than upper, got lower={lower}, upper={upper}")
    if chosen is Backend.TRITON:
        return run_triton(triton_twins.clip_activation_forward, x, lower, upper)
    return reference.clip_activation(x, lower, upper)
