"""The Triton twins of binary networks equal quantkern.reference exactly.

Where and how they run is told in test_triton.py, from which the tensors of these tests come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_triton import (
    COMPILE_EVERY_KERNEL,
    DEVICES,
    DTYPES,
    LAYOUTS,
    SPECIAL,
    assert_mask,
    assert_same_bits,
    run_python,
    values,
)
from torch import Tensor

from quantkern import Backend, reference
from quantkern import functional as F
from quantkern import triton as twins

pytestmark = [
    pytest.mark.skipif(not DEVICES, reason="Triton cannot run here, see test_triton.py"),
    # The interpreter computes with numpy, which warns where a GPU silently gives NaN or infinity.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

WITH_EVERY_AXIS = [(name, axis) for name, make in LAYOUTS.items() for axis in range(make().dim())]
# Thousands of rows of one or two signs take the interpreter seconds and show no more than "image".
for slow in (("long_rows", 0), ("long_rows", 1), ("long_channels_last", 0)):
    WITH_EVERY_AXIS.remove(slow)
INT32_MIN = -(2**31)


@pytest.fixture(params=DEVICES or ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def packed(*shape: int, seed: int = 0) -> Tensor:
    """Random packed signs of a float tensor of this shape, packed along its last dimension."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return reference.pack_signs(torch.randn(shape, generator=generator))


def with_padding_bits(words: Tensor, k: int) -> Tensor:
    """The same signs with padding bits that are all 1."""
    dirty = words.clone()
    if k % 32 and words.numel():
        dirty[..., -1] |= torch.tensor(-1, dtype=torch.int32) << (k % 32)
    return dirty


