"""The modules whose scale is a parameter that gradient descent trains (LSQ), and optionally the zero point (LSQ+).

A scale starts on the tensor that is really quantized, at the first training forward after the rule's
quant_start_step, and never again: ``initialized`` is saved with it. The flags ``ready`` and ``started`` mirror on the
host what the device knows, so that no other step waits for it.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from quantkern import functional
from quantkern.ahead import Ahead, compute_learned, learned_result
from quantkern.fake_quant import FakeQuant, is_recorded
from quantkern.learned.initial_scale import initial_scale
from quantkern.learned.state import LearnedState, LsqSpec


def _over_ranks(value: Tensor, largest: bool, everywhere: bool) -> Tensor:
    """The largest (or the sum) of a value over the ranks of the DistributedDataParallel that runs this forward.

    Where a rank may leave a layer out, nobody waits for it here: ``quantkern.ranks`` brings the scales together.
    ``everywhere``: over all ranks there are, as ``quantkern.ranks`` asks for in sharded models.
    """
    running: Any = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    together = running is not None and not running.find_unused_parameters
    if everywhere or together:
        from torch import distributed

        operation = distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM
        distributed.all_reduce(value, operation, group=None if everywhere else running.process_group)
    return value


class LearnedFakeQuant(LearnedState):
    """A tensor on a grid whose scale learns. Until there is a scale the tensor stays float."""

    warned = False
    everywhere = False
    """Whether all ranks of torch.distributed run every forward together."""
    fresh = False
    """Whether this rank has started the scale since the ranks last agreed."""

    def train(self, mode: bool = True) -> LearnedFakeQuant:
        """Switch between training and evaluation."""
        super().train(mode)
        self.warned = self.warned and mode
        if not self.started:  # compiled forwards have counted on the device alone
            self.read_steps()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x on its grid."""
        if not (self.started and self.ready):
            self.refuse_graph(x)
        if not self.started and not self.start():
            return x
        axis = self.match_axis(x)
        if not self.ready and not self.prepare(x, axis):
            return x
        low, high = self.spec.quant_range
        scale, zero_point = self.bound() if self.training else self.grid()
        return functional.lsq(x, scale, low, high, axis, self.grad_scale(x, axis), zero_point, dtype=self.narrow(x))

    def bound(self) -> tuple[Tensor, Tensor | None]:
        """Set scale and zero point to what ``grid`` says, in place, and return them.

        Forwards whose backward is still to come stay valid: only an optimizer step moves a scale below its floor.
        """
        low, high = self.spec.quant_range
        with torch.no_grad(), _unsafe_preserve_version_counter(tuple(self.parameters())):
            self.scale.clamp_(min=self.floor)
            if self.zero_point is not None:
                self.zero_point.clamp_(low, high)
        return self.scale, self.zero_point

    def start(self) -> bool:
        """Whether a replica finds quant_start_step reached: the host's count does not outlive it, the device's does."""
        if getattr(self, "_is_replica", False):
            self.read_steps()
        return self.started

    def refuse_graph(self, x: Tensor) -> None:
        """An error where a CUDA graph records x: its replays would leave it float for ever."""
        if self.training and is_recorded(x):
            raise RuntimeError(
                f"{self.label}: a scale starts from its first tensor, outside of a CUDA graph: run one training step "
                "before the capture, with a quant_start_step also the step that reaches it"
            )

    def prepare(self, x: Tensor, axis: int | None) -> bool:
        """Initialise the scale in training, warn in evaluation; whether there is a scale now."""
        if self.training:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{self.label}: a scale starts from its first tensor, outside of a graph: run one training step "
                    "before compiling, with a quant_start_step also the step that reaches it, or compile without "
                    "fullgraph=True"
                )
            self.ready = self.initialize_outside_graphs(x, axis)
        elif not self.warned and not torch.compiler.is_compiling():
            self.warned = True
            warnings.warn(
                f"{self.label} has no scale yet and stays float: run a training batch or load a calibration dict",
                UserWarning,
                stacklevel=3,
            )
        return self.ready

    def initialize_outside_graphs(self, x: Tensor, axis: int | None) -> bool:
        """``initialize``, which a compiler that has given up on what is around it shall not take up piece by piece."""
        if "torch._dynamo" not in sys.modules:
            return self.initialize(x, axis)
        from quantkern.outside_graphs import call_outside_graphs

        started: bool = call_outside_graphs(self.initialize, x, axis)
        return started

    @torch.no_grad()
    def initialize(self, x: Tensor, axis: int | None) -> bool:
        """Start scale and zero point from x; no when there is nothing in x to start from.

        A tensor without a finite value other than 0 needs no scale: it is on every grid.
        """
        if self.is_observed():  # a replica has initialised the state that this one shares
            return True
        finite = x.isfinite()
        facts = torch.stack([(finite & (x != 0)).any(), (finite & (x < 0)).any()]).to(torch.int32)
        usable, negative = self.share(facts, largest=True).tolist()
        if not usable:
            return False
        self.decide_sign(bool(negative))
        low, high = self.spec.quant_range
        scale, zero_point = initial_scale(x, low, high, axis, self.spec.init, self.spec.symmetric)
        own = (scale > 0).float()
        scale, zero_point, count = self.share(torch.stack([scale, zero_point * own, own]), largest=False)
        self.set_grid(scale / count, zero_point / count)
        self.fresh = True
        return True

    def follow(self, sibling: FakeQuant) -> None:
        """Take over what all tensors of a layer have in common."""
        super().follow(sibling)
        self.everywhere = isinstance(sibling, LearnedFakeQuant) and sibling.everywhere

    def adopt(self, scale: Tensor, zero_point: Tensor, signed: bool) -> None:
        """Start with the scale that all ranks have agreed upon."""
        self.decide_sign(signed)
        self.set_grid(scale, zero_point)
        self.ready, self.fresh = True, False

    def scale_for(self, signed: bool) -> Tensor:
        """The scale with which the tensor would have started with (or without) a sign."""
        here, there = self.spec.quant_range[1], self.spec_for(signed).quant_range[1]
        ratio = here / there  # of the ranges; 'paper' has the root of it, see ``initial_scale``
        return self.scale * (math.sqrt(ratio) if self.spec.init == "paper" and self.spec.symmetric else ratio)

    def share(self, value: Tensor, largest: bool) -> Tensor:
        """``value`` over all ranks, where they see different tensors."""
        return value

    def grad_scale(self, x: Tensor, axis: int | None) -> float | None:
        """The factor of the scale's gradient: 1 / sqrt(N * quant_max), N as the rule says."""
        if self.spec.grad_scale == "none":
            return 1.0
        count = x.numel() if self.spec.grad_scale == "numel" else self.features(x, axis)
        return None if count is None else 1.0 / math.sqrt(max(1, count) * self.spec.quant_range[1])

    def features(self, x: Tensor, axis: int | None) -> int | None:
        """The paper's N; None stands for the number of elements that share a scale."""
        return None


