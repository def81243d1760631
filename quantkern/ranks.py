"""What the ranks of torch.distributed tell each other: running ranges, and the scales that learning starts with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantkern import reference
from quantkern.current_range import WeightFakeQuant
from quantkern.learned.lsq import LearnedFakeQuant
from quantkern.learned.state import LearnedState
from quantkern.running_range import ActivationFakeQuant

AVAILABLE = torch.distributed.is_available()
"""Whether this torch was built with torch.distributed."""


def agree_on_sizes(own: Mapping[str, int], group: Any, explain: Callable[[str], str]) -> dict[str, int]:
    """The channels of every tensor, where some ranks may not know them yet (0); every rank must call this.

    Raises:
        RuntimeError: some ranks do not have a tensor, or have it with other channels. ``explain`` makes the message
            out of the names. Every rank raises it.
    """
    everywhere: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everywhere, dict(own), group)
    names = set().union(*everywhere)
    missing = sorted(name for name in names if any(name not in sizes for sizes in everywhere))
    if missing:
        raise RuntimeError(explain(", ".join(missing)))
    found = {name: {sizes[name] for sizes in everywhere} - {0} for name in own}
    other = sorted(name for name, sizes in found.items() if len(sizes) > 1)
    if other:
        raise RuntimeError(explain(", ".join(f"{name} with {sorted(found[name])} channels" for name in other)))
    return {name: max(sizes, default=0) for name, sizes in found.items()}


def keep_from_ddp(module: nn.Module, keep: bool = True) -> None:
    """Whether a DistributedDataParallel around ``module`` shall leave out what follows from the weights at once.

    Every rank computes that from the same weights, in every forward; nobody has to broadcast it.
    """
    attribute = "_ddp_params_and_buffers_to_ignore"  # what DistributedDataParallel reads
    found = [name for name, child in module.named_modules() if type(child) is WeightFakeQuant]
    own = [f"{name}.{buffer}" for name in found for buffer in ("scale", "zero_point")]
    names = [name for name in getattr(module, attribute, None) or () if name not in own] + own * keep
    module.__dict__.pop(attribute, None)
    if names:
        setattr(module, attribute, names)


def running_ddp() -> Any:
    """The DistributedDataParallel whose forward this is, or None."""
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def sharded(model: nn.Module) -> list[Any]:
    """The modules in a model whose parameters ``fully_shard`` has taken apart."""
    loaded = sys.modules.get("torch.distributed.fsdp")  # nobody can have sharded a model without that
    kind = getattr(loaded, "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def trains_distributed(model: nn.Module) -> bool:
    """Whether a forward is one of several ranks'. Known without a look at the device, and to torch.compile."""
    if not (AVAILABLE and torch.distributed.is_initialized()):
        return False
    return running_ddp() is not None or bool(sharded(model))


def require_whole(model: nn.Module, method: str) -> None:
    """Refuse what needs whole weights in one process."""
    if sharded(model):
        raise RuntimeError(
            f"{method}(): fully_shard has taken the model's weights apart. Gather them with torch.distributed."
            "checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), load "
            "them into a model that is quantized with the same rules and not sharded, and go on with that"
        )


def refuse_sharded_scales(parts: Sequence[Any]) -> None:
    """A scale that starts in a forward would be lost in a copy that ``fully_shard`` gathers for that forward."""
    for part in parts:
        state = part._get_fsdp_state()
        # torch 2.11 has one group or none
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in filter(None, groups):
            for parameter in group.fsdp_params:
                if isinstance(parameter._module_info.module, LearnedState):
                    raise RuntimeError(
                        f"{parameter._module_info.module.label}: fully_shard has sharded a learned scale; shard the "
                        "model with ignored_params=set(quantizer.scale_parameters())"
                    )


def _explain(names: str) -> str:
    return (
        f"only some ranks have a quantizer for {names}; every rank must know the same tensors and channels before the "
        "end of the first training step: give the quantizer a dummy_input, or call its share_ranges(False)"
    )


