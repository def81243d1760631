"""What the tests of the Triton twins of binary networks share: packed signs and checks of products."""

from __future__ import annotations

import torch
from torch import Tensor
from triton_checks import assert_same_bits

from quantkern import reference
from quantkern import triton as twins

INT32_MIN = -(2**31)


def packed(*shape: int, seed: int = 0) -> Tensor:
    """Random packed signs of a float tensor of this shape, packed along its last dimension."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return reference.pack_signs(torch.randn(shape, generator=generator))


def with_padding_bits(words: Tensor, k: int) -> Tensor:
    """The same signs with padding bits that are all 1."""
    dirty = words.clone()
    if k % 32 and words.numel():
        dirty[..., -1] |= torch.tensor(-1, dtype=torch.int32) << (k % 32)
    return dirty


def vectors(count: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scale, bias, threshold, flip) for ``count`` columns of sums of k signs."""
    generator = torch.Generator().manual_seed(count)
    scale, bias = torch.randn((2, count), generator=generator)
    reach = max(1, int(k**0.5))
    threshold = torch.randint(-reach, reach + 1, (count,), generator=generator, dtype=torch.int32)
    return scale, bias, threshold, packed(count, seed=1)


def assert_packed(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype is torch.int32
    assert actual.is_contiguous()
    assert torch.equal(actual.cpu(), expected)


def check_matmul(m: int, n: int, k: int, device: str) -> None:
    a, b = packed(m, k), packed(n, k, seed=1)
    scale, bias, threshold, flip = vectors(n, k)
    # What padding bits hold is nobody's business.
    given = with_padding_bits(a, k).to(device), with_padding_bits(b, k).to(device), k
    for factors in ((None, None), (scale, None), (None, bias), (scale, bias)):
        y = twins.binary_matmul_forward(*given, *(None if t is None else t.to(device) for t in factors))
        expected = reference.scaled(reference.binary_matmul(a, b, k) + 0.0, *factors)
        assert_same_bits(y, expected)
    signs = twins.binary_matmul_sign_forward(*given, threshold.to(device), flip.to(device))
    assert_packed(signs, reference.binary_matmul_sign(a, b, k, threshold, flip))


def check_conv(
    images: tuple[int, int, int, int],
    kernel: tuple[int, int, int],
    device: str,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> None:
    """Images [N, C, H, W] and kernel (O, kh, kw) against the reference, and against the float convolution."""
    n, channels, height, width = images
    x = packed(n, height, width, channels)
    weight = packed(*kernel, channels, seed=1)
    geometry = stride, padding, dilation
    scale, bias, threshold, flip = vectors(kernel[0], channels * kernel[1] * kernel[2])
    given = [with_padding_bits(t, channels).to(device) for t in (x, weight)]
    y = twins.binary_conv2d_forward(*given, channels, *geometry, None, None)
    assert y.is_contiguous()
    assert_same_bits(y, reference.binary_conv2d(x, weight, channels, *geometry) + 0.0)
    signs = (reference.unpack_signs(t, channels).permute(0, 3, 1, 2) for t in (x, weight))
    assert torch.equal(y.cpu(), torch.nn.functional.conv2d(*signs, None, *geometry))
    y = twins.binary_conv2d_forward(*given, channels, *geometry, scale.to(device), bias.to(device))
    assert_same_bits(y, reference.binary_conv2d(x, weight, channels, *geometry, scale, bias))
    packed_signs = twins.binary_conv2d_sign_forward(*given, channels, *geometry, threshold.to(device), flip.to(device))
    assert_packed(packed_signs, reference.binary_conv2d_sign(x, weight, channels, *geometry, threshold, flip))
