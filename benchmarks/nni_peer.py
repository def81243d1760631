"""NNI 2.10 as a contestant."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.problems import (
    ACTIVATION,
    DOREFA_ACTIVATION,
    DOREFA_WEIGHT,
    FAKE_QUANTIZE,
    WEIGHT,
    Learner,
    Problem,
    Unsupported,
    layer_for,
    over_channels,
)


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
        plain, arguments, dummy = layer_for(p.x)
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
        module.input_scale = over_channels(p.scale, p)
        module.input_zero_point = over_channels(p.zero_point, p).float()
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
