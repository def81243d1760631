"""Signs, packed and not, and their products."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkern.reference.affine import straight_through

WORD = 32
"""Signs in a packed word: element i is bit i % 32 of word i // 32, 1 for x >= 0; padding bits are 0."""

LONGEST_SUM = 1 << 24
"""Most signs in a dot product: every sum of that many +-1 is exact in float32."""


def words_of(k: int) -> int:
    """How many words hold k signs.

    >>> words_of(33)
    2
    """
    return -(-k // WORD)


def binarize(x: Tensor, clip_gradient: bool = True) -> Tensor:
    """+1 where x >= 0, else -1 (so NaN too); the gradient passes where |x| <= 1, or everywhere.

    Courbariaux et al., "Binarized Neural Networks", 2016, eq. 1 and 4: activations clip the gradient; for weights it
    passes whole.
    """
    detached = x.detach()
    y = torch.where(detached >= 0, 1.0, -1.0).to(x.dtype)
    return straight_through(x, y, detached.abs() <= 1 if clip_gradient else torch.ones_like(x, dtype=torch.bool))


def pack_signs(x: Tensor, axis: int = -1) -> Tensor:
    """The signs of x, packed along ``axis``, which moves to the end: int32 [..., ceil(size / 32)]."""
    bits = (x.detach() >= 0).movedim(axis, -1).to(torch.int64)
    words = words_of(bits.shape[-1])
    bits = torch.nn.functional.pad(bits, (0, words * WORD - bits.shape[-1])).reshape(*bits.shape[:-1], words, WORD)
    packed = (bits << torch.arange(WORD, device=x.device)).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def pack_signs_counted(x: Tensor, axis: int = -1) -> tuple[Tensor, Tensor]:
    """``pack_signs`` and the number of ones in every packed row, int32."""
    return pack_signs(x, axis), (x.detach() >= 0).sum(axis, dtype=torch.int32)


def unpack_signs(packed: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first k signs of every row as +-1."""
    bits = (packed.unsqueeze(-1) >> torch.arange(WORD, device=packed.device, dtype=torch.int32)) & 1
    return (2 * bits.flatten(-2)[..., :k] - 1).to(dtype)


def scaled(dot: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """dot * scale + bias along the last axis, rounded after each step."""
    dot = dot if scale is None else dot * scale
    return dot if bias is None else dot + bias


def binary_matmul(a: Tensor, b: Tensor, k: int, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The dot products of the packed rows of a [M, words] with those of b [N, words]: float32 [M, N]."""
    return scaled(unpack_signs(a, k) @ unpack_signs(b, k).t(), scale, bias)


def binary_matmul_sign(a: Tensor, b: Tensor, k: int, threshold: Tensor, flip: Tensor) -> Tensor:
    """Packed [M, ceil(N / 32)]: bit n is (dot >= threshold[n]) xor bit n of flip."""
    return signs_at(binary_matmul(a, b, k), threshold, flip)


def signs_at(dot: Tensor, threshold: Tensor, flip: Tensor) -> Tensor:
    """The packed signs of sums along the last axis."""
    turned = unpack_signs(flip, dot.shape[-1]) > 0
    return pack_signs(torch.where((dot.double() >= threshold.double()) ^ turned, 1.0, -1.0))


def binary_conv2d(
    x: Tensor,
    weight: Tensor,
    channels: int,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Convolution of packed images [N, H, W, words] with packed weights [O, kh, kw, words]: float32 [N, O, oh, ow].

    Exactly the float convolution of the +-1 tensors: padding adds nothing.
    """
    images, kernels = (unpack_signs(t, channels).permute(0, 3, 1, 2) for t in (x, weight))
    dot = torch.nn.functional.conv2d(images, kernels, None, stride, padding, dilation)
    dot = torch.round(dot) + 0.0  # a sum of +-1 has no negative zero, a convolution with padding may
    return scaled(dot.movedim(1, -1), scale, bias).movedim(-1, 1).contiguous()


def binary_conv2d_sign(
    x: Tensor,
    weight: Tensor,
    channels: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    threshold: Tensor,
    flip: Tensor,
) -> Tensor:
    """The packed signs of ``binary_conv2d``, [N, oh, ow, ceil(O / 32)], as in ``binary_matmul_sign``."""
    dot = binary_conv2d(x, weight, channels, stride, padding, dilation)
    return signs_at(dot.movedim(1, -1), threshold, flip)


def packed_max_pool2d(
    x: Tensor, flip: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Max pooling of packed images before their sign was taken: OR over the window, AND for flipped channels."""
    channels = x.shape[-1] * WORD
    turned = unpack_signs(flip, channels)
    signs = (unpack_signs(x, channels) * -turned).permute(0, 3, 1, 2)  # -1 where flipped: the least becomes the most
    pooled = torch.nn.functional.max_pool2d(signs, kernel_size, stride, padding).permute(0, 2, 3, 1)
    return pack_signs(pooled * -turned)


def sign_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear of the signs of x and weight, with the gradients of linear at those signs (section 1.2 and 1.3)."""
    x, weight = binarize(x, clip_gradient=False), binarize(weight, clip_gradient=False)
    return torch.nn.functional.linear(x, weight, bias)


def sign_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """conv2d of the signs of x and weight, with the gradients of conv2d at those signs."""
    x, weight = binarize(x, clip_gradient=False), binarize(weight, clip_gradient=False)
    return torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation)
