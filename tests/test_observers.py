"""Observers: exact histograms in any order, bad values, devices, ranks, the compiled loops."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from observed_tensors import EVERY, numbers, seen, spec
from quantizer_checks import NoReads
from torch import Tensor

from quantkern import _C, clip_range, reference
from quantkern.clip_range import Levels
from quantkern.observers import HistogramObserver, histograms, make_observer, ranges

WITH_LOOPS = ["histogram", "minmax", "moving_average"]


def without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (histograms, ranges):
        monkeypatch.setattr(module, "has_loops", lambda x: False)


# ---------------------------------------------------------------- histograms


@pytest.mark.parametrize("channels", [False, True])
def test_a_histogram_does_not_depend_on_the_order_of_batches(channels: bool) -> None:
    batches = [numbers(seed, 6, 3, 50) * 7.0 ** (seed - 3) + seed for seed in range(6)]
    batches.append(torch.zeros(6, 3, 50))
    rule = spec(scheme="per_channel_affine", axis=1) if channels else spec()
    axis = 1 if channels else None
    first = seen(make_observer(rule), batches, axis)
    second = seen(make_observer(rule), batches[::-1], axis)
    whole = seen(make_observer(rule), [torch.cat(batches)], axis)
    for other in (second, whole):
        for name in ("low", "high", "counts", "exponent", "origin"):
            assert torch.equal(getattr(first, name), getattr(other, name)), name
    assert isinstance(first, HistogramObserver) and first.counts.sum() == 7 * 900


def test_bins_hold_what_their_edges_say() -> None:
    batches = [numbers(seed, 1000) * 3**seed for seed in range(4)]
    observer = seen(make_observer(spec()), batches)
    assert isinstance(observer, HistogramObserver)
    histogram, values = observer.histogram(), torch.cat(batches).double()
    expected = torch.searchsorted(values.sort().values, histogram.edges[0], right=True).diff()
    assert torch.equal(histogram.counts[0].long(), expected)
    used = (values.max() - values.min()) / (histogram.edges[0, 1] - histogram.edges[0, 0])
    assert histograms.BINS / 2 - 2 <= used <= histograms.BINS
    assert (histogram.edges == 0).any()


def test_zeros_of_tensors_without_negative_values_have_a_bin_of_their_own() -> None:
    x = numbers(0, 5000).relu()
    observer = seen(make_observer(spec()), [x])
    assert isinstance(observer, HistogramObserver)
    histogram = observer.histogram()
    assert histogram.counts.sum() - histogram.without_zeros().counts.sum() == (x == 0).sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_other_dtypes(dtype: torch.dtype) -> None:
    x = numbers(0, 500).to(dtype)
    first, second = (seen(make_observer(spec()), [value]) for value in (x, x.float()))
    for mine, theirs in zip(first.calculate_qparams(), second.calculate_qparams(), strict=True):
        assert torch.equal(mine, theirs)
    assert first.low.dtype is torch.float32
    assert torch.equal(first.half().low, second.low)


@pytest.mark.parametrize("largest", [3e38, 1e-37, 1e-44])
def test_ranges_at_the_ends_of_float32(largest: float) -> None:
    x = torch.tensor([-largest, 0.0, largest / 2, largest])
    observer = seen(make_observer(spec()), [x * 1e-3, x])
    assert isinstance(observer, HistogramObserver)
    assert observer.counts.sum() == 8
    scale, _ = observer.calculate_qparams()
    assert scale.isfinite() and scale > 0


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("channels", [False, True])
def test_observing_elsewhere_than_on_the_cpu_waits_for_nothing_and_counts_the_same(
    name: str, channels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = spec(name, scheme="per_channel_affine", axis=1) if channels else spec(name)
    batches = [numbers(seed, 4, 3, 40) * (1 + seed % 3) for seed in range(5)]
    batches.append(torch.full((4, 3, 40), torch.nan))
    expected = seen(make_observer(rule, 3), batches, rule.axis)
    without_loops(monkeypatch)
    elsewhere = make_observer(rule, 3)
    own = torch.ops.quantkern.observe_histogram, torch.ops.quantkern.observe_range
    with NoReads(torch.ops.aten.equal, torch.ops.aten.bincount, *own):
        seen(elsewhere, batches, rule.axis)
    assert expected.spoiled == elsewhere.spoiled == 6
    for key, value in expected.state_dict().items():
        if not channels or key != "counts":  # of the refused batch
            assert torch.equal(value, elsewhere.state_dict()[key]), key
    torch.use_deterministic_algorithms(True)
    try:
        assert histograms.count_of(torch.tensor([3.0, 0.0, 3.0]), 5).tolist() == [1, 0, 0, 2, 0]
    finally:
        torch.use_deterministic_algorithms(False)
    with pytest.raises(AssertionError, match="a value was read back"), NoReads():
        bool(elsewhere.low.sum() > 0)


# ---------------------------------------------------------------- awkward tensors


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("value", [0.0, 5.0, -0.25])
@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_channel_symmetric"])
def test_constant_tensors_have_a_usable_scale(name: str, value: float, scheme: str) -> None:
    rule = spec(name, scheme=scheme, dtype="int", axis=1 if "channel" in scheme else None)
    x = torch.full((4, 2, 3), value)
    observer = seen(make_observer(rule), [x, x], rule.axis)
    scale, zero_point = observer.calculate_qparams()
    assert (scale >= 5e-4).all() and (scale <= 1).all()
    y = reference.quantize(x, scale, zero_point, *rule.quant_range, rule.axis)[0]
    assert torch.allclose(y, x, rtol=5e-3, atol=0)


def test_a_dead_channel_gets_the_largest_scale_of_the_others() -> None:
    x = torch.stack([torch.zeros(50), numbers(0, 50), numbers(1, 50) * 9])
    rule = spec("minmax", scheme="per_channel_affine", axis=0)
    scale, _ = seen(make_observer(rule), [x], 0).calculate_qparams()
    assert scale[0] == scale[2] > scale[1]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_batch_with_nan_or_infinity_is_named(name: str, value: float) -> None:
    batches = [numbers(seed, 40) for seed in range(4)]
    good = seen(make_observer(spec(name)), batches[:2])
    before = copy.deepcopy(good)
    batches[2][5] = value
    seen(good, batches[2:])
    with pytest.raises(ValueError, match="the tensor holds NaN or infinity in batch 3 of 4"):
        good.calculate_qparams()
    assert torch.equal(seen(before, batches[3:]).low, good.low)
    with pytest.raises(RuntimeError, match="the tensor has not been seen"):
        seen(make_observer(spec(name)), [torch.empty(0, 3)]).calculate_qparams()


def test_channels_must_stay_as_many() -> None:
    rule = spec(scheme="per_channel_affine", axis=1)
    observer = seen(make_observer(rule, 3, label="conv.input"), [numbers(0, 2, 5)], 1)
    with pytest.raises(ValueError, match=r"conv.input has shape \[2, 4\], expected 5 channels on axis 1"):
        observer(numbers(0, 2, 4))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_channel_affine"])
def test_state_dicts_go_on_exactly(name: str, scheme: str) -> None:
    rule = spec(name, scheme=scheme, axis=1 if "channel" in scheme else None)
    batches = [numbers(seed, 30, 4) * (seed + 1) for seed in range(4)]
    whole = seen(make_observer(rule), batches[:2], rule.axis)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = make_observer(rule)
    resumed.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for observer in (whole, resumed):
        seen(observer, batches[2:], rule.axis)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_loading_forgets_the_range_known_so_far() -> None:
    """A stale one would put values into bins that are not there."""
    wide, narrow = seen(make_observer(spec()), [numbers(0, 100) * 1e6]), seen(make_observer(spec()), [numbers(0, 100)])
    wide.load_state_dict(narrow.state_dict())
    again = seen(make_observer(spec()), [numbers(0, 100), numbers(1, 100) * 50])
    seen(wide, [numbers(1, 100) * 50])
    for key, value in again.state_dict().items():
        assert torch.equal(value, wide.state_dict()[key]), key


# ---------------------------------------------------------------- ranks


def _one_rank(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        found = {}
        for name in EVERY:
            for scheme in ("per_tensor_affine", "per_channel_affine"):
                rule = spec(name, scheme=scheme, axis=1 if "channel" in scheme else None)
                own = seen(make_observer(rule, 3), _batches_of(rank), rule.axis)
                found[f"{name} {scheme}"] = own.over_ranks().state_dict()
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def _batches_of(rank: int) -> list[Tensor]:
    return [numbers(10 * rank + i, 20, 3) * (40.0 if rank else 0.1) for i in range(2 + rank)]


def test_ranks_count_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for key, state in first.items():
        name, scheme = key.split()
        rule = spec(name, scheme=scheme, axis=1 if "channel" in scheme else None)
        assert all(torch.equal(value, second[key][part]) for part, value in state.items()), key
        assert state["batches"] == 5
        if name == "moving_average":
            ends = [seen(make_observer(rule, 3), _batches_of(rank), rule.axis) for rank in range(2)]
            assert torch.equal(state["high"], torch.maximum(ends[0].high, ends[1].high))
            continue
        whole = seen(make_observer(rule, 3), [*_batches_of(0), *_batches_of(1)], rule.axis)
        assert all(torch.equal(value, whole.state_dict()[part]) for part, value in state.items()), key


# ---------------------------------------------------------------- loops


@pytest.fixture(params=_C.supported_cpu_capabilities())
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)


def _batches(kind: str, dtype: torch.dtype) -> list[Tensor]:
    batches = [numbers(seed, 4, 5, 7, 9) * 3.0 ** (seed % 4) for seed in range(4)]
    batches += [torch.zeros(4, 5, 7, 9), batches[0].relu() * 1e3, -batches[1].abs() * 1e-3]
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": lambda x: x,
        "channels_last": lambda x: x.to(memory_format=torch.channels_last),
        "sliced": lambda x: x[:, :, 1::2],
        "expanded": lambda x: x[:1].expand(4, 5, 7, 9),
        "rows": lambda x: x.permute(0, 2, 3, 1).reshape(-1, 5).t(),
        "large": lambda x: x.repeat(30, 1, 3, 2),
    }
    return [forms[kind](batch.to(dtype)) for batch in batches]


@pytest.mark.parametrize("observer", WITH_LOOPS)
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("kind", ["plain", "channels_last", "sliced", "expanded", "rows", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_loops_count_what_operations_of_torch_count(
    kind: str, dtype: torch.dtype, channels: bool, observer: str, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    axis = (0 if kind == "rows" else 1) if channels else None
    rule = spec(observer, scheme="per_channel_affine", axis=axis) if channels else spec(observer)
    batches = _batches(kind, dtype)
    ours = seen(make_observer(rule, 5), batches, axis).state_dict()
    without_loops(monkeypatch)
    for name, expected in seen(make_observer(rule, 5), batches, axis).state_dict().items():
        assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize("name", WITH_LOOPS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 13, 1000])
@pytest.mark.parametrize("channels", [False, True])
def test_the_loops_take_nothing_from_a_spoiled_batch(
    bad: float, place: int, channels: bool, name: str, capability: str
) -> None:
    axis = 0 if channels else None
    rule = spec(name, scheme="per_channel_affine", axis=axis) if channels else spec(name)
    observer = seen(make_observer(rule, 3), [numbers(0, 3, 401)], axis)
    before = copy.deepcopy(observer.state_dict())
    batch = numbers(1, 3, 401) * 100
    batch.view(-1)[place] = bad
    seen(observer, [batch, batch], axis)
    before["batches"] += 2
    before["spoiled"] += 2
    for key, value in observer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_counts_do_not_depend_on_threads() -> None:
    batches = [numbers(seed, 1 << 19) * (seed + 1) for seed in range(3)]
    before, states = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            states.append(seen(make_observer(spec()), batches).state_dict())
    finally:
        torch.set_num_threads(before)
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


@pytest.mark.parametrize("levels", [Levels(0, 127, False), Levels(-127, 127, True), Levels(0, 7, False)])
@pytest.mark.parametrize("name", ["normal", "relu", "skewed", "negative", "zeros", "outlier"])
def test_the_search_finds_what_operations_of_torch_find(levels: Levels, name: str, capability: str) -> None:
    x = numbers(3, 6, 4000)
    makes: dict[str, Callable[[Tensor], Tensor]] = {
        "normal": lambda x: x,
        "relu": lambda x: x.relu(),
        "skewed": lambda x: x.exp() - 1,
        "negative": lambda x: -x.abs(),
        "zeros": lambda x: x * 0,
        "outlier": lambda x: torch.cat([x, torch.full((6, 1), 50.0)], 1),
    }
    observer = seen(make_observer(spec(scheme="per_channel_affine", axis=0)), [makes[name](x)], 0)
    assert isinstance(observer, HistogramObserver)
    histogram = observer.histogram()
    found = torch.stack(observer.search(histogram, levels))
    expected = torch.stack(clip_range.smallest_error(histogram, levels))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"low": torch.zeros(2)}, ValueError, "low must hold one value"),
        ({"counts": torch.zeros(1, 4)}, TypeError, "counts must be Long"),
        ({"counts": torch.zeros(1, 2, dtype=torch.int64)}, ValueError, "3 to 65536 bins"),
        ({"origin": torch.zeros(2, dtype=torch.int64)}, ValueError, r"origin must be contiguous, .* of shape \[1\]"),
        ({"x": torch.zeros(3, dtype=torch.int64)}, TypeError, "floating-point"),
    ],
)
def test_state_that_does_not_fit_is_refused(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    count = torch.zeros((), dtype=torch.int64)
    given: dict[str, Any] = {"x": torch.ones(3), "axis": None, "low": torch.zeros(()), "high": torch.zeros(())}
    given |= {"counts": torch.zeros(1, 8, dtype=torch.int64), "exponent": count.reshape(1), "origin": count.reshape(1)}
    given |= {"batches": count, "spoiled": count.clone()}
    with pytest.raises(error, match=message):
        torch.ops.quantkern.observe_histogram.default(*(given | change).values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"low": torch.zeros(2)}, ValueError, "low must hold one value"),
        ({"high": torch.zeros((), dtype=torch.float64)}, TypeError, "high must be Float"),
        ({"batches": torch.zeros(1, dtype=torch.int64)}, ValueError, r"batches must be contiguous, .* of shape \[\]"),
        ({"spoiled": torch.zeros(())}, TypeError, "spoiled must be Long"),
        ({"axis": 1}, IndexError, "axis"),
        ({"x": torch.zeros(3, dtype=torch.int64)}, TypeError, "floating-point"),
    ],
)
def test_a_range_that_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"x": torch.ones(3), "axis": None, "ema_decay": None, "low": torch.zeros(())}
    given |= {"high": torch.zeros(()), "batches": torch.zeros((), dtype=torch.int64)}
    given |= {"spoiled": torch.zeros((), dtype=torch.int64)}
    with pytest.raises(error, match=message):
        torch.ops.quantkern.observe_range.default(*(given | change).values())
    assert not given["batches"]
