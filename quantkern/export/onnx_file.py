"""A quantized model -> an ONNX file of QuantizeLinear and DequantizeLinear nodes, compared with the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from quantkern.attach import Attachment, DummyInput
from quantkern.export.frozen import SIGNS, freeze
from quantkern.export.lowering import Lowering, Options
from quantkern.export.tracing import OPSET, on_cpu, require_packages, to_onnx
from quantkern.export.verify import OutputCheck, verify
from quantkern.files import Target, publish, stage, target_of, writing

FILE_LIMIT = 1800 * 2**20
"""Bytes of constants from which on they lie beside the file: protobuf ends at 2 GB."""


@dataclass(frozen=True)
class OnnxExport:
    """What was written.

    outputs: the comparison with onnxruntime, empty where none was asked for. floats: by label the tensors that a rule
    quantizes and the file has in float, and why.
    """

    path: Path
    opset: int
    size: int
    outputs: tuple[OutputCheck, ...]
    floats: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.path}: opset {self.opset}, {self.size} bytes"]
        lines += [f"  {check}" for check in self.outputs]
        lines += [f"  float: {label}: {why}" for label, why in self.floats.items()]
        return "\n".join(lines)


def save(program: object, folder: Path, name: str) -> Path:
    """Write a ``torch.onnx.ONNXProgram`` into a folder."""
    file = folder / name
    graph = program.model.graph  # type: ignore[attr-defined]
    size = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    program.save(file, external_data=size > FILE_LIMIT)  # type: ignore[attr-defined]
    return file


def save_float(model: nn.Module, sample: Tensor, folder: Path, name: str) -> Path:
    """The float model in evaluation mode, for a batch of the sample's size; every module's mode comes back."""
    return save(to_onnx(model, sample, dynamic_batch=False), folder, name)


def export_onnx(
    model: nn.Module,
    attachments: Sequence[Attachment],
    path: Target,
    example_input: DummyInput,
    *,
    verify_file: bool,
    dynamic_batch: bool,
    max_mean_steps: float,
    options: Options,
) -> OnnxExport:
    """See ``Quantizer.export_onnx``."""
    target = target_of("path", path)
    if not (isinstance(max_mean_steps, (int, float)) and max_mean_steps >= 0):
        raise ValueError(f"max_mean_steps must be a number >= 0, got {max_mean_steps!r}")
    require_packages("onnx", "onnxscript", *(("onnxruntime",) if verify_file else ()))
    with ExitStack() as stack:
        folder = stage(stack, "path", target)
        frozen = freeze(model, attachments, example_input)
        unseen = {label: why for label, why in frozen.floats.items() if why != SIGNS}
        if unseen:
            lines = "".join(f"\n  {label}: {why}" for label, why in unseen.items())
            warnings.warn(f"stays float in the ONNX graph:{lines}", UserWarning, stacklevel=3)
        program = to_onnx(frozen.model, on_cpu(example_input), dynamic_batch)
        grids = Lowering(program.model, options).run()
        with writing("path", target):
            file = save(program, folder, target.name)
        checks: tuple[OutputCheck, ...] = ()
        if verify_file:
            checks = verify(file, example_input, frozen.output, grids, max_mean_steps, options.signed_weights)
        size = sum(part.stat().st_size for part in folder.iterdir())
        publish({"path": folder}, {"path": target})
    result = OnnxExport(target, OPSET, size, checks, frozen.floats)
    if verify_file:
        print("\n".join(f"onnxruntime against the model, {check}" for check in checks))
    return result
