"""Runs an ONNX file and compares it with the model that it was made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from quantkern.export.lowering import Grids
from quantkern.export.tracing import as_call

MAX_MEAN_STEPS = 0.5
"""int32 biases and other orders of sums turn some roundings; a wrong scale, zero point or range moves everything."""

FEWEST_STEPS, MOST_STEPS = 15, 255
"""An output without a grid has as many steps as the coarsest activation, within these."""


class DriftError(RuntimeError):
    """The file gives other numbers than the model. ``outputs``: the comparison."""

    def __init__(self, text: str, outputs: tuple[OutputCheck, ...]) -> None:
        super().__init__(text)
        self.outputs = outputs


@dataclass(frozen=True)
class OutputCheck:
    """One output of both: the differences in steps, and 10 log10 of signal / noise.

    step: the scale of the output's fake-quantizer (step_of "grid"), else the output's range / 255, with activations of
    fewer bits / (2^bits - 1), bits = 4 at least ("range"); 1 for integers ("integer").
    """

    name: str
    shape: tuple[int, ...]
    step: float
    step_of: str
    max_steps: float
    mean_steps: float
    sqnr_db: float

    def __str__(self) -> str:
        sqnr = "exact" if math.isinf(self.sqnr_db) else f"{self.sqnr_db:.1f} dB"
        return (
            f"{self.name} {list(self.shape)}: max {self.max_steps:.4g}, mean {self.mean_steps:.4g} steps of "
            f"{self.step:.4g} ({self.step_of}), SQNR {sqnr}"
        )


def session_of(
    path: Path | str, threads: int | None = None, exact_products: bool = False, spinning: bool = True
) -> Any:
    """An onnxruntime session on the CPU.

    Without VNNI the x86 kernels for unsigned inputs and signed weights saturate sums of two products at 16 bits.
    ``exact_products`` sets ``session.x64quantprecision``, so that onnxruntime takes others. Files of ``export_onnx``
    need it only where they were written with ``signed_weights=True``. ``spinning`` False: idle threads sleep, so that
    sessions that run in turn do not take each other's cores.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if exact_products:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed_of(session: Any, example_input: object) -> dict[str, np.ndarray]:
    """The tensors of an example input by the names of the file's inputs."""
    leaves = [leaf for leaf in tree_leaves(as_call(example_input)) if isinstance(leaf, Tensor)]  # type: ignore[arg-type]
    names = [value.name for value in session.get_inputs()]
    if len(names) != len(leaves):
        raise ValueError(f"example_input holds {len(leaves)} tensors, the ONNX graph has the inputs {', '.join(names)}")
    return {name: leaf.detach().cpu().numpy() for name, leaf in zip(names, leaves, strict=True)}


def compare(
    name: str, expected: np.ndarray, found: np.ndarray, scale: np.ndarray | None = None, steps: int = MOST_STEPS
) -> OutputCheck:
    """One output; ``steps``: how many its range has where there is no scale.

    >>> check = compare("y", np.array([0.0, 1.0]), np.array([0.0, 1.5]), np.array(0.5))
    >>> check.max_steps, check.mean_steps, round(check.sqnr_db, 2)
    (1.0, 0.5, 6.02)
    """
    if expected.shape != found.shape:
        raise DriftError(f"{name} has shape {list(found.shape)} in onnxruntime, expected {list(expected.shape)}", ())
    kind, step = "integer", 1.0
    if expected.dtype.kind == "f":
        finite = expected[np.isfinite(expected)]
        kind, step = "range", float(np.ptp(finite)) / steps if finite.size else 1.0
        if scale is not None:
            kind, step = "grid", float(scale.reshape(()))
    y, other = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        same = (y == other) | (np.isnan(y) & np.isnan(other))
        difference = np.where(same, 0.0, np.abs(y - other))
    difference = np.nan_to_num(difference, nan=np.inf)
    in_steps = difference / (step or 1.0)
    noise, signal = float(np.square(difference).sum()), float(np.square(np.nan_to_num(y)).sum())
    sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal / noise > 0 else -math.inf
    return OutputCheck(
        *(name, expected.shape, step, kind),
        *(float(in_steps.max(initial=0)), float(in_steps.mean()) if in_steps.size else 0.0, sqnr),
    )


def verify(
    path: Path, example_input: object, output: object, grids: Grids, max_mean_steps: float, exact_products: bool
) -> tuple[OutputCheck, ...]:
    """Compare the file at ``path`` with ``output``, what the model gives.

    Raises:
        DriftError: an output differs by more than max_mean_steps on average, or in its shape.
    """
    session = session_of(path, exact_products=exact_products)
    names = [value.name for value in session.get_outputs()]
    expected = [leaf.detach().cpu().numpy() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    found: Sequence[np.ndarray] = session.run(None, feed_of(session, example_input))
    if len(expected) != len(found):
        raise DriftError(f"onnxruntime gives {len(found)} outputs, the model {len(expected)}", ())
    steps = min(max(grids.steps, FEWEST_STEPS), MOST_STEPS)
    checks = tuple(
        compare(name, mine, other, grids.scales.get(name), steps)
        for name, mine, other in zip(names, expected, found, strict=True)
    )
    bad = [check for check in checks if not check.mean_steps <= max_mean_steps]
    if bad:
        lines = "".join(f"\n  {check}" for check in bad)
        raise DriftError(
            f"the ONNX graph drifts from the model, more than max_mean_steps={max_mean_steps} on average; no file was "
            f"written:{lines}",
            checks,
        )
    return checks
