"""binary_conv2d: the convolution of packed images with packed weights, exactly that of the +-1 tensors.

Implicit GEMM: the kernels are those of binary_matmul, which gather their rows from the images word by word, and no
copy of the images is made. Taps outside of an image count for nothing, as zero padding does. The file is not named
after its operation alone, since a module hides a function of its own name in the package.

Layout: images [N, H, W, words], weights [O, kh, kw, words]; results are float32 [N, O, oh, ow], or packed
[N, oh, ow, ceil(O / 32)].
Who owns what: the host functions own the result.
Numerics: as binary_matmul.
"""

import torch
import triton
from torch import Tensor

from quantkern.triton.binary_matmul import Epilogue, Geometry, launch_products
from quantkern.triton.pack_signs import WORD

Pair = tuple[int, int]


def geometry_of(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Geometry:
    """The geometry of a convolution."""
    out_height, out_width = (
        (x.shape[1 + i] + 2 * padding[i] - dilation[i] * (weight.shape[1 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return Geometry(x.shape[1], x.shape[2], out_height, out_width, weight.shape[2], stride, padding, dilation)


def launch_convolution(
    x: Tensor, weight: Tensor, channels: int, out: Tensor, geometry: Geometry, epilogue: Epilogue
) -> None:
    """Fill ``out``; a convolution that takes every pixel by itself gathers nothing."""
    pixels = geometry.out_height * geometry.out_width
    by_itself = weight.shape[1] == weight.shape[2] == 1 and geometry.stride == (1, 1) and geometry.padding == (0, 0)
    launch_products(x, weight, channels, out, x.shape[0] * pixels, pixels, None if by_itself else geometry, epilogue)


def binary_conv2d_forward(
    x: Tensor,
    weight: Tensor,
    channels: int,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """float32 [N, O, oh, ow]; x and weight contiguous int32, scale and bias float32 [O]."""
    geometry = geometry_of(x, weight, stride, padding, dilation)
    shape = (x.shape[0], weight.shape[0], geometry.out_height, geometry.out_width)
    out = x.new_empty(shape, dtype=torch.float32)
    launch_convolution(x, weight, channels, out, geometry, Epilogue(scale, bias))
    return out


def binary_conv2d_sign_forward(
    x: Tensor,
    weight: Tensor,
    channels: int,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    threshold: Tensor,
    flip: Tensor,
) -> Tensor:
    """int32 [N, oh, ow, ceil(O / 32)]: bit o is (dot >= threshold[o]) xor bit o of flip."""
    geometry = geometry_of(x, weight, stride, padding, dilation)
    shape = (x.shape[0], geometry.out_height, geometry.out_width, triton.cdiv(weight.shape[0], WORD))
    out = x.new_empty(shape)
    launch_convolution(x, weight, channels, out, geometry, Epilogue(threshold=threshold, flip=flip))
    return out
