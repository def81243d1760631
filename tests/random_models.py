"""Random models, and random rules that suit them and a quantizer: what the stateful tests start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from strategies import Draw, chance, pick
from torch import Tensor, nn

import quantkern
from quantkern.quantizers.base import Quantizer
from quantkern.quantizers.folding import FoldingQuantizer


@dataclass(frozen=True)
class Recipe:
    """Everything a model follows from."""

    kind: str
    width: int
    depth: int
    shared: bool
    norm: bool
    bias: bool
    tied: bool
    raw: bool
    layer: str
    activation: str


KINDS = ("images", "tokens", "two_inputs", "images")
CONVOLUTIONS = ("plain", "depthwise", "transposed")
ACTIVATIONS: dict[str, Any] = {"relu": nn.ReLU, "hardtanh": nn.Hardtanh, "prelu": nn.PReLU, "gelu": nn.GELU}
BATCH, SIDE, LENGTH, WORDS, CLASSES = 4, 6, 5, 7, 3


def recipes(draw: Draw) -> Recipe:
    """Convolutions, linear layers, embeddings; layers with two names, nested blocks, tied weights, several inputs.

    raw: the input goes through an activation first, a layer without a weight on a tensor without a gradient.
    """
    return Recipe(
        kind=pick(draw, KINDS),
        width=pick(draw, (4, 1, 3, 8)),
        depth=draw.integer(1, 2),
        shared=chance(draw, 40),
        norm=chance(draw, 60),
        bias=not chance(draw, 30),
        tied=chance(draw, 30),
        raw=chance(draw, 30),
        layer=pick(draw, CONVOLUTIONS),
        activation=pick(draw, tuple(ACTIVATIONS)),
    )


def convolution(recipe: Recipe) -> nn.Module:
    """Of the recipe's width, from images to images of the same size."""
    kind = nn.ConvTranspose2d if recipe.layer == "transposed" else nn.Conv2d
    groups = recipe.width if recipe.layer == "depthwise" else 1
    return kind(recipe.width, recipe.width, 3, padding=1, groups=groups, bias=recipe.bias)


def entrance(recipe: Recipe) -> nn.Module:
    """What the input goes through first."""
    return ACTIVATIONS[recipe.activation]() if recipe.raw else nn.Identity()  # type: ignore[no-any-return]


class Block(nn.Module):
    """A residual block of convolutions or linear layers; both of its layers are the same one where shared."""

    def __init__(self, recipe: Recipe, images: bool) -> None:
        super().__init__()

        def layer() -> nn.Module:
            if images:
                return convolution(recipe)
            return nn.Linear(recipe.width, recipe.width, bias=recipe.bias)

        norm = (
            (nn.BatchNorm2d(recipe.width) if images else nn.LayerNorm(recipe.width)) if recipe.norm else nn.Identity()
        )
        self.first = layer()
        self.rest = nn.Sequential(norm, ACTIVATIONS[recipe.activation](), self.first if recipe.shared else layer())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.rest(self.first(x))
        return y


class Images(nn.Module):
    """Convolutions; every block is the same object where shared."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.enter = entrance(recipe)
        self.stem = nn.Conv2d(2, recipe.width, 3, stride=2, padding=1, bias=recipe.bias)
        self.norm = nn.BatchNorm2d(recipe.width) if recipe.norm else nn.Identity()
        block = Block(recipe, True)
        self.blocks = nn.Sequential(*[block if recipe.shared else Block(recipe, True) for _ in range(recipe.depth)])
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(4 * recipe.width, CLASSES, bias=recipe.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.pool(self.blocks(self.norm(self.stem(self.enter(x))))).flatten(1))
        return y


class Tokens(nn.Module):
    """An embedding, linear layers over [batch, length, features], and a head that may have the embedding's weight."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, recipe.width)
        self.blocks = nn.ModuleList([Block(recipe, False) for _ in range(recipe.depth)])
        self.head = nn.Linear(recipe.width, WORDS, bias=recipe.bias)
        if recipe.tied:
            self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


class TwoInputs(nn.Module):
    """A bilinear layer, keyword and optional arguments, and a layer that is called twice."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.enter = entrance(recipe)
        self.left = nn.Linear(6, recipe.width, bias=recipe.bias)
        self.right = self.left if recipe.shared else nn.Linear(6, recipe.width, bias=recipe.bias)
        self.act = ACTIVATIONS[recipe.activation]()
        self.mix = nn.Bilinear(recipe.width, recipe.width, CLASSES, bias=recipe.bias)

    def forward(self, x: Tensor, other: Tensor, scale: Tensor | None = None) -> Tensor:
        y: Tensor = self.mix(self.act(self.left(self.enter(x))), input2=self.act(self.right(input=other)))
        return y if scale is None else y * scale


def build(recipe: Recipe) -> nn.Module:
    """The same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return {"images": Images, "tokens": Tokens, "two_inputs": TwoInputs}[recipe.kind](recipe)


