"""The Triton twins equal quantkern.reference bit for bit: values, state, masks and gradients.

They run on a CUDA device where there is one, and elsewhere in Triton's interpreter on the CPU, which is slow: tensors
here are small. The interpreter says nothing of what a GPU compiler would do with a kernel, so every kernel is also
compiled for one (no GPU needed) and its instructions are searched for the ones that would cost exactness.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkern import reference
from quantkern import triton as twins

CANDIDATES = ("cuda",) if torch.cuda.is_available() else ("cpu",)
DEVICES = [device for device in CANDIDATES if twins.available(device)[0]]
pytestmark = [
    pytest.mark.skipif(not DEVICES, reason=f"Triton cannot run here: {twins.available(CANDIDATES[0])[1]}"),
    # The interpreter computes with numpy, which warns where a GPU silently gives NaN or infinity.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SPECIAL = [
    float("nan"),
    float("inf"),
    float("-inf"),
    -0.0,
    0.0,
    1e-42,
    -1e-42,
    3e38,
    -3e38,
    6e4,
    1e-7,
    0.25,
    -0.75,
    1.25,
]
SYMMETRIC = {"symmetric": True, "affine": False}


@pytest.fixture(params=DEVICES or ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def values(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 17 * len(shape))
    return torch.randn(shape, generator=generator) * 3


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "vector": lambda: values(1031),
    "matrix": lambda: values(6, 35),
    "image": lambda: values(2, 3, 5, 7),
    "channels_last": lambda: values(2, 3, 5, 7).contiguous(memory_format=torch.channels_last),
    "permuted": lambda: values(3, 4, 5).permute(2, 0, 1),
    "transposed": lambda: values(5, 9).t(),
    "sliced": lambda: values(5, 12)[:, 1::2],
    "offset": lambda: values(23)[3:],
    "expanded": lambda: values(1, 6).expand(4, 6),
    "overlapping": lambda: values(12).as_strided((4, 5), (2, 1)),
    "long_rows": lambda: values(2, 3, 1025),
    "long_channels_last": lambda: values(1, 3, 9, 150).contiguous(memory_format=torch.channels_last),
    "many_channels": lambda: values(2, 70),
    "one_channel": lambda: values(4, 1, 6),
    "one_element": lambda: values(1),
    "zero_dim": lambda: values(1)[0],
    "empty": lambda: values(3, 0, 2),
}
WITH_AXES = [(name, axis) for name, make in LAYOUTS.items() if name != "empty" for axis in (None, *range(make().dim()))]
# Hundreds of channels take the interpreter seconds and show no more than "many_channels".
for slow in (("vector", 0), ("long_rows", 2), ("long_channels_last", 3)):
    WITH_AXES.remove(slow)


def channels_of(x: Tensor, axis: int | None) -> int:
    return 1 if axis is None else x.shape[axis]


def parameters(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    scale = torch.rand(count, generator=generator) * 0.4 + 0.05
    return scale, torch.randint(-4, 4, (count,), generator=generator, dtype=torch.int32)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal to the last bit, the sign of zero included; any NaN equals any other."""
    actual = actual.cpu()
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    integers = torch.int32 if actual.dtype is torch.float32 else torch.int16
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = (torch.where(t.isnan(), 0, t).contiguous().view(integers) for t in (actual, expected))
    assert torch.equal(actual, expected)


def in_memory_order(flags: Tensor, like: Tensor) -> Tensor:
    laid_out = torch.empty_strided(like.shape, like.stride(), dtype=torch.bool).copy_(flags)
    return laid_out.as_strided((like.numel(),), (1,))


