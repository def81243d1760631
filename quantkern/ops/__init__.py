"""Loads the compiled operators and gives torch their shape functions.

After this import ``torch.ops.quantkern.*`` exists. A missing or mismatched extension is an ImportError that says
how to mend it; nothing is replaced silently.
"""

from __future__ import annotations

from quantkern.ops import shapes as _shapes  # noqa: F401
from quantkern.ops.binary_shapes import arranged_bytes, conv_sizes, is_channels_last
from quantkern.ops.library import REBUILD, check_device, load

__all__ = ["REBUILD", "arranged_bytes", "check_device", "conv_sizes", "is_channels_last", "load"]
