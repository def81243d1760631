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
import copy
import functools
import io
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import quantkern.functional as F
from benchmarks import harness, peers, report
from benchmarks.fakequant import names_of
from benchmarks.peers import Unsupported
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
BATCHES = {"batch-1": 1, "batch-32": 32}
SHAPES = (*PRODUCTS, *LINEARS, *CONVOLUTIONS, *PACKINGS, *BATCHES)

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
        verdict = harness.Verdict(True, f"moves {harness.figure(size / 1e6)} MB")
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


# --- int8, as torch has it


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


# --- products and layers


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

    entries.add("quantkern", lambda: lambda: product(packed_rows(x)), equal)
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
        return peers.bitorch_linear(on_cpu(x), weight)

    entries.add("bitorch-engine", bitorch, equal)
    entries.unavailable["larq"] = "has convolutions only"
    return entries.case(operation, shape, shape.name, m * n, size, device)


def packed_rows(x: Tensor) -> Tensor:
    """The signs of x, packed."""
    packed = F.pack_signs(x)
    assert isinstance(packed, Tensor)
    return packed


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
        return peers.bitorch_conv2d(on_cpu(x), weight, stride, padding)

    def padded(y: Tensor) -> harness.Verdict:
        """Equal, or with an edge of -1."""
        images = nn.functional.pad(real, (padding,) * 4, value=-1.0)
        verdict = difference(y, nn.functional.conv2d(images, real_weight, None, stride).round())
        if padding and verdict.accepted:
            return harness.Verdict(True, "another padding *", other_work=peers.PADS_WITH_MINUS_ONE)
        return verdict

    entries.add("bitorch-engine", bitorch, padded)
    entries.add("larq", lambda: peers.larq_conv2d(on_cpu(x), weight, stride, padding, torch.get_num_threads()), equal)
    outputs = shape.batch * shape.outputs * shape.out_size**2
    return entries.case("conv2d", shape, shape.name, outputs, size, device)


