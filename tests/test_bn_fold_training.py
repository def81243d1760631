"""Training with folded batch norms: freezing, resuming, compiling, other ranks, and that it is as good as without."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from folded_networks import BOTH, batch, fine, net, rules, train
from quantizer_checks import NoReads
from torch import Tensor, nn

from quantkern.current_range import WeightFakeQuant
from quantkern.learned import LearnedWeight
from quantkern.quantizers import LsqQuantizer, QAT_Quantizer

# ---------------------------------------------------------------- training


@BOTH
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_freezing_after_so_many_steps(kind: type, with_optimizer: bool) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01) if with_optimizer else None
    quantizer = kind(model, rules(8, "weight", **fine(kind)), optimizer, fold_bn=True, freeze_bn_step=3)
    seen = []
    for seed in range(5):
        train(model, optimizer, range(seed, seed + 1))
        seen.append((model.bn.running_mean.clone(), model.bn.running_var.clone()))
    moves = [not torch.equal(before[0], after[0]) for before, after in zip(seen, seen[1:], strict=False)]
    assert moves == [True, True, False, False]
    assert model.bn.num_batches_tracked == 3
    model.train()
    training = model(batch(9))
    gradients = torch.autograd.grad(training.square().sum(), list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(g.abs().max() > 0 for (n, _), g in zip(model.named_parameters(), gradients, strict=True) if "bn" in n)
    assert torch.equal(training, model.eval()(batch(9)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # The folded model is the same function without rounding: 8-bit weights of at most 72 terms.
    difference = quantizer.folded_model()(batch(9)) - training
    assert difference.abs().max() < 0.05 * training.abs().max()


def test_after_freezing_the_folded_model_is_the_quantized_one_up_to_rounding() -> None:
    model = net()
    quantizer = QAT_Quantizer(model, rules(16, "weight input output", ema_decay=1e-3), fold_bn=True, freeze_bn_step=2)
    train(model, None, range(4))
    model.eval()
    torch.testing.assert_close(quantizer.folded_model()(batch(3)), model(batch(3)), rtol=0, atol=2e-4)


def test_a_batch_norm_in_evaluation_mode_is_folded_in_training_too() -> None:
    """As is usual when a trained network is tuned with its statistics kept."""
    model = net()
    QAT_Quantizer(model, rules(8), fold_bn=True)
    model.train()
    model.bn.eval()
    output = model.conv(batch())
    assert model.bn(output) is output and model.bn.num_batches_tracked == 0
    assert torch.equal(output, model.eval().conv(batch()))


def test_a_training_step_never_waits_for_the_device() -> None:
    for with_optimizer in (True, False):
        model = net().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        given = optimizer if with_optimizer else None
        QAT_Quantizer(model, rules(8, "weight input output"), given, fold_bn=True, freeze_bn_step=2)
        with NoReads():
            for seed in range(4):
                optimizer.zero_grad()
                model(batch(seed)).square().mean().backward()
                optimizer.step()
        assert model.conv.parametrizations.weight[0].keeps_statistics


@BOTH
@pytest.mark.parametrize("at", [1, 3])
def test_resuming_from_a_state_dict_is_exact(kind: type, at: int) -> None:
    """Before and after the batch norms freeze at step 2."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        kind(model, rules(8, "weight input output"), optimizer, fold_bn=True, freeze_bn_step=2)
        return model, optimizer

    model, optimizer = build()
    train(model, optimizer, range(at))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, other_optimizer = build()
    train(other, other_optimizer, range(50, 50 + 4 - at))
    other.load_state_dict(state[0])
    other_optimizer.load_state_dict(state[1])
    expected = train(model, optimizer, range(at, 6))
    found = train(other, other_optimizer, range(at, 6))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    states = other.state_dict()
    assert all(torch.equal(value, states[key]) for key, value in model.state_dict().items())


@BOTH
def test_copies_live_on_their_own(kind: type) -> None:
    model = net()
    kind(model, rules(8, "weight input output"), fold_bn=True, freeze_bn_step=3)
    train(model, None, range(1))
    twin = copy.deepcopy(model)
    assert twin.bn.folding.layer is twin.conv and twin.conv.folding.norm is twin.bn
    kept = copy.deepcopy(model.state_dict())
    expected = train(twin, None, range(1, 5))
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(train(model, None, range(1, 5)), expected, strict=True))
    assert torch.equal(model.eval()(batch()), twin.eval()(batch()))


@pytest.mark.usefixtures("scales_the_long_way")
@BOTH
@pytest.mark.parametrize("scheme", ["per_tensor_symmetric", "per_channel_symmetric"])
def test_compiled_training_equals_eager(kind: type, scheme: str) -> None:
    """torch.compile recomputes what it can in the backward, and the batch norm has renewed its statistics by then."""
    eager, compiled = net(), net()
    calls = []
    for model in (eager, compiled):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        config = rules(4, "weight input output", quant_scheme={"weight": scheme}, quant_dtype={"weight": "int"})
        kind(model, config, optimizer, fold_bn=True, freeze_bn_step=3)
        train(model, optimizer, range(1))
        calls.append(optimizer)
    torch._dynamo.reset()
    fast = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(1, 6):
        first = train(eager, calls[0], range(seed, seed + 1))[0]
        second = train(compiled, calls[1], range(seed, seed + 1), fast)[0]
        assert torch.equal(first, second)
        for (name, mine), theirs in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad), (seed, name)
    assert eager.bn.num_batches_tracked == compiled.bn.num_batches_tracked == 3
    state = compiled.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in eager.state_dict().items())
    assert torch.equal(fast.eval()(batch(8)), eager.eval()(batch(8)))


