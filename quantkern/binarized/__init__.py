"""Binary networks in training: signs with their gradients, layers on packed kernels, and where they may stand."""

from quantkern.binarized.flow import CannotTrace, find_real_inputs, trace
from quantkern.binarized.layers import packed_class, symmetric_padding, why_not_packed
from quantkern.binarized.signs import BinaryActivation, BinaryWeight, WeightClipper

__all__ = [
    "BinaryActivation",
    "BinaryWeight",
    "CannotTrace",
    "WeightClipper",
    "find_real_inputs",
    "packed_class",
    "symmetric_padding",
    "trace",
    "why_not_packed",
]
