"""quantkern: quantization-aware training with the API of NNI's quantizers and fused kernels underneath."""

from quantkern import functional
from quantkern.backend import Backend

__version__ = "0.1.0"

__all__ = ["Backend", "functional"]
