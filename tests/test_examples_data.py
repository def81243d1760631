"""The examples' data: reading files, damaged ones, saying what is missing, batches."""

from __future__ import annotations

import gzip
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import cifar_part, idx, write_cifar_binary, write_cifar_python, write_mnist

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import data  # noqa: E402
import fashion_mnist  # noqa: E402
import models  # noqa: E402
import quickstart  # noqa: E402
import train  # noqa: E402


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("inside", [".", "MNIST/raw"])
def test_mnist_files(tmp_path: Path, compress: bool, inside: str) -> None:
    arrays = write_mnist(tmp_path / inside, compress=compress)
    images = data.load("mnist", tmp_path)
    assert images.train_images.shape == (20, 1, 28, 28)
    assert images.train_labels.tolist() == arrays["train-labels-idx1-ubyte"].tolist()
    pixels = torch.from_numpy(arrays["t10k-images-idx3-ubyte"]).float()
    train_pixels = torch.from_numpy(arrays["train-images-idx3-ubyte"]).float()
    expected = (pixels - train_pixels.mean()) / train_pixels.std()
    torch.testing.assert_close(images.test_images[:, 0], expected)
    assert (float(images.train_images.mean()), float(images.train_images.std())) == pytest.approx((0, 1), abs=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"PNG, no IDX", "not an IDX file"),
        (idx(np.zeros((2, 3, 3)))[:-1], "asks for 34"),
        (idx(np.zeros((2, 3, 3))) + b"x", "asks for 34"),
        (bytes([0, 0, 8, 3, 0, 0]), "asks for"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(data.BadData, match=message) as caught:
        data.read_idx(path)
    assert str(path) in str(caught.value)


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros((2, 3, 3))))[:-9])
    with pytest.raises(data.BadData, match="cannot be read"):
        data.read_idx(path)


def test_labels_must_fit_images_and_classes(tmp_path: Path) -> None:
    write_mnist(tmp_path, compress=False)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(19)))
    with pytest.raises(data.BadData, match="20 images but 19 labels"):
        data.load("mnist", tmp_path)
    labels.write_bytes(idx(np.full(20, 10)))
    with pytest.raises(data.BadData, match=r"labels must lie in \[0, 9\]"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("write", [write_cifar_binary, write_cifar_python])
def test_cifar10_files(tmp_path: Path, write: object) -> None:
    assert callable(write)
    write(tmp_path)
    images = data.load("cifar10", tmp_path)
    assert images.train_images.shape == (20, 3, 32, 32)
    assert images.test_labels.tolist() == cifar_part(5)[1].tolist()
    assert images.train_labels.tolist() == [label for seed in range(5) for label in cifar_part(seed)[1].tolist()]
    brightest = int(images.test_images[0].argmax())
    assert brightest == int(cifar_part(5)[0][0].argmax())


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("__import__('sys').modules.__setitem__('harm_was_done', 1)",)


def test_a_cifar_pickle_cannot_run_code(tmp_path: Path) -> None:
    write_cifar_python(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Harmful(), b"labels": [0]}))
    with pytest.raises(data.BadData, match="data_batch_3"):
        data.load("cifar10", tmp_path)
    assert "harm_was_done" not in sys.modules


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({b"data": [1], b"labels": [1]})]
)
def test_damaged_cifar_batches_are_named(tmp_path: Path, content: bytes) -> None:
    write_cifar_python(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(data.BadData, match="test_batch"):
        data.load("cifar10", tmp_path)


def test_damaged_cifar_binary_is_named(tmp_path: Path) -> None:
    write_cifar_binary(tmp_path)
    (tmp_path / "data_batch_2.bin").write_bytes(b"12345")
    with pytest.raises(data.BadData, match="data_batch_2.bin: 5 bytes"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("fashion-mnist", "apt-get install dataset-fashion-mnist"), ("mnist", "--data"), ("cifar10", "data_batch_1.bin")],
)
def test_missing_data_sets_say_how_to_get_them(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(data.MissingData, match=message):
        data.load(name, tmp_path)
    with pytest.raises(data.MissingData, match="is not a folder"):
        data.load(name, tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_data_sets_without_a_place_of_their_own_ask_for_a_folder(name: str) -> None:
    with pytest.raises(data.MissingData, match="--data"):
        data.load(name)


def test_examples_end_with_the_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist.main(["--data", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match="pip install scikit-learn"):
        quickstart.main([])


def test_unknown_data_set() -> None:
    with pytest.raises(ValueError, match="imagenet"):
        data.load("imagenet")


def test_fashion_mnist_of_debian() -> None:
    if not data.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("Debian's package is not installed (apt-get install dataset-fashion-mnist)")
    images = data.load("fashion-mnist")
    assert (len(images.train_labels), len(images.test_labels)) == (60000, 10000)
    assert torch.bincount(images.train_labels).tolist() == [6000] * 10


def test_digits_are_split_the_same_way_every_time() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install scikit-learn)")
    first, second = data.digits(), data.digits()
    assert first.train_images.shape == (1437, 1, 8, 8)
    assert first.test_images.shape == (360, 1, 8, 8)
    assert torch.equal(first.test_images, second.test_images)
    assert torch.bincount(first.test_labels).min() > 20
    limited = first.limited(50)
    assert (len(limited.train_labels), len(limited.test_images)) == (50, 50)
    with pytest.raises(ValueError, match="at least 1"):
        first.limited(0)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_lenet_takes_mnist_and_cifar_images(channels: int, size: int) -> None:
    assert models.LeNet(channels, size)(torch.zeros(2, channels, size, size)).shape == (2, 10)


def test_batches_hold_every_image_once() -> None:
    generator = torch.Generator().manual_seed(0)
    assert sorted(torch.cat(list(train.batches(96, 32, generator))).tolist()) == list(range(96))
    assert [len(one) for one in train.batches(100, 32, generator)] == [32, 32, 32]
    assert [len(one) for one in train.batches(5, 32, generator)] == [5]
    assert train.steps_per_epoch(100, 32) == 3


def test_accuracy_counts_right_answers_in_evaluation_mode() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.999), torch.nn.Flatten())
    labels = torch.arange(4)
    scores = torch.eye(4)
    scores[3] = torch.tensor([1.0, 0, 0, 0])
    assert train.accuracy(model, scores, labels, batch_size=3) == 75.0
    assert model.training
