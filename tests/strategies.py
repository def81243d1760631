"""One strategy per kind of argument: shapes, layouts, values, scales, zero points, ranges, packed signs, geometry.

Every strategy asks a ``Draw`` for its choices. ``RandomDraw`` answers from one seed and costs little, for millions of
cases; ``HypothesisDraw`` lets hypothesis choose, and shrink what fails. The first option is the simplest one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from op_sample import EDGES
from torch import Tensor

from quantkern import reference

T = TypeVar("T")
Floats = np.ndarray[Any, np.dtype[np.float32]]


class Draw(Protocol):
    """Where choices come from, and the device of every tensor that is made of them."""

    device: torch.device

    def integer(self, low: int, high: int) -> int:
        """low to high, both included."""
        ...

    def words(self, count: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """32 bits each."""
        ...


class RandomDraw:
    """Choices that follow from a seed."""

    def __init__(self, seed: int, device: str = "cpu") -> None:
        self.random, self.device = random.Random(seed), torch.device(device)

    def integer(self, low: int, high: int) -> int:
        return low + self.random.getrandbits(64) % (high - low + 1)

    def words(self, count: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
        return np.frombuffer(self.random.randbytes(4 * count), np.uint32)


class HypothesisDraw:
    """Choices of hypothesis; ``data`` is what ``hypothesis.strategies.data()`` gives a test."""

    device = torch.device("cpu")

    def __init__(self, data: Any) -> None:
        self.data = data

    def integer(self, low: int, high: int) -> int:
        from hypothesis import strategies

        found: int = self.data.draw(strategies.integers(low, high))
        return found

    def words(self, count: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
        from hypothesis import strategies

        return np.frombuffer(self.data.draw(strategies.binary(min_size=4 * count, max_size=4 * count)), np.uint32)


def pick(draw: Draw, options: Sequence[T]) -> T:
    return options[draw.integer(0, len(options) - 1)]


def chance(draw: Draw, percent: int) -> bool:
    """False is the simpler answer."""
    return draw.integer(0, 99) >= 100 - percent


SIZES = (1, 2, 3, 0, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 130)
MOST_ELEMENTS = 400
MANY_ELEMENTS = 9000
"""One case in a hundred: enough for several stretches of every loop."""


def shapes(draw: Draw, least_rank: int = 0, most_rank: int = 5, *, empty: bool = True) -> tuple[int, ...]:
    """0-d, empty, of one element, odd, and sizes about the widths of vectors and words."""
    rank = draw.integer(least_rank, most_rank)
    room = MANY_ELEMENTS if chance(draw, 1) else MOST_ELEMENTS
    shape = []
    for _ in range(rank):
        size = pick(draw, SIZES)
        if size == 0 and not (empty and chance(draw, 30)):
            size = 2
        shape.append(min(size, max(1, room)))
        room //= max(1, size)
    return tuple(shape)


def axes(draw: Draw, shape: tuple[int, ...], percent: int = 50) -> int | None:
    """An axis, counted from the front or from the end, or none."""
    if not shape or not chance(draw, percent):
        return None
    return draw.integer(-len(shape), len(shape) - 1)


@dataclass(frozen=True)
class Grid:
    """The grid that values are drawn for, so that many of them lie on ties and at the ends."""

    scale: float = 1.0
    low: int = -8
    high: int = 7


FAMILIES = ("spread", "edges", "half_steps", "near_half_steps", "ends", "bits", "magnitudes", "one_value")


def values(draw: Draw, count: int, grid: Grid = Grid(), *, finite: bool = False) -> Floats:
    """float32 numbers of one family, some of another: the special ones, ties, any bits, any magnitude."""
    if not count:
        return np.empty(0, np.float32)
    found = _family(draw, pick(draw, FAMILIES), count, grid)
    if chance(draw, 35):
        other = _family(draw, pick(draw, FAMILIES), count, grid)
        found = np.where(draw.words(count) & 3 == 0, other, found)
    if finite:
        found = np.where(np.abs(found) < 1e30, found, np.float32(1.0))
    with np.errstate(all="ignore"):
        return found.astype(np.float32, copy=False)


_EDGES = np.array(EDGES + (1.0, -1.0, 10.0, -88.0, 65504.0, 65520.0, 1e-8, 6e-8), np.float32)


def _family(draw: Draw, family: str, count: int, grid: Grid) -> Floats:
    scale = np.float32(grid.scale)
    with np.errstate(all="ignore"):
        if family == "one_value":
            return np.broadcast_to(_family(draw, pick(draw, FAMILIES[:-1]), 1, grid), count)
        words = draw.words(count)
        signed = words.view(np.int32)
        if family == "edges":
            return _EDGES[words % len(_EDGES)]
        if family == "bits":
            return words.view(np.float32)
        if family == "magnitudes":
            return np.ldexp(np.where(signed < 0, np.float32(-1.25), np.float32(1.25)), (words % 277).astype(int) - 149)
        if family == "ends":
            end = np.where(words & 1, grid.low, grid.high) + ((words >> 1) % 9).astype(np.float32) / 4 - 1
            return end.astype(np.float32) * scale
        if family in ("half_steps", "near_half_steps"):
            halves = (words >> 8) % (2 * (grid.high - grid.low) + 9) / np.float32(2) + (grid.low - 2)
            on = halves.astype(np.float32) * scale
            side = np.where(words & 1, np.float32(-np.inf), np.float32(np.inf))
            return np.nextafter(on, side) if family == "near_half_steps" else on
        reach = np.float32(max(abs(grid.low), abs(grid.high)) + 2)
        return signed * np.float32(2.0**-31) * reach * scale


def numbers(draw: Draw, count: int, dtype: torch.dtype, grid: Grid = Grid(), *, finite: bool = False) -> Tensor:
    """``values`` as a tensor of a dtype; float64 gets bits below float32's."""
    found = torch.from_numpy(np.array(values(draw, count, grid, finite=finite)))
    if dtype is torch.float64:
        found = found.double() * (1 + 2.0**-40 * draw.integer(-3, 3))
    return found.to(draw.device, dtype)


