"""quantkern: quantization-aware training with the API of NNI's quantizers and fused kernels underneath."""

from quantkern import functional, reference
from quantkern.backend import Backend
from quantkern.functional import backends
from quantkern.quantizers import DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, QAT_Quantizer
from quantkern.settings import reset_quant_scheme_dtype, set_quant_scheme_dtype

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "DoReFaQuantizer",
    "LsqQuantizer",
    "NaiveQuantizer",
    "QAT_Quantizer",
    "backends",
    "functional",
    "reference",
    "reset_quant_scheme_dtype",
    "set_quant_scheme_dtype",
]
