"""Set-up that must happen before the first test module is imported."""

from __future__ import annotations

import os

import torch

# Without a GPU the Triton twins run in Triton's interpreter; it reads this when triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