LAYOUTS = ("contiguous", "permuted", "sliced", "stepped", "expanded", "offset", "far", "overlapping", "negated", "odd")
FAR = 4099
"""The stride of elements that lie far apart."""


def laid_out(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, grid: Grid = Grid(), **more: bool) -> Tensor:
    """A tensor of a shape in any layout: also what ``contiguous()`` never gives."""
    layout = pick(draw, LAYOUTS) if chance(draw, 60) else "contiguous"
    if layout == "expanded":
        kept = tuple(1 if chance(draw, 50) else size for size in shape)
        return numbers(draw, math.prod(kept), dtype, grid, **more).reshape(kept).expand(shape)
    if layout == "overlapping" and shape and all(shape):
        strides = tuple(draw.integer(0, 2) for _ in shape)
        reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        return numbers(draw, reach, dtype, grid, **more).as_strided(shape, strides)
    found = numbers(draw, math.prod(shape), dtype, grid, **more)
    return place(draw, found.reshape(shape), layout)


def place(draw: Draw, x: Tensor, layout: str) -> Tensor:
    """The same values with other strides or another place in memory."""
    shape, rank = tuple(x.shape), x.dim()
    if layout == "permuted" and rank > 1:
        if rank in (4, 5) and chance(draw, 40):
            form = torch.channels_last if rank == 4 else torch.channels_last_3d
            return x.contiguous(memory_format=form)
        order = sorted(range(rank), key=[draw.integer(0, 99) for _ in range(rank)].__getitem__)
        return x.permute(order).contiguous().permute(sorted(range(rank), key=order.__getitem__))
    if layout == "sliced" and rank:
        around = x.new_full(tuple(size + 3 for size in shape), 7)
        firsts = [draw.integer(0, 3) for _ in shape]
        return around[tuple(slice(at, at + size) for at, size in zip(firsts, shape, strict=True))].copy_(x)
    if layout == "stepped" and rank:
        apart = x.new_full((*shape[:-1], 3 * shape[-1]), 7)
        return apart[..., ::3].copy_(x)
    if layout == "offset":
        return x.new_full((x.numel() + 5,), 7)[3 : 3 + x.numel()].view(shape).copy_(x)
    if layout == "far" and 0 < x.numel() <= 40:
        strides = [FAR * math.prod(shape[i + 1 :]) for i in range(rank)]
        return x.new_empty(x.numel() * FAR).as_strided(shape, strides, 1).copy_(x)
    if layout == "negated" and x.is_floating_point():
        return torch._neg_view(x.neg())
    if layout == "odd":
        strides = [17 if size == 1 else stride for size, stride in zip(shape, x.stride(), strict=True)]
        return x.as_strided(shape, strides)
    return x


RANGES = ((-8, 7), (-128, 127), (-127, 127), (0, 255), (0, 1), (-1, 0), (-2, 1), (0, 15), (-7, 7), (3, 9), (-90, -80))
WIDE_RANGES = ((-32767, 32767), (0, 65535), (-(1 << 20), 1 << 20), (-(1 << 20), 1 - (1 << 20)))


def ranges(draw: Draw) -> tuple[int, int]:
    """quant_min and quant_max: signed, unsigned, of one bit, away from 0, as wide as allowed."""
    if chance(draw, 15):
        return pick(draw, WIDE_RANGES)
    if chance(draw, 15):
        low = draw.integer(-300, 300)
        return low, low + draw.integer(1, 600)
    return pick(draw, RANGES)


