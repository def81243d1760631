"""Placeholders -> QuantizeLinear and DequantizeLinear with integers that hold exactly the grid's numbers.

A constant becomes an integer initializer with a DequantizeLinear. An activation is quantized to unsigned integers;
where they could leave the grid a Clip of the integers follows. In front of the QuantizeLinear it would keep onnxruntime
from merging it with the convolution before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkern.export.bounds import (
    ANYTHING,
    MOVING,
    Bounds,
    clip_limits,
    constant,
    find_bounds,
    grid_of,
    is_placeholder,
)
from quantkern.export.integers import encode, finer_by, may_saturate, weight_type

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operations with the weight as second input that onnxruntime computes in integers, ConvTranspose apart."""

ORDERED = MOVING - {"Slice", "Expand", "Gather"}
"""Operations that pass on a part of the values of their only reader's tensor, in whatever order."""

LARGEST_BIAS = 2**30


@dataclass(frozen=True)
class Options:
    """See ``export_onnx``."""

    int4: bool | None = None
    int32_bias: bool = True
    signed_weights: bool = False


@dataclass
class _Quantized:
    """What a DequantizeLinear gives: its scale, for an activation the largest integer."""

    scale: np.ndarray
    axis: int | None
    largest: int | None = None
    in_8_bits: bool = True


