"""The kinds of kernels an operation can run on."""

from __future__ import annotations

import enum


class Backend(enum.Enum):
    """Which kernels compute an operation; pass one as ``backend=`` to any function of quantkern.functional.

    AUTO takes the native kernels where this build has them for the tensor's device, else Triton where it can run,
    else the reference; a fallback to Triton or the reference is announced once. ``quantkern.backends()`` shows what
    AUTO means here.

    >>> Backend.REFERENCE.value
    'reference'
    """

    AUTO = "auto"
    NATIVE = "native"
    TRITON = "triton"
    REFERENCE = "reference"
