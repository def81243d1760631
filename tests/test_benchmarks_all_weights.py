"""The benchmark of all weights at once: the networks' sizes, who is compared with whom, and a whole run."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import all_weights, harness  # noqa: E402


def test_networks_have_their_published_sizes() -> None:
    """Weights without biases and batch norms, as in the papers' tables: 0.43, 11.7 and 25.5 million with them."""
    counts = {name: sum(map(math.prod, shapes)) for name, shapes in all_weights.NETWORKS.items()}
    assert counts == {"lenet": 430_500, "resnet18": 11_678_912, "resnet50": 25_502_912}
    assert [len(shapes) for shapes in all_weights.NETWORKS.values()] == [4, 21, 54]


@pytest.fixture(name="small")
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(all_weights.NETWORKS, "small", [(6, 3, 3, 3), (70, 40), (4, 6, 1, 1)])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("operation", all_weights.OPERATIONS)
def test_a_difference_is_found_out(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    question = all_weights.Question("small", operation, "channel", "both")
    checks = [one.check for one in all_weights.make_case(question, torch.device("cpu")).contestants if one.check]
    assert all(check().accepted for check in checks) and len(checks) == 2
    right = all_weights.Weights.one_by_one
    monkeypatch.setattr(all_weights.Weights, "one_by_one", lambda self: [y * 1.001 for y in right(self)])
    case = all_weights.make_case(question, torch.device("cpu"))
    assert not any(one.check().accepted for one in case.contestants if one.check)


@pytest.mark.usefixtures("small")
def test_whole_run_writes_its_results(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    threads = torch.get_num_threads()
    options = f"--networks small --seconds 0.01 --threads 1 --json {path}"
    try:
        all_weights.main(options.split())
    finally:
        torch.set_num_threads(threads)
    document, results, excluded = harness.read_json(path)
    assert not excluded and document["benchmark"] == "all_weights"
    assert {one.contestant for one in results} == {"copy", "quantkern", "one-by-one"}
    assert len({tuple(one.labels.values()) for one in results}) == 8
