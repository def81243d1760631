"""Between which values the tensors of an ONNX graph lie, as far as the operations themselves say it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from quantkern.export.frozen import DOMAIN

Bounds = tuple[float, float]

ANYTHING: Bounds = (-math.inf, math.inf)

MOVING = frozenset(
    ("Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "MaxPool", "Expand", "Gather")
)
"""Operations that give values of their first input only."""

FIXED: dict[str, Bounds] = {
    "Sigmoid": (0.0, 1.0),
    "HardSigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "Abs": (0.0, math.inf),
    "Exp": (0.0, math.inf),
    "Softplus": (0.0, math.inf),
}


def constant(value: Any) -> np.ndarray | None:
    """The array of an initializer or constant; None for what is computed from inputs."""
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def grid_of(node: Any) -> tuple[np.ndarray, np.ndarray, int, int, int | None]:
    """scale, zero_point, quant_min, quant_max and axis of a placeholder."""
    scale, zero_point = (constant(value) for value in node.inputs[1:])
    assert scale is not None and zero_point is not None
    low, high, axis = (node.attributes[name].as_int() for name in ("quant_min", "quant_max", "axis"))
    return scale, zero_point, low, high, None if axis < 0 else axis


def is_placeholder(node: Any) -> bool:
    """Whether a node stands for a fake-quantizer."""
    return bool(node is not None and node.domain == DOMAIN)


def _of_node(node: Any, of: Callable[[Any], Bounds]) -> Bounds:
    kind = node.op_type
    if is_placeholder(node):
        scale, zero_point, low, high, _ = grid_of(node)
        return float(((low - zero_point) * scale).min()), float(((high - zero_point) * scale).max())
    if kind in FIXED:
        return FIXED[kind]
    if kind in MOVING:
        return of(node.inputs[0])
    if kind in ("Relu", "Clip", "Min", "Max"):
        return _of_clip(node, of)
    if kind in ("Concat", "Where"):
        several = [of(value) for value in node.inputs[kind == "Where" :]]
        return min(low for low, _ in several), max(high for _, high in several)
    return ANYTHING


def _of_clip(node: Any, of: Callable[[Any], Bounds]) -> Bounds:
    if node.op_type in ("Relu", "Clip"):
        (low, high), (least, most) = of(node.inputs[0]), clip_limits(node) or ANYTHING
        return min(max(low, least), most), min(max(high, least), most)
    parts = [of(value) for value in node.inputs]
    if node.op_type == "Min":
        return min(low for low, _ in parts), min(high for _, high in parts)
    return max(low for low, _ in parts), max(high for _, high in parts)


def clip_limits(node: Any) -> Bounds | None:
    """Between what a Relu or Clip puts its input; None for another operation, and for limits that are no constants."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    if node.op_type != "Clip":
        return None
    limits = [
        default if value is None else constant(value)
        for value, default in zip((*node.inputs[1:], None, None), ANYTHING, strict=False)
    ]
    return None if limits[0] is None or limits[1] is None else (float(limits[0]), float(limits[1]))


def find_bounds(graph: Iterable[Any]) -> Callable[[Any], Bounds]:
    """Go through a sorted graph once; the function returned knows the bounds of each of its tensors."""
    known: dict[Any, Bounds] = {}

    def of(value: Any) -> Bounds:
        if value not in known:
            array = constant(value)
            usable = array is not None and array.size and array.dtype.kind in "fiu" and bool(np.isfinite(array).all())
            known[value] = (float(array.min()), float(array.max())) if usable else ANYTHING  # type: ignore[union-attr]
        return known[value]

    for node in graph:
        bounds = _of_node(node, of)
        for output in node.outputs:
            known[output] = bounds if output is node.outputs[0] else ANYTHING
    return of
