"""Every operation gives the same bits on any number of threads, at sizes that several threads share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from op_sample import Sample
from op_specs import SPECS, WITHOUT_TWIN, histogram_state, range_state
from test_ops import assert_same, sample_x, with_gradient
from torch import Tensor

from quantkern import Backend

_OPS = torch.ops.quantkern

THREADS = (1, 2, 3, 5)
LARGE = 1 << 19
"""Elements: more than five times those below which a second thread is not worth waking (csrc/cpu/parallel.h)."""

SAMPLES = [pytest.param(sample, id=f"{spec.name}-{sample.name}") for spec in SPECS for sample in spec.samples]


@pytest.fixture(autouse=True)
def _own_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_same_on_any_number_of_threads(call: Callable[[], tuple[Tensor, ...]]) -> None:
    results = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        results.append(call())
    for other in results[1:]:
        assert_same(other, results[0])


def with_length(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    return shape[:axis] + (length,) + shape[axis + 1 :]


def enlarged(sample: Sample) -> Sample:
    """The sample with so long a dimension that x has LARGE elements: the first one that no parameter depends on."""
    for axis, size in enumerate(sample.shape):
        try:
            sample.run(torch.ones(with_length(sample.shape, axis, size + 1)), Backend.NATIVE)
        except ValueError:
            continue  # there is a scale for every index of this dimension
        others = torch.Size(with_length(sample.shape, axis, 1)).numel()
        return replace(sample, shape=with_length(sample.shape, axis, LARGE // others + 1))
    raise AssertionError(f"{sample.name}: no dimension may grow")


@pytest.mark.parametrize("sample", SAMPLES)
def test_results_do_not_depend_on_the_number_of_threads(sample: Sample) -> None:
    large = enlarged(sample)
    x = sample_x(large, torch.float32)
    assert_same_on_any_number_of_threads(lambda: with_gradient(large, x, Backend.NATIVE))


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _codes(*shape: int, axis: int | None = None) -> tuple[Tensor, ...]:
    channels = 1 if axis is None else shape[axis]
    scale, zero_point = torch.linspace(0.02, 0.05, channels), torch.arange(channels, dtype=torch.int32)
    y = _OPS.fake_quantize(_numbers(*shape), scale, zero_point, 0, 255, axis)
    codes, parameters = _OPS.to_codes(y, scale, zero_point, 0, 255, axis)
    assert codes.shape == shape
    return codes, parameters, _OPS.from_codes(codes, parameters, 0, axis)


def _histogram(*shape: int, axis: int | None = None) -> tuple[Tensor, ...]:
    state = histogram_state(1 if axis is None else shape[axis])
    for factor in (1, 5):
        _OPS.observe_histogram(_numbers(*shape) * factor, axis, *state)
    return tuple(state)


def _range(*shape: int, axis: int | None = None) -> tuple[Tensor, ...]:
    state = range_state(() if axis is None else (shape[axis],))
    for factor in (1, 5):
        _OPS.observe_range(_numbers(*shape) * factor, axis, 0.9, *state)
    return tuple(state)


def _histogram_range(rows: int) -> tuple[Tensor, ...]:
    edges = torch.arange(513).double().repeat(rows, 1) - 100
    counts = (_numbers(rows, 512).abs() * 100).round().double()
    return tuple(_OPS.histogram_range(counts, edges, edges[:, 0].clone(), edges[:, -1].clone(), 0, 15, False))


KERNELS: dict[str, list[Callable[[], tuple[Tensor, ...]]]] = {
    "to_codes": [lambda: _codes(LARGE + 3), lambda: _codes(6, 70, 1300, axis=1)],
    "observe_histogram": [lambda: _histogram(LARGE + 3), lambda: _histogram(9, 64, 1000, axis=1)],
    "observe_range": [lambda: _range(LARGE + 3), lambda: _range(9, 64, 1000, axis=1)],
    "histogram_range": [lambda: _histogram_range(7)],
}
KERNELS["from_codes"] = KERNELS["to_codes"]


@pytest.mark.parametrize("name", WITHOUT_TWIN)
def test_kernels_without_a_twin_do_not_depend_on_the_number_of_threads(name: str) -> None:
    for call in KERNELS[name]:
        assert_same_on_any_number_of_threads(call)


def test_these_sizes_occupy_several_threads() -> None:
    """A thread of its own, with nobody's pool: what it starts has not been started before."""
    seen: list[int] = []
    x, scale, zero_point = torch.ones(LARGE), torch.ones(1), torch.zeros(1, dtype=torch.int32)

    def work() -> None:
        torch.set_num_threads(4)
        before = len(list(Path("/proc/self/task").iterdir()))
        _OPS.fake_quantize(x, scale, zero_point, 0, 255, None)
        seen.append(len(list(Path("/proc/self/task").iterdir())) - before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [3]