def assert_mask(mask: Tensor, passes: Tensor, y: Tensor) -> None:
    """One bit an element in y's memory order, padding bits 0."""
    assert mask.dtype == torch.uint8
    assert mask.shape == ((y.numel() + 7) // 8,)
    bits = ((mask.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().bool()
    assert torch.equal(bits[: y.numel()], in_memory_order(passes, y))
    assert not bits[y.numel() :].any()


def check_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None, device: str
) -> tuple[Tensor, Tensor]:
    """The forward with a mask against the reference; returns (mask, where the gradient passes)."""
    given = [t.to(device) for t in (x, scale, zero_point)]
    y, mask = twins.fake_quantize_forward(*given, low, high, axis, None, 0, True)
    expected, passes = reference.quantize(x, scale, zero_point, low, high, axis)
    assert_same_bits(y, expected)
    assert y.stride() == torch.empty_like(given[0]).stride()
    assert_mask(mask, passes, y)
    unmasked, none = twins.fake_quantize_forward(*given, low, high, axis, None, 0, False)
    assert_same_bits(unmasked, expected)
    assert none.numel() == 0
    return mask, passes


# ---- fake_quantize


@pytest.mark.parametrize(("layout", "axis"), WITH_AXES)
def test_fake_quantize_layouts(layout: str, axis: int | None, device: str) -> None:
    x = LAYOUTS[layout]()
    check_forward(x, *parameters(channels_of(x, axis)), -8, 7, axis, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize(("low", "high"), [(-128, 127), (0, 15), (-(2**20), 2**20)])
def test_fake_quantize_special_values(dtype: torch.dtype, axis: int | None, low: int, high: int, device: str) -> None:
    ties = torch.arange(-40, 40) * 0.25
    x = torch.cat([torch.tensor(SPECIAL), ties, values(206) * 10.0 ** torch.linspace(-8, 6, 206)]).to(dtype)
    count = 1 if axis is None else 3
    scale = torch.tensor([0.5, 0.0371, 3e-38])[:count]
    zero_point = torch.tensor([0, 3, 1], dtype=torch.int32)[:count]
    shaped = x.reshape(3, 100) if axis in (None, 0) else x.reshape(100, 3)
    check_forward(shaped, scale, zero_point, low, high, axis, device)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 1e-45])
def test_unusable_scale_gives_nan(bad: float, device: str) -> None:
    scale = torch.tensor([0.1, bad])
    check_forward(values(5, 2), scale, torch.zeros(2, dtype=torch.int32), -8, 7, 1, device)
    y, _ = twins.fake_quantize_forward_number(values(3).to(device), bad, 0.0, -8, 7, False)
    assert y.isnan().all()


def test_float_zero_point(device: str) -> None:
    check_forward(values(6, 4), torch.tensor([0.3]), torch.tensor([0.4]), -8, 7, None, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "zero_point"), [(0.1, 0), (1.0, 1), (0.0371, -3), (2e-39, 0), (0.3, 0.4)])
def test_fake_quantize_number(dtype: torch.dtype, scale: float, zero_point: float, device: str) -> None:
    x = torch.cat([values(117), torch.tensor(SPECIAL)]).to(dtype)
    y, mask = twins.fake_quantize_forward_number(x.to(device), scale, zero_point, -8, 7, True)
    expected, passes = reference.quantize(x, torch.tensor(scale), torch.tensor(float(zero_point)), -8, 7)
    assert_same_bits(y, expected)
    assert_mask(mask, passes, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 1])
