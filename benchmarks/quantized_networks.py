"""A network of benchmarks.networks with its optimizer, as each library trains it quantized.

The common work: weights symmetric, -127..127, with their current range; inputs and outputs of activations affine,
0..255, with a moving average of theirs (decay 0.99); everything per tensor. LSQ has 8 bits with one learned scale a
tensor. What a library does otherwise is said in ``Trainee.other_work``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import Network
from benchmarks.problems import Unsupported
from quantkern import LsqQuantizer, QAT_Quantizer

LEARNING_RATE, MOMENTUM = 0.01, 0.9

FOLDS = "folds batch norm into the weights"


@dataclass
class Trainee:
    """A model that can be trained with its optimizer; ``call`` runs it, the model itself or what compiled it.

    reuse: makes the block in which the micro-batches of one step run.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    call: Callable[[Tensor], Tensor]
    other_work: str = ""
    reuse: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext


Build = Callable[[Network, torch.device], Trainee]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of every contestant."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)


def train_step(trainee: Trainee, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One optimizer step over as many micro-batches; returns the last loss."""
    trainee.optimizer.zero_grad()
    with trainee.reuse() if len(batches) > 1 else contextlib.nullcontext():
        for x, y in batches:
            loss = nn.functional.cross_entropy(trainee.call(x), y) / len(batches)
            loss.backward()  # type: ignore[no-untyped-call]
    trainee.optimizer.step()
    return loss.detach()


def in_float(network: Network, device: torch.device) -> Trainee:
    """The float network."""
    model = network.build(device)
    return Trainee(model, sgd(model), model)


def rules(network: Network, learned: bool) -> list[dict[str, Any]]:
    """The config_list, for ours and for NNI's quantizers."""
    weights, outputs = (
        {"quant_dtype": "int", "quant_scheme": "per_tensor_symmetric"},
        {
            "quant_dtype": "uint",
            "quant_scheme": "per_tensor_affine",
        },
    )
    both = {key: {"weight": weights[key], "input": outputs[key]} for key in weights}
    found: list[dict[str, Any]] = [
        {
            "quant_types": ["weight", "input"],
            "quant_bits": {"weight": 8, "input": 8},
            "op_types": list(network.layers),
            **({} if learned else both),
        }
    ]
    if network.outputs:
        present = {type(module).__name__ for module in network.build(torch.device("cpu")).modules()}
        types = [name for name in network.outputs if name in present]
        own = {} if learned else {key: {"output": value} for key, value in outputs.items()}
        found.append({"quant_types": ["output"], "quant_bits": {"output": 8}, "op_types": types, **own})
    return found


def ours(learned: bool, folded: bool = False) -> Build:
    """QAT_Quantizer or LsqQuantizer; ``folded`` with batch norm folded into the weights, as in NNI."""

    def build(network: Network, device: torch.device) -> Trainee:
        model = network.build(device)
        if folded and not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            raise Unsupported("the network has no batch norm")
        optimizer = sgd(model)
        make = LsqQuantizer if learned else QAT_Quantizer
        dummy = network.draw(device, batch=2)[0] if folded else None
        quantizer = make(model, rules(network, learned), optimizer, dummy)
        quantizer.compress()
        return Trainee(model, optimizer, model, FOLDS if folded else "", quantizer.reuse_weights)

    return build


def compiled(build: Build) -> Build:
    """The same through torch.compile, after one step without it: learned scales start from their first tensors."""

    def build_and_compile(network: Network, device: torch.device) -> Trainee:
        trainee = build(network, device)
        train_step(trainee, [network.draw(device)])
        trainee.call = torch.compile(trainee.model, dynamic=False)
        return trainee

    return build_and_compile


def nni(learned: bool) -> Build:
    """NNI 2.10: QAT_Quantizer or LsqQuantizer."""

    def build(network: Network, device: torch.device) -> Trainee:
        with contextlib.redirect_stdout(io.StringIO()):
            from nni.algorithms.compression.pytorch import quantization  # type: ignore[import-not-found,import-untyped]
        for logger in ("nni", "schema"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        model = network.build(device)
        optimizer = sgd(model)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            if learned:
                quantizer = quantization.LsqQuantizer(model, rules(network, learned), optimizer)
            else:
                dummy = network.draw(device, batch=2)[0]
                quantizer = quantization.QAT_Quantizer(model, rules(network, learned), optimizer, dummy)
            quantizer.compress()
        model.train()
        normed = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        other = "quantizes activations to the signed range whatever the input" if learned else FOLDS if normed else ""
        return Trainee(model, optimizer, model, other)

    return build


def torch_ao(network: Network, device: torch.device) -> Trainee:
    """torch.ao.nn.qat layers and FusedMovingAvgObsFakeQuantize, the fastest that torch.ao has.

    Its prepare_qat would quantize the outputs of layers; here hooks put the same module on the inputs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao import quantization
        from torch.ao.nn import qat
        from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver

        def fused(low: int, high: int, constant: float, **more: Any) -> Callable[[], nn.Module]:
            return FusedMovingAvgObsFakeQuantize.with_args(  # type: ignore[no-any-return,no-untyped-call]
                observer=MovingAverageMinMaxObserver,
                quant_min=low,
                quant_max=high,
                averaging_constant=constant,
                **more,
            )

        activation = fused(0, 255, 0.01, dtype=torch.quint8, qscheme=torch.per_tensor_affine)
        weight = fused(-127, 127, 1.0, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
        model = network.build(device)
        known: dict[type[nn.Module], Any] = {nn.Conv2d: qat.Conv2d, nn.Linear: qat.Linear}
        for name, module in list(model.named_modules()):
            if type(module).__name__ in network.layers:
                qconfig: Any = quantization.QConfig(activation=activation, weight=weight)  # type: ignore[no-untyped-call]
                module.qconfig = qconfig
                layer = known[type(module)].from_float(module)
                quantize_inputs(layer, activation())
                model.set_submodule(name, layer)
            elif type(module).__name__ in network.outputs:
                quantize_outputs(module, activation())
    model = model.to(device).train()
    return Trainee(model, sgd(model), model)


def quantize_inputs(layer: nn.Module, quantizer: nn.Module) -> None:
    """The module as a forward pre-hook, and as a child of the layer."""
    layer.input_quantizer = quantizer
    layer.register_forward_pre_hook(lambda _, args: (quantizer(args[0]),))


def quantize_outputs(layer: nn.Module, quantizer: nn.Module) -> None:
    """The module as a forward hook, and as a child of the layer."""
    layer.output_quantizer = quantizer
    layer.register_forward_hook(lambda _, args, output: quantizer(output))


def brevitas(network: Network, device: torch.device) -> Trainee:
    """brevitas: QuantConv2d, QuantLinear and quantized outputs, Int8WeightPerTensorFloat and ShiftedUint8Act."""
    import brevitas.nn as qnn  # type: ignore[import-not-found,import-untyped]
    from brevitas.quant import (  # type: ignore[import-not-found,import-untyped]
        Int8WeightPerTensorFloat,
        ShiftedUint8ActPerTensorFloat,
        Uint8ActPerTensorFloat,
    )

    model = network.build(device)
    for name, module in list(model.named_modules()):
        layer: nn.Module
        chosen = {"weight_quant": Int8WeightPerTensorFloat, "input_quant": ShiftedUint8ActPerTensorFloat}
        # The statistics of the first steps become a parameter; a step of the long rest is what is timed.
        chosen["input_collect_stats_steps"] = 1
        if type(module).__name__ in network.outputs:
            identity = qnn.QuantIdentity(act_quant=Uint8ActPerTensorFloat, collect_stats_steps=1)
            quantize_outputs(module, identity.to(device).train())
            continue
        if type(module).__name__ not in network.layers:
            continue
        if isinstance(module, nn.Conv2d):
            layer = qnn.QuantConv2d(
                module.in_channels,
                module.out_channels,
                module.kernel_size,
                stride=module.stride,
                padding=module.padding,
                bias=module.bias is not None,
                **chosen,
            )
        else:
            assert isinstance(module, nn.Linear)
            layer = qnn.QuantLinear(module.in_features, module.out_features, bias=module.bias is not None, **chosen)
        layer.load_state_dict(module.state_dict(), strict=False)
        model.set_submodule(name, layer.to(device).train())
    other = "ranges of activations are percentiles of the first batch, then learned"
    return Trainee(model, sgd(model), model, other)


def torchao(network: Network, device: torch.device) -> Trainee:
    """torchao: FakeQuantizedLinear, int8 weights per channel and int8 inputs per token."""
    from torchao.quantization import qat  # type: ignore[import-not-found,import-untyped]

    if network.layers != ("Linear",):
        raise Unsupported("its quantization-aware training is for linear layers and embeddings")
    model = network.build(device)
    inputs = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = qat.IntxFakeQuantizeConfig(torch.int8, "per_channel")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, qat.FakeQuantizedLinear.from_linear(module, inputs, weights))
    return Trainee(model, sgd(model), model, "every token and channel has its own current range")


BUILT_IN: dict[str, Build] = {
    "float": in_float,
    "quantkern-qat": ours(learned=False),
    "quantkern-lsq": ours(learned=True),
    "quantkern-qat-folded": ours(learned=False, folded=True),
    "torch.ao": torch_ao,
}
"""Ours and what comes with torch."""

INSTALLABLE: dict[str, dict[str, Build]] = {
    "nni": {"nni-qat": nni(learned=False), "nni-lsq": nni(learned=True)},
    "brevitas": {"brevitas": brevitas},
    "torchao": {"torchao": torchao},
}
"""Contestants by the package that they need."""

COMPILED: dict[str, Build] = {
    f"{name}-compiled": compiled(BUILT_IN[name]) for name in ("float", "quantkern-qat", "quantkern-lsq")
}
"""torch.compile of a whole network takes minutes on the CPU: these take part where they are named."""
