"""Triton twins of the native kernels: the same names, the same numbers, for machines without a compiled extension.

Importing this package does not import triton, which is optional: ``available`` says whether the kernels can run on a
device and why not, and the kernel modules are loaded when one of their functions is first asked for.

    numerics.py                  what is computed, one element at a time (twin of csrc/numerics)
    layout.py                    how a tensor is seen by a kernel: outer x channels x inner in memory order
    min_max.py                   the statistics pass, and the cut of a tensor that every reducing operation shares
    fake_quantize*.py lsq.py dorefa_*.py binarize.py pack*.py binary_*.py   one module an operation: its kernels and its
                                 host function; no module has the name of a function here, which it would hide

The functions take checked arguments and know nothing of autograd; quantkern.functional does both. Nothing here waits
for the device: scales, ranges, flags and steps are read by the kernels, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from quantkern.triton.binarize import binarize_forward
    from quantkern.triton.binary_conv2d import binary_conv2d_forward, binary_conv2d_sign_forward
    from quantkern.triton.binary_matmul import binary_matmul_forward, binary_matmul_sign_forward
    from quantkern.triton.clip_activation import clip_activation_forward
    from quantkern.triton.dorefa_activation import dorefa_activation_forward
    from quantkern.triton.dorefa_gradient import quantize_gradient
    from quantkern.triton.dorefa_weight import dorefa_weight_backward, dorefa_weight_forward
    from quantkern.triton.fake_quantize import (
        fake_quantize_backward,
        fake_quantize_forward,
        fake_quantize_forward_number,
    )
    from quantkern.triton.fake_quantize_activation import fake_quantize_activation_forward
    from quantkern.triton.fake_quantize_weight import fake_quantize_weight_forward
    from quantkern.triton.lsq import lsq_backward, lsq_forward
    from quantkern.triton.pack_signs import pack_signs_forward, unpack_signs_forward
    from quantkern.triton.packed_max_pool2d import packed_max_pool2d_forward

__all__ = [
    "available",
    "binarize_forward",
    "binary_conv2d_forward",
    "binary_conv2d_sign_forward",
    "binary_matmul_forward",
    "binary_matmul_sign_forward",
    "clip_activation_forward",
    "dorefa_activation_forward",
    "quantize_gradient",
    "dorefa_weight_backward",
    "dorefa_weight_forward",
    "fake_quantize_activation_forward",
    "fake_quantize_backward",
    "fake_quantize_forward",
    "fake_quantize_forward_number",
    "fake_quantize_weight_forward",
    "lsq_backward",
    "lsq_forward",
    "pack_signs_forward",
    "packed_max_pool2d_forward",
    "unpack_signs_forward",
]

HOMES = {
    "fake_quantize_forward": "fake_quantize",
    "fake_quantize_forward_number": "fake_quantize",
    "fake_quantize_backward": "fake_quantize",
    "fake_quantize_weight_forward": "fake_quantize_weight",
    "fake_quantize_activation_forward": "fake_quantize_activation",
    "lsq_forward": "lsq",
    "lsq_backward": "lsq",
    "dorefa_weight_forward": "dorefa_weight",
    "dorefa_weight_backward": "dorefa_weight",
    "dorefa_activation_forward": "dorefa_activation",
    "quantize_gradient": "dorefa_gradient",
    "binarize_forward": "binarize",
    "clip_activation_forward": "clip_activation",
    "pack_signs_forward": "pack_signs",
    "unpack_signs_forward": "pack_signs",
    "binary_matmul_forward": "binary_matmul",
    "binary_matmul_sign_forward": "binary_matmul",
    "binary_conv2d_forward": "binary_conv2d",
    "binary_conv2d_sign_forward": "binary_conv2d",
    "packed_max_pool2d_forward": "packed_max_pool2d",
}
"""The module that defines each function."""

COMPILED_FOR = ("cuda", "xpu")
"""Device types that Triton compiles for; ROCm devices are of type cuda in PyTorch."""


def __getattr__(name: str) -> Callable[..., object]:
    """Load a kernel module when one of its functions is first asked for."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function: Callable[..., object] = getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
    globals()[name] = function
    return function


@functools.cache
def is_installed() -> bool:
    """Whether triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU: decided by TRITON_INTERPRET when triton is first imported."""
    language = sys.modules.get("triton.language.standard")
    if language is None:
        return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    return type(language.cdiv).__name__ != "JITFunction"


def available(device: torch.device | str) -> tuple[bool, str]:
    """Whether the Triton kernels can run on tensors of ``device``, and the reason in words.

    >>> import torch
    >>> from quantkern.triton import available
    >>> available(torch.device("meta"))[0]
    False
    """
    kind = torch.device(device).type
    if not is_installed():
        return False, "triton is not installed; pip install triton"
    if is_interpreted():
        if kind in ("cpu", *COMPILED_FOR):
            return True, f"Triton interprets the kernels for {kind} tensors on the host (TRITON_INTERPRET=1; slow)"
    elif kind in COMPILED_FOR:
        return True, f"Triton compiles the kernels for {kind}"
    elif kind == "cpu":
        return False, "Triton has no CPU backend; set TRITON_INTERPRET=1 before triton is imported to interpret kernels"
    return False, f"Triton does not run on {kind} tensors; move them to one of {', '.join(COMPILED_FOR)}"
