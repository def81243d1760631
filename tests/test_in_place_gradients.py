"""A backward writes over the gradient that it is given where nobody else holds it, and only there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from quantkern import _C
from quantkern import functional as F

Layer = Callable[[Tensor], Tensor]
IN_PLACE = ("quantkern::fake_quantize_backward_", "quantkern::lsq_backward_")
OUT_OF_PLACE = ("quantkern::fake_quantize_backward", "quantkern::lsq_backward")


def quantized(x: Tensor) -> Tensor:
    return F.fake_quantize(x, 0.1, 0, -8, 7)


def learned(x: Tensor) -> Tensor:
    return F.lsq(x, torch.full((), 0.1, requires_grad=True), -8, 7)


def learned_by_row(x: Tensor) -> Tensor:
    return F.lsq(x, torch.full((x.shape[0],), 0.1, requires_grad=True), -8, 7, axis=0)


def learned_by_column(x: Tensor) -> Tensor:
    return F.lsq(x, torch.full((x.shape[1],), 0.1, requires_grad=True), -8, 7, axis=1)


LAYERS = [quantized, learned, learned_by_row, learned_by_column]


class Watch:
    """Which backward operators ran; a profiler holds no tensors, as a dispatch mode would."""

    def __enter__(self) -> Watch:
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.profile.__exit__(*error)
        self.ran = [event.name for event in self.profile.events() if event.name in IN_PLACE + OUT_OF_PLACE]


@pytest.fixture(params=_C.supported_cpu_capabilities())
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 7), (6, 64), (3, 1000), (700, 5)])
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_in_place_gives_what_a_copy_gives(
    layer: Layer, dtype: torch.dtype, shape: tuple[int, ...], spread: float, capability: str
) -> None:
    x = numbers(*shape, dtype=dtype)
    above = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    with Watch() as watch:
        # The gradient of a product is new memory that only the engine holds.
        (layer(x * spread) * above).sum().backward()
    assert watch.ran and watch.ran[0] in IN_PLACE
    y = (x.detach() * spread).requires_grad_()
    with Watch() as watch:
        layer(y).backward(above)
    assert watch.ran and watch.ran[0] in OUT_OF_PLACE
    assert y.grad is not None and torch.equal(x.grad, y.grad * spread)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_gradient_that_somebody_holds_stays_as_it_is(layer: Layer) -> None:
    x, above = numbers(4, 50), torch.full((4, 50), 2.0)
    layer(x).backward(above)
    assert bool((above == 2.0).all()) and x.grad is not None and bool((x.grad == 0).any())

    x, held = numbers(4, 50), []
    y = layer(x)
    y.register_hook(held.append)
    (y * above).sum().backward()
    assert bool((held[0] == 2.0).all())

    x = numbers(4, 50)
    y = layer(x)
    y.retain_grad()
    (y * above).sum().backward()
    assert y.grad is not None and bool((y.grad == 2.0).all())


@pytest.mark.parametrize("layer", LAYERS)
def test_one_gradient_for_several_readers(layer: Layer) -> None:
    """The gradient of a sum is one tensor for both of its terms."""
    x, other = numbers(4, 50), numbers(4, 50)
    ((layer(x) + other) * 3.0).sum().backward()
    assert other.grad is not None and bool((other.grad == 3.0).all())
    assert x.grad is not None and bool((x.grad == 0).any())
    x = numbers(4, 50)
    (layer(x) + x).mul(3.0).sum().backward()
    assert x.grad is not None and set(x.grad.unique().tolist()) == {3.0, 6.0}


@pytest.mark.parametrize("layer", LAYERS)
def test_parts_and_repeated_elements_of_other_tensors(layer: Layer) -> None:
    x = numbers(4, 50)
    layer(x).sum().backward()  # one element, expanded
    whole = numbers(4, 50)
    torch.cat([layer(whole), whole.detach()], 1).mul(torch.arange(100.0)).sum().backward()
    expected = torch.where(x.grad == 0, 0.0, torch.arange(50.0))
    assert torch.equal(whole.grad, expected)
    turned = numbers(4, 50)
    (layer(turned).t().contiguous() * 1.0).sum().backward()
    assert torch.equal(turned.grad, x.grad)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_view_of_memory_that_nobody_else_knows(layer: Layer) -> None:
    """Reshapes in a backward, as of a linear layer over a sequence, keep what they were made of alive."""
    x, weight, expected = numbers(6, 64), torch.randn(3, 32), numbers(6, 64)
    with Watch() as watch:
        torch.nn.functional.linear(layer(x).view(4, 3, 32), weight).sum().backward()
    assert watch.ran and watch.ran[0] in IN_PLACE
    y = layer(expected)
    y.backward((torch.ones(12, 3) @ weight).view(6, 64))
    assert torch.equal(x.grad, expected.grad) and bool((x.grad == 0).any())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_view_of_memory_that_somebody_holds_stays_as_it_is(layer: Layer) -> None:
    x, other, held = numbers(4, 50), numbers(200), []
    flat = layer(x).view(-1)
    flat.register_hook(held.append)
    (flat * 2.0).sum().backward()
    assert bool((held[0] == 2.0).all()) and bool((x.grad == 0).any())
    for first in (True, False):
        x, other = numbers(4, 50), numbers(200)
        flat = layer(x).view(-1)
        ((flat + other if first else other + flat) * 3.0).sum().backward()
        assert bool((other.grad == 3.0).all()) and bool((x.grad == 0).any())
    x, parts = numbers(4, 50), []
    flat = layer(x).view(200)
    flat.register_hook(lambda grad: parts.append(grad[:100]))
    (flat * 2.0).sum().backward()
    assert bool((parts[0] == 2.0).all())


def test_derivatives_of_the_backward_and_batches_of_gradients() -> None:
    x = numbers(3, 40)
    (first,) = torch.autograd.grad((quantized(x) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert set(second.unique().tolist()) == {0.0, 2.0}
    y = quantized(x) * 1.0
    above = torch.randn(2, 3, 40)
    (together,) = torch.autograd.grad(y, x, above, is_grads_batched=True, retain_graph=True)
    single = torch.stack([torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in above])
    assert torch.equal(together, single)


def test_a_graph_that_is_kept_gives_the_same_twice() -> None:
    x = numbers(3, 40)
    loss = (quantized(x) * torch.arange(40.0)).sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: torch.ops.quantkern.fake_quantize_backward_(torch.ones(4, 8)[:, ::2], torch.zeros(2).byte()),
            "one block",
        ),
        (lambda: torch.ops.quantkern.fake_quantize_backward_(torch.ones(4, 8), torch.zeros(2).byte()), "4 bytes"),
        (
            lambda: torch.ops.quantkern.lsq_backward_(
                torch.ones(4, 8), torch.ones(8, 4).t(), torch.ones(()), -8, 7, 1.0, None, None
            ),
            "strides of x",
        ),
    ],
)
def test_memory_that_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
