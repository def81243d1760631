"""The Triton twins of binary networks equal quantkern.reference exactly: signs, packing, pooling, and all of them.

Where and how they run is told in triton_checks.py, from which the tensors of these tests come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_binary_checks import assert_packed, check_conv, check_matmul, packed, vectors, with_padding_bits
from triton_checks import (
    COMPILE_EVERY_KERNEL,
    DEVICES,
    DTYPES,
    LAYOUTS,
    RUNS_HERE,
    SPECIAL,
    assert_mask,
    assert_same_bits,
    run_python,
    values,
)

from quantkern import Backend, reference
from quantkern import functional as F
from quantkern import triton as twins

pytestmark = RUNS_HERE

WITH_EVERY_AXIS = [(name, axis) for name, make in LAYOUTS.items() for axis in range(make().dim())]
# Thousands of rows of one or two signs take the interpreter seconds and show no more than "image".
for slow in (("long_rows", 0), ("long_rows", 1), ("long_channels_last", 0)):
    WITH_EVERY_AXIS.remove(slow)


@pytest.fixture(params=DEVICES or ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# ---- binarize


def check_binarize(x: Tensor, device: str) -> None:
    given = x.to(device)
    before = given.clone()
    y, mask = twins.binarize_forward(given, True)
    assert_same_bits(y, reference.binarize(x))
    assert y.stride() == torch.empty_like(given).stride()
    assert_mask(mask, x.abs() <= 1, y)
    unmasked, none = twins.binarize_forward(given, False)
    assert torch.equal(unmasked, y)
    assert none.numel() == 0
    assert_same_bits(given, before.cpu())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_binarize_layouts(layout: str, device: str) -> None:
    check_binarize(LAYOUTS[layout](), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_binarize_special_values(dtype: torch.dtype, device: str) -> None:
    near_one = torch.tensor([1.0, -1.0, 1.0 + 2**-7, -1.0 - 2**-7, 1.0 - 2**-8])
    check_binarize(torch.cat([torch.tensor(SPECIAL), near_one, values(40)]).to(dtype), device)


# ---- pack_signs, unpack_signs


def check_pack(x: Tensor, axis: int, device: str) -> None:
    words, ones = twins.pack_signs_forward(x.to(device), axis, True)
    expected, expected_ones = reference.pack_signs_counted(x, axis)
    assert_packed(words, expected)
    assert_packed(ones, expected_ones)
    uncounted, none = twins.pack_signs_forward(x.to(device), axis, False)
    assert_packed(uncounted, expected)
    assert none.numel() == 0


@pytest.mark.parametrize(("layout", "axis"), WITH_EVERY_AXIS)
def test_pack_layouts(layout: str, axis: int, device: str) -> None:
    check_pack(LAYOUTS[layout](), axis, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, -1])
def test_pack_special_values(dtype: torch.dtype, axis: int, device: str) -> None:
    x = torch.cat([torch.tensor(SPECIAL), -torch.tensor(SPECIAL), values(41)]).to(dtype)
    check_pack(x.reshape(3, 23), axis, device)


@pytest.mark.parametrize(
    ("rows", "k"), [(0, 5), (3, 0), (1, 1), (1, 300), (3, 31), (3, 32), (130, 33), (2, 64), (5, 257)]
)
def test_pack_of_any_size(rows: int, k: int, device: str) -> None:
    x = values(rows, k)
    check_pack(x, 1, device)
    check_pack(x.t().contiguous(), 0, device)


def test_pack_where_rows_have_no_two_strides(device: str) -> None:
    x = values(3, 4, 5, 40)
    check_pack(x[:, 1:3, ::2], 3, device)
    check_pack(x.permute(2, 0, 1, 3)[1:, ::2, 1:], 1, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 1), (3, 32), (2, 3, 33), (40, 70), (0, 5), (3, 0), (4,), (1, 1)])
def test_unpack(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    words, k = packed(*shape), shape[-1]
    expected = reference.unpack_signs(words, k, dtype)
    for given in (words, with_padding_bits(words, k)):
        assert_same_bits(twins.unpack_signs_forward(given.to(device), k, dtype), expected)


# ---- packed_max_pool2d


@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("channels", [3, 70])
def test_max_pool(kernel: tuple[int, int], stride: tuple[int, int], channels: int, device: str) -> None:
    padding = kernel[0] // 2, kernel[1] // 2
    x, flip = packed(2, 5, 6, channels), packed(channels, seed=3)
    for turned in (flip, torch.zeros_like(flip), torch.full_like(flip, -1)):
        y = twins.packed_max_pool2d_forward(x.to(device), turned.to(device), kernel, stride, padding)
        assert_packed(y, reference.packed_max_pool2d(x, turned, kernel, stride, padding))


def test_max_pool_of_no_images(device: str) -> None:
    x, flip = packed(0, 5, 6, 33), packed(33)
    assert twins.packed_max_pool2d_forward(x.to(device), flip.to(device), (2, 2), (2, 2), (0, 0)).shape == (0, 2, 3, 2)


def test_pooling_before_the_sign_and_after_it(device: str) -> None:
    """The maximum, batch norm and sign of sums are their signs at thresholds, then packed_max_pool2d."""
    sums = values(2, 5, 6, 40).round()
    threshold, flip = vectors(40, 9)[2:]
    pooled = torch.nn.functional.max_pool2d(sums.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)
    first = twins.packed_max_pool2d_forward(
        reference.signs_at(sums, threshold, flip).to(device), flip.to(device), (3, 3), (2, 2), (1, 1)
    )
    assert_packed(first, reference.signs_at(pooled, threshold, flip))


# ---- all of them


def test_64_bit_indices(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    from quantkern.triton import binarize, binary_matmul, pack_signs, packed_max_pool2d

    for module in (binarize, binary_matmul, pack_signs, packed_max_pool2d):
        monkeypatch.setattr(module, "index_type", lambda numel: tl.int64)
    check_binarize(values(3, 50), device)
    check_pack(values(3, 50, 7), 1, device)
    check_matmul(3, 5, 70, device)
    check_matmul(17, 33, 70, device)
    check_conv((1, 40, 4, 5), (3, 2, 3), device, padding=(1, 1))
    x = packed(1, 4, 4, 40)
    y = twins.packed_max_pool2d_forward(x.to(device), packed(40).to(device), (2, 2), (2, 2), (1, 1))
    assert_packed(y, reference.packed_max_pool2d(x, packed(40), (2, 2), (2, 2), (1, 1)))
    assert torch.equal(twins.unpack_signs_forward(x.to(device), 40, torch.float32).cpu(), reference.unpack_signs(x, 40))


def test_other_formats_are_refused(device: str) -> None:
    x = values(3).double().to(device)
    calls: list[Callable[[], object]] = [
        lambda: twins.binarize_forward(x, True),
        lambda: twins.pack_signs_forward(x, 0, False),
        lambda: twins.unpack_signs_forward(packed(2, 40).to(device), 40, torch.float64),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="float64"):
            call()


def leaves_of(device: str) -> list[Tensor]:
    shapes = (2, 3, 5, 6), (4, 3, 3, 3), (4,)
    return [(values(*shape) * 0.4).to(device).requires_grad_() for shape in shapes]


def as_rows(x: Tensor) -> Tensor:
    return x.flatten(1)


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Backend], Tensor]] = {
    "binarize": lambda x, w, b, backend: F.binarize(x, backend=backend),
    "binarize_whole": lambda x, w, b, backend: F.binarize(x, False, backend=backend),
    "linear": lambda x, w, b, backend: F.sign_linear(x[..., :3], as_rows(w)[:, :3], b, backend=backend),
    "conv": lambda x, w, b, backend: F.sign_conv2d(x, w, b, (2, 1), 1, backend=backend),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_functional_trains_with_them(operation: str, dtype: torch.dtype, device: str) -> None:
    results = []
    for backend, place in ((Backend.TRITON, device), (Backend.REFERENCE, "cpu")):
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves_of(place)]
        y = OPERATIONS[operation](*leaves, backend)
        y.backward((values(*y.shape) * 0.3).to(place, dtype))
        results.append([y.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]])
    assert len(results[0]) == len(results[1]) == (2 if "binarize" in operation else 4)
    exact = "binarize" in operation
    for have, want in zip(*results, strict=True):
        assert have.dtype is dtype
        # Gradients are sums of real numbers, in an order of the device; outputs are a sum of integers plus a bias.
        tolerance = 0 if exact else 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(have.cpu(), want, rtol=tolerance, atol=tolerance)


def test_functional_infers_with_them(device: str) -> None:
    x, weight, bias = (leaf.detach() for leaf in leaves_of("cpu"))
    results = []
    for backend, place in ((Backend.TRITON, device), (Backend.REFERENCE, "cpu")):
        image, kernel, offset = x.to(place), weight.to(place), bias.to(place)
        taps = F.pack_signs(kernel, 1, backend=backend)
        rows, counts = F.pack_signs(as_rows(kernel), counts=True, backend=backend)
        at, flip = (t.to(place) for t in vectors(4, 27)[2:])
        features = image.reshape(-1)[:54].reshape(2, 27)
        fed = F.pack_signs(features, backend=backend)
        last = image.contiguous(memory_format=torch.channels_last)
        convolved = F.binary_conv2d(last, taps, offset, padding=1, backend=backend)
        assert convolved.is_contiguous(memory_format=torch.channels_last)
        shrunk = F.binary_conv2d_sign(F.pack_signs(image, 1, backend=backend), taps, 3, at, flip, 2, backend=backend)
        results.append(
            [
                counts,
                F.unpack_signs(rows, 27, backend=backend),
                F.binary_linear(features, rows, 27, offset, backend=backend),
                F.binary_matmul(fed, rows, 27, scale=offset, backend=backend),
                F.binary_matmul_sign(fed, rows, 27, at, flip, backend=backend),
                convolved,
                shrunk,
                F.packed_max_pool2d(shrunk, flip, (1, 2), backend=backend),
            ]
        )
    for have, want in zip(*results, strict=True):
        assert have.dtype is want.dtype
        assert torch.equal(have.cpu(), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="host synchronisation exists only with a CUDA device")
def test_nothing_waits_for_the_host() -> None:
    x = values(8, 40, 5, 5).cuda()
    scale, bias, threshold, flip = (t.cuda() for t in vectors(8, 40))
    ones = (1, 1)

    def every_operation() -> Iterator[Tensor]:
        yield twins.binarize_forward(x, True)[0]
        words, _ = twins.pack_signs_forward(x, 1, True)
        yield twins.unpack_signs_forward(words, 40, torch.float32)
        rows, _ = twins.pack_signs_forward(x.flatten(1), 1, True)
        yield twins.binary_matmul_forward(rows, rows, 1000, scale, bias)
        yield twins.binary_matmul_sign_forward(rows, rows, 1000, threshold, flip)
        yield twins.binary_conv2d_forward(words, words, 40, ones, ones, ones, scale, bias)
        yield twins.binary_conv2d_sign_forward(words, words, 40, ones, ones, ones, threshold, flip)
        yield twins.packed_max_pool2d_forward(words, words[0, 0, 0], (2, 2), (2, 2), (0, 0))

    list(every_operation())
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(every_operation())) == 7
    finally:
        torch.cuda.set_sync_debug_mode("default")


# The compiler of triton_checks in place of a launch, with the operations of this file instead of its own.
COMPILE_THESE_KERNELS = (
    COMPILE_EVERY_KERNEL.partition("x = torch.empty")[0].replace(
        'print(kernel.__name__, "inexact" if found else "exact", *found)',
        """
    has = [word for word in ("popc.b32", "mma") if word in text]
    print(kernel.__name__, "inexact" if found else "exact", "bits" if options.get("num_warps") else "", *has, *found)
