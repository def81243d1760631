"""Quantized models for other programs: ONNX files that are proved to give the same numbers, and plain ATen."""

from quantkern.export.aten import decompositions
from quantkern.export.onnx_file import OnnxExport
from quantkern.export.verify import DriftError, OutputCheck, session_of

__all__ = ["DriftError", "OnnxExport", "OutputCheck", "decompositions", "session_of"]
