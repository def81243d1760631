"""The Triton twins of products of packed signs, matrices and convolutions, equal quantkern.reference exactly.

Where and how they run is told in triton_checks.py, from which the tensors of these tests come.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from triton_binary_checks import INT32_MIN, check_conv, check_matmul, packed
from triton_checks import DEVICES, RUNS_HERE

from quantkern import reference
from quantkern import triton as twins

pytestmark = RUNS_HERE


@pytest.fixture(params=DEVICES or ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# ---- binary_matmul


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