""".strip(),
    )
    + """
x = torch.empty(2, 64, 12, 12)
words, weight = torch.zeros(2, 12, 12, 2, dtype=torch.int32), torch.zeros(64, 3, 3, 2, dtype=torch.int32)
scale, at, flip = torch.ones(64), torch.zeros(64, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
one, two = (1, 1), (2, 2)
twins.binarize_forward(x.bfloat16(), True)
twins.pack_signs_forward(x, 1, False)
twins.pack_signs_forward(x.half().flatten(1), 1, True)
twins.unpack_signs_forward(words, 64, torch.bfloat16)
twins.binary_matmul_forward(at.view(32, 2), at.view(32, 2), 64, scale, scale)
twins.binary_matmul_forward(at.view(1, 64), at.view(1, 64), 2048, scale, scale)
twins.binary_conv2d_forward(words, weight, 64, two, one, one, scale, None)
twins.binary_conv2d_sign_forward(words, weight, 64, one, one, two, at, flip)
twins.packed_max_pool2d_forward(words, flip, two, two, one)
"""
)


def test_compiled_kernels_are_exact(tmp_path: Path) -> None:
    """The products besides run on the machine's instructions: bits counted by one, int8 multiplied on tensor cores."""
    pytest.importorskip("triton.backends.nvidia", reason="this Triton was built without its NVIDIA compiler")
    lines = run_python(COMPILE_THESE_KERNELS, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    kernels = {"binarize", "pack_signs", "unpack_signs", "tensor_products", "popcount_products", "packed_max_pool2d"}
    assert {line.split()[0].removesuffix("_kernel") for line in lines} == kernels
    assert [line for line in lines if line.split()[1] != "exact"] == []
    products = {line for line in lines if "_products" in line}
    assert products == {
        "tensor_products_kernel exact bits popc.b32 mma",
        "popcount_products_kernel exact bits popc.b32",
    }
