"""Results of weights that were computed before their layers ask for them.

A parametrization owns an ``Ahead``, the place where its result waits: the values and the mask, nothing with a graph.
Every time the layer asks, a view of them gets a backward of its own, so that one result serves several uses and
several forwards. It serves as long as it belongs to the very Parameter, and nothing it was made of has been written
since; a layer that finds nothing computes its weight itself. A copy or a pickle of a model has empty places.

What torch does not count is not seen: writes through ``.data``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from quantkern.backend import Backend, resolve
from quantkern.config import TensorSpec
from quantkern.reference import lsq_grad_scale

_WEIGHTS = torch.ops.quantkern.fake_quantize_weights_kept.default
_AGAIN = torch.ops.quantkern.fake_quantize_again.default
_LSQ_AGAIN = torch.ops.quantkern.lsq_again.default
_LSQ_WEIGHTS = torch.ops.quantkern.lsq_weights.default

Rule = tuple[Any, ...]


def _stream_of(device: torch.device) -> int | None:
    """The queue of work that a result belongs to; another one would have to wait for it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


class Result:
    """The fake-quantized weight, and what it was made of.

    mask: bits of the gradients that pass; empty where all do, or where none was asked for. differentiable: whether a
    backward can be hung on it. rule: what the backward of a learned scale needs besides.
    """

    __slots__ = ("__weakref__", "differentiable", "mask", "rule", "sources", "stream", "weight", "y")

    def __init__(
        self, weight: Tensor, y: Tensor, mask: Tensor | None, differentiable: bool, other: Tensor | None, rule: Rule
    ) -> None:
        self.weight, self.y, self.mask, self.differentiable, self.rule = weight, y, mask, differentiable, rule
        own = (weight, weight._version)
        self.sources = (own,) if other is None else (own, (other, other._version))
        self.stream = _stream_of(weight.device)

    def serves(self, weight: Tensor, dtype: torch.dtype | None) -> bool:
        """Whether it is what ``weight`` would be computed to now. dtype: what a product would make of it."""
        return (
            self.weight is weight
            and (self.y.dtype is dtype or self.y.dtype is weight.dtype)
            and self.y._version == 0
            and all(source._version == version for source, version in self.sources)
            and (self.differentiable or not (weight.requires_grad and torch.is_grad_enabled()))
            and self.stream == _stream_of(weight.device)
        )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The 16-bit type that an autocast region, here and now, makes of a float32 operand of a product."""
    kind = x.device.type
    if x.dtype is not torch.float32 or not torch.is_autocast_enabled(kind):
        return None
    dtype = torch.get_autocast_dtype(kind)
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


class Ahead:
    """Where the result of one weight waits. ``keep``: it may, from one forward to the next."""

    __slots__ = ("keep", "result", "rule", "seen", "shape", "spec")

    def __init__(self) -> None:
        self.keep = 0
        self.result: Result | None = None
        self.seen: weakref.ref[Tensor] | None = None
        self.shape: torch.Size | None = None
        self.spec: TensorSpec | None = None
        self.rule: Rule = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Ahead:
        return Ahead()

    def __reduce__(self) -> tuple[type[Ahead], tuple[()]]:
        return Ahead, ()

    def take(self, weight: Tensor, owner: Any) -> Result | None:
        """The result of ``weight``, if it waits here, or if it may for later; the owner's next forward is expected."""
        if self.seen is None or self.seen() is not weight:
            # Replicas, shards and tensors that took a Parameter's place are another type, or marked by FSDP.
            plain = type(weight) is nn.Parameter and not hasattr(weight, "_fsdp_flattened")
            self.seen = weakref.ref(weight) if plain else None
        self.shape = weight.shape
        result, dtype = self.result, owner.narrow(weight)
        if result is None or not result.serves(weight, dtype):
            if not self.keep:
                return None
            owner.compute_ahead([owner])
            result = self.result
            return result if result is not None and result.serves(weight, dtype) else None
        if not self.keep:  # gone with its only use: no more memory at the end of the forward than without it
            self.result = None
        return result

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is the memory of a result that is kept for later forwards."""
        return self.keep > 0 and self.result is not None and self.result.y.data_ptr() == tensor.data_ptr()

    def rule_of(self, spec: TensorSpec, weight: Tensor) -> Rule:
        """quant_min, quant_max, the axis as the operators on lists have it, and whether the scheme is symmetric."""
        if self.spec is not spec:
            axis = -1 if spec.axis is None else spec.axis % weight.dim()
            self.spec, self.rule = spec, (*spec.quant_range, axis, spec.symmetric)
        return self.rule

    def expected(self, owner: Any) -> Tensor | None:
        """The weight that the layer's last forward brought, if its result can be computed here and does not wait."""
        weight = None if self.seen is None else self.seen()
        if weight is None or weight.shape != self.shape or weight.is_inference():
            return None
        if resolve(weight, Backend.AUTO) is not Backend.NATIVE:
            return None
        return None if self.result is not None and self.result.serves(weight, owner.narrow(weight)) else weight


