"""The ranges that observers choose: searches against brute force, percentiles, errors against torch's."""

from __future__ import annotations

import warnings

import pytest
import torch
from observed_tensors import WITH_BINS, error, numbers, seen, spec

from quantkern import clip_range
from quantkern.clip_range import Histogram, Levels
from quantkern.observers import HistogramObserver, histograms, make_observer

# ---------------------------------------------------------------- ranges


def test_min_max_and_moving_average() -> None:
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0])]
    widest = seen(make_observer(spec("minmax")), batches)
    assert (widest.low.item(), widest.high.item()) == (-3, 2)
    average = seen(make_observer(spec("moving_average", ema_decay=0.75)), batches)
    assert (average.low.item(), average.high.item()) == (-1.5, 1.75)
    scale, zero_point = widest.calculate_qparams()
    assert scale.item() == pytest.approx(5 / 255) and zero_point.item() == 153


@pytest.mark.parametrize("percentile", [99.0, 99.9, 100.0])
def test_percentiles(percentile: float) -> None:
    x = numbers(3, 100000).square()
    low, high = seen(make_observer(spec("percentile", percentile=percentile)), [x]).clip_range()
    expected = torch.quantile(x.double(), torch.tensor([1 - percentile / 100, percentile / 100]).double())
    width = float(x.max()) / histograms.BINS * 4
    assert (low.item(), high.item()) == pytest.approx(expected.tolist(), abs=width)
    if percentile == 100:
        assert (low.item(), high.item()) == (x.min().item(), x.max().item())


def test_the_integral_of_the_squared_error_is_what_a_sum_approaches() -> None:
    steps = torch.linspace(-9, 9, 400001, dtype=torch.float64)
    nearest = steps.round().clamp(-3, 5)
    area = ((steps - nearest).square() * (steps[1] - steps[0])).cumsum(0)
    found = clip_range.error_integral(steps, torch.tensor(-3.0).double(), torch.tensor(5.0).double())
    assert torch.allclose(found - found[0], area, atol=1e-2)


