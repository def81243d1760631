"""What else a user could call for the same work: ATen, torch.compile, brevitas, torchao and NNI.

An adapter takes a ``Problem`` and returns a function of no arguments that does the operation once on
``problem.x`` and returns y. Everything that a user sets up once (modules, state, compilation) happens before that.
``Unsupported`` says that a library has no such operation; that is printed, not hidden.

For what is learned (benchmarks.lsq) an adapter returns a ``Learner``, because libraries keep the scale as a parameter
of their own; where a library is known to compute something else, the ``Learner`` says what.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantkern import reference

FAKE_QUANTIZE, WEIGHT, ACTIVATION = "fake_quantize", "weight", "activation"
OPERATIONS = {
    FAKE_QUANTIZE: "fake-quantize with a given scale and zero point",
    WEIGHT: "min and max of the tensor, scale (symmetric, -127..127), fake-quantize",
    ACTIVATION: "min and max, moving average (decay 0.99), scale and zero point (affine, 0..255), fake-quantize",
}
EMA_DECAY = 0.99

LSQ, DOREFA_WEIGHT, DOREFA_ACTIVATION = "lsq", "dorefa_weight", "dorefa_activation"


class Unsupported(Exception):
    """The library has no operation for this problem."""


@dataclass
class Problem:
    """The work: an operation on a tensor of its own, and the numbers that all contestants share.

    x: the tensor, an nn.Parameter; its values may change between calls, the object does not.
    scale, zero_point: of ``fake_quantize``; the other operations find their own.
    axis: None quantizes per tensor.
    """

    operation: str
    x: nn.Parameter
    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    symmetric: bool
    axis: int | None

    @property
    def channels(self) -> int:
        """How many scales there are."""
        return 1 if self.axis is None else self.x.shape[self.axis]

    def state(self) -> dict[str, Tensor]:
        """Fresh device state: range (nothing seen), scale and zero point, one value a channel."""
        device = self.x.device
        return {
            "running_min": torch.full((self.channels,), torch.inf, device=device),
            "running_max": torch.full((self.channels,), -torch.inf, device=device),
            "scale": torch.ones(self.channels, device=device),
            "zero_point": torch.zeros(self.channels, dtype=torch.int32, device=device),
        }


Adapter = Callable[[Problem], Callable[[], Tensor]]

ROUNDS_FIRST = "clips the rounded value, so that gradient passes up to half a step outside the range"


@dataclass(frozen=True)
class Learner:
    """A way to do an operation whose gradients count.

    step: does it once and returns y.
    inputs: what receives a gradient: x, then the scale where there is one, in the library's own form.
    scale_factor: the library's gradient of its scale times this is that of ``quantkern.reference``.
    departs: in what it is known to differ from the reference ("y", "gradient" of x, "scale": its gradient), and how.
    """

    step: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    scale_factor: float = 1.0
    departs: dict[str, str] = field(default_factory=dict)


# --- the specification itself


def reference_adapter(p: Problem) -> Callable[[], Tensor]:
    """quantkern.reference, plain PyTorch."""
    step = _reference_step(p)
    return lambda: step(p.x)


def _reference_step(p: Problem) -> Callable[[Tensor], Tensor]:
    s = p.state()
    if p.operation == FAKE_QUANTIZE:
        return lambda x: reference.fake_quantize(x, p.scale, p.zero_point, p.quant_min, p.quant_max, p.axis)
    if p.operation == WEIGHT:

        def weight(x: Tensor) -> Tensor:
            y, scale, zero_point = reference.fake_quantize_weight(x, p.quant_min, p.quant_max, p.symmetric, p.axis)
            s["scale"].copy_(scale.detach())
            s["zero_point"].copy_(zero_point)
            return y

        return weight

    def activation(x: Tensor) -> Tensor:
        y, *new = reference.fake_quantize_activation(
            x,
            s["running_min"],
            s["running_max"],
            s["scale"],
            s["zero_point"],
            p.quant_min,
            p.quant_max,
            p.symmetric,
            EMA_DECAY,
            p.axis,
        )
        for old, value in zip(s.values(), new, strict=True):
            old.copy_(value)
        return y

    return activation


def compiled(p: Problem) -> Callable[[], Tensor]:
    """torch.compile of quantkern.reference, with fixed shapes and without graph breaks."""
    torch._dynamo.reset()  # a new shape must not count as a recompilation of the last one
    step = torch.compile(_reference_step(p), fullgraph=True, dynamic=False)
    return lambda: step(p.x)


# --- ATen


def aten(p: Problem) -> Callable[[], Tensor]:
    """torch.fake_quantize_per_{tensor,channel}_affine."""
    if p.operation != FAKE_QUANTIZE:
        raise Unsupported("takes a given scale and zero point only")
    x, low, high = p.x, p.quant_min, p.quant_max
    if p.axis is None:
        scale, zero_point = float(p.scale), int(p.zero_point)
        return lambda: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    axis = p.axis
    return lambda: torch.fake_quantize_per_channel_affine(x, p.scale, p.zero_point, axis, low, high)


def aten_fused(p: Problem) -> Callable[[], Tensor]:
    """torch.fused_moving_avg_obs_fake_quant; with an averaging constant of 1 where the current range is wanted.

    It takes channels on axis 0 only, at least on the CPU: for another axis it is given x with that axis moved to the
    front (a view).
    """
    if p.operation == FAKE_QUANTIZE:
        raise Unsupported("always has a range of its own")
    s = p.state()
    on = torch.ones(1, dtype=torch.long, device=p.x.device)
    constant = 1.0 if p.operation == WEIGHT else 1.0 - EMA_DECAY
    channel_axis, per_row = (-1, False) if p.axis is None else (0, True)

    def step(x: Tensor) -> Tensor:
        return torch.fused_moving_avg_obs_fake_quant(
            x, on, on, s["running_min"], s["running_max"], s["scale"], s["zero_point"],
            constant, p.quant_min, p.quant_max, channel_axis, per_row, p.symmetric,
        )  # fmt: skip

    axis = p.axis
    if axis is None or axis == 0:
        return lambda: step(p.x)
    return lambda: step(p.x.movedim(axis, 0)).movedim(0, axis)


# --- brevitas


def _over_channels(parameter: Tensor, p: Problem) -> Tensor:
    return reference.along_axis(parameter, p.x, p.axis)


def _layer_for(x: Tensor) -> tuple[type[nn.Module], dict[str, Any], Tensor]:
    """The class and arguments of the layer whose weight has x's shape, and an input it takes."""
    if x.dim() == 4:
        arguments = {"in_channels": x.shape[1], "out_channels": x.shape[0], "kernel_size": tuple(x.shape[2:])}
        return nn.Conv2d, {**arguments, "bias": False}, x.new_zeros(1, *x.shape[1:])
    if x.dim() == 2:
        arguments = {"in_features": x.shape[1], "out_features": x.shape[0]}
        return nn.Linear, {**arguments, "bias": False}, x.new_zeros(1, x.shape[1])
    raise Unsupported(f"no layer has a weight of {x.dim()} dimensions")


