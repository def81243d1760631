"""A copy of a quantized model for inference: every quantized tensor on a grid that is a constant.

The copy has the user's modules and hooks, so that it runs as the model does. In it a fake-quantizer is one node
``quantkern::FakeQuantize`` of the ONNX graph, which ``quantkern.export.lowering`` replaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkern.attach import Attachment, DummyInput, change_class, copy_of, run_model
from quantkern.binarized import BinaryActivation, BinaryWeight
from quantkern.bn_fold import FoldedAttachment, Folding
from quantkern.fake_quant import FakeQuant, RangedFakeQuant
from quantkern.learned import DorefaActivation, DorefaGradient, DorefaWeight, LearnedState
from quantkern.observed import ObservedActivation, ObservedWeight
from quantkern.running_range import ActivationFakeQuant

DOMAIN = "quantkern"
"""Of the placeholder nodes; none is left in a finished file."""


SIGNS = "its signs are computed with in real arithmetic"
"""Why binary tensors are float: onnxruntime has no kernels for them."""


@dataclass(frozen=True)
class Grid:
    """Integers quant_min .. quant_max, one step apart: y = (q - zero_point) * scale. ``axis`` None: per tensor."""

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    axis: int | None = None


@dataclass(frozen=True)
class Frozen:
    """The copy, by label why tensors that a rule quantizes are float in it, and what the model made of the example."""

    model: nn.Module
    floats: dict[str, str]
    output: object


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """The placeholder. Its values are never computed, only its shape."""
    axis = -1 if grid.axis is None else grid.axis % x.dim()
    attributes: dict[str, Any] = {"quant_min": grid.quant_min, "quant_max": grid.quant_max, "axis": axis}
    y = torch.onnx.ops.symbolic(
        f"{DOMAIN}::FakeQuantize", (x, scale, zero_point), attributes, dtype=x.dtype, shape=x.shape, version=1
    )
    assert isinstance(y, Tensor)
    return y


class FrozenTensor(nn.Module):
    """An input or output; as a weight's parametrization it gives ``value``, which lies on the grid already."""

    value: Tensor | None
    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid, value: Tensor | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("value", value)
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero_point", grid.zero_point)

    def forward(self, *x: Tensor) -> Tensor:
        """The placeholder's result."""
        return fake_quantize(x[0] if self.value is None else self.value, self.scale, self.zero_point, self.grid)


class FrozenSign(nn.Module):
    """A binary input or output in real arithmetic: sign(0) = +1, and NaN becomes -1, as in training."""

    def forward(self, x: Tensor) -> Tensor:
        """+1 or -1."""
        return torch.where(x >= 0, 1.0, -1.0)


