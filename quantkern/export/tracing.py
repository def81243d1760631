"""A model -> an ONNX graph, by torch.export and torch's own exporter."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from quantkern.attach import DummyInput, in_evaluation
from quantkern.export.aten import decompositions

OPSET = 21
"""The first with 4- and 16-bit integers."""


def require_packages(*needed: str) -> None:
    """Refuse before anything is done.

    Raises:
        ImportError: a package of the extra 'onnx' is not installed.
    """
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        names = " and ".join(missing)
        raise ImportError(f"ONNX export needs {names}: pip install '.[onnx]', or pip install {' '.join(missing)}")


def as_call(example_input: DummyInput) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and keyword arguments that an example input stands for.

    >>> as_call({"x": 1}), as_call([1, 2]), as_call(torch.ones(()))
    (((), {'x': 1}), ((1, 2), {}), ((tensor(1.),), {}))
    """
    if isinstance(example_input, dict):
        return (), dict(example_input)
    return tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,), {}


def sample_input(model: nn.Module, shape: Sequence[int] | None, device: torch.device | str | None) -> Tensor:
    """Zeros of ``shape`` for ``export_model(onnx_path=...)``.

    Raises:
        ValueError: shape is none. ImportError: a package is missing.
    """
    if not isinstance(shape, (list, tuple)) or not all(isinstance(size, int) for size in shape):
        raise ValueError(f"onnx_path needs input_shape, a tuple such as (1, 3, 32, 32); got {shape!r}")
    require_packages("onnx", "onnxscript")
    own = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return torch.zeros(tuple(shape), device=own if device is None else device)


def on_cpu(example_input: DummyInput) -> DummyInput:
    """The same with its tensors on the CPU."""
    moved: DummyInput = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, example_input)
    return moved


def _batch_of(call: object) -> int | None:
    """The first size of the first tensor that has one."""
    sizes = [leaf.shape[0] for leaf in tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim()]
    return sizes[0] if sizes else None


def _program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_batch: bool
) -> torch.export.ExportedProgram:
    """The model's graph, with the first axis of every tensor as long as the batch of any size where that is asked."""
    shapes: Any = None
    size = _batch_of((args, kwargs)) if dynamic_batch else None
    if size is not None:
        batch = torch.export.Dim("batch")

        def is_batched(leaf: object) -> bool:
            return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size

        args_shapes, kwargs_shapes = tree_map(lambda leaf: {0: batch} if is_batched(leaf) else None, (args, kwargs))
        shapes = kwargs_shapes or args_shapes
        if size == 1:  # torch.export takes a size of 1 for a constant
            args, kwargs = tree_map(lambda leaf: torch.cat([leaf, leaf]) if is_batched(leaf) else leaf, (args, kwargs))
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        first = str(error).strip().split("\n\n")[0]
        hint = "; dynamic_batch=False fixes the batch size of example_input" if size is not None else ""
        raise ValueError(f"torch.export cannot trace the model{hint}: {first}") from error


def to_onnx(model: nn.Module, example_input: DummyInput, dynamic_batch: bool) -> Any:
    """The model in evaluation mode as a ``torch.onnx.ONNXProgram``; quantkern's own operations become ATen's.

    Raises:
        ValueError: the model cannot be traced, or holds an operation that ONNX has not.
    """
    with in_evaluation(model), torch.no_grad():
        program = _program(model, *as_call(example_input), dynamic_batch)
        if any("quantkern." in str(node.target) for node in program.graph.nodes if node.op == "call_function"):
            program = program.run_decompositions(decompositions())
        try:
            onnx_program = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
        except Exception as error:
            causes = re.findall(r"No ONNX function found for [^\n]*", str(error)) or [str(error).split("\n")[0]]
            raise ValueError(f"the model cannot be written as ONNX: {causes[0]}") from error
    assert onnx_program is not None
    _name_batch(onnx_program.model.graph)
    return onnx_program


def _name_batch(graph: Any) -> None:
    """Call the size that may change by its name."""
    from onnxscript import ir

    symbolic: Any = ir.SymbolicDim
    free = {dim.value for value in graph.inputs for dim in value.shape or () if isinstance(dim, symbolic)}
    if len(free) != 1:
        return
    (old,) = free
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            sizes = [dim.value if isinstance(dim, symbolic) else dim for dim in value.shape]
            named = [re.sub(rf"\b{old}\b", "batch", size) if isinstance(size, str) else size for size in sizes]
            value.shape = ir.Shape(named)
