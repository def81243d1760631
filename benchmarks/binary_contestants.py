"""What takes part in the benchmark of binary networks, how it is set up and when its results count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import quantkern.functional as F
from benchmarks import harness, tables
from benchmarks.problems import Unsupported

SLOW_MACS = 2**32
"""Above this a contestant that works bit by bit would take many seconds a call."""
Step = Callable[[], Any]
Check = Callable[[Any], harness.Verdict]


def signs(x: Tensor) -> Tensor:
    """+1 and -1, the specification of a sign."""
    return torch.where(x >= 0, 1.0, -1.0)


def normal(*shape: int, device: torch.device, seed: int) -> Tensor:
    """Standard normal, the same numbers everywhere."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def difference(y: Tensor, expected: Tensor) -> harness.Verdict:
    """Equal, or not to be timed."""
    y = y.to(expected.dtype)
    if y.shape == expected.shape and torch.equal(y, expected):
        return harness.Verdict(True, "equal")
    if y.shape != expected.shape:
        return harness.Verdict(False, f"disagrees with the reference: shape {list(y.shape)}")
    wrong = float((y != expected).float().mean())
    return harness.Verdict(False, f"disagrees with the reference: {wrong:.2g} of all differ")


def rounded(y: Tensor, expected: Tensor) -> harness.Verdict:
    """Equal once sums are whole numbers again: float convolutions may transform their operands."""
    verdict = difference(y, expected)
    if verdict.accepted or y.shape != expected.shape:
        return verdict
    verdict = difference(y.round(), expected)
    return harness.Verdict(True, "equal when rounded") if verdict.accepted else verdict


@dataclass
class Entries:
    """The contestants of a case, and those that cannot take part, with the reason."""

    contestants: list[harness.Contestant] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, build: Callable[[], Step], check: Check | None = None) -> None:
        """Set a contestant up."""
        try:
            step = build()
        except Unsupported as reason:
            self.unavailable[name] = str(reason)
        except Exception as error:  # a library that fails is a finding; ours must not
            if name.startswith("quantkern"):
                raise
            self.unavailable[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
        else:
            self.contestants.append(harness.Contestant(name, step, (lambda: check(step())) if check else None))

    def add_floor(self, size: int, device: torch.device) -> None:
        """A copy that moves so many bytes, half of them read and half written."""
        source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        verdict = harness.Verdict(True, f"moves {tables.figure(size / 1e6)} MB")
        self.contestants.append(harness.Contestant("floor", lambda: target.copy_(source), lambda: verdict))

    def case(
        self, operation: str, shape: object, name: str, elements: int, floor_bytes: int, device: torch.device
    ) -> harness.Case:
        """The finished case."""
        return harness.Case(
            labels={"operation": operation, "shape": name, "size": str(shape)},
            elements=elements,
            floor_bytes=floor_bytes,
            contestants=self.contestants,
            device=device,
            floor="floor",
            unavailable=self.unavailable,
        )


def int8_product(a: Tensor, b: Tensor, macs: int) -> Step:
    """torch._int_mm, into memory that is there."""
    if a.device.type == "cpu" and macs > SLOW_MACS:
        raise Unsupported("without VNNI it takes half a minute a call at this size")
    x, w = a.to(torch.int8), b.to(torch.int8).t()
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    return lambda: torch._int_mm(x, w, out=out)


def onednn_operands(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs as uint8 0 and 2 with zero point 1, weights as int8, their scales and zero points."""
    if x.device.type != "cpu":
        raise Unsupported("is for the CPU")
    outputs = weight.shape[0]
    zeros = torch.zeros(outputs, dtype=torch.int64)
    return (x + 1).to(torch.uint8), weight.to(torch.int8), torch.ones(outputs), zeros


def onednn_linear(x: Tensor, weight: Tensor) -> Step:
    """oneDNN's int8 linear layer, with prepacked weights and float results."""
    activations, weights, scales, zeros = onednn_operands(x, weight)
    packed = torch.ops.onednn.qlinear_prepack(weights, None)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        activations, 1.0, 1, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def onednn_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int) -> Step:
    """oneDNN's int8 convolution, channels last, with prepacked weights and float results."""
    activations, weights, scales, zeros = onednn_operands(x, weight)
    activations = activations.contiguous(memory_format=torch.channels_last)
    where = [stride, stride], [padding, padding], [1, 1], 1
    packed = torch.ops.onednn.qconv_prepack(weights, scales, 1.0, 1, *where, list(x.shape))
    return lambda: torch.ops.onednn.qconv_pointwise(
        activations, 1.0, 1, packed, scales, zeros, None, *where, 1.0, 0, torch.float32, "none", [], ""
    )


def thresholds(outputs: int, k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds in the middle of the sums, int32 [outputs]; which channels flip, bool and packed."""
    at = (normal(outputs, device=device, seed=8) * k**0.5).to(torch.int32)
    flipped = normal(outputs, device=device, seed=9)
    flip = F.pack_signs(flipped)
    assert isinstance(flip, Tensor)
    return at, flipped >= 0, flip


def packed_signs(x: Tensor, axis: int = -1) -> Tensor:
    """``pack_signs`` without counts."""
    packed = F.pack_signs(x, axis)
    assert isinstance(packed, Tensor)
    return packed


def check_signs(expected: Callable[[], Tensor], at: Tensor, flipped: Tensor, axis: int) -> Check:
    """Compare packed signs with those of the float sums."""

    def check(y: Tensor) -> harness.Verdict:
        shape = [1] * expected().dim()
        shape[axis] = -1
        bits = (expected() >= at.view(shape)) != flipped.view(shape)
        return difference(F.unpack_signs(y, at.numel()), torch.where(bits, 1.0, -1.0).movedim(axis, -1))

    return check


def on_cpu(x: Tensor) -> Tensor:
    """x, for libraries that know nothing else."""
    if x.device.type != "cpu":
        raise Unsupported("is for the CPU")
    return x


def prepacked_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int) -> Step:
    """oneDNN's float convolution with weights that were brought to its own format before."""
    on_cpu(x)
    where = [padding, padding], [stride, stride], [1, 1], 1
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *where, x.shape)  # type: ignore[attr-defined]
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, packed, None, *where, "none", [], "")