def brevitas(p: Problem) -> Callable[[], Tensor]:
    """brevitas: its IntQuant core for a given scale, QuantConv2d or QuantLinear's quant_weight() for weights."""
    import brevitas.nn as qnn  # type: ignore[import-not-found,import-untyped]
    from brevitas.core.quant import IntQuant  # type: ignore[import-not-found,import-untyped]
    from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat  # type: ignore[import-not-found,import-untyped]

    if p.operation == ACTIVATION:
        raise Unsupported("no quantization by a moving average of min and max (percentiles, then a learned parameter)")
    if p.operation == FAKE_QUANTIZE:
        core = IntQuant(narrow_range=p.quant_min == -127, signed=p.quant_min < 0, input_view_impl=nn.Identity())
        scale, zero_point = _over_channels(p.scale, p), _over_channels(p.zero_point, p).float()
        bits = torch.tensor(8.0, device=p.x.device)
        return lambda: core(scale, zero_point, bits, p.x)  # type: ignore[no-any-return]
    plain, arguments, _ = _layer_for(p.x)
    layer_class = qnn.QuantConv2d if plain is nn.Conv2d else qnn.QuantLinear
    weight_quant = Int8WeightPerTensorFloat if p.axis is None else Int8WeightPerChannelFloat
    layer = layer_class(**arguments, weight_quant=weight_quant).to(p.x.device, p.x.dtype)
    layer.weight = p.x
    layer.weight_quant.init_tensor_quant()
    return lambda: layer.quant_weight().value  # type: ignore[no-any-return]


