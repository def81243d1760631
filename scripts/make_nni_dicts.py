"""Writes tests/data/nni_calibration_dicts.json: what export_model of NNI's quantizers returns, for our tests to load.

Run it in an environment with nni 2.10 and torch:  python scripts/make_nni_dicts.py

Weights and inputs are the integer formulas of make_nni_calibration.py, so nothing depends on a random generator. A
dict is stored as NNI returns it, numbers as hexadecimal floats, tensors with their shape and dtype.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from make_nni_calibration import batches, numbers
from torch import Tensor, nn

TABLE = Path(__file__).resolve().parent.parent / "tests" / "data" / "nni_calibration_dicts.json"
STEPS = 3
WEIGHT_AND_INPUT = {"quant_types": ["weight", "input"], "quant_bits": {"weight": 8, "input": 8}}
OUTPUT = {"quant_types": ["output"], "quant_bits": {"output": 8}, "op_names": ["relu"]}
RULES: dict[str, list[dict[str, Any]]] = {
    "qat": [{**WEIGHT_AND_INPUT, "op_types": ["Conv2d", "Linear"]}, OUTPUT],
    "qat symmetric": [
        {**WEIGHT_AND_INPUT, "op_types": ["Conv2d", "Linear"], "quant_dtype": "int",
         "quant_scheme": "per_tensor_symmetric"},
        {**OUTPUT, "quant_dtype": "int", "quant_scheme": "per_tensor_symmetric"},
    ],
    "qat per channel": [
        {"quant_types": ["weight"], "quant_bits": 4, "op_names": ["conv", "fc"], "quant_dtype": "int",
         "quant_scheme": "per_channel_symmetric"},
        OUTPUT,
    ],
    "qat folded": [{**WEIGHT_AND_INPUT, "op_names": ["conv"]}, {**WEIGHT_AND_INPUT, "op_names": ["fc"]}, OUTPUT],
    "lsq": [{**WEIGHT_AND_INPUT, "op_names": ["conv", "fc"]}, OUTPUT],
    "observer": [{**WEIGHT_AND_INPUT, "op_types": ["Conv2d", "Linear"]}, OUTPUT],
    "dorefa": [{"quant_types": ["weight"], "quant_bits": 4, "op_types": ["default"]}],
    "bnn": [
        {"quant_types": ["weight"], "quant_bits": 1, "op_types": ["Conv2d"]},
        {"quant_types": ["output"], "quant_bits": 1, "op_names": ["relu"]},
    ],
}  # fmt: skip
"""NNI's quantizer, and what kind of dict, by the rules that make it."""


class Net(nn.Module):
    """A convolution, a batch norm, a rectifier and a linear layer, with formula weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(12, 4)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(numbers(parameter.shape, seed, False) + 0.01)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 2, 4, 4] -> [N, 4]."""
        return self.fc(self.relu(self.bn(self.conv(x))).flatten(1))


def dict_of(name: str) -> dict[str, Any]:
    """One calibration dict of NNI."""
    from nni.algorithms.compression.pytorch import quantization as nni

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    kind = name.split()[0]
    if kind == "observer":
        quantizer = nni.ObserverQuantizer(model.eval(), RULES[name], optimizer)
        with torch.no_grad():
            for batch in batches(False):
                model(batch)
        quantizer.compress()
    else:
        makers = {
            "qat": lambda: nni.QAT_Quantizer(model, RULES[name], optimizer, dummy_input=batches(False)[0]),
            "lsq": lambda: nni.LsqQuantizer(model, RULES[name], optimizer),
            "dorefa": lambda: nni.DoReFaQuantizer(model, RULES[name], optimizer),
            "bnn": lambda: nni.BNNQuantizer(model, RULES[name], optimizer),
        }
        if name != "qat folded":  # NNI cannot be told not to fold: here nothing follows the convolution
            model.bn = nn.Identity()
        quantizer = makers[kind]()
        quantizer.compress()
        model.train()
        for step in range(STEPS):
            optimizer.zero_grad()
            model(batches(False)[step]).square().sum().backward()
            optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        return quantizer.export_model(str(Path(folder) / "model.pt"), str(Path(folder) / "calibration.pt"))


def stored(value: Any) -> Any:
    """A number or tensor for JSON."""
    if isinstance(value, Tensor):
        entries = [stored(number) for number in value.detach().double().reshape(-1).tolist()]
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "values": entries}
    return value.hex() if isinstance(value, float) else value


def restored(value: Any) -> Any:
    """What ``stored`` was given."""
    if isinstance(value, dict):
        values = [restored(number) for number in value["values"]]
        return torch.tensor(values, dtype=getattr(torch, value["dtype"])).reshape(value["shape"])
    return float.fromhex(value) if isinstance(value, str) else value


def main() -> None:
    """Run every quantizer and write the file."""
    import nni

    about = {
        "generator": "scripts/make_nni_dicts.py",
        "nni": nni.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "steps": STEPS,
        "seed": "none: integer formulas, see Net and make_nni_calibration.batches()",
        "absent": "NNI's NaiveQuantizer has no export_model (NotImplementedError)",
    }
    dicts = {
        name: {layer: {key: stored(value) for key, value in entry.items()} for layer, entry in dict_of(name).items()}
        for name in RULES
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in dicts.items())
    TABLE.write_text(f'{{"about": {json.dumps(about, indent=1)},\n"dicts": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
