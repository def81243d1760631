"""The form that a layer and the batch norm behind it have while the folded weight is quantized.

::

    factor = gamma / sqrt(running_var + eps)                       one number an output channel
    batch statistics     y = conv(x, fq(w * factor) / factor) + b, then the ordinary batch norm of y
    running statistics   y = conv(x, fq(w * factor)) + (b - running_mean) * factor + beta, the batch norm passes it on

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
2018, section 3.2. There one more convolution takes the statistics. Here the factor is taken back out of the quantized
weight, so that one convolution gives both: its output is that of the unfolded layer, up to the rounding of the weight.
No gradient goes through that factor, and where it would round a whole channel to zero another stands for it (see
``Folding.divisor``).

Which form it is the batch norm's own mode says, so freezing one by its ``eval()`` works too. Layers and batch norms
take these forms by their class alone, as their Parameters and names stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quantkern.current_range import WeightFakeQuant
from quantkern.fake_quant import FakeQuant, Grid
from quantkern.learned import LearnedWeight
from quantkern.observed import ObservedWeight

LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

SMALLEST = 1e-20
"""Nothing nearer to 0 is divided by."""

LEAST_STEPS = 4
"""The largest weight of a channel has at least so many steps while statistics are taken, as far as there are."""


class Folding(FakeQuant):
    """What folding adds to a weight's fake-quantizer: it gets the folded weight, and its own state follows that.

    The layer and the batch norm are known here without being children, since each has its place in the model already.
    """

    layer: nn.Module
    norm: _BatchNorm

    def fold(self, layer: nn.Module, norm: _BatchNorm, freeze_step: int | None) -> None:
        """Take the batch norm into the weight; after ``freeze_step`` counted steps it keeps its statistics."""
        self.__dict__.update(layer=layer, norm=norm)
        self.dims = 2 if isinstance(layer, nn.Linear) else len(layer.kernel_size) + 2  # type: ignore[arg-type]
        transposed = isinstance(layer, TRANSPOSED)
        self.groups = int(layer.groups) if transposed else 0  # type: ignore[arg-type]
        self.own_scales = self.spec.axis == int(transposed) and self.groups < 2
        low, high = self.spec.quant_range
        self.least_share = 0.0 if self.own_scales else min(1.0, LEAST_STEPS / max(1, (high - low) // 2))
        self.freeze_step, self.steps_done, self.keeps_statistics = freeze_step, 0, freeze_step == 0
        if freeze_step is not None and self.step is None:
            device = norm.running_mean.device if norm.running_mean is not None else None
            self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))

    def code_grid(self) -> Grid | None:
        """None: the layer gets the folded weight, whose grid is the factor's as well."""
        return None

    def uses_batch_statistics(self) -> bool:
        """Whether the batch norm normalizes with its batch, and follows it. Known to the host."""
        return self.norm.training and not self.keeps_statistics

    def counted(self) -> None:
        """Whether the statistics stay from now on."""
        super().counted()
        self.keeps_statistics = self.freeze_step is not None and self.steps_done >= self.freeze_step

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation; compiled forwards have counted on the device alone."""
        super().train(mode)
        if self.freeze_step is not None and not self.keeps_statistics:
            self.read_steps()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.read_steps()

    def factor(self) -> Tensor:
        """gamma / sqrt(running_var + eps), float32 or float64; gradients go to gamma."""
        variance, gamma = self.norm.running_var, self.norm.weight
        assert variance is not None
        if torch.compiler.is_compiling() and self.uses_batch_statistics():
            # torch.compile's backward would compute the factor again, from the variance that the batch norm has
            # renewed in the meantime. What a flip gives is saved instead.
            variance = variance.flip(0).flip(0)
        dtype = torch.promote_types(variance.dtype, torch.float32)
        inverse = (variance.to(dtype) + self.norm.eps).rsqrt()
        return inverse if gamma is None else gamma.to(dtype) * inverse

    @torch.no_grad()
    def divisor(self, weight: Tensor) -> Tensor:
        """The factor, or what stands for it in a channel whose weight it would round to nothing.

        Where all channels share a scale, a channel of a small gamma may have no step left, and with gamma 0 there is
        nothing to divide by. Its statistics would be those of zeros, and the factor that follows from them grow until
        the weight comes back, whatever gamma says. Such a channel keeps some steps as long as statistics are taken,
        and gamma makes its output small.
        """
        factor = self.factor()
        size = factor.abs()
        if not self.least_share:
            return torch.where(size < SMALLEST, 1.0, factor)
        largest = self.largest(weight)
        span = (size * largest).max()
        least = span * self.least_share / largest.clamp(min=SMALLEST)
        return torch.copysign(torch.where(span < SMALLEST, 1.0, torch.maximum(size, least)), factor)

    def largest(self, weight: Tensor) -> Tensor:
        """max|w| of every output channel."""
        if not self.groups:
            return weight.abs().flatten(1).amax(1)
        return weight.abs().reshape(self.groups, -1, *weight.shape[1:]).flatten(3).amax((1, 3)).flatten()

    def spread(self, factor: Tensor) -> Tensor:
        """One number an output channel, in a shape that multiplies the weight."""
        ones = (1,) * (self.dims - 2)
        if not self.groups:
            return factor.reshape(-1, 1, *ones)
        rows = factor.reshape(self.groups, -1)
        if self.groups > 1:
            rows = rows.repeat_interleave(int(self.layer.in_channels) // self.groups, 0)  # type: ignore[arg-type]
        return rows.reshape(*rows.shape, *ones)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight to convolve with."""
        if self.uses_batch_statistics():
            divisor = self.divisor(weight)
            unit = self.unit(weight)
            divisor = self.spread(divisor if unit is None else divisor / unit)
            quantized: Tensor = super().forward(weight * divisor) / divisor
        else:
            unit = self.unit(weight)
            if unit is None:
                quantized = super().forward(self.folded_weight(weight))
            else:
                unit = self.spread(unit) if unit.dim() else unit
                quantized = super().forward(self.folded_weight(weight) / unit) * unit
        return quantized.to(weight.dtype)

    def unit(self, weight: Tensor) -> Tensor | None:
        """What the folded weight is divided by before it is quantized: one number, or one an output channel."""
        return None

    def folded_weight(self, weight: Tensor) -> Tensor:
        """weight * factor."""
        return weight * self.spread(self.factor())

    def folded_bias(self, bias: Tensor | None) -> Tensor:
        """(bias - running_mean) * factor + beta."""
        mean, beta = self.norm.running_mean, self.norm.bias
        assert mean is not None
        factor = self.factor()
        shift = (-mean if bias is None else bias - mean) * factor
        return shift if beta is None else shift + beta


