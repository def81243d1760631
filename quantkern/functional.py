"""The public functions by name, whichever module they are in."""

from __future__ import annotations

from quantkern.affine import fake_quantize, fake_quantize_activation, fake_quantize_weight
from quantkern.binary import (
    arrange_signs,
    binarize,
    binary_conv2d,
    binary_conv2d_sign,
    binary_linear,
    binary_matmul,
    binary_matmul_sign,
    pack_signs,
    packed_max_pool2d,
    sign_conv2d,
    sign_linear,
    unpack_signs,
)
from quantkern.clipping import clip_activation
from quantkern.dorefa import dorefa_activation, dorefa_gradient, dorefa_weight, quantize_gradient
from quantkern.learned_step import lsq
from quantkern.weight_lists import fake_quantize_weights, lsq_weights

__all__ = [
    "arrange_signs",
    "binarize",
    "binary_conv2d",
    "binary_conv2d_sign",
    "binary_linear",
    "binary_matmul",
    "binary_matmul_sign",
    "clip_activation",
    "dorefa_activation",
    "dorefa_gradient",
    "dorefa_weight",
    "fake_quantize",
    "fake_quantize_activation",
    "fake_quantize_weight",
    "fake_quantize_weights",
    "lsq",
    "lsq_weights",
    "pack_signs",
    "packed_max_pool2d",
    "quantize_gradient",
    "sign_conv2d",
    "sign_linear",
    "unpack_signs",
]