POWERS = tuple(2.0**exponent for exponent in (0, -1, -3, 1, -7, 4, -20, -126, 100, 127))
EXTREME_SCALES = (1.1754944e-38, 2.95e-39, 3.4e38, 1e-30, 1e30, 8e37)
UNUSABLE_SCALES = (0.0, -0.1, math.inf, -math.inf, math.nan, 1e-40, 1e-45, 2.9e-39)
"""The last three are positive, but their reciprocals overflow."""


def scales(draw: Draw, *, usable: bool = False) -> float:
    """A float32 number: powers of two, for which ties are exact, ordinary ones, extreme ones, unusable ones."""
    kind = draw.integer(0, 19)
    if kind < 7:
        return pick(draw, POWERS)
    if kind < 16:
        return float(np.float32(0.004 * (1 + draw.integer(0, 400))))
    if kind < 18 or usable:
        return float(np.float32(pick(draw, EXTREME_SCALES)))
    if kind < 19:
        return float(np.ldexp(np.float32(1 + draw.integer(0, 99) / 100), draw.integer(-126, 126)))
    return float(np.float32(pick(draw, UNUSABLE_SCALES)))


def vectors(draw: Draw, found: Sequence[float], dtype: torch.dtype = torch.float32, *, axis: bool = True) -> Tensor:
    """Parameters as a tensor: a vector, or for one value 0-d or of one element; now and then a strided view."""
    value = torch.tensor(found, dtype=dtype, device=draw.device)
    if not axis:
        return value.reshape(()) if chance(draw, 50) else value
    if chance(draw, 15):
        return value.repeat_interleave(2)[::2]
    if len(found) and chance(draw, 5):
        return value[:1].expand(len(found))
    return value


def form(draw: Draw, found: Sequence[float], axis: bool) -> Any:
    """Parameters in one of the forms that a public function takes: a list, integers, tensors of other dtypes."""
    whole = all(isinstance(value, int) for value in found)
    if len(found) and chance(draw, 10):
        return list(found) if axis else found[0]
    if not chance(draw, 20):
        return vectors(draw, found, torch.int32 if whole else torch.float32, axis=axis)
    return vectors(
        draw, found, pick(draw, (torch.float32, torch.float64, torch.int64 if whole else torch.float64)), axis=axis
    )


def channel_values(draw: Draw, count: int, one: float, spread: Sequence[float]) -> list[float]:
    """One value a channel: ``one`` and what follows from it by a factor."""
    if not count:
        return []
    factors = [spread[word % len(spread)] for word in draw.words(count).tolist()]
    return np.minimum(one * np.array([1.0, *factors[1:]]), 3.4e38).astype(np.float32).tolist()


def zero_points(draw: Draw, low: int, high: int) -> int:
    """An integer of the range: 0 where it holds it, the middle, an end, any."""
    options = (min(max(0, low), high), (low + high) // 2, low, high, draw.integer(low, high))
    return pick(draw, options)


def steps(draw: Draw) -> tuple[Tensor | None, int]:
    """The counter and the step from which an operation quantizes."""
    if not chance(draw, 15):
        return None, 0
    start = pick(draw, (0, 1, 5, -3, 1 << 40))
    step = torch.tensor(start + draw.integer(-1, 1), device=draw.device)
    return (step if chance(draw, 50) else step.reshape(1)), start


def bits(draw: Draw) -> int:
    return draw.integer(1, 16)


LENGTHS = (1, 2, 31, 32, 33, 40, 63, 64, 65, 70, 96, 100, 127, 128, 130, 0)


def lengths(draw: Draw) -> int:
    """How many signs a row holds."""
    return draw.integer(500, 1200) if chance(draw, 3) else pick(draw, LENGTHS)


def packed(draw: Draw, shape: tuple[int, ...], k: int, *, spoil: bool = True) -> Tensor:
    """Packed signs [*shape, words of k]: contiguous with padding bits 0; one in twenty breaks one of these rules."""
    words = reference.words_of(k)
    found = np.array(draw.words(math.prod(shape) * words).reshape(*shape, words))
    if draw.integer(0, 3) == 3:
        found &= np.uint32(pick(draw, (0, 0xFFFFFFFF)))
    rule = draw.integer(0, 39) if spoil else 0
    if k % 32 and words and rule != 39:
        found[..., -1] &= np.uint32((1 << k % 32) - 1)
    x = torch.from_numpy(found.view(np.int32)).to(draw.device)
    if rule == 38:
        return place(draw, x, pick(draw, LAYOUTS))
    return place(draw, x, "odd") if rule == 37 else x


def geometries(draw: Draw, kernel: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Stride, padding, dilation; the kernel may be larger than the padded image."""
    return (
        (draw.integer(1, 3), draw.integer(1, 3)),
        (draw.integer(0, kernel[0]), draw.integer(0, kernel[1])),
        (1, 1) if chance(draw, 60) else (draw.integer(1, 3), draw.integer(1, 3)),
    )