Group = list[tuple[Any, Tensor]]


def _by_device(modules: Iterable[Any]) -> Iterable[tuple[torch.dtype | None, Group]]:
    """Each module with the weight it is expected to be asked for, by device and the type that they shall become."""
    groups: dict[tuple[torch.device, torch.dtype | None], Group] = {}
    for module in modules:
        weight = module.ahead.expected(module)
        if weight is not None:
            groups.setdefault((weight.device, module.narrow(weight)), []).append((module, weight))
    return [(dtype, group) for (_, dtype), group in groups.items()]


def _call(op: Any, rows: Sequence[tuple[Any, ...]], dtype: torch.dtype | None) -> Any:
    """An operator on lists, with the arguments of each tensor."""
    return op(*(list(column) for column in zip(*rows, strict=True)), dtype)


def _outside_inference() -> AbstractContextManager[Any]:
    """Results can then be used in every mode."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def compute_ranged(modules: Iterable[Any]) -> None:
    """Leave the results of weights with their current range where they are expected and do not wait."""
    for dtype, group in _by_device(module for module in modules if not module.loaded):
        rows = []
        for module, weight in group:
            own, (low, high, axis, symmetric) = module._buffers, module.ahead.rule_of(module.spec, weight)
            state = (own["scale"], own["zero_point"])
            rows.append((weight, *state, low, high, symmetric, axis, own["step"], module.spec.start_step))
        with _outside_inference():
            ys, masks = _call(_WEIGHTS, rows, dtype)
        for (module, weight), row, y, mask in zip(group, rows, ys, masks, strict=True):
            never_clips = row[5] and row[3] == -row[4]
            differentiable = never_clips or mask.numel() > 0 or not weight.numel()
            module.ahead.result = Result(weight, y, mask, differentiable, row[7], ())


def ranged_result(module: Any, weight: Tensor) -> Tensor | None:
    """The weight with its current range, if it waits."""
    if torch.compiler.is_compiling() or module.loaded:
        return None
    result = module.ahead.take(weight, module)
    return None if result is None else _AGAIN(weight, result.y, result.mask)


def compute_learned(modules: Iterable[Any]) -> None:
    """The same of weights with a learned scale."""
    for dtype, group in _by_device(module for module in modules if module.ready and module.started):
        scales = [module.scale for module, _ in group]
        bounded = [i for i, (module, _) in enumerate(group) if module.training]
        moved = [scales[i] for i in bounded]
        # Scales are bounded as by LearnedFakeQuant.bound, all at once.
        with _outside_inference(), torch.no_grad(), _unsafe_preserve_version_counter(tuple(moved)):
            if moved:
                torch._foreach_clamp_min_(moved, [group[i][0].floor for i in bounded])
            rows = []
            for (module, weight), scale in zip(group, scales, strict=True):
                low, high, axis, _ = module.ahead.rule_of(module.spec, weight)
                given = module.grad_scale(weight, module.spec.axis)
                factor = lsq_grad_scale(weight, high, module.spec.axis) if given is None else given
                rows.append((weight, scale if module.training else module.grid()[0], low, high, factor, axis))
            ys = _call(_LSQ_WEIGHTS, rows, dtype)
        for (module, weight), row, scale, y in zip(group, rows, scales, ys, strict=True):
            module.ahead.result = Result(weight, y, None, True, scale, (*row[2:5], module.spec.axis))


def learned_result(module: Any, weight: Tensor) -> Tensor | None:
    """The weight on the grid of its learned scale, if it waits."""
    if torch.compiler.is_compiling():
        return None
    result = module.ahead.take(weight, module)
    if result is None or not (module.ready and module.started):
        return None
    scale = module.scale if module.training else module.grid()[0]
    return _LSQ_AGAIN(weight, result.y, scale, *result.rule)  # type: ignore[no-any-return]
