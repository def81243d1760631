"""What random trials have found, one named case each; every one of them failed once."""

from __future__ import annotations

import math

import pytest
import torch
from test_ops import TRITON_DEVICES, capability  # noqa: F401  the fixture that goes through the instruction sets
from torch import nn

from quantkern import Backend, LsqQuantizer, NaiveQuantizer
from quantkern import functional as F

BACKENDS = [Backend.NATIVE, Backend.REFERENCE]


def backend_on(device: str) -> Backend:
    """Triton, where it runs."""
    from quantkern import triton

    runs, why = triton.available(device)
    if not runs:
        pytest.skip(f"Triton does not run on {device} here: {why}")
    return Backend.TRITON


def assert_zeros_have_no_sign(backend: Backend, device: str = "cpu") -> None:
    x = torch.tensor([-0.0, 0.0, -1e-45, -3.0, 0.2] * 13, device=device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        y = F.dorefa_activation(x.to(dtype), 2, backend=backend)
        assert not bool(torch.signbit(y).any()) and bool((y == 0).any())


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_of_minus_zero_are_zero_on_every_instruction_set(backend: Backend) -> None:
    assert_zeros_have_no_sign(backend)


@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_activations_of_minus_zero_are_zero_in_triton(device: str) -> None:
    assert_zeros_have_no_sign(backend_on(device), device)


def assert_tiny_weights_have_a_gradient(backend: Backend, device: str = "cpu") -> None:
    """The square of the largest weight underflows."""
    for size in (1e-18, 1e-30, 1e-37):
        w = (torch.tensor([1.0, -0.5, 0.25, -1.0], device=device) * size).requires_grad_()
        above = torch.tensor([1.0, 2.0, 3.0, -4.0], device=device)
        (dx,) = torch.autograd.grad(F.dorefa_weight(w, 4, backend=backend), w, above)
        wide = w.detach().double().requires_grad_()
        t = torch.tanh(wide)
        (want,) = torch.autograd.grad(t / t.abs().max(), wide, above.double())
        torch.testing.assert_close(dx.double().cpu(), want.cpu(), rtol=1e-5, atol=0.0)


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_tiny_dorefa_weights_is_finite(backend: Backend) -> None:
    assert_tiny_weights_have_a_gradient(backend)


@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_the_gradient_of_tiny_dorefa_weights_is_finite_in_triton(device: str) -> None:
    assert_tiny_weights_have_a_gradient(backend_on(device), device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_float64_signs_add_their_bias_in_float64(backend: Backend) -> None:
    bias = torch.tensor([1 / 3, -1e-12, 1e10 + 1 / 3], dtype=torch.float64)
    x, weight = torch.ones(2, 5, dtype=torch.float64), torch.ones(3, 5, dtype=torch.float64)
    y = F.sign_linear(x, weight, bias, backend=backend)
    torch.testing.assert_close(y, (5 + bias).expand(2, 3), rtol=1e-15, atol=0)
    for form in (torch.contiguous_format, torch.channels_last):
        images = torch.ones(2, 5, 4, 4, dtype=torch.float64).contiguous(memory_format=form)
        y = F.sign_conv2d(images, weight.view(3, 5, 1, 1), bias, backend=backend)
        torch.testing.assert_close(y, (5 + bias).view(3, 1, 1).expand(2, 3, 4, 4), rtol=1e-15, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_counter_of_one_element_leaves_a_scalar_a_scalar(backend: Backend) -> None:
    x, step = torch.tensor(0.3, requires_grad=True), torch.tensor([3])
    scale, zero_point = torch.full((), 0.25), torch.zeros((), dtype=torch.int32)
    running, flag = (torch.full((), -1.0), torch.full((), 1.0)), torch.tensor(True)
    ys = [
        F.fake_quantize(x, scale, zero_point, -8, 7, step=step, start_step=2, backend=backend),
        F.fake_quantize_weight(x, scale, zero_point, -8, 7, True, step=step, start_step=2, backend=backend),
        F.fake_quantize_activation(
            x, *running, scale, zero_point, flag, -8, 7, True, step=step, start_step=2, backend=backend
        ),
    ]
    assert [tuple(y.shape) for y in ys] == [(), (), ()]
    assert torch.autograd.grad(sum(ys), x)[0].shape == ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_points_between_integers_are_not_cut_off(backend: Backend) -> None:
    x = torch.linspace(-2, 2, 41)
    want = F.fake_quantize(x, torch.tensor(0.25), torch.tensor(1.5), 0, 15, backend=backend)
    assert not torch.equal(want, F.fake_quantize(x, 0.25, 1, 0, 15, backend=backend))
    for zero_point in (1.5, torch.tensor(1.5, dtype=torch.float64), torch.tensor(1.5).half()):
        for scale in (0.25, torch.tensor(0.25)):
            assert torch.equal(F.fake_quantize(x, scale, zero_point, 0, 15, backend=backend), want)
    by_channel = F.fake_quantize(x.view(1, 41), [0.25], [1.5], 0, 15, 0, backend=backend)  # type: ignore[arg-type]
    assert torch.equal(by_channel.view(41), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_point_tensor_outside_the_range_is_refused(backend: Backend) -> None:
    zero_point = torch.tensor([0, 16], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"zero_point must lie in \[0, 15\], got 16"):
        F.fake_quantize(torch.ones(2, 3), torch.ones(2), zero_point, 0, 15, 0, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_weights_and_gradients(backend: Backend) -> None:
    w = torch.empty(0, 3, requires_grad=True)
    y = F.dorefa_weight(w, 4, backend=backend)
    assert y.shape == (0, 3) and torch.autograd.grad(y.sum(), w)[0].shape == (0, 3)
    assert F.quantize_gradient(torch.empty(0, 3), 4, torch.tensor(1), backend=backend).shape == (0, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_larger_than_the_image_is_a_clear_error(backend: Backend) -> None:
    with pytest.raises(ValueError, match="kernel .* larger than the image"):
        F.sign_conv2d(torch.ones(1, 4, 2, 2), torch.ones(2, 4, 3, 3), backend=backend)


# ---------------------------------------------------------------- quantizers in sessions of random actions


@pytest.mark.parametrize("init", ["paper", "minmax", "mse"])
@pytest.mark.parametrize("scheme", ["per_tensor_symmetric", "per_channel_symmetric"])
def test_an_unsigned_scale_starts_on_a_batch_without_positive_values(init: str, scheme: str) -> None:
    """It was 0 / 0, and every later forward an error."""
    model = nn.Sequential(nn.ReLU())
    rule = {"op_names": ["0"], "quant_types": ["input"], "quant_bits": 3, "signed": False}
    quantizer = LsqQuantizer(model, [{**rule, "init": init, "quant_scheme": scheme}])
    assert not model(torch.tensor([[-1.0, -3.0], [-2.0, -0.5]])).any()
    (scale,) = quantizer.scale_parameters()
    assert bool((scale > 0).all()) and float(scale.detach().amax()) <= 3.0
    x = 2.0 * scale.detach() * torch.ones(4, 2)
    assert torch.equal(model(x), x)


def test_a_layer_without_a_weight_learns_the_scale_of_a_batch() -> None:
    """The second forward of it was an AttributeError: a first layer's scale is learned through its product."""
    model = nn.Sequential(nn.ReLU())
    quantizer = LsqQuantizer(model, [{"op_types": ["ReLU"], "quant_types": ["input"], "quant_bits": 3}])
    for _ in range(2):
        model(torch.tensor([0.3, 9.0])).sum().backward()
    (scale,) = quantizer.scale_parameters()
    assert scale.grad is not None and scale.grad.item() != 0


@pytest.mark.parametrize("init", ["paper", "minmax", "mse"])
@pytest.mark.parametrize("value", [1e-45, 3.4e38])
def test_a_learned_scale_of_the_smallest_and_largest_numbers_is_finite(init: str, value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    nn.init.constant_(model[0].weight, value)
    rule = {"op_names": ["0"], "quant_types": ["weight"], "quant_bits": 3, "init": init}
    quantizer = LsqQuantizer(model, [rule])
    assert bool(model[0].weight.isfinite().all())
    (scale,) = quantizer.scale_parameters()
    assert 0 < scale.item() < math.inf


def test_a_loaded_weight_scale_goes_with_the_state_dict() -> None:
    """Evaluation uses it until training goes on; the model that loaded such a state_dict used another one."""

    def naive() -> tuple[nn.Linear, NaiveQuantizer]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 2)).eval()
        return model[0], NaiveQuantizer(model)  # type: ignore[return-value]

    (layer, quantizer), (other, second) = naive(), naive()
    entry = {"weight_bits": 8, "weight_scale": torch.tensor([0.25]), "weight_zero_point": torch.tensor([0.0])}
    quantizer.load_calibration_config({"0": entry})
    second.load_state_dict(quantizer.state_dict(), strict=True)
    expected = (layer.parametrizations["weight"].original / 0.25).round() * 0.25  # type: ignore[index]
    assert torch.equal(other.weight, expected) and torch.equal(layer.weight, expected)
    _, third = naive()
    second.load_state_dict(third.state_dict(), strict=True)
    assert not torch.equal(other.weight, expected)
    before = list(third.state_dict())
    quantizer.train()(torch.ones(1, 4))
    assert list(quantizer.state_dict()) == before


@pytest.mark.parametrize("backend", [Backend.NATIVE, Backend.REFERENCE])
def test_a_sum_of_signs_has_no_negative_zero(backend: Backend) -> None:
    """A window of nothing but padding, which a float convolution with -1 makes -0."""
    x, weight = F.pack_signs(torch.ones(1, 2, 2, 1)), F.pack_signs(-torch.ones(2, 1, 1, 1))
    y = F.binary_conv2d(x, weight, None, 1, 1, channels=1, backend=backend)
    assert y[0, :, 0].eq(0).all() and not y[0, :, 0].signbit().any()
    scaled = F.binary_conv2d(x, weight, None, 1, 1, channels=1, scale=torch.tensor([2.0, -2.0]), backend=backend)
    assert scaled[0, :, 0].signbit().tolist() == [[False] * 4, [True] * 4]


def test_codes_of_a_view_have_the_strides_that_their_shape_function_says() -> None:
    x = torch.tensor([1.0, 2.0, 3.0]).expand(4, 3).t().unsqueeze(0)
    codes, parameters = torch.ops.quantkern.to_codes(x, torch.ones(1), None, 0, 15, None)
    assert codes.stride() == torch.empty_like(x).stride() and codes.numel() == 12
    assert torch.equal(torch.ops.quantkern.from_codes(codes, parameters, 0, None), x)
    torch.library.opcheck(torch.ops.quantkern.to_codes.default, (x, torch.ones(1), None, 0, 15, None))
