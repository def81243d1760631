"""Train a small network on real digits, as float and with every quantizer, and compare. Under a minute on two cores.

    python examples/quickstart.py --help

lists the options.
"""

from __future__ import annotations

import argparse

import data
import models
import train
from recipes import ONE_OF_EACH


def main(arguments: list[str] | None = None) -> list[train.Run]:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # One thread: the network is too small to share.
    train.add_options(parser, epochs=15, batch_size=64, seeds=3, recipes=ONE_OF_EACH, threads=1)
    options = parser.parse_args(arguments)
    try:
        digits = data.digits().limited(options.limit)
    except (data.MissingData, data.BadData) as error:
        raise SystemExit(str(error)) from None
    setting = train.Setting(models.DigitsNet, options.epochs, options.batch_size, learning_rate=3e-3)
    return train.report(digits, setting, options)


if __name__ == "__main__":
    main()
