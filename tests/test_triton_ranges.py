"""The Triton twins that find ranges, of weights and of activations, equal quantkern.reference bit for bit.

Where and how they run is told in triton_checks.py, from which the tensors of these tests come.
"""

from __future__ import annotations

import pytest
import torch
from triton_checks import (
    DEVICES,
    DTYPES,
    LAYOUTS,
    RUNS_HERE,
    SYMMETRIC,
    WITH_AXES,
    assert_mask,
    assert_same_bits,
    channels_of,
    check_activation,
    check_weight,
    fresh_state,
    values,
)

from quantkern import reference
from quantkern import triton as twins

pytestmark = RUNS_HERE


@pytest.fixture(params=DEVICES or ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# ---- fake_quantize_weight


@pytest.mark.parametrize(("layout", "axis"), WITH_AXES)
def test_weight_layouts(layout: str, axis: int | None, device: str) -> None:
    check_weight(LAYOUTS[layout](), False, axis, -8, 7, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", SYMMETRIC.values(), ids=SYMMETRIC)
@pytest.mark.parametrize(("low", "high"), [(-127, 127), (-8, 7), (0, 255), (0, 1), (1, 4)])
@pytest.mark.parametrize("axis", [None, 1])
def test_weight_schemes(
    dtype: torch.dtype, symmetric: bool, low: int, high: int, axis: int | None, device: str
) -> None:
    check_weight(values(9, 5).to(dtype), symmetric, axis, low, high, device)


@pytest.mark.parametrize("symmetric", SYMMETRIC.values(), ids=SYMMETRIC)
def test_weight_of_unusual_channels(symmetric: bool, device: str) -> None:
    inf, nan = float("inf"), float("nan")
    rows = [
        [0.0, -0.0, 0.0],
        [nan, nan, nan],
        [nan, 1.0, -2.0],
        [inf, 1.0, nan],
        [-inf, 1.0, 2.0],
        [inf, -inf, 0.0],
        [3.4e38, -3.4e38, 1.0],
        [1e-45, -1e-44, 0.0],
        [5.0, 6.0, 7.0],
        [-5.0, -6.0, -7.0],
    ]
    check_weight(torch.tensor(rows), symmetric, 0, -8, 7, device)
    check_weight(torch.tensor(rows).t().contiguous(), symmetric, 1, 0, 15, device)


@pytest.mark.parametrize("axis", [None, 0])
def test_weight_waits_for_its_step(axis: int | None, device: str) -> None:
    x = values(4, 9)
    count = channels_of(x, axis)
    expected, expected_scale, _ = reference.fake_quantize_weight(x, -8, 7, False, axis)
    for step, quantized in ((2, False), (3, True)):
        scale, zero_point = torch.zeros(count, device=device), torch.zeros(count, dtype=torch.int32, device=device)
        y, mask = twins.fake_quantize_weight_forward(
            x.to(device), scale, zero_point, -8, 7, False, axis, torch.tensor([step], device=device), 3, True
        )
        assert_same_bits(scale, expected_scale)
        assert_same_bits(y, expected if quantized else x)
        if not quantized:
            assert_mask(mask, torch.ones_like(x, dtype=torch.bool), y)


# ---- fake_quantize_activation


@pytest.mark.parametrize(("layout", "axis"), WITH_AXES)
def test_activation_layouts(layout: str, axis: int | None, device: str) -> None:
    x = LAYOUTS[layout]()
    state = fresh_state(channels_of(x, axis), device)
    check_activation(x, state, False, axis)
    check_activation(x * 1.7 + 0.3, state, False, axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", SYMMETRIC.values(), ids=SYMMETRIC)
@pytest.mark.parametrize("axis", [None, 1])
def test_activation_follows_its_batches(dtype: torch.dtype, symmetric: bool, axis: int | None, device: str) -> None:
    state = fresh_state(1 if axis is None else 5, device)
    for batch, observing in enumerate((True, True, False, True)):
        x = (values(7, 5) * (batch + 1) + batch).to(dtype)
        check_activation(x, state, symmetric, axis, observing=observing)


@pytest.mark.parametrize("axis", [None, 1])
def test_observing_off_leaves_state_and_statistics_alone(axis: int | None, device: str) -> None:
    from quantkern.triton import layout, min_max

    state = fresh_state(1 if axis is None else 5, device)
    check_activation(values(7, 5), state, False, axis)
    before = [t.clone() for t in state]
    check_activation(values(7, 5) * 100, state, False, axis, observing=False)
    for have, want in zip(state, before, strict=True):
        assert torch.equal(have, want)
    # The statistics pass reads no element: not one range of finite values is not empty.
    x = values(7, 5).to(device)
    off = torch.zeros(1, dtype=torch.uint8, device=device)
    partials = min_max.partial_ranges(x, layout.layout_of(x, axis), off)
    assert (partials.low == float("inf")).all()
    assert (partials.high == -float("inf")).all()


def test_activation_is_the_identity_until_every_channel_has_seen_a_value(device: str) -> None:
    nan = float("nan")
    state = fresh_state(3, device)
    check_activation(values(4, 3), state, False, 1, observing=False)
    check_activation(torch.tensor([[1.2, nan, 3.0], [-1.0, nan, 0.4]]), state, False, 1)
    check_activation(torch.tensor([[1.2, float("inf"), 3.0], [-1.0, 0.3, 0.4]]), state, False, 1)
    check_activation(values(4, 3), state, False, 1)
    assert (state[0] <= state[1]).all()
    # More channels than one program takes: the last of them alone has seen nothing.
    x = values(2, 70)
    x[:, 69] = nan
    state = fresh_state(70, device)
    check_activation(x, state, False, 1)
    check_activation(values(2, 70), state, False, 1)


@pytest.mark.parametrize("axis", [None, 1])
def test_activation_waits_for_its_step(axis: int | None, device: str) -> None:
    state = fresh_state(1 if axis is None else 5, device)
    for step in range(3):
        check_activation(values(6, 5) + step, state, False, axis, step=step, start=2)


def test_activation_leaves_out_batches_without_a_finite_range(device: str) -> None:
    state = fresh_state(1, device)
    for batch in ([float("nan")] * 3, [1.0, float("inf")], [-1.0, 2.0], [float("-inf"), 0.0], [float("nan"), 4.0]):
        check_activation(torch.tensor(batch), state, False, None)


@pytest.mark.parametrize("ema_decay", [0.99, 0.1, 1e-12])
def test_ema_factors_are_rounded_once(ema_decay: float, device: str) -> None:
    state = fresh_state(1, device)
    for x in (values(50), values(51) * 1.3, values(52) * 0.7):
        copies = [t.cpu().clone() for t in state]
        want = reference.fake_quantize_activation(x, *copies, 0, 255, False, ema_decay)
        flag = torch.tensor([True], device=device)
        twins.fake_quantize_activation_forward(
            x.to(device), *state, flag, 0, 255, False, ema_decay, None, None, 0, False
        )
        for have, new in zip(state, want[1:], strict=True):
            assert torch.equal(have.cpu(), new)
