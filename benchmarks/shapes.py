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
