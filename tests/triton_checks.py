"""What the tests of the Triton twins share: where they run, tensors, comparison bit by bit, and a compiler.

They run on a CUDA device where there is one, and elsewhere in Triton's interpreter on the CPU, which is slow: tensors
here are small. The interpreter says nothing of what a GPU compiler would do with a kernel, so every kernel is also
compiled for one (no GPU needed) and its instructions are searched for the ones that would cost exactness.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantkern import reference
from quantkern import triton as twins

CANDIDATES = ("cuda",) if torch.cuda.is_available() else ("cpu",)
DEVICES = [device for device in CANDIDATES if twins.available(device)[0]]
RUNS_HERE = [
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


def run_python(script: str, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