class RangeSharing:
    """Forward hook of a quantized model: gives the running ranges of all ranks the same values.

    One collective at the end of a training forward::

        running_min = the smallest running_min of all ranks, and running_max the largest
        scale, zero_point from them as ever

    Since all ranks came from the same running range, that is the moving average of the range of the global batch.
    Ranks tell each other their tensors in the first such forward, which waits for the device; no later one does.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.group: Any = None
        self.ranges: Ranges | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles ask their own ranks."""
        return {"enabled": self.enabled, "group": None, "ranges": None}

    def set(self, enabled: bool, group: Any) -> None:
        """Switch on or off, for the ranks of ``group``."""
        self.enabled, self.group, self.ranges = enabled, group, None

    def __call__(self, model: nn.Module, args: object, output: object) -> None:
        """The hook."""
        if self.enabled and model.training and (self.group is not None or trains_distributed(model)):
            from quantkern.outside_graphs import call_outside_graphs

            call_outside_graphs(self.share, model)

    def share(self, model: nn.Module) -> None:
        """Share now, when this forward belongs to a step of all ranks."""
        group = self.ranks(model)
        if group is None or torch.distributed.get_world_size(group) == 1 or not torch.is_grad_enabled():
            return
        if self.ranges is None:
            tensors = {name: m for name, m in model.named_modules() if isinstance(m, ActivationFakeQuant)}
            sizes = agree_on_sizes({name: m.scale.numel() for name, m in tensors.items()}, group, _explain)
            for name, module in tensors.items():
                if module.scale.numel() != sizes[name]:
                    module.resize(sizes[name])
            self.ranges = Ranges([tensors[name] for name in sorted(tensors)])
        if not self.ranges.are_current():
            self.ranges = Ranges(self.ranges.modules)
        if self.ranges.modules:
            self.ranges.share(group)

    def ranks(self, model: nn.Module) -> Any:
        """The process group whose ranks all run this very forward; None: they do not, or nobody knows."""
        if self.group is not None:
            return self.group
        running = running_ddp()
        if running is not None:
            # Inside no_sync() ranks go on alone, and inside join() some of them have ended.
            alone = not running.require_backward_grad_sync or running._join_config.enable
            return None if alone else running.process_group
        return torch.distributed.group.WORLD if sharded(model) else None


def _grid_of(module: ActivationFakeQuant) -> tuple[int, int, bool]:
    return (*module.spec.quant_range, module.spec.symmetric)


class Ranges:
    """The ranges of many tensors. Views of their state are made once, so that a step has few operations."""

    NAMES = ("running_min", "running_max", "scale", "zero_point", "observing")

    def __init__(self, modules: Sequence[ActivationFakeQuant]) -> None:
        self.modules = sorted(modules, key=_grid_of)
        self.buffers = [[getattr(module, name) for name in self.NAMES] for module in self.modules]
        self.sizes = [module.scale.numel() for module in self.modules]
        self.views = [[own[i].view(-1) for own in self.buffers] for i in range(4)]
        self.views.append([own[4].expand(size) for own, size in zip(self.buffers, self.sizes, strict=True)])
        self.devices = list(dict.fromkeys(own[0].device for own in self.buffers))
        self.grids: list[
            tuple[tuple[int, int, bool], int]
        ] = []  # with the number of values; equal grids follow each other
        for module, size in zip(self.modules, self.sizes, strict=True):
            same = bool(self.grids) and self.grids[-1][0] == _grid_of(module)
            before = self.grids.pop()[1] if same else 0
            self.grids.append((_grid_of(module), before + size))

    def are_current(self) -> bool:
        """Whether the state is still in the same buffers: neither moved, nor resized, nor assigned."""
        return all(
            module._buffers[name] is buffer and own[2].numel() == size
            for module, own, size in zip(self.modules, self.buffers, self.sizes, strict=True)
            for name, buffer in zip(self.NAMES, own, strict=True)
        )

    def joined(self, index: int) -> Tensor:
        """One kind of state of all modules in one tensor."""
        views = self.views[index]
        return torch.cat(views if len(self.devices) == 1 else [view.to(self.devices[0]) for view in views])

    @torch.no_grad()
    def share(self, group: Any) -> None:
        """The ranges of all ranks together, and the scales that follow from them, in one collective."""
        both = torch.cat([-self.joined(0), self.joined(1)])
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group=group)
        low, high = both.view(2, -1)
        low = -low
        counts = [count for _, count in self.grids]
        parts = zip(self.grids, low.split(counts), high.split(counts), strict=True)
        grids = [reference.choose_scale(lowest, highest, *grid) for (grid, _), lowest, highest in parts]
        scale, zero_point = (torch.cat(values) for values in zip(*grids, strict=True))
        renewed = self.joined(4) & (low <= high)
        scale = torch.where(renewed, scale, self.joined(2))
        zero_point = torch.where(renewed, zero_point, self.joined(3))
        for targets, values in zip(self.views, (low, high, scale, zero_point), strict=False):
            torch._foreach_copy_(targets, values.split(self.sizes))


