"""How fast binary networks are here: products, layers, packing, a training step, a whole network.

    python -m benchmarks.bnn
    python -m benchmarks.bnn --ops matmul --shapes 1024,1x4096x4096 --json out.json

Every contestant's result is compared with the float product of the +-1 tensors first, to the last bit. "quantkern"
starts from real inputs, whose signs it packs; "quantkern packed" from packed ones, and "quantkern sign" also ends in
packed signs. Weights are packed and arranged beforehand. Float and int8 contestants get +-1 in their own format, and
where torch takes ``out=`` (matmul) it and ours write to memory that is there; everything else makes its output anew.

bitorch-engine and Larq compute engine take part where they are installed; on PyPI the first is a source archive whose
C++ extension ``BIE_BUILD_ONLY="bitorch_engine/layers/qlinear/binary/cpp bitorch_engine/layers/qconv/binary/cpp" python
setup.py develop`` builds, the second needs ``pip install 'numpy<2' tensorflow-cpu tf_keras larq larq-compute-engine``.

The floor moves the bytes that cannot be avoided, as one copy: packed operands and the result. For ``pack_signs`` it
reads its input, as the cheapest reduction that torch has (a sum of int64). The last table says how many times as fast
as the fastest float contestant ours are, and which one that was.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import quantkern.functional as F
from benchmarks import binary_peers, harness, report, tables
from benchmarks.binary_contestants import (
    SLOW_MACS,
    Entries,
    Step,
    check_signs,
    difference,
    int8_product,
    normal,
    on_cpu,
    onednn_conv2d,
    onednn_linear,
    packed_signs,
    prepacked_conv2d,
    rounded,
    signs,
    thresholds,
)
from benchmarks.binary_networks import BATCHES, vgg
from benchmarks.fakequant import names_of
from benchmarks.problems import Unsupported
from benchmarks.shapes import CONVOLUTIONS, LINEARS, PACKINGS, PRODUCTS, Convolution, Product, Shape

OPERATIONS = {
    "matmul": "the product of packed rows",
    "linear": "a linear layer",
    "conv2d": "a convolution",
    "pack_signs": "packing of real inputs along their channels",
    "training": "activation and convolution, forward and backward",
    "vgg": "inference of a whole network",
}
TRAINED = ("conv-256x28", "vgg-256x16")
SHAPES = (*PRODUCTS, *LINEARS, *CONVOLUTIONS, *PACKINGS, *BATCHES)


def product(operation: str, shape: Product, device: torch.device) -> harness.Case:
    """[m, k] x [n, k], as a product or as a linear layer with the sign of what follows."""
    m, n, k = shape.m, shape.n, shape.k
    x, weight = normal(m, k, device=device, seed=0), normal(n, k, device=device, seed=1)
    real, real_weight = signs(x), signs(weight)
    packed, packed_weight = packed_signs(x), packed_signs(weight)
    arranged = F.arrange_signs(packed_weight)

    @functools.cache
    def expected() -> Tensor:
        return (real @ real_weight.t()).round()

    def equal(y: Tensor) -> harness.Verdict:
        verdict = difference(y, expected())
        return harness.Verdict(verdict.accepted, verdict.text, {"macs": shape.macs})

    entries = Entries()
    size = packed.nbytes + packed_weight.nbytes + 4 * m * n
    entries.add_floor(size, device)
    ours = torch.empty(m, n, device=device) if operation == "matmul" else None

    def product(signs: Tensor) -> Tensor:
        return F.binary_matmul(signs, packed_weight, k, arranged=arranged, out=ours)

    entries.add("quantkern", lambda: lambda: product(packed_signs(x)), equal)
    entries.add("quantkern packed", lambda: lambda: product(packed), equal)
    entries.add("quantkern not arranged", lambda: lambda: F.binary_matmul(packed, packed_weight, k), equal)
    if operation == "linear":
        at, flipped, flip = thresholds(n, k, device)
        entries.add(
            "quantkern sign",
            lambda: lambda: F.binary_matmul_sign(packed, packed_weight, k, at, flip, arranged=arranged),
            check_signs(expected, at, flipped, 1),
        )
    out, turned = torch.empty(m, n, device=device), torch.empty(n, m, device=device)
    entries.add("float x@w.T", lambda: lambda: torch.mm(real, real_weight.t(), out=out), equal)
    entries.add(
        "float w@x.T",
        lambda: lambda: torch.mm(real_weight, real.t(), out=turned),
        lambda y: difference(y.t(), expected()),
    )
    entries.add("int8 torch._int_mm", lambda: int8_product(real, real_weight, shape.macs), equal)
    entries.add("int8 onednn", lambda: onednn_linear(real, real_weight), equal)

    def bitorch() -> Step:
        if shape.macs > SLOW_MACS:
            raise Unsupported("takes half a minute a call at this size")
        return binary_peers.bitorch_linear(on_cpu(x), weight)

    entries.add("bitorch-engine", bitorch, equal)
    entries.unavailable["larq"] = "has convolutions only"
    return entries.case(operation, shape, shape.name, m * n, size, device)


def convolution(shape: Convolution, device: torch.device) -> harness.Case:
    """A convolution, from real or from packed images, to real results or to packed signs."""
    c, stride, padding = shape.channels, shape.stride, shape.padding
    x = normal(shape.batch, c, shape.size, shape.size, device=device, seed=0)
    weight = normal(shape.outputs, c, shape.kernel, shape.kernel, device=device, seed=1)
    real, real_weight = signs(x), signs(weight)
    last = x.contiguous(memory_format=torch.channels_last)
    packed, packed_weight = packed_signs(x, 1), packed_signs(weight, 1)
    arranged = F.arrange_signs(packed_weight)
    at, flipped, flip = thresholds(shape.outputs, c * shape.kernel**2, device)

    @functools.cache
    def expected() -> Tensor:
        return nn.functional.conv2d(real, real_weight, None, stride, padding).round()

    def equal(y: Tensor) -> harness.Verdict:
        verdict = difference(y, expected())
        return harness.Verdict(verdict.accepted, verdict.text, {"macs": shape.macs})

    def ours(images: Tensor) -> Step:
        return lambda: F.binary_conv2d(images, packed_weight, None, stride, padding, channels=c, arranged=arranged)

    entries = Entries()
    size = packed.nbytes + packed_weight.nbytes + 4 * shape.batch * shape.outputs * shape.out_size**2
    entries.add_floor(size, device)
    entries.add("quantkern", lambda: ours(x), equal)
    entries.add("quantkern channels_last", lambda: ours(last), equal)
    entries.add("quantkern packed", lambda: ours(packed), equal)
    entries.add(
        "quantkern sign",
        lambda: lambda: F.binary_conv2d_sign(packed, packed_weight, c, at, flip, stride, padding, arranged=arranged),
        check_signs(expected, at, flipped, 1),
    )

    def in_float(memory_format: torch.memory_format) -> Step:
        images, taps = (t.contiguous(memory_format=memory_format) for t in (real, real_weight))
        return lambda: nn.functional.conv2d(images, taps, None, stride, padding)

    def near(y: Tensor) -> harness.Verdict:
        return rounded(y, expected())

    entries.add("float", lambda: in_float(torch.contiguous_format), near)
    entries.add("float channels_last", lambda: in_float(torch.channels_last), near)
    entries.add(
        "float prepacked",
        lambda: prepacked_conv2d(real.contiguous(memory_format=torch.channels_last), real_weight, stride, padding),
        near,
    )
    entries.add("int8 onednn", lambda: onednn_conv2d(real, real_weight, stride, padding), equal)

    def bitorch() -> Step:
        if shape.macs > SLOW_MACS:
            raise Unsupported("takes many seconds a call at this size")
        return binary_peers.bitorch_conv2d(on_cpu(x), weight, stride, padding)

    def larq() -> Step:
        return binary_peers.larq_conv2d(on_cpu(x), weight, stride, padding, torch.get_num_threads())

    def padded(y: Tensor) -> harness.Verdict:
        """Equal, or with an edge of -1."""
        images = nn.functional.pad(real, (padding,) * 4, value=-1.0)
        verdict = difference(y, nn.functional.conv2d(images, real_weight, None, stride).round())
        if padding and verdict.accepted:
            return harness.Verdict(True, "another padding *", other_work=binary_peers.PADS_WITH_MINUS_ONE)
        return verdict

    entries.add("bitorch-engine", bitorch, padded)
    entries.add("larq", lambda: larq(), equal)
    outputs = shape.batch * shape.outputs * shape.out_size**2
    return entries.case("conv2d", shape, shape.name, outputs, size, device)


def packing(shape: Shape, device: torch.device) -> harness.Case:
    """pack_signs along the channels, against reading its input."""
    x = shape.make(torch.float32, device)
    axis = shape.channel_axis
    flat = torch.empty(0, dtype=torch.int64, device=device).set_(x.untyped_storage())
    target = torch.empty_like(x)

    def expected() -> Tensor:
        rows = x.cpu().movedim(axis, -1).contiguous()
        bits = np.packbits((rows >= 0).numpy(), axis=-1, bitorder="little")
        return torch.from_numpy(bits.view(np.int32)).to(device)

    def with_numpy() -> Step:
        rows = on_cpu(x).movedim(axis, -1)
        return lambda: np.packbits((rows >= 0).numpy(), axis=-1, bitorder="little")

    entries = Entries()
    reads = harness.Verdict(True, f"reads {tables.figure(x.nbytes / 1e6)} MB")
    entries.contestants.append(harness.Contestant("floor", flat.sum, lambda: reads))
    entries.add("copy", lambda: lambda: target.copy_(x))
    entries.add("quantkern", lambda: lambda: F.pack_signs(x, axis), lambda y: difference(y, expected()))
    entries.add(
        "numpy.packbits",
        with_numpy,
        lambda y: difference(torch.from_numpy(np.ascontiguousarray(y).view(np.int32)).to(device), expected()),
    )
    return entries.case("pack_signs", shape, shape.name, x.numel(), x.nbytes + x.nbytes // 32, device)


class SimulatedSign(torch.autograd.Function):
    """The sign as libraries simulate it: real numbers, and the whole input kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The sign."""
        ctx.save_for_backward(x)
        return signs(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Straight through where |x| <= 1."""
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() <= 1)


