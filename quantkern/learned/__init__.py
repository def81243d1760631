"""Fake-quantizers of the methods that train through their own transforms: LSQ, LSQ+ and DoReFa."""

from quantkern.learned.dorefa import DorefaActivation, DorefaGradient, DorefaSpec, DorefaWeight
from quantkern.learned.lsq import LearnedActivation, LearnedWeight
from quantkern.learned.state import LearnedState, LsqSpec

__all__ = [
    "DorefaActivation",
    "DorefaGradient",
    "DorefaSpec",
    "DorefaWeight",
    "LearnedActivation",
    "LearnedState",
    "LearnedWeight",
    "LsqSpec",
]
