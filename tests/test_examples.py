"""The examples: training a little, saying what is wrong, showing their progress."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from image_files import write_cifar_python, write_mnist

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import bnn_vgg  # noqa: E402
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
