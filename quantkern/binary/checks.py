"""What arguments of binary functions must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkern import ops, reference
from quantkern.reference import words_of

WORD = reference.WORD
Pair = int | Sequence[int]


def pair(value: Pair, name: str, least: int) -> tuple[int, int]:
    """Two integers, both at least ``least``, from one or from two."""
    found = (value, value) if isinstance(value, int) else tuple(value)
    if len(found) != 2 or not all(isinstance(v, int) and v >= least for v in found):
        raise ValueError(f"{name} must be one or two integers of at least {least}, got {value!r}")
    return found[0], found[1]


def check_real(x: Tensor, name: str) -> None:
    """A tensor whose signs are taken."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}; convert it with {name}.float()")


def check_packed(packed: Tensor, k: int, name: str, dims: int | None = None) -> None:
    """A packed tensor that holds k signs a row, the checks that need not read it."""
    if packed.dtype is not torch.int32:
        raise TypeError(f"{name} must hold packed signs, int32 from pack_signs, got {packed.dtype}")
    if dims is not None and packed.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, the packed one last, got shape {list(packed.shape)}")
    if not 0 <= k <= reference.LONGEST_SUM:
        raise ValueError(f"k must lie in [0, {reference.LONGEST_SUM}], got {k}")
    if packed.shape[-1] != words_of(k):
        raise ValueError(
            f"{name} must have rows of {words_of(k)} words for k={k} signs, 32 a word, got shape {list(packed.shape)}"
        )
    if not packed.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {packed.stride()}; call {name}.contiguous()")


def check_padding_bits(packed: Tensor, k: int, name: str) -> None:
    """Padding bits are 0; read only where that does not wait for a device."""
    if k % WORD == 0 or packed.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool((packed[..., -1] >> (k % WORD)).any()):
        raise ValueError(f"{name} has padding bits that are not 0 behind its {k} signs; pack it with pack_signs")


def check_vector(value: Tensor | None, like: Tensor, count: int, dtype: torch.dtype, name: str) -> None:
    """A vector of count values of a type, on the device of ``like``, or None."""
    if value is None:
        return
    if value.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
    if tuple(value.shape) != (count,):
        raise ValueError(f"{name} must be a vector of {count} values, got shape {list(value.shape)}")
    ops.check_device(value, like, name)


def check_operands(a: Tensor, b: Tensor, k: int, dims: int, names: tuple[str, str]) -> None:
    """Two packed tensors of rows of k signs on one device."""
    for value, name in zip((a, b), names, strict=True):
        check_packed(value, k, name, dims)
        check_padding_bits(value, k, name)
    ops.check_device(b, a, names[1])


def check_signs(threshold: Tensor, flip: Tensor, like: Tensor, count: int) -> None:
    """Thresholds and packed flips of count outputs."""
    check_vector(threshold, like, count, torch.int32, "threshold")
    check_vector(flip, like, words_of(count), torch.int32, "flip")