def vectors(count: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scale, bias, threshold, flip) for ``count`` columns of sums of k signs."""
    generator = torch.Generator().manual_seed(count)
    scale, bias = torch.randn((2, count), generator=generator)
    reach = max(1, int(k**0.5))
    threshold = torch.randint(-reach, reach + 1, (count,), generator=generator, dtype=torch.int32)
    return scale, bias, threshold, packed(count, seed=1)


def assert_packed(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype is torch.int32
    assert actual.is_contiguous()
    assert torch.equal(actual.cpu(), expected)


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


# ---- binary_matmul


def check_matmul(m: int, n: int, k: int, device: str) -> None:
    a, b = packed(m, k), packed(n, k, seed=1)
    scale, bias, threshold, flip = vectors(n, k)
    # What padding bits hold is nobody's business.
    given = with_padding_bits(a, k).to(device), with_padding_bits(b, k).to(device), k
    for factors in ((None, None), (scale, None), (None, bias), (scale, bias)):
        y = twins.binary_matmul_forward(*given, *(None if t is None else t.to(device) for t in factors))
        expected = reference.scaled(reference.binary_matmul(a, b, k) + 0.0, *factors)
        assert_same_bits(y, expected)
    signs = twins.binary_matmul_sign_forward(*given, threshold.to(device), flip.to(device))
    assert_packed(signs, reference.binary_matmul_sign(a, b, k, threshold, flip))


@pytest.mark.parametrize("k", [0, 1, 32, 33, 260])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 70), (3, 5), (15, 33), (16, 1), (17, 40)])
def test_matmul(m: int, n: int, k: int, device: str) -> None:
    check_matmul(m, n, k, device)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 5), (3, 0, 5), (0, 0, 0), (130, 129, 65), (2, 300, 40), (140, 2, 64)])
def test_matmul_of_several_tiles_and_of_none(m: int, n: int, k: int, device: str) -> None:
    check_matmul(m, n, k, device)


@pytest.mark.parametrize(("m", "k"), [(2, 2**16 + 7), (16, 2**12 + 7)])
def test_matmul_of_equal_and_opposite_rows(m: int, k: int, device: str) -> None:
    x = torch.ones(1, k)
    a = reference.pack_signs(torch.cat([x, -x]).repeat(m // 2, 1))
    y = twins.binary_matmul_forward(a.to(device), a[:2].to(device), k, None, None).cpu()
    assert y.tolist() == [[k, -k], [-k, k]] * (m // 2)


@pytest.mark.parametrize("m", [1, 16])
def test_thresholds_out_of_reach(m: int, device: str) -> None:
    a, b = packed(m, 40), packed(4, 40, seed=1)
    threshold = torch.tensor([INT32_MIN, 2**31 - 1, -41, 41], dtype=torch.int32)
    for flip, expected in ((0, 0b0101), (0b0110, 0b0011), (-1, 0b1010)):
        turned = torch.tensor([flip], dtype=torch.int32)
        signs = twins.binary_matmul_sign_forward(
            a.to(device), b.to(device), 40, threshold.to(device), turned.to(device)
        )
        assert signs.cpu().flatten().tolist() == [expected] * m


@pytest.mark.parametrize("rows", [1, 15, 16, 200])
def test_the_kernel_is_chosen_by_the_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkern.triton import binary_matmul

    launched = []
    for name in ("popcount", "tensor"):

        class Recorder:
            kind = name

            def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
                return lambda *given, **options: launched.append(self.kind)

        monkeypatch.setattr(binary_matmul, f"{name}_products_kernel", Recorder())
    twins.binary_matmul_forward(packed(rows, 40), packed(7, 40), 40, None, None)
    assert launched == ["popcount" if rows < 16 else "tensor"]


# ---- binary_conv2d


def check_conv(
    images: tuple[int, int, int, int],
    kernel: tuple[int, int, int],
    device: str,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> None:
    """Images [N, C, H, W] and kernel (O, kh, kw) against the reference, and against the float convolution."""
    n, channels, height, width = images
    x = packed(n, height, width, channels)
    weight = packed(*kernel, channels, seed=1)
    geometry = stride, padding, dilation
    scale, bias, threshold, flip = vectors(kernel[0], channels * kernel[1] * kernel[2])
    given = [with_padding_bits(t, channels).to(device) for t in (x, weight)]
    y = twins.binary_conv2d_forward(*given, channels, *geometry, None, None)
    assert y.is_contiguous()
    assert_same_bits(y, reference.binary_conv2d(x, weight, channels, *geometry) + 0.0)
    signs = (reference.unpack_signs(t, channels).permute(0, 3, 1, 2) for t in (x, weight))
    assert torch.equal(y.cpu(), torch.nn.functional.conv2d(*signs, None, *geometry))
    y = twins.binary_conv2d_forward(*given, channels, *geometry, scale.to(device), bias.to(device))
    assert_same_bits(y, reference.binary_conv2d(x, weight, channels, *geometry, scale, bias))
    packed_signs = twins.binary_conv2d_sign_forward(*given, channels, *geometry, threshold.to(device), flip.to(device))
    assert_packed(packed_signs, reference.binary_conv2d_sign(x, weight, channels, *geometry, threshold, flip))


@pytest.mark.parametrize("channels", [1, 3, 33, 64])
@pytest.mark.parametrize("padding", [(0, 0), (2, 1)])
def test_conv_channels(channels: int, padding: tuple[int, int], device: str) -> None:
    check_conv((2, channels, 5, 6), (5, 3, 3), device, padding=padding)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [
        ((2, 3), (1, 1), (1, 1)),
        ((2, 3), (2, 1), (1, 3)),
        ((2, 3), (3, 2), (2, 1)),
        ((3, 1), (1, 2), (3, 1)),
        ((3, 1), (2, 3), (1, 2)),
        ((3, 2), (1, 1), (2, 2)),
    ],
)
def test_conv_geometries(
    kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], device: str
) -> None:
    check_conv((2, 40, 6, 7), (5, *kernel), device, stride, (1, 2), dilation)


@pytest.mark.parametrize(
    ("images", "kernel", "options"),
    [
        ((1, 3, 1, 1), (2, 1, 1), {}),
        ((1, 33, 1, 1), (2, 3, 3), {"padding": (1, 1)}),
        ((20, 33, 1, 1), (2, 3, 3), {"padding": (1, 1)}),
        ((2, 70, 4, 4), (33, 1, 1), {}),
        ((2, 70, 4, 5), (3, 1, 1), {"stride": (2, 2)}),
        ((2, 70, 3, 3), (3, 1, 1), {"padding": (1, 1)}),
        ((1, 5, 3, 4), (2, 3, 4), {}),
        ((1, 5, 2, 2), (2, 2, 2), {"padding": (3, 3)}),
        ((0, 5, 3, 3), (2, 3, 3), {}),
        ((2, 32, 8, 9), (130, 2, 2), {"padding": (1, 1)}),
    ],
)
def test_conv_at_the_edges(
    images: tuple[int, int, int, int],
    kernel: tuple[int, int, int],
    options: dict[str, tuple[int, int]],
    device: str,
) -> None:
    check_conv(images, kernel, device, **options)


def test_conv_without_outputs(device: str) -> None:
    x, weight, none = packed(2, 3, 3, 5).to(device), packed(0, 2, 2, 5).to(device), packed(0).to(device)
    geometry = (1, 1), (0, 0), (1, 1)
    assert twins.binary_conv2d_forward(x, weight, 5, *geometry, None, None).shape == (2, 0, 2, 2)
    assert twins.binary_conv2d_sign_forward(x, weight, 5, *geometry, none, none).shape == (2, 2, 2, 0)


def test_conv_without_channels(device: str) -> None:
    x, weight = (torch.empty(shape, dtype=torch.int32, device=device) for shape in ((2, 3, 3, 0), (4, 2, 2, 0)))
    bias = torch.arange(4.0)
    y = twins.binary_conv2d_forward(x, weight, 0, (1, 1), (0, 0), (1, 1), None, bias.to(device))
    assert torch.equal(y.cpu(), bias[None, :, None, None].expand(2, 4, 2, 2))


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


# test_triton's compiler in place of a launch, with the operations of this file instead of its own.
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
