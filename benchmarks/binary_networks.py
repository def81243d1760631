"""A whole binary network, against the same network in float and simulated."""

from __future__ import annotations

import copy
import functools
import io
import sys
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import environment, harness, tables
from benchmarks.binary_contestants import Check, Entries, Step, difference, normal, on_cpu, signs

BATCHES = {"batch-1": 1, "batch-32": 32}


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
    examples = str(environment.ROOT / "examples")
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
            text = f"{verdict.text}; state_dict {tables.figure(size)} MB"
            return harness.Verdict(verdict.accepted, text, {"megabytes": size})

        return compare

    @functools.cache
    def real() -> Tensor:
        return evaluated(made.plain, x)()  # type: ignore[no-any-return]

    def close(y: Tensor) -> harness.Verdict:
        off = float((y - real()).norm() / real().norm())
        size = megabytes(made.plain)
        text = f"the float network, {off:.1g} off; state_dict {tables.figure(size)} MB"
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
