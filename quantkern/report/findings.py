"""What in a report deserves a look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from quantkern.attach import Attachment, DummyInput
from quantkern.binarized import CannotTrace
from quantkern.bn_fold import FOLDED_LAYERS, find_pairs, float_class
from quantkern.bn_fold.attachment import FoldedAttachment
from quantkern.report.result import Finding, Row
from quantkern.report.table import number

MAX_SATURATION = 5.0
"""Percent of clipped values that are nothing to worry about. Learned scales of few bits clip some on purpose."""
MIN_SQNR = 10.0
"""dB; the noise has a tenth of the tensor's power there."""
FEW_BITS = 8

_STATES = {
    "not-started": "is float until quant_start_step",
    "not-compressed": "is float: calibrate() observes it, compress() then quantizes it",
    "no-range": "stays float: run a training batch, or load a calibration dict",
    "not-reached": "the batch did not reach it",
}


def of_tensor(row: Row, code: str, any_gradient: bool, max_saturation: float, min_sqnr: float) -> Row:
    """The row with its warnings; ``code`` is that of its state."""
    found: list[Finding] = []

    def note(kind: str, text: str) -> None:
        found.append(Finding(kind, row.name, text))

    if code in _STATES:
        note(code, f"{row.state}; it {_STATES[code]}" if code != "not-reached" else _STATES[code])
    if row.not_finite:
        note("not-finite", f"{row.not_finite} values are NaN or infinite")
    if row.values is not None and row.values[0] == row.values[1] and row.elements != 1:
        note("dead-range", f"all its values are {number(row.values[0])}, there is nothing to quantize")
    elif row.dead_channels:
        note("dead-range", f"in {row.dead_channels} channels all values are the same")
    if row.saturation is not None and row.saturation > max_saturation:
        note("saturation", f"{row.saturation:.1f}% of its values are clipped, more than {max_saturation:g}%")
    if row.sqnr is not None and row.sqnr < min_sqnr:
        note("sqnr", f"SQNR is {row.sqnr:.1f} dB, below {min_sqnr:g} dB")
    if any_gradient and not row.frozen and not row.state:
        if row.tensor == "weight" and row.elements and not row.gradient:
            kind = "no gradient" if row.gradient is None else "a gradient of zeros"
            note("no-gradient", f"the weight got {kind} while others have one; does the loss depend on this layer?")
        if row.learns and not row.scale_gradient:
            kind = "no gradient" if row.scale_gradient is None else "a gradient of zeros"
            note("no-gradient", f"its learned scale got {kind} while others have one")
    return replace(row, warnings=tuple(found))


def of_ends(order: Sequence[str], rows: Sequence[Row]) -> list[Finding]:
    """The first and the last layer with weights, where they have few bits."""
    found = []
    ends = {"first-layer": order[0], "last-layer": order[-1]} if order else {}
    for code, layer in ends.items():
        own = [row for row in rows if row.layer == layer and row.tensor != "gradient"]
        few = {row.tensor: row.bits for row in own if row.bits < FEW_BITS}
        if few:
            bits = ", ".join(f"{tensor} {bits}" for tensor, bits in few.items())
            found.append(
                Finding(
                    code, layer or "(model)",
                    f"the {code[:-6]} layer is quantized below {FEW_BITS} bits ({bits}), where few bits often cost "
                    "most; quantkern.sensitivity() measures it, 'exclude' or 8 bits for this layer avoid it",
                )
            )  # fmt: skip
    return found


def of_norms(
    attachments: Sequence[Attachment], folded: Mapping[str, str], unfolded: Mapping[str, str]
) -> list[Finding]:
    """Batch norms that were not folded, and channels that a folded one switches off."""
    found = [
        Finding("batch-norm", layer, f"the batch norm {why}; it is not folded and stays a layer of its own")
        for layer, why in unfolded.items()
    ]
    for attachment in attachments:
        if isinstance(attachment, FoldedAttachment) and isinstance(attachment.norm.weight, torch.Tensor):
            zeros, channels = int((attachment.norm.weight == 0).sum()), attachment.norm.num_features
            if zeros:
                name = folded.get(attachment.name, "")
                text = f"gamma of the folded batch norm {name!r} is 0 in {zeros} of {channels} channels, whose weights"
                found.append(Finding("batch-norm", attachment.name, f"{text} count for nothing"))
    return found


def of_open_folding(model: nn.Module, attachments: Sequence[Attachment], batch: DummyInput | None) -> list[Finding]:
    """Batch norms that could be folded, where nobody has said whether they should be."""
    layers = {a.layer: a for a in attachments if a.weight is not None and float_class(a.layer) in FOLDED_LAYERS}
    try:
        pairs = find_pairs(model, dict.fromkeys(layers), batch)
    except CannotTrace:
        return []
    text = (
        "the batch norm behind it is not folded, but inference runtimes fold it and quantize that weight; give "
        "fold_bn=True or a dummy_input to train what they run, or fold_bn=False if none of them will"
    )
    return [Finding("batch-norm", layers[layer].name, text) for layer in pairs.folded]


def gradient_norm(parameters: Sequence[torch.Tensor]) -> float | None:
    """Of all their gradients together; None without any."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return None
    dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    return math.sqrt(math.fsum(float(gradient.detach().double().square().sum()) for gradient in dense))


def any_gradient(model: nn.Module) -> bool:
    """Whether a backward has run since gradients were set to None."""
    return any(parameter.grad is not None for parameter in model.parameters())