def brevitas_learner(p: Problem) -> Learner:
    """brevitas: its quantizers with the scale as a parameter (scaling_impl_type PARAMETER), in the layer of a user.

    Weights: QuantConv2d's or QuantLinear's quant_weight(). Activations: QuantIdentity; DoReFa's is a constant scale.
    """
    import brevitas.nn as qnn  # type: ignore[import-not-found,import-untyped]
    from brevitas.inject.enum import ScalingImplType, ScalingPerOutputType  # type: ignore[import-not-found,import-untyped]
    from brevitas.quant import (  # type: ignore[import-not-found,import-untyped]
        Int8WeightPerChannelFloat,
        Int8WeightPerTensorFloat,
        Uint8ActPerTensorFloatMaxInit,
    )

    if p.operation == DOREFA_WEIGHT:
        raise Unsupported("no tanh normalisation of weights")
    bits = (p.quant_max - p.quant_min).bit_length()
    step: Callable[[], Tensor]
    if p.quant_min < 0:
        plain, arguments, _ = _layer_for(p.x)
        layer = (qnn.QuantConv2d if plain is nn.Conv2d else qnn.QuantLinear)(
            **arguments,
            weight_quant=Int8WeightPerTensorFloat if p.axis is None else Int8WeightPerChannelFloat,
            weight_bit_width=bits,
            weight_narrow_range=False,
            weight_scaling_impl_type=ScalingImplType.PARAMETER,
            weight_scaling_init=1.0,
        ).to(p.x.device, p.x.dtype)
        layer.weight = p.x
        layer.weight_quant.init_tensor_quant()
        quantizer, step = layer.weight_quant.tensor_quant, lambda: layer.quant_weight().value
    else:
        arguments = {"act_quant": Uint8ActPerTensorFloatMaxInit, "bit_width": bits, "max_val": 1.0}
        if p.operation == DOREFA_ACTIVATION:
            arguments["scaling_impl_type"] = ScalingImplType.CONST
        if p.axis is not None:
            others = [i for i in range(p.x.dim()) if i != p.axis]
            arguments["scaling_per_output_type"] = ScalingPerOutputType.CHANNEL
            arguments["per_channel_broadcastable_shape"] = tuple(_over_channels(p.scale, p).shape)
            arguments["scaling_stats_permute_dims"] = (p.axis, *others)
        identity = qnn.QuantIdentity(**arguments).to(p.x.device, p.x.dtype)
        quantizer = identity.act_quant.fused_activation_quant_proxy.tensor_quant
        step = lambda: identity(p.x)  # noqa: E731
    if p.operation == DOREFA_ACTIVATION:
        return Learner(step, (p.x,), departs={"gradient": ROUNDS_FIRST})
    # Its parameter is the end of the range: the scale times the integer there. Its gradient is not scaled down.
    end = float(max(-p.quant_min, p.quant_max))
    parameter = quantizer.scaling_impl.value
    with torch.no_grad():
        parameter.copy_(_over_channels(p.scale, p) * end)
    factor = end * reference.lsq_grad_scale(p.x, p.quant_max, p.axis)
    return Learner(step, (p.x, parameter), factor, {"gradient": ROUNDS_FIRST, "scale": ROUNDS_FIRST})


# --- torchao


