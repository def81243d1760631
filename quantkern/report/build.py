"""From a quantized model to a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantkern.attach import Attachment, DummyInput, run_model
from quantkern.binarized import BinaryActivation, BinaryWeight
from quantkern.config import DEFAULT_OP_TYPES
from quantkern.fake_quant import FakeQuant, RangedFakeQuant
from quantkern.layer_plans import layers_of, op_type
from quantkern.learned import DorefaActivation, DorefaGradient, DorefaWeight, LearnedState
from quantkern.observed import ObservedActivation, ObservedWeight
from quantkern.report import findings
from quantkern.report.measure import Measurement, grid_of, unchanged, watching
from quantkern.report.result import Finding, Report, Row, Span
from quantkern.running_range import ActivationFakeQuant

_ENDS = frozenset(DEFAULT_OP_TYPES) - {"PReLU"}
"""Kinds of layers that can be the first or the last one of a network."""


def _tensors(attachments: Sequence[Attachment]) -> Iterator[tuple[Attachment, str, FakeQuant]]:
    """Every fake-quantizer with its layer and its name there: inputs, the weight, outputs."""
    for attachment in attachments:
        named: dict[str, Any] = {} if attachment.tensors is None else dict(attachment.tensors.named_children())
        before = {name: module for name, module in named.items() if name.startswith("input")}
        weight = {} if attachment.weight is None else {"weight": attachment.weight}
        for name, module in {**before, **weight, **named}.items():
            yield attachment, name, module


def _state(module: FakeQuant, measured: bool) -> tuple[str, str]:
    """Why a tensor is float at present, as the code of a warning and in words; both empty when it is quantized."""
    start = module.spec.start_step
    done = 0 if module.step is None else int(module.step)
    if done < start:
        return "not-started", f"step {done} of {start}"
    if isinstance(module, (ObservedWeight, ObservedActivation)) and not module.ready:
        return "not-compressed", "observing"
    if isinstance(module, DorefaGradient):
        return "", "in training only"
    if not module.is_observed():
        return "no-range", "no scale yet" if isinstance(module, LearnedState) else "no range seen"
    return ("not-reached", "not reached") if measured else ("", "")


def _seen(module: FakeQuant) -> tuple[Span | None, int]:
    """The range that was observed, and how many channels of several have seen one value only."""
    if isinstance(module, ObservedActivation):
        low, high = module.observer.low, module.observer.high
    elif isinstance(module, ActivationFakeQuant):
        low, high = module.running_min, module.running_max
    else:
        return None, 0
    if not low.numel() or not bool((low <= high).all()):
        return None, 0
    dead = int((low == high).sum()) if low.dim() else 0
    return (float(low.min()), float(high.max())), dead


def _span(value: Tensor) -> Span:
    return float(value.min()), float(value.max())


def _scheme(module: FakeQuant) -> tuple[str | None, str]:
    if isinstance(module, (BinaryWeight, BinaryActivation)):
        return None, "sign"
    if isinstance(module, (DorefaWeight, DorefaActivation, DorefaGradient)):
        return None, "dorefa"
    return module.spec.dtype, module.spec.scheme


def _originals(layer: nn.Module) -> list[nn.Parameter]:
    """The Parameters behind a parametrized weight."""
    entries: Any = layer.parametrizations["weight"] if parametrize.is_parametrized(layer, "weight") else None  # type: ignore[index]
    return [] if entries is None else list(entries.parameters(recurse=False))


def _row(
    attachment: Attachment, name: str, module: FakeQuant, norm: str | None, measured: Measurement | None
) -> tuple[Row, str]:
    """What is known of a tensor, and the code of its state."""
    code, state = _state(module, measured is not None and not measured.count and not measured.not_finite)
    seen, dead_channels = _seen(module)
    values = None if measured is None or not measured.count else (measured.low, measured.high)
    if measured is not None and measured.count:
        dead_channels = measured.dead_channels
    if values is None and seen is not None and (not module.spec.per_channel or seen[0] == seen[1]):
        values = seen
    grid = grid_of(module, name) if not state or state == "not reached" else None
    dtype, scheme = _scheme(module)
    weights = _originals(attachment.layer) if name == "weight" else []
    learned = module if isinstance(module, LearnedState) and not state else None
    active = measured if not state else None
    row = Row(
        layer=attachment.name, tensor=name, bits=module.spec.bits, dtype=dtype, scheme=scheme, norm=norm, state=state,
        scale=None if grid is None else _span(grid.scale),
        zero_point=None if grid is None or not isinstance(module, (RangedFakeQuant, LearnedState)) else
        _span(grid.zero_point),
        range=seen if grid is None else grid.ends(), values=values,
        saturation=None if active is None else active.saturation(), sqnr=None if active is None else active.sqnr(),
        agreement=None if active is None else active.agreement(),
        gradient=findings.gradient_norm(weights),
        scale_gradient=None if learned is None else findings.gradient_norm([learned.scale]),
        frozen=bool(weights) and not any(parameter.requires_grad for parameter in weights),
        learns=learned is not None and learned.scale.requires_grad,
        elements=sum(parameter.numel() for parameter in weights), dead_channels=dead_channels,
        not_finite=0 if measured is None else measured.not_finite,
        histogram=None if measured is None else measured.histogram(),
    )  # fmt: skip
    return row, code


def _title(kind: str, model: nn.Module, rows: Sequence[Row]) -> str:
    layers = len({row.layer for row in rows})
    parts = [f"{kind}: {len(rows)} quantized tensor{'s'[: len(rows) != 1]} in {layers} layer{'s'[: layers != 1]}"]
    weights = [row for row in rows if row.elements]
    if weights:
        floats = sum(row.elements for row in weights) * 4
        packed = sum(-(-row.elements * row.bits // 8) for row in weights)
        parts.append(f"their weights take {_bytes(floats)} as float32, {_bytes(packed)} quantized")
    return "; ".join([*parts, f"model in {'training' if model.training else 'evaluation'} mode"])


def _bytes(count: int) -> str:
    return f"{count} bytes" if count < 1000 else f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"


def make_report(
    quantizer: object,
    model: nn.Module,
    attachments: Sequence[Attachment],
    batch: DummyInput | None,
    notes: Sequence[str],
    max_saturation: float,
    min_sqnr: float,
) -> Report:
    """See ``quantkern.quantizers.base.Quantizer.report``; notes: the warnings about the config_list."""
    folded: Mapping[str, str] = getattr(quantizer, "folded_layers", {})
    unfolded: Mapping[str, str] = getattr(quantizer, "unfolded_layers", {})
    open_folding: bool = getattr(quantizer, "folding_is_open", False)
    candidates = {module: names[0] for module, names in layers_of(model).items() if op_type(module) in _ENDS}
    called: list[nn.Module] = []
    trained = findings.any_gradient(model)
    with unchanged(model):
        model.eval()
        measured = {module: Measurement(module, name) for _, name, module in _tensors(attachments)}
        weights = {module: measured[module] for _, name, module in _tensors(attachments) if name == "weight"}
        with watching(weights):
            for attachment in attachments:
                if attachment.weight is not None:
                    _ = attachment.layer.weight
        if batch is None:
            measured = weights
        else:
            others = {module: one for module, one in measured.items() if module not in weights}
            with watching(others, called, list(candidates)):
                run_model(model, batch, "batch")
        foldable = findings.of_open_folding(model, attachments, batch) if open_folding else []
        rows = []
        for attachment, name, module in _tensors(attachments):
            norm = folded.get(attachment.name)
            row, code = _row(attachment, name, module, norm, measured.get(module))
            rows.append(findings.of_tensor(row, code, trained, max_saturation, min_sqnr))
    order = [candidates[module] for module in called or candidates]
    found = [Finding("rule", "", text) for text in notes]
    found += findings.of_ends(order, rows) + findings.of_norms(attachments, folded, unfolded)
    found += foldable
    found += [finding for row in rows for finding in row.warnings]
    title = _title(type(quantizer).__name__, model, rows)
    return Report(title, tuple(rows), tuple(found), batch is not None, trained)
