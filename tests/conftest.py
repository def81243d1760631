"""Set-up that must happen before the first test module is imported."""

from __future__ import annotations

import contextlib
import functools
import importlib
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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For networks that are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_table_of_translations() -> Iterator[None]:
    """torch builds its own anew for every export, half of the time that tests of ONNX files would take."""
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(ImportError, AttributeError):  # it is nothing that torch promises
            registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
            patch.setattr(registry, "from_torchlib", staticmethod(functools.cache(registry.from_torchlib)))
        yield


@pytest.fixture
def factory_settings() -> Iterator[None]:
    """What a test sets with set_quant_scheme_dtype() ends with it."""
    from quantkern.settings import reset_quant_scheme_dtype

    yield
    reset_quant_scheme_dtype()
