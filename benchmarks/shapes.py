"""Named tensor shapes of real layers, shared by the benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A tensor shape and where it occurs.

    kind: "weight", "activation", or "tiny" (a call's fixed cost: every operation runs on it).
    channel_axis: the dimension that per-channel operations use.
    """

    name: str
    dims: tuple[int, ...]
    kind: str
    channel_axis: int
    origin: str
    channels_last: bool = False

    @property
    def elements(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.dims)

    @property
    def channels(self) -> int:
        """How many scales a per-channel operation has."""
        return self.dims[self.channel_axis]

    def make(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
        """A tensor of this shape, standard normal, the same numbers on every device."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.dims, generator=generator).to(device=device, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def __str__(self) -> str:
        return "x".join(map(str, self.dims)) + (" channels_last" if self.channels_last else "")


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("act-64x56", (32, 64, 56, 56), "activation", 1, "ResNet, first stage, batch 32"),
        Shape("act-64x56-nhwc", (32, 64, 56, 56), "activation", 1, "the same, channels_last", channels_last=True),
        Shape("act-512x14", (32, 512, 14, 14), "activation", 1, "VGG-16, last block, batch 32: 512 channels"),
        Shape("act-bert", (8, 512, 768), "activation", 2, "BERT base, batch 8, 512 tokens: 768 channels, last axis"),
        Shape("weight-512", (512, 512, 3, 3), "weight", 0, "ResNet-34, last stage, 3x3 convolution"),
        Shape("weight-64", (64, 64, 3, 3), "weight", 0, "ResNet, first stage, 3x3 convolution"),
        Shape("weight-1x1", (512, 128, 1, 1), "weight", 0, "ResNet-50, second stage, 1x1 convolution"),
        Shape("weight-depthwise", (960, 1, 3, 3), "weight", 0, "MobileNetV2, last depthwise convolution"),
        Shape("weight-4096x1024", (4096, 1024), "weight", 0, "BERT large, feed-forward layer"),
        Shape("tiny-16", (4, 4), "tiny", 0, "16 elements: the cost of a call"),
    )
}


@dataclass(frozen=True)
class Product:
    """A matrix product [m, k] x [n, k]: a linear layer of m rows with k inputs and n outputs."""

    name: str
    m: int
    n: int
    k: int
    origin: str

    @property
    def macs(self) -> int:
        """Multiplications."""
        return self.m * self.n * self.k

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


@dataclass(frozen=True)
class Convolution:
    """A square convolution of square images."""

    name: str
    batch: int
    channels: int
    size: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    origin: str

    @property
    def out_size(self) -> int:
        """The side of an output image."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiplications, those with padding counted."""
        return self.batch * self.outputs * self.out_size**2 * self.channels * self.kernel**2

    def __str__(self) -> str:
        return (
            f"{self.batch}x{self.channels}x{self.size}x{self.size} {self.kernel}x{self.kernel} to {self.outputs}, "
            f"stride {self.stride}, padding {self.padding}"
        )


PRODUCTS = {
    shape.name: shape
    for shape in (
        Product("512", 512, 512, 512, "square"),
        Product("1024", 1024, 1024, 1024, "square"),
        Product("4096", 4096, 4096, 4096, "square"),
        Product("64x1024x8192", 64, 1024, 8192, "VGG's first linear layer, batch 64"),
        Product("16x4096x4096", 16, 4096, 4096, "a large linear layer, batch 16"),
        Product("8x4096x4096", 8, 4096, 4096, "the same, batch 8"),
        Product("1x4096x4096", 1, 4096, 4096, "the same, one row"),
    )
}
"""Products whose operands are packed beforehand."""

LINEARS = {
    shape.name: shape
    for shape in (
        Product("vgg-fc", 32, 1024, 8192, "VGG's first linear layer, batch 32"),
        Product("bert-ff", 512, 3072, 768, "BERT base, feed-forward layer, 512 tokens"),
    )
}

CONVOLUTIONS = {
    shape.name: shape
    for shape in (
        Convolution("conv-256x28", 8, 256, 28, 256, 3, 1, 1, "ResNet, third stage, batch 8"),
        Convolution("vgg-128x32", 32, 128, 32, 128, 3, 1, 1, "VGG, second convolution, batch 32"),
        Convolution("vgg-256x16", 32, 256, 16, 256, 3, 1, 1, "VGG, fourth convolution, batch 32"),
        Convolution("vgg-512x8", 32, 512, 8, 512, 3, 1, 1, "VGG, sixth convolution, batch 32"),
        Convolution("resnet-1x1", 8, 256, 28, 512, 1, 1, 0, "ResNet-50, second stage, 1x1, batch 8"),
    )
}

PACKINGS = {
    shape.name: shape
    for shape in (
        Shape("rows-8192", (4096, 8192), "activation", 1, "rows of a linear layer, 134 MB"),
        Shape("nchw-64x56", (128, 64, 56, 56), "activation", 1, "ResNet, first stage, batch 128, 103 MB"),
        Shape("nhwc-64x56", (128, 64, 56, 56), "activation", 1, "the same, channels_last", channels_last=True),
    )
}
"""Tensors whose signs are packed along the channels; larger than any cache."""