def levels(ends: Bounds, scale: np.ndarray, zero_point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The integers of two numbers, as QuantizeLinear has them before it saturates."""
    with np.errstate(over="ignore"):
        low, high = (np.rint(np.float32(end) / scale) + zero_point for end in ends)
    return low, high


@dataclass(frozen=True)
class Grids:
    """What a rewritten graph says about its outputs.

    scales: by name, of those that lie on a grid of one scale. steps: of the coarsest grid of an activation.
    """

    scales: dict[str, np.ndarray]
    steps: int


class Lowering:
    """Rewrites one graph in place."""

    def __init__(self, model: Any, options: Options) -> None:
        from onnxscript import ir

        self.ir: Any = ir
        self.graph, self.options = model.graph, options
        self.known: dict[Any, _Quantized] = {}
        self.count = 0

    def run(self) -> Grids:
        """Replace every placeholder."""
        bounds = find_bounds(self.graph)
        placeholders = [node for node in self.graph if is_placeholder(node)]
        weights = [node for node in placeholders if constant(node.inputs[0]) is not None]
        steps = []
        for node in placeholders:
            if node not in weights:
                _, _, low, high, _ = grid_of(node)
                steps.append(high - low)
                self.activation(node, bounds)
        for node in weights:
            self.weight(node)
        if self.options.int32_bias:
            for node in list(self.graph):
                self.bias(node)
        self.drop_unused()
        scales = {
            value.name: found.scale for value in self.graph.outputs if (found := self.quantized(value)) is not None
        }
        return Grids({name: scale for name, scale in scales.items() if scale.size == 1}, min(steps, default=255))

    # --- pieces of graph

    def initializer(self, name: str, array: np.ndarray, dtype: str | None = None) -> Any:
        """A new constant; ``dtype`` where numpy lacks it."""
        kind = None if dtype is None else self.ir.DataType[dtype]
        array = array if kind is None else array.astype(kind.numpy())
        self.count += 1
        name = f"{name}_{self.count}" if name in self.graph.initializers else name
        value = self.ir.Value(name=name, const_value=self.ir.tensor(np.array(array, order="C"), dtype=kind, name=name))
        value.type, value.shape = self.ir.TensorType(value.const_value.dtype), value.const_value.shape
        self.graph.register_initializer(value)
        return value

    def insert(self, before: Any, kind: str, inputs: Sequence[Any], dtype: str, shape: Any, **attributes: int) -> Any:
        """A new node's output."""
        node = self.ir.node(kind, inputs, attributes=attributes)
        self.count += 1
        node.name, output = f"node_{kind}_q{self.count}", node.outputs[0]
        output.name, output.shape = f"{inputs[0].name}_{kind.lower()}_{self.count}", shape
        output.type = self.ir.TensorType(self.ir.DataType[dtype])
        self.graph.insert_before(before, node)
        return output

    def replace(self, node: Any, value: Any) -> None:
        """``value`` for a node's output, under the same name where it is one of the graph's."""
        old = node.outputs[0]
        if old in self.graph.outputs:
            old.name, value.name = f"{old.name}_", old.name
        self.ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def drop_unused(self) -> None:
        """Take out float constants that nobody reads any more."""
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and value not in self.graph.outputs:
                del self.graph.initializers[name]

    # --- what placeholders become

    def activation(self, node: Any, bounds: Callable[[Any], Bounds]) -> None:
        """Quantize, clip if need be, and dequantize."""
        scale, zero_point, low, high, axis = grid_of(node)
        source = node.inputs[0]
        if axis is None:
            source, limits = self.absorb(source)
            first, last = (int(np.clip(q, low, high)) for q in levels(limits, scale, zero_point))
        else:
            first, last = low, high
        code = encode(first, last, zero_point, levels(bounds(source), scale, zero_point))
        x = node.inputs[0]
        step = self.initializer(f"{node.outputs[0].name}_scale", scale)
        zero = self.initializer(f"{node.outputs[0].name}_zero_point", zero_point + code.shift, code.dtype)
        channels = {} if axis is None else {"axis": axis}
        wide = code.dtype == "UINT16"
        if wide:  # onnxruntime has no Clip of 16 bits
            for kind, end in (("Max", code.least), ("Min", code.most)):
                if end is not None:
                    x = self.limit(node, kind, x, ((end - code.shift - zero_point) * scale).astype(np.float32), axis)
        q = self.insert(node, "QuantizeLinear", [x, step, zero], code.dtype, x.shape, **channels)
        if not wide and (code.least, code.most) != (None, None):
            ends = [
                None if end is None else self.initializer(f"{q.name}_end", np.array(end), code.dtype)
                for end in (code.least, code.most)
            ]
            q = self.insert(node, "Clip", [q, *ends], code.dtype, x.shape)
        y = self.insert(node, "DequantizeLinear", [q, step, zero], "FLOAT", x.shape, **channels)
        self.known[y] = _Quantized(scale, axis, code.largest, not wide)
        self.replace(node, y)

    def limit(self, node: Any, kind: str, x: Any, end: np.ndarray, axis: int | None) -> Any:
        """The smaller or larger one of a float tensor and an end, or one a channel."""
        if axis is not None:
            end = end.reshape([-1 if i == axis else 1 for i in range(len(x.shape))])
        return self.insert(node, kind, [x, self.initializer(f"{x.name}_end", end)], "FLOAT", x.shape)

    def absorb(self, value: Any) -> tuple[Any, Bounds]:
        """Take out ReLUs and clips that only a quantization reads: where they came from, and their limits.

        Rounding keeps the order of numbers, so the integers of the limits do the same to the integers. In front of
        the QuantizeLinear they would keep onnxruntime from merging it with the convolution that they follow.
        """
        low, high = ANYTHING
        while len(value.uses()) == 1 and value not in self.graph.outputs:
            node = value.producer()
            if node is None or not (node.op_type in ORDERED or clip_limits(node) is not None):
                break
            limits, value = clip_limits(node), node.inputs[0]
            if limits is not None:
                low, high = (min(max(end, limits[0]), limits[1]) for end in (low, high))
                self.ir.convenience.replace_all_uses_with(node.outputs[0], value)
                self.graph.remove(node, safe=True)
        return value, (low, high)

    def weight(self, node: Any) -> None:
        """An integer constant and a DequantizeLinear; a transposed reader gets a transposed constant."""
        value = constant(node.inputs[0])
        scale, zero_point, low, high, axis = grid_of(node)
        assert value is not None
        shape = [1] * value.ndim
        if axis is not None:
            shape[axis] = -1
        scale_along, zero_along = scale.reshape(shape), zero_point.reshape(shape)
        q = np.clip(np.rint(value / scale_along).astype(np.int64) + zero_along, low, high)
        dead = (q == zero_along).all(tuple(i for i in range(value.ndim) if i != axis))
        scale = np.where(dead, scale.max(), scale).astype(np.float32)  # zeros are zeros on any grid
        for user in list(node.outputs[0].uses()):
            if user.node.op_type == "Transpose" and user.node.outputs[0] not in self.graph.outputs:
                order = user.node.attributes["perm"].as_ints()
                turned = None if axis is None else list(order).index(axis)
                self.replace(user.node, self.constant(user.node, node, q.transpose(order), scale, zero_point, turned))
        if node.outputs[0].uses() or node.outputs[0] in self.graph.outputs:
            self.replace(node, self.constant(node, node, q, scale, zero_point, axis))
        else:
            self.graph.remove(node, safe=True)

    def constant(
        self, before: Any, node: Any, q: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int | None
    ) -> Any:
        """A weight in integers, dequantized in front of ``before``, whose output it replaces."""
        readers = [use.node for use in before.outputs[0].uses()]
        multiplied = [self.quantized(node.inputs[0]) for node in readers if node.op_type in PRODUCTS]
        largest = [found.largest for found in multiplied if found is not None and found.largest is not None]
        for half in (2**7, 2**15):  # 0..255 as -128..127, which hold what is shifted back if need be
            if q.min(initial=0) >= 0 and half <= q.max(initial=0) < 2 * half:
                q, zero_point = q - half, zero_point - half
        allow_int4 = self.options.int4 if self.options.int4 is not None else not largest
        dtype = weight_type(q, zero_point, allow_int4)
        if dtype == "INT8" and largest:
            finer = finer_by(q, zero_point, max(largest))
            q, zero_point, scale = q * finer, zero_point * finer, scale / np.float32(finer)
        unsigned = not self.options.signed_weights
        if dtype == "INT8" and unsigned and any(may_saturate(q, most) for most in largest):
            q, zero_point, dtype = q + 128, zero_point + 128, "UINT8"
        name = node.inputs[0].name
        w = self.initializer(f"{name}_quantized", q, dtype)
        step = self.initializer(f"{name}_scale", scale)
        zero = self.initializer(f"{name}_zero_point", zero_point, dtype)
        channels = {} if axis is None else {"axis": axis}
        y = self.insert(before, "DequantizeLinear", [w, step, zero], "FLOAT", self.ir.Shape(q.shape), **channels)
        self.known[y] = _Quantized(scale, axis, in_8_bits=dtype.endswith("INT8"))
        return y

    def bias(self, node: Any) -> None:
        """int32 with the scale of the products it is added to; float where it does not fit into them."""
        if node.op_type not in PRODUCTS[:3] or len(node.inputs) < 3:
            return
        x, w, bias = self.quantized(node.inputs[0]), self.known.get(node.inputs[1]), constant(node.inputs[2])
        if x is None or w is None or bias is None or x.axis is not None or bias.ndim != 1:
            return
        if not (x.in_8_bits and w.in_8_bits):  # computed in float: the bias would be rounded for nothing
            return
        if w.axis is not None and w.axis != self.output_axis(node):
            return
        factors = [node.attributes[name].as_float() for name in ("alpha", "beta") if name in node.attributes]
        if any(factor != 1.0 for factor in factors):
            return
        scale = np.float32(x.scale.reshape(())) * w.scale.astype(np.float32)
        with np.errstate(all="ignore"):
            q = np.rint(bias.astype(np.float64) / scale)
        if not (np.abs(q) <= LARGEST_BIAS).all():
            return
        name = node.inputs[2].name
        step = self.initializer(f"{name}_scale", scale)
        zero = self.initializer(f"{name}_zero_point", np.zeros(scale.shape, np.int32))
        channels = {} if w.axis is None else {"axis": 0}
        inputs = [self.initializer(f"{name}_quantized", q.astype(np.int32)), step, zero]
        node.replace_input_with(
            2, self.insert(node, "DequantizeLinear", inputs, "FLOAT", node.inputs[2].shape, **channels)
        )

    @staticmethod
    def output_axis(node: Any) -> int | None:
        """The axis of a weight that counts the outputs."""
        if node.op_type == "Gemm":
            return 0 if "transB" in node.attributes and node.attributes["transB"].as_int() else 1
        if node.op_type == "ConvTranspose":
            return 1 if "group" not in node.attributes or node.attributes["group"].as_int() == 1 else None
        return 0

    def quantized(self, value: Any) -> _Quantized | None:
        """How a value is quantized, looked for through operations that only move it."""
        moved = False
        while value not in self.known:
            node = None if value is None else value.producer()
            if node is None or node.op_type not in MOVING:
                return None
            value, moved = node.inputs[0], True
        found = self.known[value]
        return found if not moved or found.axis is None else None
