"""Looks at the tensors of a quantized model while it runs once, and leaves the model as it was."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parameter import is_lazy

from quantkern import reference
from quantkern.binarized import BinaryActivation, BinaryWeight
from quantkern.bn_fold.layers import Folding
from quantkern.fake_quant import FakeQuant
from quantkern.layer_quantizers import LayerQuantizers
from quantkern.learned import DorefaActivation, DorefaWeight
from quantkern.observed import ObservedActivation
from quantkern.observers import HistogramObserver, Observer, ObserverSpec

BARS = 60
"""A histogram for people has so many bars at most."""


@dataclass(frozen=True)
class Grid:
    """The values a quantized tensor can have: (q - zero_point) * scale for q = quant_min .. quant_max."""

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    axis: int | None = None

    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value of any channel."""
        low = (self.quant_min - self.zero_point) * self.scale
        high = (self.quant_max - self.zero_point) * self.scale
        return low.min().item(), high.max().item()

    def holds(self, x: Tensor) -> Tensor:
        """Which elements are not clipped."""
        axis = self.axis if self.scale.dim() else None
        grid = (self.scale.to(x.device), self.zero_point.to(x.device))
        return reference.quantize(x, *grid, self.quant_min, self.quant_max, axis)[1]


def grid_of(module: FakeQuant, name: str) -> Grid | None:
    """The grid of a fake-quantizer; None where it has no scale (yet), as signs."""
    bits = module.spec.bits
    last = 2**bits - 1
    if isinstance(module, DorefaActivation):
        return Grid(torch.tensor(1 / last), torch.tensor(0.0), 0, last)
    if isinstance(module, DorefaWeight):
        return Grid(torch.tensor(2 / last), torch.tensor(last / 2), 0, last) if bits > 1 else None
    entry: Mapping[str, Any] = module.calibration(name)
    if f"{name}_scale" not in entry:
        return None
    scale, zero_point = (torch.as_tensor(entry[f"{name}_{key}"]).float() for key in ("scale", "zero_point"))
    axis = entry[f"{name}_axis"]
    if axis is None:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return Grid(scale, zero_point, entry[f"{name}_qmin"], entry[f"{name}_qmax"], axis) if scale.numel() else None


def before_rounding(module: FakeQuant, x: Tensor) -> Tensor:
    """What a fake-quantizer rounds when it is given x: the weight with its batch norm, or through its tanh."""
    if isinstance(module, Folding):
        return module.folded_weight(x)
    if isinstance(module, DorefaWeight) and module.spec.bits > 1:
        squashed = torch.tanh(x.float())
        return squashed / squashed.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return x


@dataclass(frozen=True)
class Bars:
    """A histogram: how many values lie between neighbours of ``edges``."""

    counts: tuple[int, ...]
    edges: tuple[float, ...]


def bars_of(observer: HistogramObserver) -> Bars:
    """A histogram with few bars that covers what the observer has seen."""
    seen = observer.histogram()
    counts, edges = seen.counts[0].long().cpu(), seen.edges[0].cpu()
    used = counts.nonzero().flatten()
    first, last = int(used[0]), int(used[-1]) + 1
    group = math.ceil((last - first) / BARS)
    starts = list(range(first, last, group))
    sums = [int(counts[start : min(start + group, last)].sum()) for start in starts]
    return Bars(tuple(sums), tuple(edges[[*starts, last]].tolist()))