class FoldedWeight(Folding, WeightFakeQuant):
    """A folded weight on the grid of its current range."""


class FoldedObservedWeight(Folding, ObservedWeight):
    """A folded weight, float until its grid is chosen, and with running statistics whatever the batch norm's mode."""

    def uses_batch_statistics(self) -> bool:
        """No: nothing is trained."""
        return False


class FoldedLearnedWeight(Folding, LearnedWeight):
    """A folded weight on a learned grid, which starts on the folded weight.

    What learns is the scale divided by the layer's mean factor (per channel: by the channel's own), so that it learns
    as without folding, wherever the statistics and gammas go. A scale that stayed behind a growing factor would clip
    the weight; its statistics would fall, and the factor grow further.
    """

    def unit(self, weight: Tensor) -> Tensor:
        """See ``Folding.unit``."""
        size = self.divisor(weight).abs()
        return size if self.own_scales else size.mean()

    def absolute(self) -> Tensor:
        """What the learned scale is multiplied by, in the shape of the scale."""
        with torch.no_grad():
            return self.unit(self.float_weight()).float().cpu().expand(self.scale.shape)

    def float_weight(self) -> Tensor:
        """The layer's weight before this quantizer."""
        entries: Any = self.layer.parametrizations["weight"]  # type: ignore[index]
        several = range(entries.ntensors) if not entries.is_tensor else ()
        values = [getattr(entries, f"original{i}") for i in several] or [entries.original]
        for entry in entries:
            if entry is self:
                break
            values = [entry(*values)]
        weight: Tensor = values[0]
        return weight

    def entries(self, name: str, scale: Tensor, zero_point: Tensor) -> dict[str, Any]:
        """The scale of the folded weight itself."""
        return super().entries(name, scale * self.absolute(), zero_point)

    def read_tensor(self, key: str, given: Mapping[str, Any], problems: list[str]) -> Tensor | None:
        """Scales and ranges of the folded weight, as the scale here has them."""
        value = super().read_tensor(key, given, problems)
        return value if value is None or key.endswith("zero_point") else value / self.absolute().double()


FOLDED_WEIGHTS: dict[type[Any], type[Folding]] = {
    WeightFakeQuant: FoldedWeight,
    LearnedWeight: FoldedLearnedWeight,
    ObservedWeight: FoldedObservedWeight,
}


class _FoldedLayer:
    """Where running statistics count the layer's forward finds the folded bias under ``bias``."""

    folding: Folding
    _parameters: dict[str, nn.Parameter | None]

    @property
    def bias(self) -> Tensor | None:
        own = self._parameters["bias"]
        if self.folding.uses_batch_statistics():
            return own
        entries: Any = self.folding.layer.parametrizations["weight"]  # type: ignore[index]
        weight = entries.original if entries.is_tensor else entries.original0
        return self.folding.folded_bias(own).to(weight.dtype)

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "torch.nn.DataParallel cannot replicate a layer with a folded batch norm; use DistributedDataParallel, or "
            "build the quantizer with fold_bn=False"
        )


class _FoldedNorm:
    """Passes on what the layer before it has normalized already."""

    folding: Folding

    def forward(self, input: Tensor) -> Tensor:
        folding = self.folding
        if input.dim() != folding.dims:
            raise ValueError(
                f"{folding.label}: a tensor of shape {list(input.shape)} reaches the folded batch norm, expected "
                f"{folding.dims} dimensions with the channels on axis 1; build the quantizer with fold_bn=False"
            )
        if folding.uses_batch_statistics():
            return super().forward(input)  # type: ignore[misc, no-any-return]
        return input


def _with(addition: type, own: type[nn.Module]) -> type[nn.Module]:
    """A subclass with torch's name: rules and printed models know a layer by it."""
    return type(own.__name__, (addition, own), {"__module__": __name__, "__doc__": addition.__doc__})


FOLDED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {own: _with(_FoldedLayer, own) for own in LAYERS}
FOLDED_NORMS: dict[type[nn.Module], type[nn.Module]] = {own: _with(_FoldedNorm, own) for own in NORMS}
