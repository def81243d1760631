"""Packed layers of binary networks, for inference."""

from quantkern.nn.binary import BinaryConv2d, BinaryLinear, Pool

__all__ = ["BinaryConv2d", "BinaryLinear", "Pool"]
