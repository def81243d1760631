"""Real images for the examples: scikit-learn's digits, Fashion-MNIST, MNIST and CIFAR-10.

Nothing is downloaded. Digits come with scikit-learn, Fashion-MNIST with Debian's package dataset-fashion-mnist, and
files of MNIST's or CIFAR-10's format are read from a folder. A data set that is not there is a ``MissingData`` error
with the command that gets it.
"""

from __future__ import annotations

import gzip
import pickle
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DIGITS_TEST_IMAGES = 360
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGIT_CLASSES = tuple(map(str, range(10)))


class MissingData(Exception):
    """A data set or the package that holds it is not on this machine; the message says how to get it."""


class BadData(Exception):
    """A file is not what its name says."""


@dataclass(frozen=True)
class Dataset:
    """Images [N, channels, height, width], float32, normalized by the training images; labels int64 [N]."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    def limited(self, limit: int | None) -> Dataset:
        """The first ``limit`` training images and as many test images, for quick trials; None keeps all."""
        if limit is None:
            return self
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        return replace(
            self,
            train_images=self.train_images[:limit],
            train_labels=self.train_labels[:limit],
            test_images=self.test_images[:limit],
            test_labels=self.test_labels[:limit],
        )


def _dataset(
    name: str, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], classes: tuple[str, ...]
) -> Dataset:
    """Check, normalize with the mean and deviation of the training images, and give every image a channel axis."""
    tensors = []
    for images, labels in (train, test):
        if len(images) != len(labels):
            raise BadData(f"{name}: {len(images)} images but {len(labels)} labels")
        if not len(images):
            raise BadData(f"{name}: no images")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise BadData(f"{name}: labels must lie in [0, {len(classes) - 1}], got {labels.min()}..{labels.max()}")
        x = torch.from_numpy(np.array(images, dtype=np.float32))
        tensors += [x.unsqueeze(1) if x.dim() == 3 else x, torch.from_numpy(np.array(labels, dtype=np.int64))]
    mean, deviation = tensors[0].mean(), tensors[0].std().clamp(min=1e-6)
    train_images, train_labels, test_images, test_labels = tensors
    return Dataset(
        name, (train_images - mean) / deviation, train_labels, (test_images - mean) / deviation, test_labels, classes
    )


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; a fixed shuffle, the last 360 are the test images."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingData("the digits are part of scikit-learn; install it with: pip install scikit-learn") from None
    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    images, labels = bunch.images[order], bunch.target[order]
    cut = len(labels) - DIGITS_TEST_IMAGES
    return _dataset("digits", (images[:cut], labels[:cut]), (images[cut:], labels[cut:]), DIGIT_CLASSES)


def read_idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes in an IDX file (the format of MNIST), gzipped or not."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise BadData(f"{path}: cannot be read ({error})") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != 8 or content[3] == 0:
        first = content[:4].hex() or "missing"
        raise BadData(f"{path}: not an IDX file of unsigned bytes (its first bytes are {first})")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise BadData(f"{path}: {len(content)} bytes, but its header alone asks for {header}")
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], dtype=">u4"))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise BadData(f"{path}: {len(content)} bytes, but its header ({shape}) asks for {expected}")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _find(folders: list[Path], names: list[str]) -> Path | None:
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def idx_folder(name: str, folder: Path, classes: tuple[str, ...], hint: str) -> Dataset:
    """MNIST's four files (``train-images-idx3-ubyte`` ...; .gz and torchvision's subfolders too) from a folder."""
    folders = [folder / inside for inside in (".", "raw", "MNIST/raw", "FashionMNIST/raw")]
    arrays = []
    for stem, rank in (("train-images", 3), ("train-labels", 1), ("t10k-images", 3), ("t10k-labels", 1)):
        names = [f"{stem}{mark}idx{rank}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
        path = _find(folders, names)
        if path is None:
            raise MissingData(f"{name}: {names[0]} (or .gz) is not in {folder}; {hint}")
        array = read_idx(path)
        if array.ndim != rank:
            raise BadData(f"{path}: expected {rank} dimensions, got {array.ndim}")
        arrays.append(array)
    return _dataset(name, (arrays[0], arrays[1]), (arrays[2], arrays[3]), classes)


def fashion_mnist(folder: Path | None = None) -> Dataset:
    """The 70,000 images of 28x28 pixels of Fashion-MNIST, from Debian's package or from a folder."""
    hint = "get it with: apt-get install dataset-fashion-mnist  (or name the folder of its four files with --data)"
    return idx_folder("fashion-mnist", folder or DEBIAN_FASHION_MNIST, FASHION_CLASSES, hint)


def mnist(folder: Path | None) -> Dataset:
    """MNIST's 70,000 digits of 28x28 pixels from a folder."""
    if folder is None:
        raise MissingData("mnist: name the folder of its files (train-images-idx3-ubyte.gz, ...) with --data FOLDER")
    return idx_folder("mnist", folder, DIGIT_CLASSES, "name the folder of MNIST's four files with --data FOLDER")


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that makes numbers, strings, lists, dicts and numpy arrays, and nothing else: it runs no code."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> object:
        """The few names that arrays need; anything else is refused."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"a CIFAR-10 batch holds no {module}.{name}")
        if name == "_reconstruct":
            module = "numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray"
        return super().find_class(module, name)


def _cifar_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        images, labels = (batch.get(key, batch.get(key.decode())) for key in (b"data", b"labels"))
        return np.asarray(images, dtype=np.uint8).reshape(-1, 3, 32, 32), np.asarray(labels, dtype=np.int64)
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError, ImportError) as error:
        raise BadData(f"{path}: not a CIFAR-10 batch of the Python version ({error})") from error


def _cifar_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = np.fromfile(path, dtype=np.uint8)
    record = 1 + 3 * 32 * 32
    if not content.size or content.size % record:
        raise BadData(f"{path}: {content.size} bytes are not a whole number of CIFAR-10 records ({record} bytes each)")
    records = content.reshape(-1, record)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


def cifar10(folder: Path | None) -> Dataset:
    """CIFAR-10's 60,000 color images of 32x32 pixels from a folder: the binary (.bin) or the Python version."""
    if folder is None:
        raise MissingData("cifar10: name the folder of its batches (data_batch_1.bin, ...) with --data FOLDER")
    folders = [folder, folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py"]
    parts = []
    for stem in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        path = _find(folders, [f"{stem}.bin", stem])
        if path is None:
            hint = "name the folder of the batches with --data FOLDER"
            raise MissingData(f"cifar10: {stem}.bin (or {stem}) is not in {folder}; {hint}")
        parts.append(_cifar_binary(path) if path.suffix == ".bin" else _cifar_python(path))
    images, labels = (np.concatenate([part[i] for part in parts[:5]]) for i in range(2))
    return _dataset("cifar10", (images, labels), parts[5], CIFAR10_CLASSES)


def load(name: str, folder: Path | None = None) -> Dataset:
    """A data set by name: digits, fashion-mnist, mnist or cifar10."""
    if name == "digits":
        return digits()
    readers = {"fashion-mnist": fashion_mnist, "mnist": mnist, "cifar10": cifar10}
    if name not in readers:
        raise ValueError(f"unknown data set {name!r}; there are digits, {', '.join(readers)}")
    if folder is not None and not folder.is_dir():
        raise MissingData(f"{name}: {folder} is not a folder")
    return readers[name](folder)