def torchao(p: Problem) -> Callable[[], Tensor]:
    """torchao: choose_qparams_affine and _fake_quantize_affine; FakeQuantize with its moving-average observer."""
    from torchao.quantization import quant_primitives as primitives  # type: ignore[import-not-found,import-untyped]

    block = list(p.x.shape)
    if p.axis is not None:
        block[p.axis] = 1
    low, high = p.quant_min, p.quant_max
    if p.operation == FAKE_QUANTIZE:
        return lambda: primitives._fake_quantize_affine(  # type: ignore[no-any-return]
            p.x, tuple(block), p.scale, p.zero_point, torch.int32, low, high
        )
    if p.operation == WEIGHT:

        def weight() -> Tensor:
            scale, zero_point = primitives.choose_qparams_affine(
                p.x, primitives.MappingType.SYMMETRIC, tuple(block), torch.int32, low, high
            )
            return primitives._fake_quantize_affine(  # type: ignore[no-any-return]
                p.x, tuple(block), scale, zero_point, torch.int32, low, high
            )

        return weight
    from torchao.quantization.pt2e import fake_quantize, observer  # type: ignore[import-not-found,import-untyped]

    shared = {"quant_min": low, "quant_max": high, "dtype": torch.quint8, "averaging_constant": 1.0 - EMA_DECAY}
    module: nn.Module
    if p.axis is None:
        module = fake_quantize.FakeQuantize(
            observer.MovingAverageMinMaxObserver, qscheme=torch.per_tensor_affine, **shared
        )
    else:
        module = fake_quantize.FakeQuantize(
            observer.MovingAveragePerChannelMinMaxObserver,
            qscheme=torch.per_channel_affine,
            ch_axis=p.axis,
            **shared,
        )
    module = module.to(p.x.device)
    return lambda: module(p.x)  # type: ignore[no-any-return]


# --- NNI


