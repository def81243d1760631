"""How the loops of the observers are called at random; what they are compared with are operations of torch."""

from __future__ import annotations

from typing import Any

import oracles
import strategies as st
import torch
from op_draws import dtype_of
from op_sample import Sample
from strategies import Draw, Grid, chance, pick
from torch import Tensor
from trials import Outcome, Trial

from quantkern import Backend, clip_range
from quantkern.clip_range import Levels
from quantkern.observers import Observer, ObserverSpec, make_observer


def seen_by(x: Tensor, axis: int | None, batches: int, backend: Backend, name: str = "histogram") -> Any:
    """An observer after some batches, each twice as large as the one before."""
    scheme = "per_tensor_affine" if axis is None else "per_channel_affine"
    spec = ObserverSpec(8, "uint", scheme, axis=axis, observer=name)
    observer = make_observer(spec, 0 if axis is None else x.shape[axis])
    for k in range(batches):
        batch = x * 2**k
        if backend is Backend.REFERENCE:
            Observer.take_in(observer, batch, axis)
        else:
            observer.take_in(batch, axis)
    return observer


def _batch(draw: Draw) -> tuple[Tensor, int | None, int]:
    """The first batch, the axis of its channels, how many batches there are."""
    dtype, shape = dtype_of(draw), st.shapes(draw, empty=False)
    axis = st.axes(draw, shape)
    axis = None if axis is None else axis % len(shape)
    x = st.laid_out(draw, shape, dtype, Grid(st.scales(draw, usable=True)), finite=chance(draw, 80))
    return x, axis, draw.integer(1, 3)


def observe_range(draw: Draw) -> Trial:
    (x, axis, batches), name = _batch(draw), pick(draw, ("minmax", "moving_average"))

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        observer = seen_by(x, axis, batches, backend, name)
        return observer.batches, observer.spoiled, observer.low, observer.high

    def oracle(outcome: Outcome) -> None:
        """Every end lies where the ends of the batches lie, and is one of them where there is no average."""
        number, spoiled, low, high = outcome.results
        assert int(number) == batches
        rows = [(x * 2**k).float().double().unsqueeze(-1) for k in range(batches)]
        values = [b.reshape(1, -1) if axis is None else b.movedim(axis, 0).flatten(1) for b in rows]
        whole = [k for k in range(batches) if bool(values[k].isfinite().all())]
        first = next((k for k in range(batches) if k not in whole), None)
        assert int(spoiled) == (0 if first is None else first + 1)
        for got, ends in ((low, [values[k].amin(1) for k in whole]), (high, [values[k].amax(1) for k in whole])):
            if not ends:
                continue
            least, most = torch.stack(ends).amin(0), torch.stack(ends).amax(0)
            if name == "minmax":
                assert torch.equal(got.reshape(-1).double(), least if got is low else most)
            room = (least.abs() + most.abs()) * 1e-6 + 1e-44
            assert bool(((got.reshape(-1) >= least - room) & (got.reshape(-1) <= most + room)).all())

    sample = Sample("observe_range", tuple(x.shape), run, like_x=False, differentiable=False)
    return Trial(sample, x, oracle)


def observe_histogram(draw: Draw) -> Trial:
    x, axis, batches = _batch(draw)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        observer = seen_by(x, axis, batches, backend)
        whole = (observer.batches, observer.spoiled)
        if bool(observer.spoiled):  # the range and the counts are never read again
            return whole
        return (*whole, observer.low, observer.high, observer.counts, observer.exponent, observer.origin)

    def oracle(outcome: Outcome) -> None:
        if len(outcome.results) == 2:
            return
        observer = seen_by(x, axis, batches, Backend.NATIVE)
        batches_as_rows = [(x * 2**k).float().double().unsqueeze(-1) for k in range(batches)]
        values = [b.reshape(1, -1) if axis is None else b.movedim(axis, 0).flatten(1) for b in batches_as_rows]
        # Counted in widths of a bin; a value that float32 takes for 0 in the widths of its time may be counted as 0.
        widths = torch.cat(values, 1) * 2.0 ** -observer.exponent.double().unsqueeze(1)
        edges = torch.arange(-1, observer.bins).double() + observer.origin.unsqueeze(1)
        # Bins are open below and closed above.
        exact, coarse = (
            torch.searchsorted(w.sort(1).values, edges, right=True) for w in (widths, widths.float().double())
        )
        got = torch.nn.functional.pad(observer.counts.cumsum(1), (1, 0))
        between = (got >= torch.minimum(exact, coarse)) & (got <= torch.maximum(exact, coarse))
        assert bool(between.all()), "counts are not those of the edges"
        assert bool((got[:, -1] == widths.shape[1]).all()), "values outside"

    sample = Sample("observe_histogram", tuple(x.shape), run, like_x=False, differentiable=False)
    return Trial(sample, x, oracle)


def histogram_range(draw: Draw) -> Trial:
    shape = (pick(draw, (1, 2, 3)), draw.integer(1, 60))
    x = st.numbers(draw, shape[0] * shape[1], torch.float32, Grid(0.1), finite=True).reshape(shape)
    x = x.clamp(-1e6, 1e6) if chance(draw, 80) else x
    low, high = pick(draw, ((0, 255), (0, 127), (-127, 127), (0, 15), (-7, 7), (0, 3)))
    levels = Levels(low, high, symmetric=low < 0)
    histogram = seen_by(x, 0, 1, Backend.REFERENCE).histogram()

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        if backend is Backend.REFERENCE:
            return clip_range.smallest_error(histogram, levels)
        rows = histogram.counts, histogram.edges, histogram.low, histogram.high
        found: tuple[Tensor, ...] = torch.ops.quantkern.histogram_range.default(*rows, low, high, levels.symmetric)
        return found

    def oracle(outcome: Outcome) -> None:
        """Another range may be found where two have equal errors but for rounding, or a better one: the search goes on
        from where rounding has led it."""
        errors = []
        for found in (outcome.results, run(x, Backend.REFERENCE)):
            ends = [value.unsqueeze(1) for value in found]
            errors.append(clip_range.squared_errors(histogram.without_zeros(), *ends, levels))
        spread = (histogram.edges[:, -1:] - histogram.edges[:, :1]) ** 2 * histogram.counts.sum(1, keepdim=True)
        got, want = errors
        oracles.assert_near(torch.maximum(got, want), want, want * 1e-6 + spread * 1e-12, "squared error of the range")

    sample = Sample("histogram_range", shape, run, like_x=False, differentiable=False)
    return Trial(sample, x, oracle, exact=False)
