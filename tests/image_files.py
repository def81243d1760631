"""Small data sets of random images, in the files that the examples read."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, count: int = 20, size: int = 28, compress: bool = True) -> dict[str, np.ndarray]:
    random = np.random.RandomState(0)
    arrays = {}
    folder.mkdir(parents=True, exist_ok=True)
    for stem in ("train", "t10k"):
        arrays[f"{stem}-images-idx3-ubyte"] = random.randint(0, 256, (count, size, size))
        arrays[f"{stem}-labels-idx1-ubyte"] = random.randint(0, 10, count)
    for name, array in arrays.items():
        content = idx(array)
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)
    return arrays


def cifar_part(seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(seed)
    return random.randint(0, 256, (4, 3, 32, 32), dtype=np.uint8), random.randint(0, 10, 4)


CIFAR_PARTS = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def write_cifar_binary(folder: Path) -> None:
    for seed, stem in enumerate(CIFAR_PARTS):
        images, labels = cifar_part(seed)
        records = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(4, -1)], axis=1)
        (folder / f"{stem}.bin").write_bytes(records.tobytes())


def write_cifar_python(folder: Path) -> None:
    for seed, stem in enumerate(CIFAR_PARTS):
        images, labels = cifar_part(seed)
        batch = {b"data": images.reshape(4, -1), b"labels": labels.tolist(), b"batch_label": b"one of six"}
        (folder / stem).write_bytes(pickle.dumps(batch, protocol=2))
