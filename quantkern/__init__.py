"""quantkern: quantization-aware training with the API of NNI's quantizers and fused kernels underneath."""

from quantkern import functional, nn, reference
from quantkern.backend import Backend, backends
from quantkern.files import load
from quantkern.layer_sensitivity import sensitivity
from quantkern.quantizers import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqQuantizer,
    NaiveQuantizer,
    ObserverQuantizer,
    QAT_Quantizer,
)
from quantkern.settings import reset_quant_scheme_dtype, set_quant_scheme_dtype

__version__ = "0.1.0"

__all__ = [
    "BNNQuantizer",
    "Backend",
    "DoReFaQuantizer",
    "LsqQuantizer",
    "NaiveQuantizer",
    "ObserverQuantizer",
    "QAT_Quantizer",
    "backends",
    "functional",
    "load",
    "nn",
    "reference",
    "reset_quant_scheme_dtype",
    "sensitivity",
    "set_quant_scheme_dtype",
]