def batch(recipe: Recipe, seed: int) -> tuple[Tensor, ...]:
    """What the model is called with."""
    generator = torch.Generator().manual_seed(seed)
    if recipe.kind == "images":
        return (torch.randn(BATCH, 2, SIDE, SIDE, generator=generator),)
    if recipe.kind == "tokens":
        return (torch.randint(WORDS, (BATCH, LENGTH), generator=generator),)
    x, other = torch.randn(BATCH, 6, generator=generator), torch.rand(BATCH, 6, generator=generator)
    return (x, other, torch.tensor(0.5)) if recipe.norm else (x, other)


QUANTIZERS: dict[str, type[Quantizer]] = {
    "qat": quantkern.QAT_Quantizer,
    "lsq": quantkern.LsqQuantizer,
    "dorefa": quantkern.DoReFaQuantizer,
    "naive": quantkern.NaiveQuantizer,
    "bnn": quantkern.BNNQuantizer,
    "observer": quantkern.ObserverQuantizer,
}
TYPES = {
    "naive": ("weight",),
    "dorefa": ("weight", "input", "output", "gradient"),
}
WEIGHTED = ("Conv2d", "ConvTranspose2d", "Linear", "Embedding", "Bilinear", "PReLU")
SYMMETRIC = ("per_tensor_symmetric", "per_channel_symmetric")
SCHEMES = (*SYMMETRIC, "per_tensor_affine", "per_channel_affine")


def some(draw: Draw, options: Sequence[str]) -> list[str]:
    """One of them at least."""
    found = [option for option in options if chance(draw, 50)]
    return found or [pick(draw, options)]


def rule(draw: Draw, kind: str, quant_types: list[str], **selects: Any) -> dict[str, Any]:
    """A rule of a quantizer, with some of the keys that it knows."""
    found: dict[str, Any] = {**selects, "quant_types": quant_types}
    if kind == "bnn":
        return {**found, "quant_bits": 1}
    bits = {quant_type: pick(draw, (8, 4, 2, 3)) for quant_type in quant_types}
    found["quant_bits"] = bits if chance(draw, 50) else bits[quant_types[0]]
    if kind in ("qat", "lsq", "observer") and chance(draw, 60):
        learned_weight = kind == "lsq"
        found["quant_scheme"] = {
            t: pick(draw, SYMMETRIC if t == "weight" and learned_weight else SCHEMES) for t in quant_types
        }
        found["quant_dtype"] = {
            t: "int" if t == "weight" and learned_weight else pick(draw, ("int", "uint")) for t in quant_types
        }
    if kind in ("qat", "lsq") and chance(draw, 40):
        found["quant_start_step"] = draw.integer(1, 3)
    if kind in ("qat", "observer") and chance(draw, 30):
        found["ema_decay"] = 0.5
    if kind == "lsq":
        found["init"] = pick(draw, ("paper", "minmax", "mse"))
        found["grad_scale"] = pick(draw, ("paper", "numel", "none"))
    if kind == "observer":
        observers = ("minmax", "moving_average", "histogram", "percentile", "mse", "entropy")
        found["observer"] = {t: pick(draw, observers) for t in quant_types}
    if kind == "dorefa" and chance(draw, 30):
        found["seed"] = draw.integer(0, 99)
    return found


def configs(draw: Draw, kind: str, model: nn.Module) -> list[dict[str, Any]]:
    """Rules by class and by name; the last one may take a layer out."""
    classes = sorted({type(module).__name__ for module in model.modules() if not list(module.children())})
    types = TYPES.get(kind, ("weight", "input", "output"))
    weighted = [name for name in classes if name in WEIGHTED]
    chosen = ["default"] if chance(draw, 40) else some(draw, weighted)
    first = some(draw, types) if chance(draw, 20) else ["weight", *(t for t in types[1:] if chance(draw, 50))]
    found = [rule(draw, kind, first, op_types=chosen)]
    without = [name for name in classes if name not in (*WEIGHTED, "Identity")]
    if without and kind != "naive" and chance(draw, 50):
        outputs = [t for t in types if t in ("input", "output")]
        found.append(rule(draw, kind, some(draw, outputs), op_types=some(draw, without)))
    names = [name for name, module in model.named_modules() if type(module).__name__ in weighted]
    if chance(draw, 30):
        found.append(rule(draw, kind, some(draw, types), op_names=[pick(draw, names)]))
    if len(names) > 1 and chance(draw, 20):
        found.append({"op_names": [pick(draw, names)], "exclude": True})
    return found


def foldings(draw: Draw, recipe: Recipe, kind: str) -> dict[str, Any]:
    """What a quantizer is told about batch norms, where there are some and it can fold them."""
    if not (recipe.kind == "images" and recipe.norm and issubclass(QUANTIZERS[kind], FoldingQuantizer)):
        return {}
    if not chance(draw, 75):
        return {"fold_bn": False} if chance(draw, 30) else {}
    step = draw.integer(0, 3) if kind != "observer" and chance(draw, 40) else None
    return {"fold_bn": True} if step is None else {"fold_bn": True, "freeze_bn_step": step}
