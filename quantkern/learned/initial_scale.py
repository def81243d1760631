"""Where a learned scale starts: the step size of a grid for one tensor or for each of its channels.

NaN and infinities are left out. Everything here runs once in the life of a scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkern import reference

SHRINKS = 64
"""How many ranges 'mse' tries, from 1/64 of the whole range to all of it."""


def _by_range(low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The smallest scale that clips nothing, and its zero point.

    What is nowhere positive is clipped to 0 by an unsigned grid, whatever its scale; it gets that of its magnitudes.
    """
    if not symmetric:
        scale, zero_point = reference.choose_scale(low, high, quant_min, quant_max, False)
        return scale, zero_point.float()
    below = low / quant_min if quant_min < 0 else torch.where(high > 0, 0.0, low / -quant_max)
    return torch.maximum(high / quant_max, below), torch.zeros_like(low)


def _by_error(rows: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Of ``SHRINKS`` parts of the range the one with the smallest squared error, for each row."""
    low, high = rows.amin(1), rows.amax(1)
    best = torch.full_like(low, torch.inf)
    scale, zero_point = _by_range(low, high, quant_min, quant_max, symmetric)
    for part in torch.linspace(1, 1 / SHRINKS, SHRINKS).tolist():
        candidate = _by_range(low * part, high * part, quant_min, quant_max, symmetric)
        error = (reference.quantize(rows, *candidate, quant_min, quant_max, 0)[0] - rows).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero_point = (
            torch.where(better, new, old) for new, old in zip(candidate, (scale, zero_point), strict=True)
        )
    return scale, zero_point


def _of_rows(
    rows: Tensor, finite: Tensor, quant_min: int, quant_max: int, symmetric: bool, method: str
) -> tuple[Tensor, Tensor]:
    if method == "mse":
        scale, zero_point = _by_error(rows, quant_min, quant_max, symmetric)
    elif method == "minmax" or not symmetric:
        scale, zero_point = _by_range(rows.amin(1), rows.amax(1), quant_min, quant_max, symmetric)
    else:
        mean = rows.abs().sum(1, dtype=torch.float64) / finite.sum(1).clamp(min=1)
        scale = (2 * mean / math.sqrt(quant_max)).float()
        zero_point = torch.zeros_like(scale)
    limits = torch.finfo(torch.float32)
    return torch.where(rows.any(1), scale.clamp(reference.SMALLEST_SCALE, limits.max), 0.0), zero_point


def initial_scale(
    x: Tensor, quant_min: int, quant_max: int, axis: int | None = None, method: str = "paper", symmetric: bool = True
) -> tuple[Tensor, Tensor]:
    """The scale and the zero point that quantization of x starts with.

    ::

        paper   scale = 2 * mean|x| / sqrt(quant_max)        (Esser et al. 2020, section 2.1)
        minmax  the smallest scale that clips nothing; max|x| / quant_max where all of x is below an unsigned grid
        mse     of 64 parts of that range the one with the smallest mean squared error

    With ``symmetric`` False the zero point is chosen too, from the range; 'paper' is 'minmax' then.

    Args:
        x: floating-point tensor.
        quant_min, quant_max, axis: as in ``quantkern.functional.lsq``.

    Returns:
        Two float32 tensors, [1] or [channels]; the zero point is 0 when symmetric. A channel that holds no finite
        value other than 0 gets the scale of the whole tensor, which is 0 where there is no such value at all.

    >>> initial_scale(torch.tensor([1.0, -3.0, 2.0, 2.0]), -2, 1)[0].tolist()
    [4.0]
    >>> initial_scale(torch.tensor([1.0, -3.0, 2.0, 2.0]), -8, 7, method="minmax")[0].tolist()
    [0.375]
    """
    rows = x.detach().reshape(1, -1) if axis is None else x.detach().movedim(axis, 0).unsqueeze(-1).flatten(1)
    rows = rows.float()
    if not rows.shape[1]:
        return rows.new_zeros(rows.shape[0]), rows.new_zeros(rows.shape[0])
    finite = rows.isfinite()
    rows = torch.where(finite, rows, 0.0)
    settings = (quant_min, quant_max, symmetric, method)
    scale, zero_point = _of_rows(rows, finite, *settings)
    empty = scale == 0
    if rows.shape[0] > 1 and bool(empty.any()):
        whole_scale, whole_zero_point = _of_rows(rows.reshape(1, -1), finite.reshape(1, -1), *settings)
        scale = torch.where(empty, whole_scale, scale)
        zero_point = torch.where(empty, whole_zero_point, zero_point)
    return scale, zero_point
