"""Networks under every quantizer for the tests of ONNX export, and what their files hold."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantkern import BNNQuantizer, DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, ObserverQuantizer, QAT_Quantizer
from quantkern.export import session_of

onnx = pytest.importorskip("onnx", reason="pip install '.[onnx]'")
pytest.importorskip("onnxscript", reason="pip install '.[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install '.[onnx]'")

TYPES = ["Conv2d", "Linear"]
PER_CHANNEL: dict[str, Any] = {
    "quant_scheme": {"weight": "per_channel_symmetric", "input": "per_tensor_affine"},
    "quant_dtype": {"weight": "int", "input": "uint"},
}
X = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3)
        self.bn1 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.relu1 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 8, 3, bias=not norm)
        self.bn2 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.relu2 = nn.ReLU6()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu1(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.relu2(self.bn2(self.conv2(x))), 1))


def net(norm: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(norm)


def rules(bits: Any = 8, types: tuple[str, ...] = ("weight", "input"), **more: Any) -> list[dict[str, Any]]:
    return [{"quant_types": list(types), "quant_bits": bits, "op_types": TYPES, **more}]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def qat(norm: bool = False, more: dict[str, Any] | None = None, **settings: Any) -> QAT_Quantizer:
    quantizer = QAT_Quantizer(net(norm), rules(**settings), **(more or {}))
    for _ in range(3):
        quantizer.bound_model(X)
    return quantizer


def lsq(norm: bool = False, more: dict[str, Any] | None = None, **settings: Any) -> LsqQuantizer:
    model = net(norm)
    quantizer = LsqQuantizer(model, rules(**settings), sgd(model), **(more or {}))
    model(X)
    return quantizer


def dorefa(bits: int = 4) -> DoReFaQuantizer:
    model = net()
    return DoReFaQuantizer(model, rules(bits, ("weight", "input", "gradient")), sgd(model))


def bnn() -> BNNQuantizer:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Hardtanh(), nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)),
        *(nn.Hardtanh(), nn.Flatten(), nn.Linear(6 * 36, 5)),
    )
    binary = [
        {"quant_types": ["weight"], "quant_bits": 1, "op_names": ["3", "7"]},
        {"quant_types": ["output"], "quant_bits": 1, "op_names": ["2", "5"]},
    ]
    quantizer = BNNQuantizer(model, binary, sgd(model))
    model(X)
    return quantizer


def observer(**settings: Any) -> ObserverQuantizer:
    quantizer = ObserverQuantizer(net().eval(), rules(**settings))
    quantizer.calibrate([X], progress=False)
    quantizer.compress()
    return quantizer


def graph_of(path: Path) -> Any:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return model.graph


def initializers(graph: Any) -> dict[str, str]:
    return {value.name: onnx.TensorProto.DataType.Name(value.data_type) for value in graph.initializer}


def kinds(graph: Any) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def run(path: Path, *inputs: Tensor, **options: Any) -> np.ndarray:
    session = session_of(path, 1, **options)
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0]


def unrounded(quantizer: Any, path: Path, *inputs: Tensor) -> float:
    """The mean difference in parts of the outputs' range, with float biases and every node computed as it stands."""
    import onnxruntime

    quantizer.export_onnx(path, inputs, verify=False, int32_bias=False)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    with torch.no_grad():
        expected = copy.deepcopy(quantizer.bound_model).eval()(*inputs).numpy()
    return float(np.abs(found - expected).mean() / np.ptp(expected))


def optimized(path: Path) -> Counter[str]:
    """The operations that onnxruntime makes of a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".opt.onnx")), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return kinds(onnx.load(options.optimized_model_filepath).graph)


QUANTIZERS = {
    "naive": lambda: NaiveQuantizer(net()),
    "qat": qat,
    "lsq": lsq,
    "dorefa": dorefa,
    "bnn": bnn,
    "observer": observer,
}