def simulated_weight(weight: Tensor) -> Tensor:
    """Its sign, with the whole gradient."""
    return weight + (signs(weight) - weight).detach()


def saved_bytes(forward: Callable[[], Tensor], parameters: Sequence[Tensor]) -> int:
    """Bytes that are kept for the backward, in tensors that are no parameters; shared memory counts once."""
    own = {one.untyped_storage().data_ptr() for one in parameters}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    del y
    return sum(kept.values())


def training(shape: Convolution, device: torch.device) -> harness.Case:
    """An activation and a convolution behind it, forward and backward, binary or float."""
    x = normal(shape.batch, shape.channels, shape.size, shape.size, device=device, seed=0).requires_grad_()
    weight = 0.5 * normal(shape.outputs, shape.channels, shape.kernel, shape.kernel, device=device, seed=1)
    weight.clamp_(-1, 1).requires_grad_()
    edge = shape.out_size
    above = normal(shape.batch, shape.outputs, edge, edge, device=device, seed=2)
    where = shape.stride, shape.padding
    layers: dict[str, Callable[[], Tensor]] = {
        "quantkern": lambda: F.sign_conv2d(F.binarize(x), weight, None, *where),
        "float simulation": lambda: nn.functional.conv2d(
            SimulatedSign.apply(x),
            simulated_weight(weight),
            None,
            *where,  # type: ignore[no-untyped-call]
        ),
        "float layer": lambda: nn.functional.conv2d(nn.functional.hardtanh(x), weight, None, *where),
    }

    @functools.cache
    def expected() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = layers["float simulation"]()
        return y.detach().round(), harness.gradients(y, (x, weight), above)

    def check(name: str) -> harness.Verdict:
        saved = saved_bytes(layers[name], (weight,))
        figures = {"saved_bytes": float(saved), "macs": float(shape.macs)}
        told = f"saves {tables.figure(saved / 1e6)} MB"
        if name == "float layer":
            return harness.Verdict(True, f"float activations; {told}", figures)
        y = layers[name]()
        right, wanted = expected()
        found = harness.gradients(y, (x, weight), above)
        off = max(float((one - two).norm() / two.norm()) for one, two in zip(found, wanted, strict=True))
        verdict = rounded(y.detach(), right)
        if verdict.accepted and off > 1e-4:
            return harness.Verdict(False, f"disagrees with the reference: gradients are off by {off:.2g}", figures)
        return harness.Verdict(verdict.accepted, f"{verdict.text}, gradients {off:.1g}; {told}", figures)

    entries = Entries()
    size = 8 * (x.numel() + above.numel() + weight.numel())  # x and dx, y and its gradient, the weight and its
    entries.add_floor(size, device)
    for name, layer in layers.items():

        def step(layer: Callable[[], Tensor] = layer) -> object:
            return harness.gradients(layer(), (x, weight), above)

        entries.contestants.append(harness.Contestant(name, step, functools.partial(check, name)))
    return entries.case("training", shape, shape.name, x.numel(), size, device)


