"""The networks of benchmarks.train_step, with a batch each and what is quantized in them.

Activations are modules, so that a config_list can name them. Everywhere the weights and inputs of convolutions and
linear layers have 8 bits; where there are ReLUs their outputs have 8 bits too, as NNI's examples ask for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import environment


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.shortcut = (
            nn.Identity()
            if stride == 1 and before == channels
            else nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, before, H, W] to [N, channels, H / stride, W / stride]."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016) with the 3x3 stem usual for 32x32 images; ``width`` 1 starts with 64 channels."""

    def __init__(self, width: float = 1.0, classes: int = 10) -> None:
        super().__init__()
        sizes = [max(8, round(size * width)) for size in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, sizes[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(sizes[0])
        self.relu1 = nn.ReLU()
        blocks = []
        before = sizes[0]
        for stage, size in enumerate(sizes):
            for first in (True, False):
                blocks.append(BasicBlock(before, size, 2 if first and stage else 1))
                before = size
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [N, classes] of images [N, 3, 32, 32]."""
        x = self.blocks(self.relu1(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class VGG11(nn.Module):
    """VGG-11 for 32x32 images (Simonyan and Zisserman 2015, configuration A), without batch norm or dropout."""

    def __init__(self, width: float = 1.0, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for size, pooled in zip((64, 128, 256, 256, 512, 512, 512, 512), (1, 1, 0, 1, 0, 1, 0, 1), strict=True):
            channels = max(8, round(size * width))
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
            if pooled:
                layers.append(nn.MaxPool2d(2))
            before = channels
        self.features = nn.Sequential(*layers)
        hidden = max(8, round(4096 * width / 4))
        self.classifier = nn.Sequential(
            nn.Linear(before, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):  # torch's own start would let the signal die out
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Scores [N, classes] of images [N, 3, 32, 32]."""
        return self.classifier(torch.flatten(self.features(x), 1))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Token and position embeddings, one block of attention and two linear layers behind layer norms, a classifier.

    The block is that of Vaswani et al. 2017 with the norms in front of its parts and GELU, as in ViT.
    """

    def __init__(
        self, words: int = 1000, length: int = 128, size: int = 256, heads: int = 4, classes: int = 10
    ) -> None:
        super().__init__()
        self.heads = heads
        self.words = nn.Embedding(words, size)
        self.places = nn.Parameter(0.02 * torch.randn(length, size))
        self.norm1 = nn.LayerNorm(size)
        self.query_key_value = nn.Linear(size, 3 * size)
        self.joined = nn.Linear(size, size)
        self.norm2 = nn.LayerNorm(size)
        self.wider = nn.Linear(size, 4 * size)
        self.gelu = nn.GELU()
        self.narrower = nn.Linear(4 * size, size)
        self.norm3 = nn.LayerNorm(size)
        self.classifier = nn.Linear(size, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores [N, classes] of token numbers [N, length]."""
        x = self.words(tokens) + self.places
        batch, length, size = x.shape
        parts = self.query_key_value(self.norm1(x)).view(batch, length, 3, self.heads, size // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.joined(attended.transpose(1, 2).reshape(batch, length, size))
        x = x + self.narrower(self.gelu(self.wider(self.norm2(x))))
        return self.classifier(self.norm3(x).mean(1))  # type: ignore[no-any-return]


def lenet() -> nn.Module:
    """The LeNet of the examples."""
    examples = str(environment.ROOT / "examples")
    if examples not in sys.path:
        sys.path.append(examples)
    import models  # type: ignore[import-not-found]

    return models.LeNet()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Network:
    """A network to train.

    make: builds it; the random numbers are torch's. batch: its usual batch. shape: of one input; tokens: how many
    words an input of integers is drawn from. layers: types whose weights and inputs are quantized; outputs: types whose
    outputs are.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: int
    shape: tuple[int, ...]
    layers: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    tokens: int | None = None
    classes: int = 10

    def build(self, device: torch.device) -> nn.Module:
        """The network in training mode, the same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().to(device).train()

    def draw(self, device: torch.device, seed: int = 0, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """A batch of random inputs with random classes."""
        generator = torch.Generator().manual_seed(seed)
        size = (batch or self.batch, *self.shape)
        x = (
            torch.randint(self.tokens, size, generator=generator)
            if self.tokens
            else torch.randn(size, generator=generator)
        )
        return x.to(device), torch.randint(self.classes, size[:1], generator=generator).to(device)


def convolutional(name: str, make: Callable[[], nn.Module], batch: int, shape: tuple[int, ...]) -> Network:
    """A network of convolutions, linear layers and ReLUs."""
    return Network(name, make, batch, shape, layers=("Conv2d", "Linear"), outputs=("ReLU", "ReLU6"))


NETWORKS = {
    network.name: network
    for network in (
        convolutional("lenet", lenet, 64, (1, 28, 28)),
        convolutional("resnet18", lambda: ResNet18(0.5), 32, (3, 32, 32)),
        convolutional("vgg11", lambda: VGG11(0.5), 32, (3, 32, 32)),
        Network("transformer", Transformer, 16, (128,), ("Linear",), tokens=1000),
    )
}
"""LeNet, ResNet-18 and VGG-11 of half the width, one block of a transformer."""