class Measurement:
    """What happens to one tensor, over all calls of its layer in a forward."""

    def __init__(self, module: FakeQuant, name: str) -> None:
        self.module, self.name = module, name
        self.count = self.clipped = self.not_finite = self.dead_channels = 0
        self.signal = self.noise = self.product = self.quantized = 0.0
        self.low, self.high = math.inf, -math.inf
        self.observer: HistogramObserver | None = None

    def add(self, given: Tensor, y: Tensor) -> None:
        """Take in a tensor and what it became."""
        x, grid = before_rounding(self.module, given.detach()), grid_of(self.module, self.name)
        x = x.float() if x.dtype is not torch.float64 else x
        finite = x.isfinite()
        self.not_finite += int((~finite).sum())
        if grid is not None:
            self.clipped += int((~grid.holds(x) & finite).sum())
        values, became = x[finite], y.detach().to(x.dtype).reshape(x.shape)[finite]
        if not values.numel():
            return
        self.count += values.numel()
        self.signal += float(values.square().sum(dtype=torch.float64))
        self.noise += float((values - became).square().sum(dtype=torch.float64))
        self.product += float((values * became).sum(dtype=torch.float64))
        self.quantized += float(became.square().sum(dtype=torch.float64))
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        if self.observer is None:
            self.observer = HistogramObserver(ObserverSpec(8, "int", "per_tensor_affine"), device=x.device)
        self.observer.observe(values)
        axis = self.module.spec.axis
        if axis is not None and x.dim() and x.numel() > x.shape[axis]:
            rows = x.movedim(axis, 0).flatten(1)
            self.dead_channels = int((rows.amin(1) == rows.amax(1)).sum())

    @property
    def is_sign(self) -> bool:
        """Whether only the signs are kept, so that no scale relates x and y."""
        return isinstance(self.module, (BinaryWeight, BinaryActivation))

    def sqnr(self) -> float | None:
        """10 log10(sum x^2 / sum (x - y)^2) in dB, infinite without noise."""
        if self.is_sign or not self.count or not self.signal:
            return None
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf

    def agreement(self) -> float | None:
        """Of signs: sum x * y / sqrt(sum x^2 * sum y^2) in percent, 100 where all |x| are equal."""
        norm = math.sqrt(self.signal * self.quantized)
        return 100 * self.product / norm if self.is_sign and norm else None

    def saturation(self) -> float | None:
        """Clipped values in percent."""
        return None if not self.count or grid_of(self.module, self.name) is None else 100 * self.clipped / self.count

    def histogram(self) -> Bars | None:
        """Of x."""
        return None if self.observer is None else bars_of(self.observer)


Tensors = Mapping[FakeQuant, Measurement]


@contextmanager
def watching(
    measurements: Tensors, order: list[nn.Module] | None = None, layers: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Every call of these fake-quantizers is measured; ``order`` gets those of ``layers`` that run, once each."""

    def measured(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        measurements[module].add(args[0], y)  # type: ignore[index]

    def called(module: nn.Module, *_: object) -> None:
        if order is not None and module not in order:
            order.append(module)

    handles = [module.register_forward_hook(measured) for module in measurements]
    handles += [layer.register_forward_pre_hook(called) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keeper(module: nn.Module) -> Callable[[], None]:
    """A function that gives a module of ours its attributes, children and tensors back."""
    attributes, children = dict(vars(module)), dict(module._modules)
    tensors: list[Tensor] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    grown = [(tensor, tensor.data) for tensor in tensors]

    def give_back() -> None:
        vars(module).clear()
        vars(module).update(attributes)
        module._modules.clear()
        module._modules.update(children)
        for tensor, data in grown:  # a per-channel state may have got its number of channels
            if tensor.shape != data.shape:
                tensor.data = data

    return give_back


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever evaluation-mode forwards in this block do to modes, buffers, random generators: it is undone."""
    modes = [(module, module.training) for module in model.modules()]
    own = [module for module in model.modules() if isinstance(module, (FakeQuant, LayerQuantizers, Observer))]
    keepers = [_keeper(module) for module in own]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not is_lazy(buffer)]
    devices = {p.device for p in (*model.parameters(), *model.buffers()) if p.device.type == "cuda"}
    for module in own:
        if isinstance(module, ObservedActivation):
            module.watching = False
    # A forward whose backward is still to come may have saved buffers.
    same_versions = _unsafe_preserve_version_counter(tuple(buffer for buffer, _ in buffers))
    try:
        with same_versions, torch.random.fork_rng(sorted(d.index for d in devices)), torch.no_grad():
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*stays float")  # the report says so itself
                    yield
            finally:
                for give_back in keepers:
                    give_back()
                for buffer, value in buffers:
                    buffer.copy_(value)
    finally:
        for any_module, training in modes:
            any_module.training = training
