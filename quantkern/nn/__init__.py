"""Packed layers of binary networks, for inference."""

from quantkern.nn.binary import BinaryConv2d, BinaryLinear
from quantkern.nn.packed import Pool

__all__ = ["BinaryConv2d", "BinaryLinear", "Pool"]