def test_fake_quantize_waits_for_its_step(dtype: torch.dtype, axis: int | None, device: str) -> None:
    x = torch.cat([values(112), torch.tensor(SPECIAL)]).reshape(9, 14).to(dtype)
    scale, zero_point = parameters(channels_of(x, axis))
    expected, passes = reference.quantize(x, scale, zero_point, -8, 7, axis)
    # 1 is a value of its own to Triton's compiler, and steps are 64-bit.
    for start in (1, 5, 2**40):
        for step, quantized in ((start - 1, False), (start, True)):
            counter = torch.tensor([step], device=device)
            given = [t.to(device) for t in (x, scale, zero_point)]
            y, mask = twins.fake_quantize_forward(*given, -8, 7, axis, counter, start, True)
            assert_same_bits(y, expected if quantized else x)
            assert_mask(mask, passes if quantized else torch.ones_like(passes), y)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_64_bit_indices(axis: int | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    from quantkern.triton import fake_quantize, layout, min_max

    assert layout.index_type(2**31) is tl.int64
    assert layout.index_type(2**30) is tl.int32
    for module in (fake_quantize, min_max):
        monkeypatch.setattr(module, "index_type", lambda numel: tl.int64)
    x = values(3, 40, 11)
    mask, passes = check_forward(x, *parameters(channels_of(x, axis)), -8, 7, axis, device)
    dx = twins.fake_quantize_backward(x.to(device), mask, x.stride())
    assert_same_bits(dx, torch.where(passes, x, 0))
    check_weight(x, False, axis, -8, 7, device)


def test_negative_axis_counts_from_the_end(device: str) -> None:
    x = values(4, 6)
    check_forward(x, *parameters(6), -8, 7, -1, device)


# ---- fake_quantize_backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "empty"])
def test_backward(dtype: torch.dtype, layout: str, device: str) -> None:
    x = LAYOUTS[layout]().to(dtype)
    scale, zero_point = parameters(1)
    given = [t.to(device) for t in (x, scale, zero_point)]
    y, mask = twins.fake_quantize_forward(*given, -8, 7, None, None, 0, True)
    passes = reference.quantize(x, scale, zero_point, -8, 7)[1]
    gradient = values(1, *x.shape)[0].to(dtype)
    backwards = tuple(reversed(range(x.dim())))
    reversed_strides = gradient.permute(backwards).contiguous().permute(backwards)
    constant = torch.ones((), dtype=dtype).expand(x.shape)
    for grad in (gradient, reversed_strides, constant):
        dx = twins.fake_quantize_backward(grad.to(device), mask, y.stride())
        assert_same_bits(dx, torch.where(passes, grad, 0))
        assert dx.stride() == y.stride()


def test_backward_keeps_special_gradients(device: str) -> None:
    grad = torch.tensor(SPECIAL)
    mask = torch.tensor([0b10110111, 0b00101101], dtype=torch.uint8)
    passes = torch.tensor([bool(mask[i // 8] >> (i % 8) & 1) for i in range(len(SPECIAL))])
    dx = twins.fake_quantize_backward(grad.to(device), mask.to(device), grad.stride())
    assert_same_bits(dx, torch.where(passes, grad, 0))


def test_backward_leaves_its_gradient_alone(device: str) -> None:
    grad = values(5, 4).to(device)
    before = grad.clone()
    twins.fake_quantize_backward(grad, torch.zeros(3, dtype=torch.uint8, device=device), grad.stride())
    twins.fake_quantize_backward(grad, torch.zeros(3, dtype=torch.uint8, device=device), (1, 5))
    assert torch.equal(grad, before)


def test_backward_refuses_a_foreign_mask(device: str) -> None:
    grad = values(20).to(device)
    with pytest.raises(ValueError, match="mask must hold 3 uint8 values.*got 2"):
        twins.fake_quantize_backward(grad, torch.zeros(2, dtype=torch.uint8, device=device), grad.stride())


# ---- fake_quantize_weight


def check_weight(x: Tensor, symmetric: bool, axis: int | None, low: int, high: int, device: str) -> None:
    count = channels_of(x, axis)
    scale = torch.full((count,), 7.0, device=device)
    zero_point = torch.full((count,), 7, dtype=torch.int32, device=device)
    y, mask = twins.fake_quantize_weight_forward(
        x.to(device), scale, zero_point, low, high, symmetric, axis, None, 0, True
    )
    expected, expected_scale, expected_zero_point = reference.fake_quantize_weight(x, low, high, symmetric, axis)
    assert_same_bits(scale, expected_scale)
    assert torch.equal(zero_point.cpu(), expected_zero_point)
    assert_same_bits(y, expected)
    if x.numel():
        passes = reference.quantize(x, expected_scale, expected_zero_point, low, high, axis)[1]
        assert_mask(mask, passes, y)


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


def fresh_state(count: int, device: str) -> list[Tensor]:
    infinite = torch.full((count,), float("inf"), device=device)
    zero_point = torch.zeros(count, dtype=torch.int32, device=device)
    return [infinite.clone(), -infinite, torch.ones(count, device=device), zero_point]


def check_activation(
    x: Tensor,
    state: list[Tensor],
    symmetric: bool,
    axis: int | None,
    *,
    observing: bool = True,
    step: int | None = None,
    start: int = 0,
) -> None:
    """One call, in place on ``state``, against the reference from a copy of it."""
    device = state[0].device
    copies = [t.cpu().clone() for t in state]
    quantizing = step is None or step >= start
    expected, *new = reference.fake_quantize_activation(
        x, *copies, -8, 7, symmetric, 0.9, axis, observing=observing, quantizing=quantizing
    )
    counter = None if step is None else torch.tensor([step], device=device)
    flag = torch.tensor([observing], device=device)
    y, mask = twins.fake_quantize_activation_forward(
        x.to(device), *state, flag, -8, 7, symmetric, 0.9, axis, counter, start, True
    )
    for have, want in zip(state, new, strict=True):
        assert torch.equal(have.cpu(), want)
    assert_same_bits(y, expected)
    if x.numel():
        active = quantizing and bool((new[0] <= new[1]).all())
        passes = reference.quantize(x, new[2], new[3], -8, 7, axis)[1]
        assert_mask(mask, passes if active else torch.ones_like(passes), y)


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


# ---- all of them


@pytest.mark.parametrize("axis", [None, 0])
def test_empty_tensors(axis: int | None, device: str) -> None:
    x = LAYOUTS["empty"]()
    count = channels_of(x, axis)
    mask, _ = check_forward(x, *parameters(count), -8, 7, axis, device)
    assert twins.fake_quantize_backward(x.to(device), mask, x.stride()).shape == x.shape
    assert twins.fake_quantize_forward_number(x.to(device), 0.1, 0.0, -8, 7, True)[0].shape == x.shape
    check_weight(x, True, axis, -8, 7, device)
    state = fresh_state(count, device)
    check_activation(x, state, False, axis)
    assert torch.isinf(state[0]).all()
    check_activation(values(3, 4, 2), state, False, axis)
    check_activation(x, state, False, axis)


def test_no_channels(device: str) -> None:
    x = values(2, 0).to(device)
    y, mask = twins.fake_quantize_weight_forward(x, *fresh_state(0, device)[2:], -8, 7, False, 1, None, 0, True)
    assert y.shape == x.shape
    assert mask.numel() == 0


def test_inputs_stay_as_they_are(device: str) -> None:
    for layout in ("matrix", "transposed", "sliced", "expanded"):
        x = LAYOUTS[layout]().to(device)
        before = x.clone()
        y, _ = twins.fake_quantize_forward_number(x, 0.5, 0.0, -8, 7, True)
        assert torch.equal(x, before)
        assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_float64_is_refused(device: str) -> None:
    with pytest.raises(TypeError, match="float64"):
        twins.fake_quantize_forward_number(values(3).double().to(device), 0.5, 0.0, -8, 7, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="host synchronisation exists only with a CUDA device")
def test_nothing_waits_for_the_host() -> None:
    x = values(8, 40).cuda()
    scale, zero_point = (t.cuda() for t in parameters(40))
    state, flag, step = fresh_state(40, "cuda"), torch.tensor([True], device="cuda"), torch.tensor([4], device="cuda")

    def every_operation() -> Iterator[Tensor]:
        y, mask = twins.fake_quantize_forward(x, scale, zero_point, -8, 7, 1, step, 3, True)
        yield twins.fake_quantize_backward(y, mask, y.stride())
        yield twins.fake_quantize_weight_forward(x, scale, zero_point, -8, 7, False, 1, step, 3, True)[0]
        yield twins.fake_quantize_activation_forward(x, *state, flag, -8, 7, False, 0.9, 1, step, 3, True)[0]

    list(every_operation())
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(every_operation())) == 3
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- where they can run


def test_availability_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, reason = twins.available("meta")
    assert not runs
    assert "meta" in reason
    monkeypatch.setattr(twins, "is_interpreted", lambda: False)
    assert twins.available("cuda:0")[0]
    runs, reason = twins.available(torch.device("cpu"))
    assert not runs
    assert "TRITON_INTERPRET=1" in reason
    monkeypatch.setattr(twins, "is_installed", lambda: False)
    runs, reason = twins.available("cuda")
    assert not runs
    assert "pip install triton" in reason


def run_python(script: str, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_does_not_need_triton() -> None:
    script = """
import sys
import quantkern.triton as twins
assert "triton" not in sys.modules, "importing quantkern.triton imported triton"
sys.modules["triton"] = None
print(twins.available("cpu"), twins.available("cuda"))
"""
    assert run_python(script).count("(False, 'triton is not installed; pip install triton')") == 2


COMPILE_EVERY_KERNEL = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import quantkern.triton as twins

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
         torch.int64: "*i64", torch.uint8: "*u8"}

def compile_instead(kernel, *args, grid, warmup, **options):
    signature, constants, hints = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], hints[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constants, hints)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    # A fused multiply-add, an approximate division or flushed denormals would cost exactness.
    found = [word for word in ("fma.", "div.full", "div.approx", ".ftz") if word in text]
    print(kernel.__name__, "inexact" if found else "exact", *found)

triton.JITFunction.run = compile_instead
x = torch.empty(2, 64, 40, 40)
channels_last = x.to(torch.bfloat16, memory_format=torch.channels_last)
scale, zero_point, flag = torch.ones(64), torch.zeros(64, dtype=torch.int32), torch.tensor([True])
step = torch.zeros(1, dtype=torch.int64)
_, mask = twins.fake_quantize_forward_number(x.half(), 0.1, 1.0, -8, 7, True)
twins.fake_quantize_forward(x, scale[:1], zero_point[:1], -8, 7, None, step, 3, True)
twins.fake_quantize_forward(channels_last, scale, zero_point, -8, 7, 1, None, 0, True)
twins.fake_quantize_backward(x, mask, x.stride())
twins.fake_quantize_weight_forward(x, scale, zero_point, -8, 7, True, 1, None, 0, False)
twins.fake_quantize_weight_forward(x, scale, zero_point, -8, 7, False, 1, None, 0, False)
twins.fake_quantize_activation_forward(
    channels_last, scale, scale, scale, zero_point, flag, 0, 1, False, 0.9, 1, step, 1, True)
"""


def test_compiled_kernels_are_exact(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia", reason="this Triton was built without its NVIDIA compiler")
    lines = run_python(COMPILE_EVERY_KERNEL, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    kernels = {"fake_quantize_tensor", "fake_quantize_channel", "fake_quantize_backward", "row_ranges"}
    kernels |= {"column_ranges", "weight_scale", "update_state"}
    assert {line.split()[0].removesuffix("_kernel") for line in lines} == kernels
    assert [line for line in lines if line.split()[1] != "exact"] == []
