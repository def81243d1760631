"""No ONNX file where its numbers would be wrong, and errors that say why."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_networks import Net, X, net, observer, qat, rules
from torch import Tensor

from quantkern import NaiveQuantizer, ObserverQuantizer
from quantkern.export import DriftError
from quantkern.export.lowering import Lowering

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("one_table_of_translations"),
]


@pytest.mark.parametrize("what", ["zero_point", "scale", "clip"])
def test_a_wrong_graph_is_caught_and_no_file_is_written(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = observer() if what == "clip" else qat()
    honest = Lowering.run

    def tampered(self: Lowering) -> object:
        grids = honest(self)
        for node in list(self.graph):
            value = node.inputs[2] if len(node.inputs) > 2 else None
            if what == "clip" and node.op_type == "Clip":
                value.const_value = self.ir.tensor(np.array(90, np.uint8))
            elif what == "zero_point" and node.op_type == "QuantizeLinear":
                value.const_value = self.ir.tensor(value.const_value.numpy() + np.uint8(20))
                node.replace_input_with(2, self.initializer("other", np.array(3), "UINT8"))
            elif what == "scale" and node.op_type == "DequantizeLinear" and "weight" in node.inputs[1].name:
                node.inputs[1].const_value = self.ir.tensor(node.inputs[1].const_value.numpy() * np.float32(1.1))
        return grids

    monkeypatch.setattr(Lowering, "run", tampered)
    (tmp_path / "model.onnx").write_text("an older file")
    with pytest.raises(DriftError, match="drifts from the model, more than max_mean_steps=0.5") as caught:
        quantizer.export_onnx(tmp_path / "model.onnx", X)
    assert caught.value.outputs[0].mean_steps > 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "an older file"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"example_input": torch.randn(2, 3)}, ValueError, "does not run on example_input"),
        ({"example_input": None}, ValueError, "does not run on example_input"),
        ({"path": "missing/model.onnx"}, OSError, "cannot write path .*missing"),
        ({"path": "."}, IsADirectoryError, "is the folder"),
        ({"path": 3}, TypeError, "path must be a path, got 3"),
        ({"max_mean_steps": -1}, ValueError, "max_mean_steps must be a number >= 0, got -1"),
    ],
    ids=str,
)
def test_bad_arguments(
    arguments: dict[str, Any], error: type[Exception], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=text):
        qat().export_onnx(**{"path": "model.onnx", "example_input": X, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = qat()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs onnx and onnxscript and onnxruntime: pip install '.\[onnx\]'"):
        quantizer.export_onnx(tmp_path / "a.onnx", X)


def test_at_the_wrong_time(tmp_path: Path) -> None:
    calibrating = ObserverQuantizer(net().eval(), rules())
    calibrating.calibrate([X], progress=False)
    with pytest.raises(RuntimeError, match=r"export_onnx\(\): there are no scales yet; call compress\(\) first"):
        calibrating.export_onnx(tmp_path / "a.onnx", X)
    quantizer = qat()
    quantizer.export_model(tmp_path / "model.pt")
    with pytest.raises(RuntimeError, match=r"export_onnx\(\): export_model\(\) has taken the quantizers off"):
        quantizer.export_onnx(tmp_path / "a.onnx", X)


def test_models_that_cannot_be_written(tmp_path: Path) -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(ValueError, match="torch.export cannot trace the model"):
        NaiveQuantizer(Branching()).export_onnx(tmp_path / "a.onnx", X)
    with pytest.raises(ValueError, match="needs a float32 model, this one has torch.float64"):
        NaiveQuantizer(net().double()).export_onnx(tmp_path / "a.onnx", X.double())
    model = net()
    quantizer = NaiveQuantizer(model)
    with torch.no_grad():
        model.conv1.parametrizations.weight.original[0] = float("nan")
    with pytest.raises(ValueError, match="conv1.weight holds NaN or infinity"):
        quantizer.export_onnx(tmp_path / "a.onnx", X)
    assert list(tmp_path.iterdir()) == []
