"""Whole training steps on a GPU, with every quantizer: no host synchronisation, CUDA graphs, autocast, torch.compile.

A CUDA graph runs on the device alone, so whatever a delay changes must be decided there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from cuda_checks import capture, run_without_waiting, why_not
from test_compile import DELAY, TRAINED, One, batch, net
from test_low_precision import EVERY, HALVES, modules_of, same
from torch import Tensor, nn

DEVICE = "cuda"
GRAPHED = [name for name in EVERY if "freezing" not in name]
"""A frozen batch norm is another program: it takes a new capture."""


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """The same algorithm for a convolution, in a graph and outside."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = deterministic


class Training:
    """A quantized model on the device, with its optimizer and a batch that stays where it is."""

    def __init__(self, name: str, build: Callable[[], nn.Module] = net) -> None:
        torch.manual_seed(0)
        self.model = build().to(DEVICE)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        EVERY[name](self.model, self.optimizer)
        self.x = batch(0).to(DEVICE)

    def step(self, autocast: torch.dtype | None = None) -> tuple[Tensor]:
        self.optimizer.zero_grad()
        with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
            output = self.model(self.x)
        loss = output.float().square().mean()
        loss.backward()
        self.optimizer.step()
        return (loss.detach(),)

    def steps(self, seeds: range) -> Tensor:
        """The losses."""
        losses = []
        for seed in seeds:
            self.x.copy_(batch(seed))
            losses.append(self.step()[0].clone())
        return torch.stack(losses)


def starts(name: str) -> int:
    """The step in which learned scales start, and wait for the device once."""
    return DELAY + 1 if "delayed" in name else 0


@pytest.mark.parametrize("name", EVERY)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    """Delays and their ends included."""
    training = Training(name)
    batches = [batch(seed).to(DEVICE) for seed in range(6)]
    for number, training.x in enumerate(batches):
        if "lsq" in name and number == starts(name):
            training.step()
        else:
            run_without_waiting(training.step)
    counts = [(module.steps_done, int(module.step)) for module in modules_of(training.model) if module.step is not None]
    assert all(done == 6 == counted for done, counted in counts)
    training.model.eval()
    run_without_waiting(lambda: training.model(training.x))


@pytest.mark.parametrize("name", GRAPHED)
def test_a_graph_of_the_whole_step(name: str) -> None:
    """Forward, backward, optimizer and the count of steps: replays are eager steps, across the end of a delay."""
    first = 1 + (starts(name) if "lsq" in name else 0)
    training, eager = Training(name), Training(name)
    eager.steps(range(first))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # momentum and workspaces must exist before the capture
        training.steps(range(first))
    torch.cuda.current_stream().wait_stream(side)
    training.optimizer.zero_grad(set_to_none=True)
    graph, (loss,) = capture(training.step)
    same(training.model, eager.model)  # a capture computes nothing
    for seed in range(first, first + DELAY + 2):
        training.x.copy_(batch(seed))
        graph.replay()
        torch.testing.assert_close(loss, eager.steps(range(seed, seed + 1))[0], rtol=0, atol=0)
        same(training.model, eager.model)
    for model in (training.model, eager.model):
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(training.model(training.x), eager.model(eager.x), rtol=0, atol=0)


@pytest.mark.parametrize("name", TRAINED)
def test_a_graph_of_inference(name: str) -> None:
    training = Training(name)
    training.steps(range(DELAY + 2))
    model = training.model.eval()
    with torch.no_grad():
        model(training.x)
        graph, (output,) = capture(lambda: (model(training.x),))
        for seed in (8, 9):
            training.x.copy_(batch(seed))
            graph.replay()
            torch.testing.assert_close(output, model(training.x), rtol=0, atol=0)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_graph_refuses_a_learned_scale_that_has_not_started(steps: int) -> None:
    training = Training("lsq-delayed")
    for _ in range(steps):
        training.step()
    with pytest.raises(RuntimeError, match=r"a scale starts .*outside of a CUDA graph"):
        capture(training.step)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["qat", "qat-folded-delayed", "lsq", "dorefa", "bnn"])
def test_autocast_and_half_models_wait_for_nothing(name: str, dtype: torch.dtype) -> None:
    training = Training(name)
    training.step(dtype)
    run_without_waiting(lambda: training.step(dtype))
    assert all(p.grad.dtype is torch.float32 for p in training.model.parameters() if p.grad is not None)
    half = copy.deepcopy(training.model).to(dtype)
    x = training.x.to(dtype)
    run_without_waiting(lambda: half(x))
    assert half(x).dtype is dtype


@pytest.mark.parametrize("name", ["qat", "lsq"])
def test_a_scaled_loss_gives_the_same_training(name: str) -> None:
    plain, scaled = Training(name), Training(name)
    for training in (plain, scaled):
        training.step()
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    for _ in range(4):
        plain.step()
        scaled.optimizer.zero_grad()
        scaler.scale(scaled.model(scaled.x).square().mean()).backward()
        scaler.step(scaled.optimizer)
        scaler.update()
    same(plain.model, scaled.model)


@pytest.mark.parametrize("name", ["qat-delayed", "lsq"])
def test_compiled_training_waits_for_nothing(name: str) -> None:
    """One graph for all steps; of one layer, since inductor rounds batch norms otherwise than eager does."""
    torch._dynamo.reset()
    pair = [Training(name, One), Training(name, One)]
    for training in pair:
        training.x = batch(0).view(3, 64).to(DEVICE)
        training.step()
    compiled, eager = pair
    model = compiled.model
    compiled.model = torch.compile(model, fullgraph=True)  # type: ignore[assignment]
    for training in pair:
        training.step()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(DELAY):
            run_without_waiting(compiled.step)
    for _ in range(DELAY):
        eager.step()
    state = model.state_dict()
    for key, value in eager.model.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-6, msg=lambda t, n=key: f"{n}: {t}")
