"""The functions of binary networks: one bit is one bit. ``quantkern.functional`` has them all by name.

A sign is 1 bit: 1 for x >= 0 (so +1 for 0.0 and -0.0), 0 for anything else (so -1 for NaN). Packed tensors are int32;
element i is bit i % 32 of word i // 32 of the last dimension, and padding bits are 0. Images are packed along their
channels, [N, H, W, words], and so are the weights of convolutions, [O, kh, kw, words].
"""

from __future__ import annotations

from quantkern.binary.convolutions import binary_conv2d, binary_conv2d_sign, packed_max_pool2d
from quantkern.binary.layers import sign_conv2d, sign_linear
from quantkern.binary.products import binary_linear, binary_matmul, binary_matmul_sign
from quantkern.binary.signs import arrange_signs, binarize, pack_signs, unpack_signs

__all__ = [
    "arrange_signs",
    "binarize",
    "binary_conv2d",
    "binary_conv2d_sign",
    "binary_linear",
    "binary_matmul",
    "binary_matmul_sign",
    "pack_signs",
    "packed_max_pool2d",
    "sign_conv2d",
    "sign_linear",
    "unpack_signs",
]
