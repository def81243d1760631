"""Scales, zero points and tracked ranges equal NNI 2.10 bit for bit (scripts/make_nni_calibration.py)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkern.quantizers import QAT_Quantizer


def _load_generator() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "scripts" / "make_nni_calibration.py"
    spec = importlib.util.spec_from_file_location("make_nni_calibration", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NNI = _load_generator()
TABLE = json.loads(NNI.TABLE.read_text())


def _name(case: dict[str, Any]) -> str:
    return f"{case['layer']}-{case['quant_type']}-{case['dtype']}{case['bits']}-{case['scheme']}"


def _as_hex(value: Tensor | float | list[float]) -> list[str]:
    return [number.hex() for number in torch.as_tensor(value, dtype=torch.float64).reshape(-1).tolist()]


def test_the_table_is_complete() -> None:
    kinds = {tuple(case[key] for key in ("quant_type", "layer", "bits", "dtype", "scheme")) for case in TABLE["cases"]}
    assert len(kinds) == len(TABLE["cases"]) == len(NNI.PLACES) * len(NNI.BITS) * len(NNI.DTYPES) * len(NNI.SCHEMES)
    assert TABLE["about"]["nni"] == "2.10" and TABLE["about"]["steps"] == NNI.STEPS


@pytest.mark.parametrize("case", TABLE["cases"], ids=_name)
def test_calibration_equals_nni(case: dict[str, Any], tmp_path: Path) -> None:
    model = NNI.Net(case["exact"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rules = NNI.config_list(*(case[key] for key in ("quant_type", "layer", "bits", "dtype", "scheme")))
    quantizer = QAT_Quantizer(model, rules, optimizer)
    NNI.train(quantizer.compress(), optimizer, case["exact"])
    calibration = quantizer.export_model(tmp_path / "model.pt")[case["layer"]]
    names = [f"{case['quant_type']}_scale", f"{case['quant_type']}_zero_point"]
    if case["quant_type"] != "weight":
        names += [f"tracked_min_{case['quant_type']}", f"tracked_max_{case['quant_type']}"]
    assert {name: _as_hex(calibration[name]) for name in names} == {name: case[name] for name in names}
    assert set(case.get("exported_keys", ())) <= set(calibration)


def test_an_nni_calibration_dict_is_read(tmp_path: Path) -> None:
    """NNI writes the range only; the scale and zero point that follow are the ones NNI would use (D9)."""
    for case in TABLE["cases"]:
        if case["quant_type"] == "weight" or case["scheme"].startswith("per_channel"):
            continue
        kind = case["quant_type"]
        rules = NNI.config_list(*(case[key] for key in ("quant_type", "layer", "bits", "dtype", "scheme")))
        quantizer = QAT_Quantizer(NNI.Net(case["exact"]), rules)
        tracked = {key: float.fromhex(case[key][0]) for key in (f"tracked_min_{kind}", f"tracked_max_{kind}")}
        quantizer.load_calibration_config({case["layer"]: {f"{kind}_bits": case["bits"], **tracked}})
        calibration = quantizer.export_model(tmp_path / "model.pt")[case["layer"]]
        for key in (f"{kind}_scale", f"{kind}_zero_point", *tracked):
            assert _as_hex(calibration[key]) == case[key], (_name(case), key)
