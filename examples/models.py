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


class ConvNet(nn.Module):
    """Three 3x3 convolutions with batch norm and ReLU, max pooling down to 3 or 4 pixels, and two linear layers.

    7.6 million products for an image of 28x28 pixels.
    """

    def __init__(self, channels: int = 1, size: int = 28, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = channels
        for width in (32, 64, 128):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            if size >= 7:
                layers.append(nn.MaxPool2d(2))
                size //= 2
            before = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(before * size * size, 128), nn.ReLU(), nn.Linear(128, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Scores [N, classes] of images [N, channels, size, size]."""
        return self.classifier(torch.flatten(self.features(x), 1))  # type: ignore[no-any-return]


def as_built(model: nn.Module) -> nn.Module:
    """The model itself."""
    return model


def with_batch_norm(model: nn.Module) -> nn.Module:
    """A DigitsNet or LeNet with batch norm and Hardtanh in the place of its activations, as a binary network needs.

    Behind a ReLU every sign would be +1, and sums of signs need a scale. Pooling comes before the batch norm, as in
    the paper: the largest of four signs is nearly always +1.
    """
    for name, before in (("relu1", "conv1"), ("relu2", "conv2"), ("relu3", "fc1")):
        layer = model.get_submodule(before)
        norm: list[nn.Module] = (
            [nn.MaxPool2d(2), nn.BatchNorm2d(layer.out_channels)]
            if isinstance(layer, nn.Conv2d)
            else [nn.Identity(), nn.BatchNorm1d(layer.out_features)]
        )
        setattr(model, name, nn.Sequential(*norm, nn.Hardtanh()))
    for name, _ in list(model.named_children()):
        if name.startswith("pool"):
            setattr(model, name, nn.Identity())
    return model


class BinaryVGG(nn.Module):
    """The VGG of NNI's BNN example for 32x32 images; at width 1 it has 14 million weights.

    Module names are NNI's: ``features.0`` .. ``features.20`` are convolutions, poolings, batch norms and Hardtanh,
    the pooling before the batch norm; ``classifier.0``, ``.3`` and ``.6`` are the linear layers.
    """

    def __init__(self, channels: int = 3, classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        sizes = [max(8, round(size * width)) for size in (128, 128, 256, 256, 512, 512)]
        hidden = max(8, round(1024 * width))
        features: list[nn.Module] = []
        before = channels
        for index, size in enumerate(sizes):
            features.append(nn.Conv2d(before, size, 3, padding=1, bias=False))
            if index % 2:
                features.append(nn.MaxPool2d(2))
            features += [nn.BatchNorm2d(size, eps=1e-4), nn.Hardtanh(inplace=True)]
            before = size
        self.features = nn.Sequential(*features)
        classifier: list[nn.Module] = []
        before = sizes[-1] * 4 * 4
        for _ in range(2):
            classifier += [nn.Linear(before, hidden, bias=False), nn.BatchNorm1d(hidden), nn.Hardtanh(inplace=True)]
            before = hidden
        self.classifier = nn.Sequential(*classifier, nn.Linear(hidden, classes), nn.BatchNorm1d(classes, affine=False))

    def forward(self, x: Tensor) -> Tensor:
        """Scores [N, classes] of images [N, channels, 32, 32]."""
        x = self.features(x)
        return self.classifier(x.view(-1, self.classifier[0].in_features))  # type: ignore[no-any-return]
