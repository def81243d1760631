"""The networks of the examples. Their activations are modules, so that a config_list can name them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DigitsNet(nn.Module):
    """Two convolutions and two linear layers for 8x8 images: 23,000 weights."""

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.relu1 = nn.ReLU6()
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.relu2 = nn.ReLU6()
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(32 * 2 * 2, 128)
        self.relu3 = nn.ReLU6()
        self.fc2 = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [N, classes] of images [N, channels, 8, 8]."""
        x = self.pool(self.relu1(self.conv1(x)))
        x = self.pool(self.relu2(self.conv2(x)))
        return self.fc2(self.relu3(self.fc1(torch.flatten(x, 1))))  # type: ignore[no-any-return]


class LeNet(nn.Module):
    """The LeNet of NNI's examples: 5x5 convolutions to 20 and 50 channels, linear layers of 500 and 10."""

    def __init__(self, channels: int = 1, size: int = 28, classes: int = 10) -> None:
        super().__init__()
        left = ((size - 4) // 2 - 4) // 2  # what two unpadded 5x5 convolutions, each with a pool of 2, leave
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.relu1 = nn.ReLU6()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.relu2 = nn.ReLU6()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(left * left * 50, 500)
        self.relu3 = nn.ReLU6()
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [N, classes] of images [N, channels, size, size]."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        return self.fc2(self.relu3(self.fc1(torch.flatten(x, 1))))  # type: ignore[no-any-return]
