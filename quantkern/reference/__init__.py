"""The specification of every operation, in plain PyTorch.

Nothing here is fast. The kernels are tested against this page, the benchmarks compile it as a baseline, and
``backend=Backend.REFERENCE`` runs it. Arithmetic is float32 for float16, bfloat16 and float32 tensors. With a
float64 ``scale`` everything is float64, which makes these functions the oracle of the kernels.

Sources: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", 2018 (eq. 1, sections 3 and 3.1); NNI 2.10's QAT_Quantizer for the scale and zero point conventions; Esser
et al., "Learned Step Size Quantization", 2020; Zhou et al., "DoReFa-Net", 2016.
"""

from __future__ import annotations

from quantkern.reference.affine import (
    QUANT_LIMIT,
    SMALLEST_SCALE,
    StraightThrough,
    along_axis,
    choose_scale,
    clip_activation,
    fake_quantize,
    fake_quantize_activation,
    fake_quantize_weight,
    fake_quantize_weights,
    from_codes,
    min_max,
    narrowed,
    quantize,
    straight_through,
    to_codes,
    update_running,
)
from quantkern.reference.binary import (
    LONGEST_SUM,
    WORD,
    binarize,
    binary_conv2d,
    binary_conv2d_sign,
    binary_matmul,
    binary_matmul_sign,
    pack_signs,
    pack_signs_counted,
    packed_max_pool2d,
    scaled,
    sign_conv2d,
    sign_linear,
    signs_at,
    unpack_signs,
    words_of,
)
from quantkern.reference.dorefa import (
    DorefaWeight,
    dorefa_activation,
    dorefa_gradient,
    dorefa_weight,
    gradient_noise,
    philox,
)
from quantkern.reference.learned_step import Lsq, channel_sums, lsq, lsq_grad_scale, lsq_positions, lsq_weights

__all__ = [
    "DorefaWeight",
    "LONGEST_SUM",
    "Lsq",
    "QUANT_LIMIT",
    "SMALLEST_SCALE",
    "StraightThrough",
    "WORD",
    "along_axis",
    "binarize",
    "binary_conv2d",
    "binary_conv2d_sign",
    "binary_matmul",
    "binary_matmul_sign",
    "channel_sums",
    "choose_scale",
    "clip_activation",
    "dorefa_activation",
    "dorefa_gradient",
    "dorefa_weight",
    "fake_quantize",
    "fake_quantize_activation",
    "fake_quantize_weight",
    "fake_quantize_weights",
    "from_codes",
    "gradient_noise",
    "lsq",
    "lsq_grad_scale",
    "lsq_positions",
    "lsq_weights",
    "min_max",
    "narrowed",
    "pack_signs",
    "pack_signs_counted",
    "packed_max_pool2d",
    "philox",
    "quantize",
    "scaled",
    "sign_conv2d",
    "sign_linear",
    "signs_at",
    "straight_through",
    "to_codes",
    "unpack_signs",
    "update_running",
    "words_of",
]
