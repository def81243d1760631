"""The numbers of batch norms folded into weights by QAT_Quantizer and LsqQuantizer; D2 is what NNI does wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from folded_networks import BOTH, Convolutions, batch, fine, net, on_grid, rules, shake, train
from torch import nn

from quantkern.quantizers import LsqQuantizer, QAT_Quantizer


@BOTH
def test_training_and_evaluation_equal_the_formulas(kind: type) -> None:
    """Unfolded statistics in training (D2), one folded convolution in evaluation."""
    model, twin = net(), net()
    kind(model, rules(), fold_bn=True)
    conv, bn = model.conv, twin.bn
    factor = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach().reshape(-1, 1, 1, 1)
    model.train()
    output = model.bn(model.conv(batch()))
    quantizer = conv.parametrizations.weight[0]
    weight = on_grid(twin.conv.weight.detach() * factor, quantizer, factor) / factor
    expected = bn(nn.functional.conv2d(batch(), weight))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.bn.running_mean, bn.running_mean)
    torch.testing.assert_close(model.bn.running_var, bn.running_var)

    model.eval()
    output = model.conv(batch())
    assert model.bn(output) is output
    factor = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach()
    weight = on_grid(twin.conv.weight.detach() * factor.reshape(-1, 1, 1, 1), quantizer, factor)
    expected = nn.functional.conv2d(batch(), weight, bn.bias - bn.running_mean * factor)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 3e-4), (8, 3e-2)])
def test_statistics_are_those_of_the_unfolded_layer(bits: int, tolerance: float) -> None:
    """D2: NNI's are those of the folded output, fed back into itself."""
    model, floating = net(), net()
    QAT_Quantizer(model, rules(bits), fold_bn=True)
    train(model, None, range(30))
    train(floating, None, range(30))
    for name in ("bn", "bn1"):
        for statistic in ("running_mean", "running_var"):
            expected = getattr(getattr(floating, name), statistic)
            difference = (getattr(getattr(model, name), statistic) - expected).abs().max()
            assert difference <= tolerance * expected.abs().max(), (name, statistic)
        folded = floating.bn.weight.square() * floating.bn.running_var
        assert ((folded - floating.bn.running_var).abs() / floating.bn.running_var).min() > 2 * tolerance


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_float_model(frozen: bool) -> None:
    """With 16 bits nothing is left of quantization; the divisor of the statistics takes no gradient."""
    model, floating = net(), net()
    QAT_Quantizer(model, rules(16), fold_bn=True, freeze_bn_step=0 if frozen else None)
    train(model, None, range(1))
    if frozen:
        floating.eval()
        floating(batch()).square().mean().backward()
    else:
        train(floating, None, range(1))
    own = {name.replace("parametrizations.weight.original", "weight"): p for name, p in model.named_parameters()}
    for name, parameter in floating.named_parameters():
        size = parameter.grad.abs().max().item()
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=0, atol=5e-3 * size + 1e-6, msg=name)


@BOTH
def test_gamma_learns_from_the_batch_norm_alone(kind: type) -> None:
    """In the factor, which the batch norm makes up for, its gradient would be noise of the rounding."""
    model = net()
    kind(model, rules(4), fold_bn=True)
    model.train()
    between = model.conv(batch())
    model.bn(between).square().sum().backward()
    plain = net().bn
    plain(between.detach()).square().sum().backward()
    torch.testing.assert_close(model.bn.weight.grad, plain.weight.grad)