def cases(
    operations: Sequence[str], shapes: Sequence[str], device: torch.device, width: float = 1.0
) -> Iterator[harness.Case]:
    """Every operation on those of the shapes that are its own."""
    for operation in operations:
        if operation in ("matmul", "linear"):
            known = PRODUCTS if operation == "matmul" else LINEARS
            yield from (product(operation, known[name], device) for name in shapes if name in known)
        elif operation == "conv2d":
            yield from (convolution(CONVOLUTIONS[name], device) for name in shapes if name in CONVOLUTIONS)
        elif operation == "pack_signs":
            yield from (packing(PACKINGS[name], device) for name in shapes if name in PACKINGS)
        elif operation == "training":
            yield from (training(CONVOLUTIONS[name], device) for name in shapes if name in TRAINED)
        else:
            yield from (vgg(name, width, device) for name in shapes if name in BATCHES)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.bnn", description=__doc__.splitlines()[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=int, help="CPU threads for every contestant (default: torch's own choice)")
    p.add_argument("--shapes", type=names_of(list(SHAPES), "--shapes"), default=list(SHAPES))
    p.add_argument("--ops", type=names_of(list(OPERATIONS), "--ops"), default=list(OPERATIONS))
    p.add_argument("--width", type=float, default=1.0, help="factor of the network's channels (default 1)")
    p.add_argument("--seconds", type=float, default=2.0, help="time budget for timing one case (default 2)")
    p.add_argument("--json", type=Path, help="where the results go (default benchmarks/results/bnn-DEVICE.json)")
    p.add_argument("--plot", type=Path, help="draw the medians to this file (needs matplotlib)")
    options = p.parse_args(arguments)
    device = harness.device_for(options)
    path = options.json or harness.RESULTS / f"bnn-{options.device}.json"
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    shown["dtype"] = "float32"
    results = harness.run(
        "bnn",
        cases(options.ops, options.shapes, device, options.width),
        device,
        path,
        shown,
        options.seconds,
        options.plot,
        binary_peers.BINARY_DISTRIBUTIONS,
        floor="floor",
    )
    for title, columns, rows in (
        ("how many times as fast as the fastest float contestant; peers' times over ours", *report.speedups(results)),
        ("packing and memory", *report.packed_figures(results)),
    ):
        if rows:
            tables.print_table(title, columns, rows, text_columns=2)


if __name__ == "__main__":
    main()
