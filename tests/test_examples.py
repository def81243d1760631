"""The examples: reading data sets, saying what is missing, and training a little."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import bnn_vgg  # noqa: E402
import data  # noqa: E402
import deploy  # noqa: E402
import fashion_mnist  # noqa: E402
import models  # noqa: E402
import ptq  # noqa: E402
import quickstart  # noqa: E402
import sensitivity  # noqa: E402
import train  # noqa: E402
from progress import Progress  # noqa: E402
from recipes import ONE_OF_EACH  # noqa: E402

from quantkern.observers import OBSERVERS  # noqa: E402


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


def test_quickstart_trains_with_every_quantizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install scikit-learn)")
    out, exported, threads = tmp_path / "runs.json", tmp_path / "models", torch.get_num_threads()
    options = ["--epochs", "6", "--limit", "400", "--seeds", "1", "--threads", "1", "--batch-size", "32"]
    try:
        runs = quickstart.main([*options, "--json", str(out), "--export", str(exported)])
    finally:
        torch.set_num_threads(threads)
    assert [run.recipe for run in runs] == list(ONE_OF_EACH)
    # 78 steps on 400 images: enough for 4 bits and more, not quite for weights of 2.
    assert all(run.accuracy > (80 if train.RECIPES[run.recipe].weights >= 4 else 60) for run in runs), runs
    assert len(json.loads(out.read_text())["runs"]) == len(runs)
    printed = capsys.readouterr()
    assert all(name in printed.out for name in ONE_OF_EACH)
    assert "100%" in printed.err
    for name in ONE_OF_EACH:
        if name != "float":
            model = train.RECIPES[name].prepare(models.DigitsNet())
            model.load_state_dict(torch.load(exported / f"{name}-0.pth", weights_only=True), strict=True)
            assert torch.load(exported / f"{name}-0-calibration.pth", weights_only=False)


def test_fashion_mnist_example_runs_on_files_from_a_folder(tmp_path: Path) -> None:
    write_mnist(tmp_path, count=40)
    (run,) = fashion_mnist.main(
        ["--dataset", "mnist", "--data", str(tmp_path), "--epochs", "1", "--batch-size", "20", "--quantizers", "qat"]
    )
    assert run.recipe == "qat"


def test_bnn_vgg_trains_and_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path, count=40)
    out, exported, threads = tmp_path / "run.json", tmp_path / "models", torch.get_num_threads()
    options = ["--dataset", "mnist", "--data", str(tmp_path), "--epochs", "1", "--batch-size", "20", "--threads", "1"]
    try:
        bnn_vgg.main([*options, "--width", "0.0625", "--json", str(out), "--export", str(exported)])
    finally:
        torch.set_num_threads(threads)
    written = json.loads(out.read_text())
    assert written["packed"]["equal"] and written["packed"]["accuracy"] == written["accuracy"]
    assert len(written["epochs"]) == 1 and written["settings"]["width"] == 0.0625 and "torch" in written["versions"]
    assert written["packed"]["float_megabytes"] > 5 * written["packed"]["packed_megabytes"]
    assert "scores equal" in capsys.readouterr().out
    state = torch.load(exported / "bnn-vgg-full.pth", weights_only=True)
    models.BinaryVGG(1, 10, 0.0625).load_state_dict(state, strict=True)
    assert "features.3.weight_packed" in torch.load(exported / "bnn-vgg-full-packed.pth", weights_only=True)


def test_bnn_vgg_reads_cifar10(tmp_path: Path) -> None:
    write_cifar_python(tmp_path)
    outcome = bnn_vgg.main(
        ["--data", str(tmp_path), "--config", "nni", "--epochs", "1", "--batch-size", "10", "--width", "0.0625"]
    )
    assert outcome["data"] == "cifar10" and outcome["train_images"] == 20


def test_bnn_vgg_on_the_float_network_and_without_data(tmp_path: Path) -> None:
    write_mnist(tmp_path, count=20)
    options = ["--dataset", "mnist", "--data", str(tmp_path), "--config", "float", "--epochs", "1", "--width", "0.0625"]
    assert "packed" not in bnn_vgg.main(options)
    with pytest.raises(SystemExit, match="data_batch_1.bin"):
        bnn_vgg.main(["--dataset", "cifar10", "--data", str(tmp_path)])


def test_ptq_compares_every_observer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install scikit-learn)")
    out, threads = tmp_path / "ptq.json", torch.get_num_threads()
    options = ["--epochs", "6", "--limit", "400", "--batch-size", "32"]
    try:
        runs = ptq.main([*options, "--bits", "8,3", "--json", str(out)])
    finally:
        torch.set_num_threads(threads)
    floating = next(run.accuracy for run in runs if run.observer == "float")
    assert floating > 80
    assert {(run.observer, run.bits) for run in runs} == {("float", 32), *((o, b) for o in OBSERVERS for b in (8, 3))}
    assert all(abs(run.accuracy - floating) < 3 for run in runs if run.bits == 8)
    errors = {(run.observer, run.bits): run.error for run in runs}
    assert errors["histogram", 3] < errors["minmax", 3] and errors["histogram", 8] < errors["histogram", 3]
    assert len(json.loads(out.read_text())["runs"]) == len(runs)
    assert "versions" in json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert all(name in printed for name in OBSERVERS)


def test_ptq_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        ptq.main(["--dataset", "fashion-mnist", "--data", str(tmp_path)])
    for arguments in (["--observers", "mse,median"], ["--bits", "8,99"]):
        with pytest.raises(SystemExit):
            ptq.main(arguments)
        assert arguments[1] in capsys.readouterr().err


def test_sensitivity_chooses_bits_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install scikit-learn)")
    page, threads = tmp_path / "report.html", torch.get_num_threads()
    options = ["--epochs", "6", "--limit", "400", "--batch-size", "32", "--bits", "8,5,3"]
    try:
        report = sensitivity.main([*options, "--html", str(page)])
        with pytest.raises(SystemExit, match="cannot be kept"):
            sensitivity.main([*options, "--sqnr", "99"])
    finally:
        torch.set_num_threads(threads)
    assert [row.name for row in report.rows if row.tensor == "weight"] == [
        f"{layer}.weight" for layer in ("conv1", "conv2", "fc1", "fc2")
    ]
    assert {row.bits for row in report.rows} <= {8, 5, 3}
    assert page.read_text(encoding="utf-8").count("<figure>") == len(report.rows) == 8
    printed = capsys.readouterr().out
    assert "SQNR (dB) of the model's outputs" in printed and "Top-1 accuracy (%)" in printed
    assert "Bits for an SQNR of about 20 dB" in printed


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--seeds", "two"], ["--quantizers", "qta"]])
def test_wrong_options_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quickstart.main(arguments)
    assert arguments[1] in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_file_is_ten_lines() -> None:
    stream = io.StringIO()
    with Progress(200, stream) as bar:
        bar.describe("training")
        for _ in range(200):
            bar.advance()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert all("training" in line for line in lines)
    assert lines[-1].strip().startswith("100%")


def test_progress_on_a_terminal_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    with Progress(3, stream) as bar:
        for _ in range(3):
            bar.advance()
    assert "[##############################] 100%" in stream.getvalue()


def test_table_compares_with_float() -> None:
    runs = [
        train.Run("float", 0, 98.0, 2.0),
        train.Run("qat", 0, 97.0, 3.0),
        train.Run("float", 1, 99.0, 2.0),
        train.Run("qat", 1, 99.5, 3.0),
    ]
    header, _, first, second = train.table(runs).splitlines()
    assert header.split()[:2] == ["recipe", "weight"]
    assert first.split() == ["float", "32", "32", "98.50", "0.71", "+0.00", "2.00", "1.00x"]
    assert second.split() == ["qat", "8", "8", "98.25", "1.77", "-0.25", "3.00", "1.50x"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_deploy_exports_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("sklearn", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    out, threads = tmp_path / "run.json", torch.get_num_threads()
    options = ["--epochs", "3", "--limit", "320", "--threads", "1", "--rounds", "3", "--out", str(tmp_path / "files")]
    try:
        outcome, times = deploy.main([*options, "--json", str(out)])
    finally:
        torch.set_num_threads(threads)
    assert outcome.same_top1_percent > 99 and outcome.mean_steps < 0.1 and outcome.onnxruntime_accuracy > 60
    assert outcome.float_bytes > 3 * outcome.int8_bytes > 10_000
    assert [one.batch for one in times] == [1, 32] and all(one.int8_ms > 0 and one.float_ms > 0 for one in times)
    document = json.loads(out.read_text())
    assert document["outcome"]["same_top1_percent"] == outcome.same_top1_percent
    assert document["versions"]["onnxruntime"] and document["latency"][0]["times_faster"] == times[0].ratio
    printed = capsys.readouterr().out
    assert f"same class for {outcome.same_top1_percent:.2f} % of the images" in printed