class FrozenWeight(nn.Module):
    """A weight's parametrization: a float constant."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, *_: Tensor) -> Tensor:
        """The constant."""
        return self.value


def _waiting(module: FakeQuant) -> bool:
    return module.step is not None and int(module.step) < module.spec.start_step


def why_float(module: FakeQuant) -> str | None:
    """What keeps a fake-quantizer from quantizing in evaluation; None: nothing."""
    if _waiting(module):
        return f"its quant_start_step {module.spec.start_step} is not reached"
    unseen = isinstance(module, ActivationFakeQuant | LearnedState) and not module.is_observed()
    if unseen or (isinstance(module, ObservedWeight | ObservedActivation) and not module.ready):
        return "it has no scale yet: no training or calibration batch has reached it"
    return None


def _numbers(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to("cpu", dtype).clone()


def _levels(scale: Tensor | float, largest: int, smallest: int | None = None) -> Grid:
    zero = torch.zeros((), dtype=torch.int32)
    low = -largest if smallest is None else smallest
    return Grid(torch.as_tensor(scale, dtype=torch.float32), zero, low, largest)


def module_grid(module: FakeQuant, value: Tensor | None = None) -> Grid:
    """The grid that ``module`` puts tensors on; ``value``: the quantized weight."""
    spec = module.spec
    if isinstance(module, DorefaWeight):
        assert value is not None
        if spec.bits == 1:  # sign * mean|w|
            return _levels(value.abs().max().clamp(min=torch.finfo(torch.float32).tiny), 1)
        return _levels(1.0 / (2**spec.bits - 1), 2**spec.bits - 1)  # 2 k / n - 1 are odd multiples of 1 / n
    if isinstance(module, DorefaActivation):
        return _levels(1.0 / (2**spec.bits - 1), 2**spec.bits - 1, 0)
    low, high = spec.quant_range
    if isinstance(module, RangedFakeQuant):
        scale, zero_point = module.scale, module.zero_point
    elif isinstance(module, LearnedState):
        scale, learned = module.grid()
        if isinstance(module, Folding):
            scale = scale * module.absolute().to(scale.device)  # type: ignore[attr-defined,operator]
        zero_point = torch.zeros_like(scale) if learned is None else learned.round()
    else:
        raise NotImplementedError(f"{module.label}: {type(module).__name__} has no grid that ONNX knows")
    return Grid(_numbers(scale, torch.float32), _numbers(zero_point, torch.int32), low, high, spec.axis)


def _freeze_weight(attachment: Attachment, floats: dict[str, str]) -> None:
    layer, module = attachment.layer, attachment.weight
    if module is None:
        return
    weight = layer.weight
    assert isinstance(weight, Tensor)
    value = _numbers(weight, weight.dtype)
    if not bool(value.isfinite().all()):
        raise ValueError(f"{module.label} holds NaN or infinity; such a model cannot be exported")
    if isinstance(attachment, FoldedAttachment):
        bias = _numbers(layer.bias, value.dtype)  # type: ignore[arg-type]
    why = why_float(module)
    if why is not None:
        floats[module.label] = why
    elif isinstance(module, BinaryWeight):
        floats[module.label] = SIGNS
    new = FrozenTensor(module_grid(module, value), value) if module.label not in floats else FrozenWeight(value)
    entries: Any = layer.parametrizations["weight"]  # type: ignore[index]
    entries[list(entries).index(module)] = new
    if attachment.computed_as is not None:  # packed kernels, or a folded bias that is computed anew in every forward
        change_class(layer, attachment.computed_as, attachment.own_class)
    if isinstance(attachment, FoldedAttachment):
        layer._parameters["bias"] = nn.Parameter(bias, False)


def _freeze_tensors(attachment: Attachment, floats: dict[str, str]) -> None:
    own = attachment.tensors
    for name, module in list(own.named_children()) if own is not None else ():
        assert own is not None and isinstance(module, FakeQuant)
        why = None if isinstance(module, DorefaGradient) else why_float(module)
        new: nn.Module
        if isinstance(module, DorefaGradient) or why is not None:
            new = nn.Identity()
        elif isinstance(module, BinaryActivation):
            new, why = FrozenSign(), SIGNS
        else:
            new = FrozenTensor(module_grid(module))
        if why is not None:
            floats[module.label] = why
        own._modules[name] = new


@torch.no_grad()
def freeze(model: nn.Module, attachments: Sequence[Attachment], example_input: DummyInput) -> Frozen:
    """A frozen copy on the CPU, in evaluation mode; the model stays as it is.

    Args:
        example_input: a copy runs on it once, so that every tensor of a layer is known.

    Raises:
        ValueError: the model does not run on example_input, a weight holds NaN, or a parameter is not float32.
    """
    wrong = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype is not torch.float32}
    if wrong:
        found = ", ".join(sorted(map(str, wrong)))
        raise ValueError(f"export_onnx needs a float32 model, this one has {found}; call it on a copy made float()")
    new, copies = copy_of(model, attachments)
    output = run_model(new, example_input, "example_input")
    new.eval()
    floats: dict[str, str] = {}
    for attachment in copies:
        _freeze_weight(attachment, floats)
        _freeze_tensors(attachment, floats)
    return Frozen(new.cpu(), floats, output)
