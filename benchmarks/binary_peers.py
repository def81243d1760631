"""Other libraries' binary layers."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.problems import Unsupported

PADS_WITH_MINUS_ONE = "pads with -1"


def bitorch_linear(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """bitorch-engine's C++ linear layer with packed weights; it packs real inputs itself.

    Its PyPI release has the C++ sources in the source archive only, and builds them for ``setup.py develop``.
    """
    extension = _bitorch("binary_linear_cpp")
    (m, k), n = x.shape, weight.shape[0]
    if k % 32 or n % 32:
        raise Unsupported("takes multiples of 32")
    words = (weight >= 0).t().reshape(k // 32, 32, n).to(torch.int64) << torch.arange(32).view(1, 32, 1)
    packed = words.sum(1).flatten()
    return lambda: extension.forward(x, packed, m, n, k, False)  # type: ignore[no-any-return]


def bitorch_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int) -> Callable[[], Tensor]:
    """bitorch-engine's C++ convolution with packed weights; it packs real inputs itself, and pads with -1."""
    extension = _bitorch("binary_conv_cpp")
    outputs, channels, kernel, _ = weight.shape
    if channels % 32:
        raise Unsupported("takes multiples of 32")
    words = (weight.reshape(-1, 32) >= 0).to(torch.int64) << torch.arange(32)
    packed = words.sum(1)
    edge = (x.shape[2] + 2 * padding - kernel) // stride + 1
    return lambda: extension.forward(  # type: ignore[no-any-return]
        x, packed, outputs, edge * edge, channels * kernel * kernel, kernel, stride, padding, 1, edge, False
    )


def _bitorch(name: str) -> Any:
    try:
        return importlib.import_module(f"bitorch_engine.extensions.{name}")
    except ImportError as error:
        raise Unsupported(
            f"{error}: its source archive on PyPI builds it (BIE_BUILD_ONLY=... python setup.py develop)"
        ) from None


LARQ_CONVERTER = """
import sys
import larq, larq_compute_engine, numpy, tensorflow
folder, batch, height, width, channels, stride = sys.argv[1], *map(int, sys.argv[2:])
weight = numpy.load(folder + "/weight.npy")
layer = larq.layers.QuantConv2D(
    weight.shape[-1], weight.shape[0], strides=stride, padding="same", pad_values=0.0,
    input_quantizer="ste_sign", kernel_quantizer="ste_sign", use_bias=False,
)
images = tensorflow.keras.layers.Input((height, width, channels), batch_size=batch)
model = tensorflow.keras.Sequential([images, layer])
layer.set_weights([weight])
open(folder + "/model.tflite", "wb").write(larq_compute_engine.convert_keras_model(model))
"""
"""Builds and converts a model of one layer. A process of its own: TensorFlow's LLVM and Triton's cannot share one."""


def larq_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int, threads: int) -> Callable[[], Tensor]:
    """Larq compute engine with its indirect kernel, the fastest it has off ARM; inputs and outputs are numpy's, NHWC.

    Off ARM it runs portable kernels and says that they are not made for speed.
    """
    package = importlib.util.find_spec("larq_compute_engine")
    if package is None or not package.submodule_search_locations:
        raise Unsupported("is not installed: pip install 'numpy<2' tensorflow-cpu tf_keras larq larq-compute-engine")
    kernel = weight.shape[2]
    if stride != 1 or padding != (kernel - 1) // 2:
        raise Unsupported("pads as TensorFlow does")
    batch, channels, height, width = x.shape
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "weight.npy", weight.permute(2, 3, 1, 0).contiguous().numpy())
        sizes = map(str, (batch, height, width, channels, stride))
        converted = subprocess.run(
            [sys.executable, "-c", LARQ_CONVERTER, folder, *sizes],
            env={**os.environ, "TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
        )
        if converted.returncode:
            raise Unsupported(f"conversion failed: {converted.stderr.strip().splitlines()[-1]}")
        model = (Path(folder) / "model.tflite").read_bytes()
    found = Path(package.submodule_search_locations[0]) / "tflite/python/interpreter_wrapper_lite.so"
    spec = importlib.util.spec_from_file_location("interpreter_wrapper_lite", found)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)  # without the package, whose first line imports TensorFlow
    spec.loader.exec_module(module)
    interpreter = module.LiteInterpreter(model, threads, False, True, False)
    images = [x.permute(0, 2, 3, 1).contiguous().numpy()]
    return lambda: torch.from_numpy(interpreter.predict(images)[0]).permute(0, 3, 1, 2)


BINARY_DISTRIBUTIONS = ("numpy", "bitorch-engine", "larq", "larq-compute-engine", "tensorflow-cpu")
"""Packages whose versions belong in the results of benchmarks.bnn."""
