"""What else a user could call for the same work: ATen, torch.compile, brevitas, torchao and NNI.

An adapter takes a ``Problem`` and returns a function of no arguments that does the operation once on
``problem.x`` and returns y. Everything that a user sets up once (modules, state, compilation) happens before that.
``Unsupported`` says that a library has no such operation; that is printed, not hidden.

For what is learned (benchmarks.lsq) an adapter returns a ``Learner``, because libraries keep the scale as a parameter
of their own; where a library is known to compute something else, the ``Learner`` says what.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.nni_peer import nni, nni_learner
from benchmarks.problems import (
    ACTIVATION,
    DOREFA_ACTIVATION,
    DOREFA_WEIGHT,
    EMA_DECAY,
    FAKE_QUANTIZE,
    ROUNDS_FIRST,
    WEIGHT,
    Adapter,
    Learner,
    Problem,
    Unsupported,
    layer_for,
    over_channels,
)
from quantkern import reference


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


def brevitas(p: Problem) -> Callable[[], Tensor]:
    """brevitas: its IntQuant core for a given scale, QuantConv2d or QuantLinear's quant_weight() for weights."""
    import brevitas.nn as qnn  # type: ignore[import-not-found,import-untyped]
    from brevitas.core.quant import IntQuant  # type: ignore[import-not-found,import-untyped]
    from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat  # type: ignore[import-not-found,import-untyped]

    if p.operation == ACTIVATION:
        raise Unsupported("no quantization by a moving average of min and max (percentiles, then a learned parameter)")
    if p.operation == FAKE_QUANTIZE:
        core = IntQuant(narrow_range=p.quant_min == -127, signed=p.quant_min < 0, input_view_impl=nn.Identity())
        scale, zero_point = over_channels(p.scale, p), over_channels(p.zero_point, p).float()
        bits = torch.tensor(8.0, device=p.x.device)
        return lambda: core(scale, zero_point, bits, p.x)  # type: ignore[no-any-return]
    plain, arguments, _ = layer_for(p.x)
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
        plain, arguments, _ = layer_for(p.x)
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
            arguments["per_channel_broadcastable_shape"] = tuple(over_channels(p.scale, p).shape)
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
        parameter.copy_(over_channels(p.scale, p) * end)
    factor = end * reference.lsq_grad_scale(p.x, p.quant_max, p.axis)
    return Learner(step, (p.x, parameter), factor, {"gradient": ROUNDS_FIRST, "scale": ROUNDS_FIRST})


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
