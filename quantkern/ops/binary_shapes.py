"""What the results of operations on signs look like, for torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkern.ops.library import check_device
from quantkern.reference import words_of


def _pack_signs(x: Tensor, axis: int = -1) -> Tensor:
    shape = list(x.shape)
    size = shape.pop(axis)
    return x.new_empty([*shape, words_of(size)], dtype=torch.int32)


def _pack_signs_counted(x: Tensor, axis: int = -1) -> tuple[Tensor, Tensor]:
    packed = _pack_signs(x, axis)
    return packed, packed.new_empty(packed.shape[:-1])


def _unpack_signs(packed: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty([*packed.shape[:-1], k], dtype=dtype)


ROWS_TOGETHER = 32
"""Rows of packed weights that the CPU kernels arrange byte by byte beside each other."""


def arranged_bytes(rows: int, words: int, device: torch.device) -> int:
    """How many bytes ``arrange_signs`` gives: on the CPU the bits and a count a row, on CUDA the count alone."""
    if device.type == "cuda":
        return 4 * rows
    return -(-rows // ROWS_TOGETHER) * ROWS_TOGETHER * (4 * words + 4)


def _arrange_signs(packed: Tensor) -> Tensor:
    words = math.prod(packed.shape[1:])
    return packed.new_empty([arranged_bytes(packed.shape[0], words, packed.device)], dtype=torch.uint8)


def _binary_matmul(
    a: Tensor,
    b: Tensor,
    k: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    arranged: Tensor | None = None,
) -> Tensor:
    check_device(b, a, "b")
    return a.new_empty([a.shape[0], b.shape[0]], dtype=torch.float32)


def _binary_matmul_into(
    a: Tensor, b: Tensor, k: int, scale: Tensor | None, bias: Tensor | None, arranged: Tensor | None, out: Tensor
) -> None:
    check_device(out, a, "out")


def _binary_matmul_sign(
    a: Tensor, b: Tensor, k: int, threshold: Tensor, flip: Tensor, arranged: Tensor | None = None
) -> Tensor:
    check_device(b, a, "b")
    return a.new_empty([a.shape[0], words_of(b.shape[0])])


def conv_sizes(
    sizes: Sequence[int], kernel: Sequence[int], stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    """Height and width of what a convolution or a pooling makes of images of ``sizes``."""
    pairs = zip(sizes, kernel, stride, padding, dilation, strict=True)
    return [(size + 2 * pad - step * (taps - 1) - 1) // by + 1 for size, taps, by, pad, step in pairs]


def _binary_conv2d(
    x: Tensor,
    weight: Tensor,
    channels: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    arranged: Tensor | None = None,
    channels_last: bool = False,
) -> Tensor:
    check_device(weight, x, "weight")
    sizes = conv_sizes(x.shape[1:3], weight.shape[1:3], stride, padding, dilation)
    form = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty([x.shape[0], weight.shape[0], *sizes], dtype=torch.float32, device=x.device, memory_format=form)


def _binary_conv2d_sign(
    x: Tensor,
    weight: Tensor,
    channels: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    threshold: Tensor,
    flip: Tensor,
    arranged: Tensor | None = None,
) -> Tensor:
    check_device(weight, x, "weight")
    sizes = conv_sizes(x.shape[1:3], weight.shape[1:3], stride, padding, dilation)
    return x.new_empty([x.shape[0], *sizes, words_of(weight.shape[0])])


def _packed_max_pool2d(
    x: Tensor, flip: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    check_device(flip, x, "flip")
    return x.new_empty([x.shape[0], *conv_sizes(x.shape[1:3], kernel_size, stride, padding, [1, 1]), x.shape[3]])


def _sign_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    check_device(weight, x, "weight")
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


def _sign_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    check_device(weight, x, "weight")
    sizes = conv_sizes(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    form = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty([x.shape[0], weight.shape[0], *sizes], dtype=x.dtype, device=x.device, memory_format=form)


def is_channels_last(x: Tensor) -> bool:
    """Whether images lie with their channels innermost, and not only because of sizes of 1."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


_SHAPES: dict[str, Callable[..., Any]] = {
    "pack_signs": _pack_signs,
    "pack_signs_counted": _pack_signs_counted,
    "unpack_signs": _unpack_signs,
    "arrange_signs": _arrange_signs,
    "binary_matmul": _binary_matmul,
    "binary_matmul_into": _binary_matmul_into,
    "binary_matmul_sign": _binary_matmul_sign,
    "binary_conv2d": _binary_conv2d,
    "binary_conv2d_sign": _binary_conv2d_sign,
    "packed_max_pool2d": _packed_max_pool2d,
    "sign_linear": _sign_linear,
    "sign_conv2d": _sign_conv2d,
}
for _name, _shapes in _SHAPES.items():
    torch.library.register_fake(f"quantkern::{_name}", _shapes)
