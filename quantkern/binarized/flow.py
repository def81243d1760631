"""Which tensors of a model are binary, read from its graph before anything runs.

A model is traced with torch.fx in every way it may run: in training and in evaluation, with and without its optional
arguments. Only what holds in all of these counts.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

MOST_VARIANTS = 32

_MODULES = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_MANY = (torch.cat, torch.concat, torch.stack)
_FUNCTIONS = (
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.movedim),
    *(torch.clone, torch.chunk, torch.split, operator.getitem),
    *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    *(functional.max_pool1d, functional.max_pool2d, functional.max_pool3d, functional.adaptive_max_pool2d),
    *_MANY,
)
_METHODS = frozenset(
    (
        *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "movedim"),
        *("contiguous", "clone", "detach", "chunk", "split", "expand"),
    )
)


class CannotTrace(Exception):
    """The model's graph cannot be read; the message says why."""


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Collection[nn.Module]) -> None:
        super().__init__()
        self.leaves = set(leaves)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.leaves or super().is_leaf_module(m, module_qualified_name)


def _choices(model: nn.Module) -> list[dict[str, Any]]:
    """The ways to call the model: an optional tensor is given or not, a switch is on or off."""
    values: dict[str, list[Any]] = {}
    given = object()
    for name, parameter in inspect.signature(model.forward).parameters.items():
        default = parameter.default
        if default is None:
            values[name] = [None, given]
        elif isinstance(default, bool):
            values[name] = [True, False]
        elif default is not parameter.empty:
            values[name] = [default]
    if 2 ** sum(len(v) > 1 for v in values.values()) > MOST_VARIANTS:
        raise CannotTrace(f"its forward has too many optional arguments: {', '.join(values)}")
    combinations = itertools.product(*values.values())
    return [
        {name: value for name, value in zip(values, combination, strict=True) if value is not given}
        for combination in combinations
    ]


def trace(model: nn.Module, leaves: Collection[nn.Module], modes: Sequence[bool] = (True, False)) -> list[fx.Graph]:
    """The graphs of a model, one for every way it may run; ``leaves`` are calls, whatever they do inside.

    The model is not changed, whatever its forward does; nodes have the names of its modules.

    Raises:
        CannotTrace: its forward depends on values, or does what torch.fx cannot follow.
    """
    if model in leaves:
        raise CannotTrace("the model is this one layer")
    known: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    graphs = []
    try:
        # A copy of everything but the parameters: a forward may keep or count what it meets. And it may draw numbers.
        twin = copy.deepcopy(model, known)
        inside = [known[id(leaf)] for leaf in leaves]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for mode in modes:
                for module in twin.modules():
                    module.training = mode
                for arguments in _choices(twin):
                    graphs.append(_Tracer(inside).trace(twin, concrete_args=arguments or None))
    except CannotTrace:
        raise
    except Exception as error:  # a user's forward may raise anything when it meets torch.fx's stand-ins for tensors
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise CannotTrace(f"torch.fx cannot trace the model ({first[0].split('. ')[0]})") from error
    return graphs


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under all of its names, as a graph calls them."""
    return dict(model.named_modules(remove_duplicate=False))


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks of somebody else may change what goes in or comes out."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not (getattr(hook, "__module__", None) or "").startswith("quantkern.") for hook in hooks)


def calls(graph: fx.Graph, modules: dict[str, nn.Module]) -> Iterator[tuple[fx.Node, nn.Module]]:
    """Every call of a module."""
    for node in graph.nodes:
        if node.op == "call_module":
            yield node, modules[node.target]


def only_input(node: fx.Node) -> fx.Node | None:
    """The one tensor that a module is called with; None where it gets something else or more."""
    values = (*node.args, *node.kwargs.values())
    return values[0] if len(values) == 1 and isinstance(values[0], fx.Node) else None


def _keeps_signs(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether +1 and -1 come out as +1 and -1."""
    if node.op == "call_method":
        return node.target in _METHODS
    if node.op == "call_function":
        return any(node.target is function for function in _FUNCTIONS)
    if node.op != "call_module":
        return False
    module = modules[str(node.target)]
    if is_hooked(module) or getattr(module, "return_indices", False):
        return False
    if type(module) is nn.Hardtanh:
        return float(module.min_val) <= -1 and float(module.max_val) >= 1
    return type(module) in _MODULES or (isinstance(module, _DROPOUTS) and module.p == 0)


def _sources(node: fx.Node) -> list[fx.Node]:
    """The tensors whose elements a sign-keeping node passes on."""
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("tensors"))
    found = list(first) if isinstance(first, (list, tuple)) and node.target in _MANY else [first]
    return [entry for entry in found if isinstance(entry, fx.Node)] if all(found) else []


def _writes_into_its_input(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        in_place = node.target is operator.setitem or name in {f"i{word}" for word in _OPERATORS}
        return in_place or (name.endswith("_") and not name.endswith("__")) or bool(node.kwargs.get("inplace"))
    return node.op == "call_module" and bool(getattr(modules[str(node.target)], "inplace", False))


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")


def binary_nodes(
    graph: fx.Graph, modules: dict[str, nn.Module], makes_signs: Callable[[nn.Module], bool]
) -> set[fx.Node]:
    """The nodes whose tensors hold +1 and -1 only: outputs of ``makes_signs`` and what passes them on unchanged.

    A tensor that something later writes into counts for nothing, together with all that may share its memory.
    """
    roots: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and makes_signs(modules[str(node.target)]):
            roots[node] = {node}
        elif _keeps_signs(node, modules):
            sources = _sources(node)
            if sources and all(source in roots for source in sources):
                roots[node] = set().union(*(roots[source] for source in sources))
    spoiled: set[fx.Node] = set()
    for node, origin in roots.items():
        for user in node.users:
            if _writes_into_its_input(user, modules) and not _keeps_signs(user, modules):
                spoiled |= origin
    return {node for node, origin in roots.items() if not origin & spoiled}


def _describe(node: fx.Node | None) -> str:
    if node is None:
        return "more than one tensor"
    if node.op == "placeholder":
        return "the model's own"
    return f"the output of {str(node.target)!r}" if node.op == "call_module" else f"the result of {node.name!r}"


def find_real_inputs(
    model: nn.Module,
    graphs: Sequence[fx.Graph],
    layers: Collection[nn.Module],
    makes_signs: Callable[[nn.Module], bool],
) -> dict[nn.Module, str]:
    """Those of ``layers`` that do not always get a binary tensor, each with the reason."""
    modules = modules_of(model)
    found: dict[nn.Module, str] = {}
    called: set[nn.Module] = set()
    for graph in graphs:
        known = binary_nodes(graph, modules, makes_signs)
        for node, module in calls(graph, modules):
            if module not in layers:
                continue
            called.add(module)
            source = only_input(node)
            if source is None or source not in known:
                found.setdefault(module, f"its input, {_describe(source)}, is not binary")
            elif module._forward_pre_hooks and is_hooked(module):
                found.setdefault(module, "a hook may change its input")
    for layer in layers:
        if layer not in called:
            found.setdefault(layer, "the model does not call it")
    return found
