"""quantkern's operations in ATen's, for programs that run where quantkern is not installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkern import reference

Table = dict[Any, Callable[..., Any]]


def _axis(x: Tensor, axis: int | None) -> int | None:
    return None if axis is None else axis % x.dim()


def _fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    step: Tensor | None = None,
    start_step: int = 0,
) -> Tensor:
    y = reference.fake_quantize(x, scale, zero_point, quant_min, quant_max, _axis(x, axis))
    return y if step is None else torch.where(step >= start_step, y, x)


def _fake_quantize_number(x: Tensor, scale: float, zero_point: float, quant_min: int, quant_max: int) -> Tensor:
    step, zero = (torch.full((), value, dtype=torch.float32, device=x.device) for value in (scale, zero_point))
    return _fake_quantize(x, step, zero, quant_min, quant_max)


def _lsq_forward(
    x: Tensor, scale: Tensor, quant_min: int, quant_max: int, axis: int | None = None, zero_point: Tensor | None = None
) -> Tensor:
    return reference.lsq(x, scale, quant_min, quant_max, _axis(x, axis), 1.0, zero_point)


def _lsq(
    x: Tensor,
    scale: Tensor,
    quant_min: int,
    quant_max: int,
    grad_scale: float,
    axis: int | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    return _lsq_forward(x, scale, quant_min, quant_max, axis, zero_point)


def _binary_matmul(
    a: Tensor,
    b: Tensor,
    k: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    arranged: Tensor | None = None,
) -> Tensor:
    return reference.binary_matmul(a, b, k, scale, bias)


def _binary_conv2d(
    x: Tensor,
    weight: Tensor,
    channels: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    arranged: Tensor | None = None,
    channels_last: bool = False,
) -> Tensor:
    y = reference.binary_conv2d(x, weight, channels, stride, padding, dilation, scale, bias)
    return y.contiguous(memory_format=torch.channels_last) if channels_last else y


def _kernel(operation: Callable[..., Tensor], settings: int, kept: torch.dtype = torch.uint8) -> Callable[..., Any]:
    """A forward kernel of ``settings`` arguments: it also gives what only a backward reads, here nothing."""

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return operation(*arguments[:settings]), arguments[0].new_zeros(0, dtype=kept)

    return forward


def decompositions() -> Table:
    """A table for ``torch.export.ExportedProgram.run_decompositions`` that leaves no operation of quantkern's behind.

    The decomposed program of a model in evaluation mode gives the same numbers, bit for bit, but for DoReFa's weights,
    whose tanh may differ in the last bit. It is for inference: a decomposed forward saves nothing for a backward.

    >>> from quantkern import QAT_Quantizer
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
    >>> rules = [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Linear"]}]
    >>> model, x = QAT_Quantizer(model, rules).compress().eval(), torch.randn(3, 4)
    >>> program = torch.export.export(model, (x,)).run_decompositions(decompositions())
    >>> any("quantkern" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    False
    >>> torch.equal(program.module()(x), model(x))
    True
    """
    ops = torch.ops.quantkern
    return {
        ops.fake_quantize.default: _fake_quantize,
        ops.fake_quantize_forward.default: _kernel(_fake_quantize, 8),
        ops.fake_quantize.number: _fake_quantize_number,
        ops.fake_quantize_forward.number: _kernel(_fake_quantize_number, 5),
        ops.lsq.default: _lsq,
        ops.lsq_forward.default: _lsq_forward,
        ops.dorefa_weight.default: reference.dorefa_weight,
        ops.dorefa_weight_forward.default: _kernel(reference.dorefa_weight, 2, torch.float32),
        ops.dorefa_activation.default: reference.dorefa_activation,
        ops.dorefa_activation_forward.default: _kernel(reference.dorefa_activation, 2),
        ops.binarize.default: reference.binarize,
        ops.binarize_forward.default: _kernel(reference.binarize, 1),
        ops.sign_linear.default: reference.sign_linear,
        ops.sign_conv2d.default: reference.sign_conv2d,
        ops.pack_signs.default: reference.pack_signs,
        ops.pack_signs_counted.default: reference.pack_signs_counted,
        ops.unpack_signs.default: reference.unpack_signs,
        ops.binary_matmul.default: _binary_matmul,
        ops.binary_conv2d.default: _binary_conv2d,
    }