DISTRIBUTIONS = {
    "normal": lambda: numbers(0, 20000),
    "shifted": lambda: numbers(1, 20000) + 0.7,
    "relu": lambda: numbers(2, 20000).relu(),
    "negative": lambda: -numbers(3, 20000).abs(),
    "heavy": lambda: numbers(4, 20000) ** 3,
    "one outlier": lambda: torch.cat([numbers(5, 20000), torch.tensor([60.0])]),
    "uniform": lambda: torch.linspace(0, 6, 20000),
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_tensor_symmetric"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_smallest_error_is_near_that_of_a_full_search(distribution: str, scheme: str, bits: int) -> None:
    x = DISTRIBUTIONS[distribution]()
    rule = spec(bits=bits, scheme=scheme, dtype="int" if "symmetric" in scheme else "uint")
    levels = Levels(*rule.quant_range, rule.symmetric)
    found = error(x, *seen(make_observer(rule), [x]).calculate_qparams(), levels)
    parts = torch.arange(1, 41) / 40
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    pairs = [(a, b) for a in (parts if low < 0 and not rule.symmetric else [1.0]) for b in parts]
    if rule.symmetric:
        pairs = [(b, b) for b in parts]
    best = min(error(x, *levels.scale(low * a, high * b), levels) for a, b in pairs)
    assert found <= best * 1.05
    by_parts = error(x, *seen(make_observer(rule.__class__(**{**vars(rule), "observer": "mse"})), [x])
                     .calculate_qparams(), levels)  # fmt: skip
    assert found <= by_parts * 1.01


def test_errors_of_a_histogram_are_those_of_the_values() -> None:
    x = numbers(7, 200000)
    observer = seen(make_observer(spec()), [x])
    assert isinstance(observer, HistogramObserver)
    low, high = torch.tensor([[-4.0, -2.0, -3.0]]), torch.tensor([[4.0, 2.5, 1.0]])
    for levels in (Levels(0, 15, False), Levels(-7, 7, True)):
        found = clip_range.squared_errors(observer.histogram(), low.double(), high.double(), levels)[0] / x.numel()
        expected = [error(x, *levels.scale(a, b), levels) for a, b in zip(low[0], high[0], strict=True)]
        assert found.tolist() == pytest.approx(expected, rel=2e-3)


def test_entropy_is_least_for_the_range_of_a_full_search() -> None:
    """The divergence itself, written out for one range at a time."""
    x = numbers(8, 50000).abs()
    observer = seen(make_observer(spec("entropy", 4)), [x])
    assert isinstance(observer, HistogramObserver)
    histogram, levels = observer.histogram(), Levels(0, 15, False)
    counts, middle = histogram.counts[0], (histogram.edges[0, 1:] + histogram.edges[0, :-1]) / 2
    middle = middle.clamp(x.min(), x.max())
    highs = histogram.high * torch.arange(64, 0, -1) / 64
    by_hand = []
    for high in highs.tolist():
        q = (middle / (high / 15)).round()
        inside = (q >= 0) & (q <= 15)
        real = counts * inside
        quantized = torch.zeros_like(real)
        for level in range(16):
            here = inside & (q == level) & (counts > 0)
            quantized[here] = real[here].sum() / here.sum().clamp(min=1)
        last = inside.nonzero().max()
        real[last] += counts[q > 15].sum()
        real, quantized = real / real.sum(), (quantized / quantized.sum()).clamp(min=1e-4 / len(real))
        by_hand.append(torch.where(real > 0, real * (real / quantized).log(), 0.0).sum())
    found = clip_range.divergences(histogram, torch.zeros(1, 64).double(), highs.double().unsqueeze(0), levels)
    torch.testing.assert_close(found[0], torch.stack(by_hand), rtol=1e-6, atol=1e-9)
    low, high = observer.clip_range()
    assert low == 0 and high == highs[int(torch.stack(by_hand).argmin())]
    assert 0.3 < high / x.max() < 1


def test_rows_are_searched_in_parts_of_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(9, 64, 7) * torch.arange(1, 8)
    rule = spec(scheme="per_channel_affine", axis=1)
    expected = {name: seen(make_observer(spec(name, scheme=rule.scheme, axis=1)), [x], 1).calculate_qparams()
                for name in WITH_BINS}  # fmt: skip
    monkeypatch.setattr(clip_range, "MOST_ELEMENTS", 1)
    for name, (scale, zero_point) in expected.items():
        for channel in range(7):
            alone = seen(make_observer(spec(name, scheme=rule.scheme, axis=1)), [x[:, channel : channel + 1]], 1)
            mine = alone.calculate_qparams()
            assert torch.equal(mine[0], scale[channel : channel + 1]), (name, channel)
            assert torch.equal(mine[1], zero_point[channel : channel + 1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("quant_max", [127, 255])
def test_errors_are_not_above_those_of_torch(distribution: str, quant_max: int) -> None:
    ao = pytest.importorskip("torch.ao.quantization.observer")
    x = DISTRIBUTIONS[distribution]()
    batches = list(x.split(4000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ao.HistogramObserver(dtype=torch.quint8, quant_min=0, quant_max=quant_max)
        for batch in batches:
            theirs(batch)
        scale, zero_point = theirs.calculate_qparams()
    levels = Levels(0, quant_max, False)
    rule = spec(reduce_range=quant_max == 127)
    assert rule.quant_range == (0, quant_max)
    mine = error(x, *seen(make_observer(rule), batches).calculate_qparams(), levels)
    assert mine <= error(x, scale.reshape(()), zero_point.reshape(()), levels) * 1.005


def test_merging_bins_keeps_every_count() -> None:
    counts = torch.arange(10).double().unsqueeze(0)
    histogram = Histogram(counts, torch.arange(11).double().unsqueeze(0), counts[:, 1], counts[:, 9])
    merged = histogram.merged(4)
    assert merged.counts.tolist() == [[3, 12, 21, 9]] and merged.edges.tolist() == [[0, 3, 6, 9, 12]]
    assert histogram.trimmed().edges.tolist() == [list(range(1, 11))]
