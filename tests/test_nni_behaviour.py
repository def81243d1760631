"""The situations of scripts/make_nni_behaviour.py: what quantkern does in them, and that NNI 2.10 does something else.

docs/migrating.md speaks of each of them by its name.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import quantkern

ROOT = Path(__file__).resolve().parents[1]


def _load_situations() -> ModuleType:
    path = ROOT / "scripts" / "make_nni_behaviour.py"
    spec = importlib.util.spec_from_file_location("make_nni_behaviour", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SITUATIONS = _load_situations()
NNI = json.loads(SITUATIONS.TABLE.read_text())

OURS: dict[str, Any] = {
    "delay_stops_gradients": False,
    "delay_zeroes_evaluation": False,
    "zeros_become_nan": False,
    "lsq_weights_without_gradient": False,
    "lsq_weights_alone_export": "works",
    "observer_keeps_float_weights": False,
    "naive_truncates": False,
    "naive_without_rules": "works",
    "naive_export": "works",
    "dorefa_skips_tanh": False,
    "dorefa_zeros_become_nan": False,
    "dorefa_inputs": "works",
    "channels_of_inputs_export": "works",
    "exported_keys_of_inputs": [
        *("input_axis", "input_bits", "input_dtype", "input_qmax", "input_qmin", "input_scale", "input_scheme"),
        *("input_zero_point", "tracked_max_input", "tracked_min_input"),
    ],
    "exported_state_loads": "works",
    "loaded_range_is_used": True,
    "loaded_range_stays": True,
    "batch_norm_is_lost": False,
    "needs_dummy_input": "works",
    "parameter_groups": [[4, 0.1]],
    "exclude_false_excludes": False,
    "weight_twice_in_state": False,
    "lsq_scale_starts_again": False,
    "folding_spoils_statistics": False,
}


@pytest.mark.filterwarnings("ignore:.*has no range yet and stays float")
@pytest.mark.parametrize("name", SITUATIONS.FACTS)
def test_what_happens(name: str) -> None:
    assert SITUATIONS.FACTS[name](quantkern) == OURS[name]


@pytest.mark.parametrize("name", SITUATIONS.FACTS)
def test_nni_does_something_else(name: str) -> None:
    assert NNI["about"]["nni"] == "2.10"
    assert NNI["facts"][name] != OURS[name]


def test_the_document_has_every_situation() -> None:
    assert NNI["facts"].keys() == OURS.keys() == SITUATIONS.FACTS.keys()
    text = (ROOT / "docs" / "migrating.md").read_text()
    assert [name for name in OURS if f"`{name}`" not in text] == []
