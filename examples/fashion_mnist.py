"""Train NNI's LeNet on the 70,000 images of Fashion-MNIST, as float and with every quantizer, and compare.

    apt-get install dataset-fashion-mnist
    python examples/fashion_mnist.py
    python examples/fashion_mnist.py --dataset cifar10 --data ~/cifar-10-batches-bin

A few minutes on two cores; --limit 6000 for a quick look.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import data
import models
import train
from recipes import ONE_OF_EACH


def main(arguments: list[str] | None = None) -> list[train.Run]:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    train.add_options(parser, epochs=3, batch_size=128, seeds=1, recipes=ONE_OF_EACH)
    parser.add_argument("--dataset", choices=("fashion-mnist", "mnist", "cifar10"), default="fashion-mnist")
    parser.add_argument("--data", type=Path, help="folder of the data set's files")
    options = parser.parse_args(arguments)
    try:
        images = data.load(options.dataset, options.data).limited(options.limit)
    except (data.MissingData, data.BadData) as error:
        raise SystemExit(str(error)) from None
    _, channels, size, _ = images.train_images.shape
    setting = train.Setting(
        lambda: models.LeNet(channels, size, len(images.classes)),
        options.epochs,
        options.batch_size,
        learning_rate=1e-3,
    )
    return train.report(images, setting, options)


if __name__ == "__main__":
    main()
