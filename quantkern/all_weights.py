"""All weights of a model in one operation: when its forward begins, for the layers that its last forward called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from quantkern.current_range import WeightFakeQuant
from quantkern.learned import LearnedWeight
from quantkern.watching import StillThere

KINDS: tuple[Any, ...] = (WeightFakeQuant, LearnedWeight)
"""The parametrizations whose result depends on the weight and their own state alone."""


class AllWeights:
    """Two hooks of a model. Results wait for one training forward, or as long as ``reuse`` says.

    Nothing is done while a forward is traced or compiled, nor in a replica of DataParallel: there each layer computes
    its own weight, as do layers that are called on their own and weights that are sharded or no plain Parameters.
    """

    def __init__(self, model: nn.Module, quantizers: Iterable[nn.Module | None]) -> None:
        self.members: list[Any] = [module for module in quantizers if type(module) in KINDS]
        self.scope = list(model.modules())
        self.kinds: set[type[nn.Module]] = set()
        self.sharded = False

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Put the hooks on ``model``."""
        if not self.members:
            return []
        return [
            model.register_forward_pre_hook(self.before),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook."""
        if (
            torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
            or getattr(model, "_is_replica", False)
        ):
            return
        if ((model.training and torch.is_grad_enabled()) or self.members[0].ahead.keep) and not self.is_sharded():
            self.compute()

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, also behind an exception."""
        if not torch.compiler.is_compiling() and not self.members[0].ahead.keep:
            self.drop()

    def is_sharded(self) -> bool:
        """Whether FSDP gathers and frees some of the weights, in memory whose changes torch does not count."""
        kinds = set(map(type, self.scope))
        if kinds != self.kinds:
            self.kinds, self.sharded = kinds, any("FSDP" in base.__name__ for kind in kinds for base in kind.__mro__)
        return self.sharded

    def compute(self) -> None:
        """Compute what is expected and does not wait."""
        for kind in KINDS:
            kind.compute_ahead([module for module in self.members if type(module) is kind])

    def drop(self) -> None:
        """Forget every result."""
        for module in self.members:
            module.ahead.result = None

    @contextmanager
    def reuse(self) -> Iterator[None]:
        """Let results wait from one forward to the next; may be entered several times."""
        members = [] if self.is_sharded() else self.members
        for module in members:
            module.ahead.keep += 1
        try:
            yield
        finally:
            for module in members:
                module.ahead.keep -= 1
                if not module.ahead.keep:
                    module.ahead.result = None


def take_off(model: nn.Module) -> None:
    """Remove from a copy of a model the hooks that came with it."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", hook), (AllWeights, StillThere)):
                del hooks[key]
                model._forward_hooks_always_called.pop(key, None)
