"""The quantizers: thin classes that say which tensors of a model are quantized, and how."""

from quantkern.quantizers.bnn import BNNQuantizer
from quantkern.quantizers.dorefa import DoReFaQuantizer
from quantkern.quantizers.lsq import LsqQuantizer
from quantkern.quantizers.naive import NaiveQuantizer
from quantkern.quantizers.observer import ObserverQuantizer
from quantkern.quantizers.qat import QAT_Quantizer

__all__ = ["BNNQuantizer", "DoReFaQuantizer", "LsqQuantizer", "NaiveQuantizer", "ObserverQuantizer", "QAT_Quantizer"]
