"""Workers, forks, spawned processes and threads beside a quantized model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import quantkern.functional as F
from quantkern.quantizers import BNNQuantizer, DoReFaQuantizer, LsqQuantizer, QAT_Quantizer

SECONDS = 120
"""A process that takes longer hangs."""

KINDS = ["weight", "input", "output"]
LAYERS = {"op_types": ["Conv2d", "Linear"]}
ATTACH: dict[str, Callable[[nn.Module, Any], object]] = {
    "qat": lambda model, opt: QAT_Quantizer(model, [{"quant_types": KINDS, "quant_bits": 8, **LAYERS}], opt),
    "lsq": lambda model, opt: LsqQuantizer(model, [{"quant_types": KINDS, "quant_bits": 4, **LAYERS}], opt),
    "dorefa": lambda model, opt: DoReFaQuantizer(
        model, [{"quant_types": [*KINDS, "gradient"], "quant_bits": 4, "seed": 3, **LAYERS}], opt
    ),
    "bnn": lambda model, opt: BNNQuantizer(
        model, [{"quant_types": ["weight"], "quant_bits": 1, "op_names": ["conv2"]}], opt
    ),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.act(self.bn(self.conv1(x)))).flatten(1))


def started(kind: str, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ATTACH[kind](model, optimizer)
    return model, optimizer


def batch(seed: int, size: int = 16) -> Tensor:
    return torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    model.train()
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 3)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    return loss.item()


def trained(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = started(kind)
    for seed in range(2):
        step(model, optimizer, batch(seed))
    return model, optimizer


def assert_same_state(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.fixture(autouse=True)
def _several_threads() -> Iterator[None]:
    """Forks inherit the record of threads that are not theirs, so there should be some."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_a_process(method: str, work: Callable[..., None], *arguments: Any) -> None:
    process = mp.get_context(method).Process(target=work, args=arguments, daemon=True)
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0, "it hangs" if process.exitcode is None else f"exit code {process.exitcode}"


# ---------------------------------------------------------------- processes


class Quantizing(Dataset[Tensor]):
    """Images that the worker quantizes itself."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Tensor:
        return F.fake_quantize(batch(index, 1)[0], 0.1, 0, -128, 127)


def losses_with(workers: int, method: str | None) -> list[float]:
    loader = DataLoader(
        Quantizing(), 16, num_workers=workers, multiprocessing_context=method, persistent_workers=workers > 0
    )
    model, optimizer = started("qat")
    return [step(model, optimizer, x) for _ in range(2) for x in loader]


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_data_loader_workers_while_a_quantized_model_trains(method: str, workers: int) -> None:
    assert losses_with(workers, method) == losses_with(0, None)


def use_threads(values: Tensor, results: Tensor) -> None:
    """An operation of ours and one of torch's, both large enough for several threads."""
    assert torch.get_num_threads() == 3
    results[0].copy_(F.fake_quantize(values, 0.1, 0, -8, 7))
    results[1].copy_(torch.relu(values))


def test_several_threads_after_a_fork() -> None:
    """GNU OpenMP waits for threads that only the parent has; csrc/cpu/fork.cpp."""
    values = torch.linspace(-1, 1, 1 << 19)
    expected = torch.stack([F.fake_quantize(values, 0.1, 0, -8, 7), torch.relu(values)])
    results = torch.zeros_like(expected).share_memory_()
    in_a_process("fork", use_threads, values, results)
    assert torch.equal(results, expected)
    assert torch.equal(F.fake_quantize(values, 0.1, 0, -8, 7), expected[0])  # the parent goes on


def infer(model: nn.Module, x: Tensor, result: Tensor) -> None:
    with torch.no_grad():
        result.copy_(model.eval()(x))


@pytest.mark.parametrize("kind", ATTACH)
def test_a_quantized_model_after_a_fork(kind: str) -> None:
    model, _ = trained(kind)
    with torch.no_grad():
        expected = model.eval()(batch(9))
    result = torch.zeros_like(expected).share_memory_()
    in_a_process("fork", infer, model, batch(9), result)
    assert torch.equal(result, expected)


def train_from(kind: str, state: dict[str, Tensor], results: Any) -> None:
    torch.set_num_threads(1)
    model, optimizer = started(kind)
    model.load_state_dict(state, strict=True)
    loss = step(model, optimizer, batch(5))
    results.put((loss, {name: value.numpy() for name, value in model.state_dict().items()}))


@pytest.mark.parametrize(("method", "kind"), [*(("fork", kind) for kind in ATTACH), ("spawn", "lsq")])
def test_state_dicts_travel_between_processes(method: str, kind: str) -> None:
    torch.set_num_threads(1)
    model, optimizer = trained(kind)
    context = mp.get_context(method)
    results = context.Queue()
    process = context.Process(target=train_from, args=(kind, model.state_dict(), results), daemon=True)
    process.start()
    loss, arrays = results.get(timeout=SECONDS)
    process.join(SECONDS)
    assert process.exitcode == 0
    twin, twin_optimizer = started(kind)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert loss == step(twin, twin_optimizer, batch(5)) == step(model, optimizer, batch(5))
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    assert_same_state(state, twin.state_dict())
    model.load_state_dict(state, strict=True)


def train_here(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for seed in range(5, 8):
        step(model, optimizer, batch(seed))


@pytest.mark.parametrize("kind", ATTACH)
def test_what_a_process_trains_in_shared_memory_is_here(kind: str) -> None:
    """Weights, scales, ranges and counters are written where they lie, never replaced."""
    alone, alone_optimizer = trained(kind)
    train_here(alone, alone_optimizer)
    model, optimizer = trained(kind)
    model.share_memory()
    assert all(value.is_shared() for value in model.state_dict().values())
    in_a_process("fork", train_here, model, optimizer)
    assert_same_state(model.state_dict(), alone.state_dict())


# ---------------------------------------------------------------- threads


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What each gave, after all ran at once."""
    found: dict[int, Any] = {}
    together = threading.Barrier(len(works))

    def run(index: int, work: Callable[[], Any]) -> None:
        together.wait()
        found[index] = work()

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(found) == len(works), "a thread failed or hangs"
    return [found[index] for index in range(len(works))]


@pytest.mark.parametrize("pair", [("qat", "lsq"), ("dorefa", "bnn"), ("qat", "qat")])
def test_two_models_train_in_two_threads(pair: tuple[str, str]) -> None:
    def works() -> list[Callable[[], tuple[list[float], dict[str, Tensor]]]]:
        def work(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[float], dict[str, Tensor]]:
            return [step(model, optimizer, batch(seed, 64)) for seed in range(8)], model.state_dict()

        models = [started(kind, seed) for seed, kind in enumerate(pair)]
        return [lambda m=m, o=o: work(m, o) for m, o in models]  # type: ignore[misc]

    expected = [work() for work in works()]
    for (losses, state), (own_losses, own_state) in zip(in_threads(*works()), expected, strict=True):
        assert losses == own_losses
        assert_same_state(state, own_state)


@pytest.mark.parametrize("kind", ATTACH)
def test_one_model_answers_several_threads_at_once(kind: str) -> None:
    model, _ = trained(kind)
    model.eval()

    def answers(first: int) -> list[Tensor]:
        with torch.no_grad():
            return [model(batch(seed)) for seed in range(first, first + 8)]

    expected = [answers(first) for first in (0, 8, 16, 24)]
    for got, own in zip(in_threads(*(lambda f=f: answers(f) for f in (0, 8, 16, 24))), expected, strict=True):  # type: ignore[misc]
        assert all(map(torch.equal, got, own))
