"""How a grid is written in the integers that ONNX has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SUM_LIMIT = 2**15 - 1
"""x86 without VNNI adds two products of 8-bit integers in 16 bits, and saturates."""

_WEIGHT_TYPES = (("INT4", -8, 7), ("UINT4", 0, 15), ("INT8", -128, 127), ("UINT8", 0, 255)) + (
    ("INT16", -(2**15), 2**15 - 1),
    ("UINT16", 0, 2**16 - 1),
    ("INT32", -(2**31), 2**31 - 1),
)


@dataclass(frozen=True)
class Encoding:
    """An activation's integers: unsigned, ``shift`` above those of its grid, ``largest`` the last one.

    least, most: where they must be clipped, where not None.
    """

    dtype: str
    shift: int
    largest: int
    least: int | None = None
    most: int | None = None


def encode(first: int, last: int, zero_point: np.ndarray, bounds: tuple[np.ndarray, np.ndarray]) -> Encoding:
    """Unsigned integers of 8 or 16 bits for those from ``first`` to ``last``.

    They saturate at their own ends, so one end of the grid is put there. The other one needs a clip unless it is one
    of theirs too, or ``bounds``, the rounded ends of the tensor on this grid, keep it from being crossed.

    >>> encode(0, 127, np.array(0), (np.array(0), np.array(120)))
    Encoding(dtype='UINT8', shift=0, largest=127, least=None, most=None)
    >>> encode(-127, 127, np.array(0), (np.array(-np.inf), np.array(np.inf)))
    Encoding(dtype='UINT8', shift=127, largest=254, least=None, most=254)
    """
    low, high = min(first, int(zero_point.min())), max(last, int(zero_point.max()))
    bits = 8 if high - low < 2**8 else 16
    end = 2**bits - 1
    crossed_low, crossed_high = bool((bounds[0] < first).any()), bool((bounds[1] > last).any())
    shift = end - high if crossed_high and not crossed_low else -low
    least = first + shift if crossed_low and first + shift > 0 else None
    most = last + shift if crossed_high and last + shift < end else None
    return Encoding(f"UINT{bits}", shift, high + shift, least, most)


def weight_type(values: np.ndarray, zero_point: np.ndarray, allow_int4: bool) -> str:
    """The smallest integers that hold a weight's and its zero points.

    >>> weight_type(np.array([-7, 7]), np.array(0), True), weight_type(np.array([-7, 200]), np.array(0), True)
    ('INT4', 'INT16')
    """
    low = min(int(values.min(initial=0)), int(zero_point.min(initial=0)))
    high = max(int(values.max(initial=0)), int(zero_point.max(initial=0)))
    types = _WEIGHT_TYPES if allow_int4 else _WEIGHT_TYPES[2:]
    return next(name for name, first, last in types if first <= low and high <= last)


def may_saturate(values: np.ndarray, largest: int) -> bool:
    """Whether two products of 8-bit weights and unsigned activations up to ``largest`` can exceed 16 bits.

    >>> may_saturate(np.array([127, -127, 127]), 255), may_saturate(np.array([127, -127, 127]), 127)
    (True, False)
    """
    flat = values.reshape(-1)
    sums = [int(np.sort(np.maximum(side, 0))[-2:].sum()) for side in (flat, -flat)]
    return max(sums) * largest > SUM_LIMIT


def finer_by(values: np.ndarray, zero_point: np.ndarray, largest: int) -> int:
    """The power of two by which a weight's integers can be multiplied, and its scale divided, in 8 bits.

    The numbers stay the same, and the bias, which counts in steps of input_scale * weight_scale, is rounded less. It
    is not worth products that ``may_saturate``, with activations up to ``largest``.

    >>> finer_by(np.array([-7, 5]), np.array(0), 255), finer_by(np.array([-127, 5]), np.array(0), 255)
    (16, 1)
    """
    both = np.append(values.reshape(-1), zero_point.reshape(-1))
    fast, factor = not may_saturate(values, largest), 1
    while 2 * factor * both.min() >= -128 and 2 * factor * both.max() <= 127 and factor < 64:
        if fast and may_saturate(2 * factor * values, largest):
            break
        factor *= 2
    return factor
