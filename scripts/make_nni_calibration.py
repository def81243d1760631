"""Writes tests/data/nni_qat_calibration.json: what NNI's QAT_Quantizer computes, for our tests to equal bit for bit.

Run it in an environment with nni 2.10 and torch:  python scripts/make_nni_calibration.py

Weights and inputs come from integer formulas, so nothing depends on a random generator. Where an observed tensor is
computed by the model (``exact``), all numbers are small multiples of powers of two: every sum of products is exact in
float32, whatever the order of summation, and the table holds on every machine. One tensor is quantized in each case,
because NNI rounds ties differently (round(zero_point + x / scale)), which would show in the layers behind it.
"""

from __future__ import annotations

import itertools
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TABLE = Path(__file__).resolve().parent.parent / "tests" / "data" / "nni_qat_calibration.json"
DTYPES = ("int", "uint")
SCHEMES = ("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric")
BITS = (8, 4)
PLACES = (
    ("weight", "conv", False),
    ("weight", "fc", False),
    ("input", "conv", False),
    ("input", "fc", True),
    ("output", "conv", True),
    ("output", "relu", True),
    ("output", "fc", True),
)
"""(quant type, layer, whether the observed tensor must be computed exactly)."""
STEPS = 3


class Net(nn.Module):
    """A convolution, a rectifier and a linear layer, with formula weights."""

    def __init__(self, exact: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(12, 4)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(numbers(parameter.shape, seed, exact))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 2, 4, 4] -> [N, 4]."""
        return self.fc(self.relu(self.conv(x)).flatten(1))


def numbers(shape: torch.Size | tuple[int, ...], seed: int, exact: bool) -> Tensor:
    """Integers in -15..15 divided by 32, or in -498..498 divided by 1000, scrambled by squares modulo a prime."""
    count = torch.Size(shape).numel()
    index = torch.arange(1, count + 1, dtype=torch.int64) + 101 * seed
    if exact:
        return ((index * index * 7 + index * 3) % 31 - 15).reshape(shape).float() / 32
    return ((index * index * 271 + index * 57) % 997 - 498).reshape(shape).float() / 1000


def batches(exact: bool) -> list[Tensor]:
    """One input for each training step, of different ranges."""
    return [numbers((5, 2, 4, 4), 10 + step, exact) * (1.0 + step % 2) + step / 8 for step in range(STEPS)]


def config_list(quant_type: str, layer: str, bits: int, dtype: str, scheme: str) -> list[dict[str, Any]]:
    """One rule for one tensor of one layer."""
    rule = {"quant_types": [quant_type], "quant_bits": bits, "quant_dtype": dtype, "quant_scheme": scheme}
    return [{**rule, "op_names": [layer]}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, exact: bool) -> None:
    """Training steps with a learning rate of 0: only the statistics move."""
    model.train()
    for batch in batches(exact):
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()


def _hex(value: Tensor) -> list[str]:
    return [number.hex() for number in value.detach().double().reshape(-1).tolist()]


def _run_nni(quant_type: str, layer: str, exact: bool, bits: int, dtype: str, scheme: str) -> dict[str, Any]:
    from nni.algorithms.compression.pytorch.quantization import QAT_Quantizer

    model = Net(exact)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rules = config_list(quant_type, layer, bits, dtype, scheme)
    quantizer = QAT_Quantizer(model, rules, optimizer, dummy_input=batches(exact)[0])
    quantizer.compress()
    train(model, optimizer, exact)
    module = getattr(model, layer).module
    names = [f"{quant_type}_scale", f"{quant_type}_zero_point"]
    if quant_type != "weight":
        names += [f"tracked_min_{quant_type}", f"tracked_max_{quant_type}"]
    case: dict[str, Any] = {name: _hex(getattr(module, name)) for name in names}
    if scheme.startswith("per_tensor"):  # NNI's export fails for per-channel inputs and outputs
        with tempfile.TemporaryDirectory() as folder:
            exported = quantizer.export_model(str(Path(folder) / "model.pt"))
        case["exported_keys"] = sorted(exported[layer])
    return case


def main() -> None:
    """Run every case and write the table."""
    import nni

    cases = []
    for (quant_type, layer, exact), bits, dtype, scheme in itertools.product(PLACES, BITS, DTYPES, SCHEMES):
        found = _run_nni(quant_type, layer, exact, bits, dtype, scheme)
        where = {"quant_type": quant_type, "layer": layer, "exact": exact}
        cases.append({**where, "bits": bits, "dtype": dtype, "scheme": scheme, **found})
    about = {
        "generator": "scripts/make_nni_calibration.py",
        "nni": nni.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "steps": STEPS,
        "seed": "none: integer formulas, see numbers() and batches()",
        "numbers": "hexadecimal floats (float.fromhex), a list per channel, of length 1 per tensor",
    }
    lines = ",\n".join(json.dumps(case) for case in cases)
    TABLE.write_text(f'{{"about": {json.dumps(about, indent=1)},\n"cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
