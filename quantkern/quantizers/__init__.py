"""The quantizers: thin classes that say which tensors of a model are quantized, and how."""

from quantkern.quantizers.naive import NaiveQuantizer
from quantkern.quantizers.qat import QAT_Quantizer

__all__ = ["NaiveQuantizer", "QAT_Quantizer"]