class StartSharing:
    """Forward pre-hook of a model whose scales learn: where ranks leave layers out, all get the same scales.

    Ranks that run every layer share what a scale starts with while it starts. Where DistributedDataParallel was told
    that ranks may leave out layers (``find_unused_parameters``), a rank starts on its own, and the next training
    forward begins with the mean of the ranks, also on those that have not had the tensor. (Not sooner: the backward
    needs the scale of its forward.) That ends when every scale has started somewhere.

    ``fully_shard`` cannot shard scales. It has to leave them alone, and gradients of what it leaves alone are no
    concern of its own: they become the mean of all ranks here, in one collective at the end of a backward.
    """

    def __init__(self) -> None:
        self.started: frozenset[str] = frozenset()
        self.hooked: dict[int, nn.Parameter] = {}  # kept alive: an id stands for one object only
        self.queued = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies ask their own ranks."""
        return StartSharing().__dict__

    def __call__(self, model: nn.Module, args: object) -> None:
        """The hook."""
        if model.training and trains_distributed(model):
            from quantkern.outside_graphs import call_outside_graphs

            call_outside_graphs(self.share, model)

    def share(self, model: nn.Module) -> None:
        """Share the scales that have started on some rank for the first time."""
        running = running_ddp()
        if running is None:
            parts = sharded(model)
            if parts:
                refuse_sharded_scales(parts)
                self.watch_gradients(model)
            return
        if not running.find_unused_parameters or running._join_config.enable:
            return
        modules = {name: m for name, m in model.named_modules() if isinstance(m, LearnedFakeQuant)}
        waiting = {name: m for name, m in modules.items() if name not in self.started}
        if not waiting:
            return
        sizes = agree_on_sizes({name: m.scale.numel() for name, m in waiting.items()}, running.process_group, _explain)
        for name, module in waiting.items():
            if module.scale.numel() != sizes[name]:
                module.resize(sizes[name])
        self.started |= share_starts(waiting, running.process_group)

    def watch_gradients(self, model: nn.Module) -> None:
        """Have the gradients of all scales averaged when a backward ends."""

        def ended() -> None:
            self.queued = False
            gradients = [scale.grad for _, scale in learned_scales(model)]  # some came in this very forward
            average([gradient for gradient in gradients if gradient is not None])

        def arrived(_: Tensor) -> None:
            if not self.queued:
                self.queued = True
                torch.autograd.Variable._execution_engine.queue_callback(ended)

        self.queued = False
        for module, scale in learned_scales(model):
            module.everywhere = True
            if id(scale) not in self.hooked:
                self.hooked[id(scale)] = scale
                scale.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]


def learned_scales(model: nn.Module) -> list[tuple[LearnedFakeQuant, nn.Parameter]]:
    """Every learned scale and zero point of a model, with its owner."""
    modules = [module for module in model.modules() if isinstance(module, LearnedFakeQuant)]
    return [(module, scale) for module in modules for scale in module.parameters(recurse=False)]


@torch.no_grad()
def average(values: Sequence[Tensor]) -> None:
    """Give every rank the mean over all ranks, in one collective."""
    flat = torch.cat([value.reshape(-1).to(values[0].device) for value in values])
    torch.distributed.all_reduce(flat)
    parts = torch.split(flat / torch.distributed.get_world_size(), [value.numel() for value in values])
    torch._foreach_copy_([value.view(-1) for value in values], list(parts))


@torch.no_grad()
def share_starts(modules: Mapping[str, LearnedFakeQuant], group: Any) -> frozenset[str]:
    """Mean of the scales that started on some rank, taken over by all; the names that have a scale now."""
    names = sorted(modules)
    device = modules[names[0]].scale.device
    facts = [[modules[n].ready, modules[n].fresh, modules[n].ready and modules[n].spec.dtype == "int"] for n in names]
    counts = torch.tensor(facts, dtype=torch.float32, device=device)
    torch.distributed.all_reduce(counts, group=group)
    told = dict(zip(names, counts.tolist(), strict=True))
    names = [name for name in names if told[name][1]]
    values = []
    for name in names:
        module, own = modules[name], float(modules[name].ready)
        zero_point = torch.zeros_like(module.scale) if module.zero_point is None else module.zero_point
        values.append(module.scale_for(told[name][2] > 0).reshape(-1).to(device) * own)
        values.append(zero_point.reshape(-1).to(device) * own)
    if names:
        sums = torch.cat(values)
        torch.distributed.all_reduce(sums, group=group)
        parts = torch.split(sums, [value.numel() for value in values])
        for name, scale, zero_point in zip(names, parts[::2], parts[1::2], strict=True):
            count, _, signed = told[name]
            modules[name].adopt(scale / count, zero_point / count, signed > 0)
    return frozenset(name for name, (count, _, _) in told.items() if count)