class LearnedWeight(LearnedFakeQuant):
    """A parametrization: the weight on its learned grid. Signed, with every value of the bits."""

    compute_ahead = staticmethod(compute_learned)

    def __init__(self, label: str, spec: LsqSpec, weight: Tensor) -> None:
        super().__init__(label, spec, weight.shape[spec.axis] if spec.axis is not None else 1, weight.device)
        self.ahead = Ahead()

    def forward(self, x: Tensor) -> Tensor:
        """The weight on its grid."""
        result = learned_result(self, x)
        return super().forward(x) if result is None else result

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to ``layer.weight`` sets the float weight."""
        return weight


class LearnedActivation(LearnedFakeQuant):
    """An input or output on its learned grid; unsigned where the rule or the first batch says so."""

    signed: Tensor

    def __init__(self, label: str, spec: LsqSpec, channels: int, device: torch.device) -> None:
        super().__init__(label, spec, channels, device)
        self.rule = spec
        self.register_buffer("signed", torch.tensor(spec.dtype != "uint", device=device))

    def share(self, value: Tensor, largest: bool) -> Tensor:
        """Every rank sees its own part of the batch, and all must go on with the same scale."""
        return _over_ranks(value, largest, self.everywhere)

    def is_relu(self) -> bool:
        """Whether it gives what is not positive 0, and no gradient to it or to the scale, as a ReLU before it would."""
        return self.started and self.ready and self.zero_point is None and self.spec.quant_range[0] == 0

    def spec_for(self, negative: bool) -> LsqSpec:
        """A range 0 .. 2^b - 1 for tensors that are never negative, unless the rule says which."""
        return replace(self.rule, dtype="int" if negative else "uint") if self.rule.dtype == "auto" else self.rule

    def decide_sign(self, negative: bool) -> None:
        """Make ``spec_for`` the spec, and save it."""
        super().decide_sign(negative)
        self.signed.fill_(self.spec.dtype == "int")

    def features(self, x: Tensor, axis: int | None) -> int | None:
        """The features of the layer, without the batch; one channel's where each has its scale."""
        shape = x.shape[1:] if x.dim() > 1 and axis != 0 else x.shape
        count = math.prod(shape)
        return count if axis is None else count // max(1, x.shape[axis])

    def resize(self, channels: int) -> None:
        """Become the state of ``channels`` channels, in the same parameters."""
        for tensor, start in ((self.scale, 1.0), (self.zero_point, 0.0), (self.floor, 0.0)):
            if tensor is not None:
                tensor.grad = None
                tensor.data = tensor.new_full((channels,), start)

    def fits(self, channels: int) -> bool:
        """Whether the state can take this many values; as long as it is empty, any number per channel."""
        return super().fits(channels) or (self.spec.per_channel and channels > 0 and not self.is_observed())

    def check_state(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """Shapes, and whether the rule says the same about negative values."""
        problems, signed = super().check_state(state_dict, prefix), state_dict.get(prefix + "signed")
        if signed is not None and self.rule.dtype != "auto" and bool(signed) != (self.rule.dtype == "int"):
            problems.append(f"{prefix}signed is {bool(signed)}, this quantizer's rule says dtype {self.rule.dtype!r}")
        return problems

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        scale = state_dict.get(prefix + "scale")
        loaded = scale.numel() if isinstance(scale, Tensor) and scale.dim() == 1 and self.spec.per_channel else None
        if loaded is not None and loaded != self.scale.numel() and self.fits(loaded):
            self.resize(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.ready:
            self.decide_sign(bool(self.signed))

    def entries(self, name: str, scale: Tensor, zero_point: Tensor) -> dict[str, Any]:
        """Scale, zero point and the range they give, as numbers or lists of them."""
        low, high = self.spec.quant_range
        return {
            f"tracked_min_{name}": ((low - zero_point) * scale).tolist(),
            f"tracked_max_{name}": ((high - zero_point) * scale).tolist(),
            f"{name}_scale": scale.tolist(),
            f"{name}_zero_point": zero_point.tolist(),
        }