# --- packing


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
    reads = harness.Verdict(True, f"reads {harness.figure(x.nbytes / 1e6)} MB")
    entries.contestants.append(harness.Contestant("floor", flat.sum, lambda: reads))
    entries.add("copy", lambda: lambda: target.copy_(x))
    entries.add("quantkern", lambda: lambda: F.pack_signs(x, axis), lambda y: difference(y, expected()))
    entries.add(
        "numpy.packbits",
        with_numpy,
        lambda y: difference(torch.from_numpy(np.ascontiguousarray(y).view(np.int32)).to(device), expected()),
    )
    return entries.case("pack_signs", shape, shape.name, x.numel(), x.nbytes + x.nbytes // 32, device)


# --- training


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
        told = f"saves {harness.figure(saved / 1e6)} MB"
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


# --- a whole network


class Sign(nn.Module):
    """The sign of a float simulation."""

    def forward(self, x: Tensor) -> Tensor:
        """+1 and -1."""
        return signs(x)


def megabytes(model: nn.Module) -> float:
    """The size of a saved state_dict."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6


@dataclass(frozen=True)
class Network:
    """One VGG in four forms: float, simulated with +-1 in real numbers, trained by us, and packed."""

    plain: nn.Module
    simulated: nn.Module
    trained: nn.Module
    packed: nn.Module


@functools.cache
def network(width: float, device: torch.device) -> Network:
    """The fully binary VGG of examples/bnn_vgg.py with random numbers, those of its batch norms too."""
    examples = str(harness.ROOT / "examples")
    if examples not in sys.path:
        sys.path.append(examples)
    import bnn_vgg  # type: ignore[import-not-found]
    import models  # type: ignore[import-not-found]

    from quantkern import BNNQuantizer

    plain = models.BinaryVGG(width=width)
    generator = torch.Generator().manual_seed(0)
    before = 1
    for module in plain.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            before = module.weight[0].numel()
            nn.init.uniform_(module.weight, -1, 1, generator=generator)
        elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3 * before**0.5, generator=generator)
            module.running_var.uniform_(0.5 * before, 1.5 * before, generator=generator)
            if module.affine:  # weights of both signs
                nn.init.normal_(module.weight, generator=generator)
                nn.init.normal_(module.bias, std=0.2, generator=generator)
    plain = plain.to(device).eval()
    simulated, trained = copy.deepcopy(plain), copy.deepcopy(plain)
    lists = bnn_vgg.CONFIGS["full"]
    assert lists is not None
    for name in lists[0]:
        weight = simulated.get_submodule(name).weight
        weight.data = signs(weight.data)
    for name in lists[1]:
        simulated.set_submodule(name, Sign())
    quantizer = BNNQuantizer(trained, bnn_vgg.config_list("full"), torch.optim.SGD(trained.parameters(), lr=0.1))
    return Network(plain, simulated.eval(), trained.eval(), quantizer.convert().eval())


def channels_last(model: nn.Module) -> nn.Module:
    """A copy of the VGG with its convolutions' weights in that format; its own ``view`` cannot take such images."""
    features, classifier = (copy.deepcopy(model.get_submodule(name)) for name in ("features", "classifier"))
    layers = nn.Sequential(features, nn.Flatten(), classifier).eval()
    return layers.to(memory_format=torch.channels_last)  # type: ignore[no-any-return,call-overload]


def vgg(name: str, width: float, device: torch.device) -> harness.Case:
    """Inference of the whole network."""
    made, batch = network(width, device), BATCHES[name]
    x = normal(batch, 3, 32, 32, device=device, seed=0)
    last = x.contiguous(memory_format=torch.channels_last)

    def evaluated(model: nn.Module, images: Tensor) -> Step:
        def step() -> Tensor:
            with torch.no_grad():
                return model(images)  # type: ignore[no-any-return]

        return step

    @functools.cache
    def expected() -> Tensor:
        return evaluated(made.simulated, x)()  # type: ignore[no-any-return]

    def check(model: nn.Module) -> Check:
        def compare(y: Tensor) -> harness.Verdict:
            verdict, size = difference(y, expected()), megabytes(model)
            text = f"{verdict.text}; state_dict {harness.figure(size)} MB"
            return harness.Verdict(verdict.accepted, text, {"megabytes": size})

        return compare

    @functools.cache
    def real() -> Tensor:
        return evaluated(made.plain, x)()  # type: ignore[no-any-return]

    def close(y: Tensor) -> harness.Verdict:
        off = float((y - real()).norm() / real().norm())
        size = megabytes(made.plain)
        text = f"the float network, {off:.1g} off; state_dict {harness.figure(size)} MB"
        return harness.Verdict(off < 1e-3, text, {"megabytes": size})

    def optimized() -> Step:
        on_cpu(x)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            frozen = torch.jit.freeze(torch.jit.trace(made.plain, x))  # type: ignore[no-untyped-call]
            return evaluated(torch.jit.optimize_for_inference(frozen), x)

    entries = Entries()
    size = int(1e6 * megabytes(made.packed)) + x.nbytes  # every weight and every image once
    entries.add_floor(size, device)
    entries.add("quantkern", lambda: evaluated(made.packed, x), check(made.packed))
    entries.add("quantkern channels_last", lambda: evaluated(made.packed, last), check(made.packed))
    entries.add("float", lambda: evaluated(made.plain, x), close)
    entries.add("float channels_last", lambda: evaluated(channels_last(made.plain), last), close)
    entries.add("float torch.jit", optimized, close)
    entries.add("simulation", lambda: evaluated(made.simulated, x), check(made.simulated))
    entries.add("quantkern as trained", lambda: evaluated(made.trained, x), check(made.trained))
    return entries.case("vgg", f"width {width:g}", name, batch, size, device)


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
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
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
        peers.BINARY_DISTRIBUTIONS,
        floor="floor",
    )
    for title, columns, rows in (
        ("how many times as fast as the fastest float contestant; peers' times over ours", *report.speedups(results)),
        ("packing and memory", *report.packed_figures(results)),
    ):
        if rows:
            harness.print_table(title, columns, rows, text_columns=2)


if __name__ == "__main__":
    main()
