"""Biases that int32 holds exactly, in steps of input_scale * weight_scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantkern.attach import Attachment, in_evaluation
from quantkern.binarized import BinaryWeight
from quantkern.bn_fold import FoldedAttachment
from quantkern.export.frozen import module_grid, why_float
from quantkern.export.lowering import LARGEST_BIAS
from quantkern.fake_quant import FakeQuant

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KNOWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def _step(attachment: Attachment, weight: Tensor) -> Tensor | None:
    """What one unit of the layer's products is worth, one number or one an output channel."""
    layer, module = attachment.layer, attachment.weight
    source = attachment.tensors._modules.get("input") if attachment.tensors is not None else None
    if module is None or isinstance(module, BinaryWeight) or not isinstance(source, FakeQuant):
        return None
    if any(why_float(part) for part in (module, source)):
        return None
    x, w = module_grid(source), module_grid(module, weight.detach())
    transposed = isinstance(layer, _TRANSPOSED)
    if x.axis is not None or (w.axis not in (None, int(transposed)) or (transposed and layer.groups != 1)):
        return None
    scale = w.scale.to(weight.device)
    if w.axis is not None:  # a channel of zeros lies on any grid
        used = weight.abs().movedim(w.axis, 0).flatten(1).amax(1) > 0
        scale = torch.where(used, scale, scale.max())
    return x.scale.to(weight.device).reshape(()) * scale.reshape(-1)


@torch.no_grad()
def round_biases(model: nn.Module, attachments: Sequence[Attachment]) -> dict[str, float]:
    """See ``Quantizer.round_biases``."""
    changed: dict[str, float] = {}
    with in_evaluation(model):
        for attachment in attachments:
            layer = attachment.layer
            if not isinstance(layer, _KNOWN) or layer.bias is None:
                continue
            norm = attachment.norm if isinstance(attachment, FoldedAttachment) else None
            owner: Tensor | None = layer._parameters.get("bias") if norm is None else norm.bias
            bias, step = layer.bias, _step(attachment, layer.weight)
            if step is None or owner is None:
                continue
            counted = (bias.double() / step).round()
            if bool((counted.abs() <= LARGEST_BIAS).all()):
                difference = counted * step - bias
                owner.add_(difference)
                changed[attachment.name] = float(difference.abs().max())
    return changed