class _Holder(nn.Module):
    """A model of one layer, with the parameter that NNI's constructor asks every model for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def _nni_quantizer(
    p: Problem, name: str, quantizes_weight: bool, bits: int, config: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """NNI's quantizer of that name around one layer with x as its weight or input, and NNI's names of quant_types."""
    with contextlib.redirect_stdout(io.StringIO()):
        from nni.algorithms.compression.pytorch import quantization  # type: ignore[import-not-found,import-untyped]
        from nni.compression.pytorch.quantization.literal import QuantType  # type: ignore[import-not-found,import-untyped]

    for logger in ("nni", "schema"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    if quantizes_weight:
        plain, arguments, dummy = _layer_for(p.x)
        layer = plain(**arguments).to(p.x.device, p.x.dtype)
    else:
        layer, dummy = nn.ReLU(), p.x.detach()
    model = _Holder(layer).to(p.x.device)
    whole = {
        "quant_types": ["weight" if quantizes_weight else "input"],
        "quant_bits": bits,
        "op_names": ["layer"],
        **(config or {}),
    }
    more = {} if name == "DoReFaQuantizer" else {"dummy_input": dummy}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return getattr(quantization, name)(model, [whole], optimizer, **more), QuantType


def nni(p: Problem) -> Callable[[], Tensor]:
    """NNI: QAT_Quantizer's own gradient function, called as its wrapper calls it.

    A given scale is its evaluation mode. Its step counter is moved on once, as its optimizer hook would.
    """
    if p.operation == ACTIVATION and p.axis not in (None, 1):
        raise Unsupported("channels of activations are always dimension 1")
    quantizes_weight = p.operation == WEIGHT
    granularity, scheme = "per_tensor" if p.axis is None else "per_channel", "symmetric" if p.symmetric else "affine"
    config = {
        "quant_dtype": "int" if p.quant_min < 0 else "uint",
        "quant_scheme": f"{granularity}_{scheme}",
    }
    quantizer, QuantType = _nni_quantizer(p, "QAT_Quantizer", quantizes_weight, 8, config)
    (wrapper,) = quantizer.get_modules_wrapper()
    module, steps = wrapper.module, quantizer.bound_model.steps
    if quantizes_weight:

        def weight() -> Tensor:
            module.weight = p.x.data  # what the wrapper does before each call
            return quantizer.quant_grad(p.x, QuantType.WEIGHT, wrapper, None)  # type: ignore[no-any-return]

        return weight
    if p.operation == FAKE_QUANTIZE:
        wrapper.eval()
        module.input_scale = _over_channels(p.scale, p)
        module.input_zero_point = _over_channels(p.zero_point, p).float()
        return lambda: quantizer.quant_grad(p.x, QuantType.INPUT, wrapper)  # type: ignore[no-any-return]
    first = True

    def activation() -> Tensor:
        nonlocal first
        y: Tensor = quantizer.quant_grad(p.x, QuantType.INPUT, wrapper)
        if first:
            steps.add_(1)
            first = False
        return y

    return activation


def nni_learner(p: Problem) -> Learner:
    """NNI: LsqQuantizer and DoReFaQuantizer, called as their wrapper calls them, in training."""
    if p.operation == DOREFA_ACTIVATION:
        raise Unsupported("its DoReFaQuantizer quantizes weights only")
    if p.axis is not None:
        raise Unsupported("a learned scale is always per tensor")
    bits, quantizes_weight = (p.quant_max - p.quant_min).bit_length(), p.operation == DOREFA_WEIGHT or p.quant_min < 0
    name = "DoReFaQuantizer" if p.operation == DOREFA_WEIGHT else "LsqQuantizer"
    quantizer, QuantType = _nni_quantizer(p, name, quantizes_weight, bits)
    (wrapper,) = quantizer.get_modules_wrapper()
    module = wrapper.module

    def weight() -> Tensor:
        module.weight = p.x.data  # what the wrapper does before each call
        return quantizer.quant_grad(p.x, QuantType.WEIGHT, wrapper, None)  # type: ignore[no-any-return]

    if p.operation == DOREFA_WEIGHT:
        return Learner(weight, (p.x,), departs={"gradient": "the gradient skips tanh and the maximum"})
    scale = module.weight_scale if quantizes_weight else module.input_scale
    scale.data = p.scale.detach().clone()
    if quantizes_weight:
        return Learner(weight, (p.x, scale), departs={"gradient": "no gradient reaches the weight"})
    quantizer.bound_model.steps.add_(1)  # the first step would choose the scale; its optimizer hook moves on
    signed = "quantizes to the signed range whatever the input"
    return Learner(
        lambda: quantizer.quant_grad(p.x, QuantType.INPUT, wrapper),
        (p.x, scale),
        departs=dict.fromkeys(("y", "gradient", "scale"), signed),
    )


# --- binary networks

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

BUILT_IN: dict[str, Adapter] = {"aten": aten, "aten-fused": aten_fused, "torch.compile": compiled}
"""Contestants that come with torch."""

INSTALLABLE: dict[str, Adapter] = {"brevitas": brevitas, "torchao": torchao, "nni": nni}
"""Contestants that are packages of their own: ``pip install '.[peers]'``. The names are those of the modules."""

LEARNERS: dict[str, Callable[[Problem], Learner]] = {"brevitas": brevitas_learner, "nni": nni_learner}
"""The installable contestants of benchmarks.lsq."""

DISTRIBUTIONS = ("triton", "numpy", *INSTALLABLE)
"""Packages whose versions belong in the results."""


def missing() -> list[str]:
    """The installable peers that are not here."""
    return [name for name in INSTALLABLE if importlib.util.find_spec(name) is None]


def installed_learners() -> dict[str, Callable[[Problem], Learner]]:
    """Every installable contestant of benchmarks.lsq that is here."""
    absent = missing()
    return {name: adapter for name, adapter in LEARNERS.items() if name not in absent}


def installed() -> dict[str, Adapter]:
    """Every peer that can take part here."""
    absent = missing()
    return {**BUILT_IN, **{name: adapter for name, adapter in INSTALLABLE.items() if name not in absent}}