def test_compiled_forwards_that_count_steps_freeze_with_the_next_train() -> None:
    model = net().train()
    QAT_Quantizer(model, rules(), fold_bn=True, freeze_bn_step=2)
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        fast(batch(seed))
    assert model.bn.num_batches_tracked == 3 and not model.conv.folding.keeps_statistics
    model.train()
    fast(batch(3))
    assert model.bn.num_batches_tracked == 3 and model.conv.folding.keeps_statistics


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_types(dtype: torch.dtype) -> None:
    model = net()
    QAT_Quantizer(model, rules(8, "weight"), fold_bn=True)
    model.to(dtype)
    for mode in (True, False):
        output = model.train(mode)(batch().to(dtype))
        assert output.dtype is dtype and output.isfinite().all()
    model.train()(batch().to(dtype)).sum().backward()
    assert model.conv.parametrizations.weight.original.grad.dtype is dtype


def test_autocast() -> None:
    model = net()
    QAT_Quantizer(model, rules(8, "weight input output"), fold_bn=True)
    for mode in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            output = model.train(mode)(batch())
        assert output.isfinite().all() and output.dtype is torch.bfloat16


def test_other_parametrizations_of_the_weight(tmp_path: Path) -> None:
    model = net()
    nn.utils.parametrizations.weight_norm(model.conv)
    floating = copy.deepcopy(model)
    quantizer = QAT_Quantizer(model, rules(16), fold_bn=True)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(batch()), floating.train(mode)(batch()), rtol=1e-2, atol=1e-2)
    folded = quantizer.folded_model()
    torch.testing.assert_close(folded(batch()), floating(batch()), rtol=1e-4, atol=1e-4)
    assert type(folded.conv) is nn.Conv2d and set(folded.state_dict()) >= {"conv.weight", "conv.bias"}
    quantizer.export_model(tmp_path / "m.pt")
    floating.load_state_dict(torch.load(tmp_path / "m.pt"), strict=True)
    assert torch.equal(model(batch()), floating(batch()))


def test_data_parallel_says_what_to_do() -> None:
    model = net()
    QAT_Quantizer(model, rules(), fold_bn=True)
    with pytest.raises(RuntimeError, match="DataParallel cannot replicate a layer with a folded batch norm"):
        model.conv._replicate_for_data_parallel()


def _one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(f"{folder}/store", 2), rank=rank, world_size=2
    )
    try:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        LsqQuantizer(model, rules(8, "weight input output"), optimizer, fold_bn=True, freeze_bn_step=2)
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel.train()
        for seed in range(4):
            optimizer.zero_grad()
            parallel(batch(10 * rank + seed)).square().mean().backward()
            optimizer.step()
        parallel(batch(0))  # broadcasts the statistics of the first rank once more
        torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ranks_of_distributed_training_stay_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["bn.num_batches_tracked"] == 2
    assert all(torch.equal(value, second[key]) for key, value in first.items())


# ---------------------------------------------------------------- does it train


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def train_on_digits(fold: bool, bits: int, kind: type) -> tuple[list[float], float]:
    """Mean loss of every epoch, and the accuracy on the last third."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(3)
    model = Digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    delay = {"quant_start_step": 20} if kind is LsqQuantizer else {}
    config = rules(bits, "weight input output", **delay)
    quantizer = kind(model, config, optimizer, fold_bn=fold, freeze_bn_step=114 if fold else None)
    assert len(quantizer.folded_layers) == 2 * fold
    count, losses = 1200, []
    for epoch in range(8):
        if epoch == 6:  # step 114: fixed statistics bear a smaller learning rate only, without quantization too
            for group in optimizer.param_groups:
                group["lr"] /= 10
        model.train()
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch)).split(64)
        total = 0.0
        for picked in order:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[picked]), labels[picked])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(picked)
        losses.append(total / count)
    model.eval()
    with torch.no_grad():
        return losses, (model(images[count:]).argmax(1) == labels[count:]).float().mean().item()


@pytest.mark.parametrize(("bits", "kind"), [(8, QAT_Quantizer), (4, QAT_Quantizer), (4, LsqQuantizer)])
def test_training_with_folding_is_as_good_as_without(bits: int, kind: type) -> None:
    """Every epoch's loss within 0.05 + 10 % and the accuracy within 2 points: between seeds they differ by more."""
    plain, plain_accuracy = train_on_digits(False, bits, kind)
    folded, accuracy = train_on_digits(True, bits, kind)
    for epoch, (loss, other) in enumerate(zip(folded, plain, strict=True)):
        assert loss < other * 1.1 + 0.05, (epoch, loss, other)
    assert folded[-1] < 0.1 and accuracy > plain_accuracy - 0.02, (plain, plain_accuracy, folded, accuracy)


def test_the_state_of_a_folded_weight_is_an_ordinary_one() -> None:
    model = net()
    QAT_Quantizer(model, rules(), fold_bn=True)
    assert isinstance(model.conv.parametrizations.weight[0], WeightFakeQuant)
    assert set(model.conv.state_dict()) == {"parametrizations.weight.original"} | {
        f"parametrizations.weight.0.{name}" for name in ("scale", "zero_point")
    }
    learned = net()
    LsqQuantizer(learned, rules(), fold_bn=True)
    assert isinstance(learned.conv.parametrizations.weight[0], LearnedWeight)
