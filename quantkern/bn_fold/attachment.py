"""Puts a layer and the batch norm behind it into their folded form, and takes them out of it again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from quantkern.all_weights import take_off
from quantkern.attach import Attachment, change_class, copy_of, count_step
from quantkern.bn_fold.layers import FOLDED_NORMS, FOLDED_WEIGHTS, Folding
from quantkern.bn_fold.pairs import float_class
from quantkern.config import LayerPlan
from quantkern.layer_quantizers import Arguments, Kinds, Sizes, quantize_outputs


def quantize_folded_outputs(norm: nn.Module, args: Arguments, output: object) -> object:
    """Forward hook of a batch norm: what it gives is the layer's output."""
    return quantize_outputs(_folding_of(norm).layer, args, output)


def count_folded_step(norm: nn.Module, args: Arguments, output: object) -> None:
    """Forward hook of a batch norm: layer and batch norm must agree on the step, so it ends behind both."""
    count_step(_folding_of(norm).layer, args, output)


def _folding_of(norm: nn.Module) -> Folding:
    folding = norm.folding
    assert isinstance(folding, Folding)
    return folding


class FoldedAttachment(Attachment):
    """The fake-quantizers of a layer whose plan has a batch norm."""

    weight: Folding

    def __init__(
        self, plan: LayerPlan, kinds: Kinds, sizes: Sizes, device: torch.device, count_forwards: bool,
        freeze_step: int | None,
    ) -> None:  # fmt: skip
        super().__init__(plan, {**kinds, "weight": FOLDED_WEIGHTS[kinds["weight"]]}, sizes, device, count_forwards)
        assert isinstance(plan.norm, _BatchNorm)
        self.norm = plan.norm
        self.norm_class = float_class(plan.norm)
        self.weight.fold(plan.layer, plan.norm, freeze_step)
        self.delayed = self.delayed or freeze_step is not None
        self.counts = count_forwards and self.delayed

    def damage(self, present: Collection[nn.Module]) -> str | None:
        """A layer without its batch norm is damaged too."""
        if self.norm in present and isinstance(self.norm, FOLDED_NORMS[self.norm_class]):
            return super().damage(present)
        return f"the batch norm folded into layer {self.name!r} is no longer part of the model"

    def attach(self) -> None:
        """Put everything on the layer and the batch norm."""
        for module in (self.layer, self.norm):
            module.__dict__["folding"] = self.weight
        super().attach()
        change_class(self.norm, self.norm_class, FOLDED_NORMS[self.norm_class])

    def attach_to_outputs(self) -> None:
        """The layer's output is what the batch norm makes of it."""
        if "output" in self.kinds:
            self.handles.append(self.norm.register_forward_hook(quantize_folded_outputs))
        if self.counts:
            self.handles.append(self.norm.register_forward_hook(count_folded_step))

    def detach(self) -> None:
        """Leave both as they were before ``attach``."""
        super().detach()
        folded = FOLDED_NORMS[self.norm_class]
        if isinstance(self.norm, folded):
            change_class(self.norm, folded, self.norm_class)
        for module in (self.layer, self.norm):
            module.__dict__.pop("folding", None)

    def refresh(self) -> Tensor | None:
        """The scale is that of the weight which evaluation uses."""
        training, self.norm.training = self.norm.training, False
        weight = super().refresh()
        self.norm.training = training
        return weight

    def fold_for_good(self) -> None:
        """Leave the layer with the folded float weight and bias."""
        self.detach()
        layer, folding = self.layer, self.weight
        weight, bias = layer.weight, layer._parameters["bias"]
        assert isinstance(weight, Tensor)
        trained = any(parameter.requires_grad for parameter in layer.parameters())
        new_weight = folding.folded_weight(weight).to(weight.dtype)
        new_bias = folding.folded_bias(bias).to(weight.dtype)
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        for owner in (layer._parameters, layer._buffers):
            for name in ("weight", "bias"):
                owner.pop(name, None)
        layer.register_parameter("weight", nn.Parameter(new_weight, trained))
        layer.register_parameter("bias", nn.Parameter(new_bias, trained))


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Exchange modules under all of their names."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


@torch.no_grad()
def fold_model(model: nn.Module, attachments: Sequence[Attachment]) -> nn.Module:
    """A float copy of the model with every batch norm of ``attachments`` folded for good; the model stays as it is."""
    new, copies = copy_of(model, attachments)
    identities: dict[nn.Module, nn.Module] = {}
    for attachment in copies:
        if isinstance(attachment, FoldedAttachment):
            attachment.fold_for_good()
            identities[attachment.norm] = nn.Identity().train(attachment.norm.training)
        else:
            attachment.detach()
    take_off(new)
    _replace(new, identities)
    return new