@BOTH
@pytest.mark.parametrize("scheme", ["per_tensor_symmetric", "per_channel_symmetric"])
@pytest.mark.parametrize("gammas", [[0.0, 0.7, -0.5, 1.0], [0.0] * 4, [1e-42, 1e-30, -1e-25, 0.0], [-1.0] * 4])
def test_any_gamma(kind: type, scheme: str, gammas: list[float]) -> None:
    model, floating = net(), net()
    for each in (model, floating):
        with torch.no_grad():
            each.bn.weight.copy_(torch.tensor(gammas))
    kind(model, rules(16, quant_scheme=scheme, quant_dtype="int", **fine(kind)), fold_bn=True)
    for each in (model, floating):
        each.train()
        each.first = each.bn(each.conv(batch()))
        each.first.mul(torch.linspace(-1, 1, 16).reshape(4, 4)).sum().backward()
    assert model.first.isfinite().all()
    torch.testing.assert_close(model.first, floating.first, rtol=1e-3, atol=1e-3)
    dead = [gamma == 0 for gamma in gammas]
    for channel, (found, expected) in enumerate(zip(model.bn.weight.grad, floating.bn.weight.grad, strict=True)):
        # A dead channel keeps 4 steps where it shares its scale with others: that much noise for its gamma.
        tolerance = 0.25 if dead[channel] and not all(dead) and "tensor" in scheme else 0.01
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=2e-2)
    own, expected = model.conv.parametrizations.weight.original.grad, floating.conv.weight.grad.clone()
    if kind is LsqQuantizer:  # no gradient where a weight lies on the end of its grid: the largest does
        expected[own == 0] = 0
        assert (own[[gamma != 0 for gamma in gammas]] == 0).sum() <= 4
    torch.testing.assert_close(own, expected, rtol=2e-2, atol=2e-2)
    for channel, gamma in enumerate(gammas):
        if gamma == 0:
            assert torch.equal(model.first[:, channel], model.bn.bias[channel].expand_as(model.first[:, channel]))
            assert own[channel].abs().max() == 0
    torch.testing.assert_close(model.bn.running_var, floating.bn.running_var, rtol=3e-3, atol=1e-5)
    model.eval()
    floating.eval()
    found, expected = model.bn(model.conv(batch())), floating.bn(floating.conv(batch()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(found[:, dead], expected[:, dead])


def test_a_channel_with_gamma_zero_leaves_the_range_to_the_others() -> None:
    """Pruned channels of small gamma elsewhere: an unscaled weight among them would cost the others their steps."""
    model = net()
    with torch.no_grad():
        model.bn.weight.copy_(torch.tensor([0.0, 0.01, 0.01, -0.01]))
        model.bn.running_var.fill_(1)
    QAT_Quantizer(model, rules(quant_scheme="per_tensor_symmetric", quant_dtype="int"), fold_bn=True)
    model.train()
    model(batch())
    largest = model.conv.parametrizations.weight.original.abs().max().item()
    assert model.conv.parametrizations.weight[0].scale.item() * 127 <= largest * 0.01


@BOTH
@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_channels_too_small_for_the_grid_keep_their_statistics(kind: type, name: str) -> None:
    """Those of zeros would make the factor grow until the weight comes back, and evaluation wrong."""
    torch.manual_seed(0)
    model = shake(nn.Sequential(getattr(nn, name)(4, 4, 3, groups=2 if "T" in name else 1), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, 1e-3, -1e-4, 0.0]))
        model[0].weight[3] *= 1e-3
    floating = copy.deepcopy(model)
    kind(model, rules(4, layers=(name,), **fine(kind)), fold_bn=True)
    generator = torch.Generator().manual_seed(1)
    for each in (model, floating):
        each.train()
    for _ in range(80):
        x = torch.randn(16, 4, 5, 5, generator=generator)
        model(x)
        floating(x)
    ratio = model[1].running_var / floating[1].running_var
    assert ratio.min() > 0.5 and ratio.max() < 2, ratio
    small = torch.tensor([False, True, True, True])
    difference = (model.eval()(x) - floating.eval()(x))[:, small]
    assert difference.abs().max() < 0.02


@BOTH
@pytest.mark.parametrize("frozen", [False, True])
def test_one_convolution_a_layer_and_step(kind: type, frozen: bool) -> None:
    """NNI takes two, in training and in evaluation."""
    model = net()
    kind(model, rules(8, "weight input output"), fold_bn=True, freeze_bn_step=0 if frozen else None)
    train(model, None, range(1))
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad(), Convolutions() as counted:
            model(batch())
        assert counted.count == 3
