"""Binary operations beyond the inventory: every path of the products, sizes of 0 and 1, what is saved, and layouts."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_ops import capability  # noqa: F401  the fixture that goes through the instruction sets
from torch import Tensor

from quantkern import Backend, ops, reference
from quantkern import functional as F

SIZES = (1, 2, 3, 7, 8, 9, 31, 33, 63, 64, 65, 70, 97, 130)
LENGTHS = (1, 4, 31, 32, 33, 56, 60, 64, 127, 504, 512, 513, 1023, 1100, 2304)


def signs(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)


def pack(x: Tensor, axis: int = -1) -> Tensor:
    packed = F.pack_signs(x, axis)
    assert isinstance(packed, Tensor)
    return packed


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("k", LENGTHS)
def test_products_equal_those_of_floats(k: int) -> None:
    """Rows 1 to 130 and columns 1 to 130: every number of rows in a panel and of columns in a tile."""
    a, b = signs(130, k, seed=k), signs(130, k, seed=k + 1)
    expected = a @ b.t()
    for m, n in itertools.product((1, 2, 9, 65, 130), SIZES):
        assert torch.equal(F.binary_matmul(pack(a[:m]), pack(b[:n]), k), expected[:m, :n]), (m, n)
    for m, n in itertools.product(SIZES, (1, 40, 97, 130)):
        weights = pack(b[:n])
        got = F.binary_matmul(pack(a[:m]), weights, k, arranged=F.arrange_signs(weights))
        assert torch.equal(got, expected[:m, :n]), (m, n)


@pytest.mark.usefixtures("capability")
def test_products_of_every_pair_of_nibbles() -> None:
    """The largest and smallest sums of every nibble, in every field, over whole segments and their rest."""
    nibbles = torch.tensor([[1.0 if value >> bit & 1 else -1.0 for bit in range(4)] for value in range(16)])
    for repeats in (1, 7, 126, 128, 141, 300):
        rows = nibbles.repeat(1, repeats)
        packed = pack(rows)
        assert torch.equal(F.binary_matmul(packed, packed, 4 * repeats), rows @ rows.t()), repeats


@pytest.mark.usefixtures("capability")
def test_sums_longer_than_16_bits() -> None:
    k = 140_000
    a, b = torch.ones(9, k), torch.ones(34, k)
    b[1] = -1
    b[2, ::2] = -1
    assert torch.equal(F.binary_matmul(pack(a), pack(b), k), a @ b.t())


@pytest.mark.usefixtures("capability")
def test_threads_share_rows_and_columns() -> None:
    """Large enough for several items a thread, of rows and of columns."""
    for m, n, k in ((3, 3000, 4096), (200, 700, 1024), (70, 65, 40000)):
        a, b = signs(m, k), signs(n, k, seed=1)
        assert torch.equal(F.binary_matmul(pack(a), pack(b), k), a @ b.t())


@pytest.mark.parametrize("backend", [Backend.NATIVE, Backend.REFERENCE])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 40), (2, 0, 40), (2, 3, 0), (0, 0, 0), (1, 1, 1)])
def test_empty_products(m: int, n: int, k: int, backend: Backend) -> None:
    a, b = signs(m, k), signs(n, k)
    packed = F.pack_signs(a, backend=backend), F.pack_signs(b, backend=backend)
    assert isinstance(packed[0], Tensor) and isinstance(packed[1], Tensor)
    assert packed[0].shape == (m, -(-k // 32))
    bias = torch.arange(n, dtype=torch.float32)
    got = F.binary_matmul(packed[0], packed[1], k, bias=bias, backend=backend)
    assert torch.equal(got, a @ b.t() + bias)
    threshold, flip = torch.zeros(n, dtype=torch.int32), torch.zeros(-(-n // 32), dtype=torch.int32)
    above = F.binary_matmul_sign(packed[0], packed[1], k, threshold, flip, backend=backend)
    assert above.shape == (m, -(-n // 32))
    x = a.clone().requires_grad_()
    y = F.sign_linear(x, b, backend=backend)
    assert y.shape == (m, n)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == (m, k)


@pytest.mark.parametrize("backend", [Backend.NATIVE, Backend.REFERENCE])
def test_products_into_memory_that_is_there(backend: Backend) -> None:
    a, b = signs(5, 70), signs(9, 70, seed=1)
    out = torch.empty(5, 9)
    assert F.binary_matmul(pack(a), pack(b), 70, out=out, backend=backend) is out
    assert torch.equal(out, a @ b.t())


GEOMETRIES = [
    ((2, 5, 7, 6), (4, 3, 3), {"padding": 1}),
    ((1, 3, 1, 1), (2, 1, 1), {}),
    ((1, 3, 1, 1), (2, 3, 3), {"padding": 1}),
    ((3, 64, 8, 8), (97, 3, 3), {"padding": 1, "stride": 2}),
    ((2, 33, 9, 10), (33, 3, 2), {"padding": (2, 0), "dilation": (2, 3)}),
    ((0, 5, 4, 4), (3, 3, 3), {}),
    ((2, 40, 12, 12), (65, 5, 5), {"padding": 2}),
    ((1, 7, 5, 5), (3, 5, 5), {"padding": 4}),
]


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize(("shape", "kernel", "options"), GEOMETRIES)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_convolutions_equal_those_of_floats(
    shape: tuple[int, ...], kernel: tuple[int, ...], options: dict[str, int], form: torch.memory_format
) -> None:
    x = signs(*shape).contiguous(memory_format=form)
    weight = signs(kernel[0], shape[1], *kernel[1:], seed=1)
    expected = torch.nn.functional.conv2d(x, weight, **options)
    got = F.binary_conv2d(x, pack(weight, 1), **options)
    assert torch.equal(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last if ops.is_channels_last(x) else torch.contiguous_format)
    thresholds = torch.randint(-5, 6, (kernel[0],), dtype=torch.int32)
    turned = signs(kernel[0], seed=3)
    packed = F.binary_conv2d_sign(pack(x, 1), pack(weight, 1), shape[1], thresholds, pack(turned), **options)
    above = torch.where(expected >= thresholds.view(-1, 1, 1), 1.0, -1.0) * -turned.view(-1, 1, 1)
    assert torch.equal(F.unpack_signs(packed, kernel[0]).permute(0, 3, 1, 2), above)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_training_layers_have_the_gradients_of_float_layers(form: torch.memory_format) -> None:
    x, weight = signs(3, 40, 9, 8).contiguous(memory_format=form), signs(33, 40, 3, 3, seed=1)
    bias = torch.linspace(-1, 1, 33)
    above = torch.randn(3, 33, 9, 8)
    outcomes = []
    for layer in (F.sign_conv2d, torch.nn.functional.conv2d):
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
        y = layer(*leaves, padding=1)
        outcomes.append((y, *torch.autograd.grad(y, leaves, above)))
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_refused() -> None:
    x, weight = signs(2, 5).requires_grad_(), signs(3, 5).requires_grad_()
    (dx,) = torch.autograd.grad(F.sign_linear(x, weight).square().sum(), x, create_graph=False)
    assert dx.shape == x.shape
    with pytest.raises(NotImplementedError, match="sign_linear has no second derivative"):
        torch.autograd.grad(F.sign_linear(x, weight).square().sum(), x, create_graph=True)


def test_pooling_before_and_after_the_sign() -> None:
    values = torch.randn(2, 40, 7, 9)
    turned = signs(40, seed=5)
    for kernel, stride, padding in ((2, 2, 0), (3, 2, 1), (3, 1, 0)):
        pooled = torch.nn.functional.max_pool2d(values, kernel, stride, padding)
        # A flipped channel's sign is that of the negated value, so its pooling is a minimum.
        expected = torch.where((pooled >= 0.3) ^ (turned > 0).view(-1, 1, 1), 1.0, -1.0)
        before = torch.where((values >= 0.3) ^ (turned > 0).view(-1, 1, 1), 1.0, -1.0)
        packed = F.packed_max_pool2d(pack(before, 1), pack(turned), kernel, stride, padding)
        assert torch.equal(F.unpack_signs(packed, 40).permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_signs_of_special_values(dtype: torch.dtype) -> None:
    values = [0.0, -0.0, 1e-30, -1e-30, float("inf"), float("-inf"), float("nan"), -float("nan"), 2.0, -2.0]
    x = torch.tensor(values * 4, dtype=dtype)
    expected = torch.where(x >= 0, 1.0, -1.0).to(dtype)
    assert torch.equal(F.binarize(x), expected)
    assert torch.equal(F.unpack_signs(pack(x), 40, dtype), expected)
    assert torch.equal(F.unpack_signs(pack(x.expand(3, 40).t(), 0), 40, dtype), expected.expand(3, 40))


def test_arranged_weights_are_the_same_bits_in_another_order() -> None:
    weights = pack(signs(70, 100))
    arranged = F.arrange_signs(weights)
    assert arranged.numel() == ops.arranged_bytes(70, 4, weights.device) == 96 * 20
    blocks = arranged[: 96 * 16].view(3, 16, 32)
    order = torch.tensor([(j >> 1) + 16 * (j & 1) for j in range(32)])
    rows = torch.cat([weights, weights.new_zeros(26, 4)]).view(torch.uint8).view(3, 32, 16)
    assert torch.equal(blocks, rows[:, order].transpose(1, 2))


def test_without_compiled_kernels_nothing_is_arranged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed layers arrange their weights on any device; only compiled kernels read the result."""
    for module in ("signs", "products"):
        monkeypatch.setattr(f"quantkern.binary.{module}.resolve", lambda x, backend: Backend.REFERENCE)
    a, weights = signs(5, 70), signs(9, 70, seed=1)
    arranged = F.arrange_signs(pack(weights))
    assert arranged.numel() == 0
    got = F.binary_matmul(pack(a), pack(weights), 70, arranged=arranged)
    assert torch.equal(got, a @ weights.t())


def test_saved_bytes_are_a_sixteenth() -> None:
    x, weight = signs(8, 128, 14, 14), signs(128, 128, 3, 3).requires_grad_()
    saved: dict[str, int] = {}
    for name, layer in (("packed", F.sign_conv2d), ("float", torch.nn.functional.conv2d)):
        total = 0

        def count(t: Tensor) -> Tensor:
            nonlocal total
            total += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            layer(x.clone().requires_grad_(), weight, padding=1).sum().backward()
        saved[name] = total
    assert 0 < saved["packed"] <= saved["float"] / 16


def test_a_product_of_inference_tensors() -> None:
    with torch.inference_mode():
        assert torch.equal(F.sign_linear(signs(2, 40), signs(3, 40)), signs(2, 40) @ signs(3, 40).t())


def test_reference_accepts_what_the_kernels_accept() -> None:
    x = signs(2, 33)
    assert torch.equal(reference.unpack_signs(reference.pack_signs(x), 33), x)
