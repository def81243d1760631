"""Set-up that must happen before the first test module is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Without a GPU the Triton twins run in Triton's interpreter; it reads this when triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def scales_the_long_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A first layer's learned input scale by that input's gradient, as compiled forwards make it: the same bits."""
    from quantkern import layer_quantizers

    monkeypatch.setattr(layer_quantizers, "quantize_leaf", lambda *_: None)
    yield
