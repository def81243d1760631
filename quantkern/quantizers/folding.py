"""What the quantizers have in common that fold batch norms into the weights before them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from quantkern.attach import Attachment, DummyInput
from quantkern.binarized import CannotTrace
from quantkern.bn_fold import FOLDED_LAYERS, FoldedAttachment, find_pairs, float_class, fold_model
from quantkern.config import LayerPlan, is_int
from quantkern.layer_quantizers import Sizes
from quantkern.quantizers.base import Quantizer


class FoldingQuantizer(Quantizer):
    """A quantizer with ``fold_bn`` and ``freeze_bn_step``.

    folded_layers: by layer the batch norm folded into it; unfolded_layers: by layer why the one behind it is not.
    folding_is_open: nothing is folded because neither fold_bn nor a dummy_input was given.
    """

    folded_layers: Mapping[str, str]
    unfolded_layers: Mapping[str, str]
    folding_is_open: bool

    def choose_folding(self, fold_bn: bool | None, freeze_bn_step: int | None, dummy_input: object) -> None:
        """Check and keep the arguments about folding; called first in a constructor."""
        if fold_bn is not None and not isinstance(fold_bn, bool):
            raise TypeError(f"fold_bn must be True, False or None (fold where dummy_input is given), got {fold_bn!r}")
        if freeze_bn_step is not None and not (is_int(freeze_bn_step) and freeze_bn_step >= 0):
            raise ValueError(f"freeze_bn_step must be an integer >= 0 or None, got {freeze_bn_step!r}")
        fold = dummy_input is not None if fold_bn is None else fold_bn
        if freeze_bn_step is not None and not fold:
            raise ValueError(
                f"freeze_bn_step={freeze_bn_step} is about folded batch norms, and none is folded: "
                "give fold_bn=True or a dummy_input"
            )
        self.folding_is_open = fold_bn is None and not fold
        self._folding, self._freeze_step = (fold, fold_bn is True), freeze_bn_step

    def fold_batch_norms(
        self, model: nn.Module, plans: list[LayerPlan], sizes: Mapping[str, Sizes], dummy_input: DummyInput | None
    ) -> list[LayerPlan]:
        """See ``Quantizer.fold_batch_norms``."""
        fold, demanded = self._folding
        self.folded_layers, self.unfolded_layers = {}, {}
        if not fold:
            return plans
        asking = {
            plan.layer: sizes.get(plan.name, {}).get("output")
            for plan in plans
            if "weight" in plan.specs and float_class(plan.layer) in FOLDED_LAYERS
        }
        try:
            pairs = find_pairs(model, asking, dummy_input)
        except CannotTrace as error:
            raise ValueError(
                f"fold_bn=True: which batch norms can be folded is not known, {error}; give a dummy_input, or "
                "fold_bn=False. The model is unchanged"
            ) from error
        by_module = {plan.layer: plan for plan in plans}
        names = {module: name for name, module in model.named_modules()}
        reasons = {layer: f"{names[norm]!r} behind it: {why}" for layer, (norm, why) in pairs.reasons.items()}
        new = []
        folded = {}
        for plan in plans:
            norm = pairs.folded.get(plan.layer)
            own = by_module.get(norm) if norm is not None else None
            if own is not None and not {"weight", "input"}.isdisjoint(own.specs):
                reasons[plan.layer] = f"{own.name!r} behind it: a rule quantizes the batch norm's own tensors"
                norm = None
            if norm is not None:
                folded[plan.name] = names[norm]
                plan = replace(plan, norm=norm, computed_as=FOLDED_LAYERS[float_class(plan.layer)])
            new.append(plan)
        self.folded_layers = folded
        self.unfolded_layers = {by_module[layer].name: why for layer, why in reasons.items()}
        if self.unfolded_layers:
            listed = "".join(f"\n  {name!r}: {why}" for name, why in self.unfolded_layers.items())
            warnings.warn(f"batch norms that are not folded stay layers of their own:{listed}", stacklevel=4)
        elif demanded and not folded:
            warnings.warn("fold_bn=True: no batch norm follows a layer with a quantized weight", stacklevel=4)
        return new

    def _prepare(
        self, plan: LayerPlan, sizes: Mapping[str, Sizes], device: torch.device, count_forwards: bool
    ) -> Attachment:
        if plan.norm is None:
            return super()._prepare(plan, sizes, device, count_forwards)
        own = sizes.get(plan.name, {})
        return FoldedAttachment(plan, self.kinds, own, device, count_forwards, self._freeze_step)

    def folded_model(self) -> nn.Module:
        """A float copy of the model, without quantizers, whose folded layers have the folded weight and bias.

        Each folded batch norm is an ``nn.Identity`` in it. In evaluation it gives what the quantized model gives, up
        to the rounding of the quantized tensors. The quantized model stays as it is.

        ::

            weight = w * gamma / sqrt(running_var + eps)
            bias = (b - running_mean) * gamma / sqrt(running_var + eps) + beta

        Raises:
            RuntimeError: after ``export_model``.
        """
        self._require_whole("folded_model")
        return fold_model(self.bound_model, self._attachments)
