"""Which batch norms can be folded into which layers: those that alone read what the layer gives, whenever it runs.

The model's graph says so where torch.fx can trace it. Else one run on a dummy_input does, in which every module and
every torch function is watched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from quantkern.attach import DummyInput, run_model
from quantkern.binarized import CannotTrace, trace
from quantkern.binarized.flow import calls, is_hooked, modules_of, only_input
from quantkern.bn_fold.layers import LAYERS, NORMS


@dataclass(frozen=True)
class Pairs:
    """By layer: the batch norm to fold into it, or one that cannot be folded and why."""

    folded: dict[nn.Module, _BatchNorm] = field(default_factory=dict)
    reasons: dict[nn.Module, tuple[_BatchNorm, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    """What one run of the model, or one graph of it, shows.

    times: how often each module is called; readers: by layer and call, the modules that read its output alone, and
    None for anything else that does. touched: modules whose parameters somebody else reads.
    """

    times: Mapping[nn.Module, int]
    readers: Mapping[nn.Module, list[nn.Module | None]]
    touched: Collection[nn.Module] = ()

    def why_not(self, layer: nn.Module, norm: nn.Module) -> str | None:
        """What speaks against folding here; a run that calls neither says nothing."""
        if layer not in self.times and norm not in self.times:
            return None
        if layer in self.touched or norm in self.touched:
            return "the model reads their parameters itself"
        for module, name in ((layer, "the layer"), (norm, "the batch norm")):
            if self.times.get(module, 0) != 1:
                return f"{name} is called {self.times.get(module, 0)} times in one forward"
        if norm not in self.readers[layer]:
            return "the batch norm does not always follow"
        return None if len(self.readers[layer]) == 1 else "something else reads the layer's output too"


def float_class(layer: nn.Module) -> type[nn.Module]:
    """The layer's class, whatever else is parametrized."""
    cls = type(layer)
    return cls.__bases__[0] if parametrize.is_parametrized(layer) else cls


def why_not_folded(layer: nn.Module, norm: _BatchNorm, output: torch.Size | None) -> str | None:
    """What speaks against folding, whatever the model does with them; output: the shape of the layer's where known."""
    for module, known in ((layer, LAYERS), (norm, NORMS)):
        if float_class(module) not in known or "forward" in vars(module):
            return f"its class is {float_class(module).__name__}, expected one of torch.nn's with its own forward"
    if norm.running_mean is None or norm.running_var is None:
        return "the batch norm keeps no running statistics"
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if norm.num_features != channels or (output is not None and len(output) != layer.weight.dim()):  # type: ignore[union-attr,operator]
        return "the batch norm's channels are not the layer's"
    if parametrize.is_parametrized(layer, "bias"):
        return "the layer's bias is parametrized"
    if (layer._forward_hooks and is_hooked(layer)) or (norm._forward_pre_hooks and is_hooked(norm)):
        return "a hook stands between them"
    return None


def _read_graph(graph: fx.Graph, modules: dict[str, nn.Module], layers: Collection[nn.Module]) -> _Run:
    nodes = dict(calls(graph, modules))
    owners = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    readers: dict[nn.Module, list[nn.Module | None]] = {}
    for node, module in nodes.items():
        if module in layers:
            readers.setdefault(module, []).extend(
                nodes[user] if user in nodes and only_input(user) is node else None for user in node.users
            )
    return _Run(Counter(nodes.values()), readers, {modules[name] for name in owners if name in modules})


class _Watcher(TorchFunctionMode):
    """Notes who reads the outputs of layers; what happens inside a batch norm is the batch norm's reading."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[nn.Module] = Counter()
        self.outputs: dict[int, tuple[nn.Module, Tensor]] = {}
        self.readers: dict[nn.Module, list[nn.Module | None]] = {}
        self.inside = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # To ask a tensor for its shape or dtype is not to read it.
        if not self.inside and not isinstance(result, (torch.Size, torch.dtype, torch.device, int)):
            self.note((args, kwargs), None)
        return result

    def note(self, values: object, reader: nn.Module | None) -> None:
        """``reader`` gets these."""
        for value in tree_leaves(values):
            known = self.outputs.get(id(value))
            if known is not None:
                self.readers[known[0]].append(reader)

    def after_layer(self, layer: nn.Module, args: object, output: object) -> None:
        """Forward hook. Tensors are kept: ids are those of living ones."""
        self.times[layer] += 1
        self.readers.setdefault(layer, [])
        if isinstance(output, Tensor):
            self.outputs[id(output)] = (layer, output)

    def before_norm(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        self.times[norm] += 1
        self.note((args, kwargs), norm)
        self.inside += 1

    def after_norm(self, norm: nn.Module, args: object, output: object) -> None:
        """Forward hook."""
        self.inside -= 1


def _watch(model: nn.Module, layers: Iterable[nn.Module], norms: Iterable[nn.Module], dummy_input: DummyInput) -> _Run:
    """One run on dummy_input in evaluation mode, without a trace."""
    watcher = _Watcher()
    handles: list[RemovableHandle] = []
    try:
        handles += [layer.register_forward_hook(watcher.after_layer) for layer in layers]
        for norm in norms:
            handles.append(norm.register_forward_pre_hook(watcher.before_norm, with_kwargs=True))
            handles.append(norm.register_forward_hook(watcher.after_norm))
        with watcher:
            output = run_model(model, dummy_input)
        watcher.note(output, None)
    finally:
        for handle in handles:
            handle.remove()
    return _Run(watcher.times, watcher.readers)


def find_pairs(
    model: nn.Module,
    layers: Mapping[nn.Module, torch.Size | None],
    dummy_input: DummyInput | None = None,
) -> Pairs:
    """Look for batch norms behind ``layers``; the model is only looked at.

    Args:
        layers: those whose weight is quantized, each with the shape of its output where that is known.
        dummy_input: runs the model where torch.fx cannot trace it.

    Raises:
        CannotTrace: the model cannot be traced and there is no dummy_input.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    >>> pairs = find_pairs(model, {model[0]: None, model[2]: None})
    >>> pairs.folded == {model[0]: model[1]}, pairs.reasons
    (True, {})
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    pairs = Pairs()
    if not layers or not norms:
        return pairs
    try:
        graphs = trace(model, [*layers, *norms])
        modules = modules_of(model)
        runs = [_read_graph(graph, modules, layers) for graph in graphs]
    except CannotTrace:
        if dummy_input is None:
            raise
        runs = [_watch(model, layers, norms, dummy_input)]
    for layer, output in layers.items():
        behind = [norm for run in runs for norm in run.readers.get(layer, []) if isinstance(norm, _BatchNorm)]
        if not behind:
            continue
        norm = behind[0]
        reasons = [why_not_folded(layer, norm, output), *(run.why_not(layer, norm) for run in runs)]
        why = next((reason for reason in reasons if reason is not None), None)
        if why is None:
            pairs.folded[layer] = norm
        else:
            pairs.reasons[layer] = (norm, why)
    return pairs
