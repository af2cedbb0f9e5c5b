from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segfit.networks import prediction
from segfit.networks.blocks import EPSILON, SLOPE, BatchNorm, ConvUnit, Head, InstanceNorm, ResidualBlock


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def make_norm(channels: int) -> InstanceNorm:
    norm = InstanceNorm(channels)
    norm.weight.data = 1 + noise(channels, seed=1)
    norm.bias.data = noise(channels, seed=2)
    return norm


@pytest.mark.parametrize("shape", [(2, 5, 6, 7, 4), (3, 4, 9, 8)])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_channels_last_norm_equals_pytorchs(shape: tuple[int, ...], mean: float) -> None:
    norm = make_norm(shape[1])
    image, upstream = noise(*shape) * 3 + mean, noise(*shape, seed=4)
    results = []
    for x in (image.clone(), channels_last(image)):
        x.requires_grad_()
        y = norm(x)
        results.append((y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), upstream)))
    assert channels_last(image).stride() == results[1][0].stride() == results[1][1].stride()
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-4 if mean else 1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 6, 7, 4), (3, 4, 9, 8), (1, 3, 40, 33, 29), (1, 8, 1, 1, 2)])
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("part", [2**20, 200])
@pytest.mark.parametrize("activate", [True, False])
def test_units_that_only_predict_normalise_in_place_as_pytorch_does(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], mean: float, part: int, activate: bool
) -> None:
    monkeypatch.setattr(prediction, "_PART", part)
    norm, slope = make_norm(shape[1]), SLOPE if activate else 1.0
    image = noise(*shape) * 3 + mean
    with torch.inference_mode():
        plain = F.leaky_relu(norm(image), slope)
        ours, low = (
            prediction.normalize_(channels_last(image).to(kind), norm.weight, norm.bias, EPSILON, slope)
            for kind in (torch.float32, torch.bfloat16)
        )
    assert ours.stride() == channels_last(image).stride()
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-4 if mean else 1e-5)
    assert low.dtype == torch.bfloat16
    if not mean and shape[-1] > 2:
        torch.testing.assert_close(low.float(), plain, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("size", "kernel"),
    [((6, 8), (3, 3)), ((6, 7), (3, 3)), ((6, 8), (3, 1)), ((6, 2, 12), (1, 3, 5)), ((7, 5, 10), (3, 3, 3)),
     ((3, 4, 16), (3, 3, 7))],
)  # fmt: skip
def test_convolutions_that_only_predict_equal_pytorchs(
    channels: int, stride: int, size: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    conv = ConvUnit(channels, 5, kernel, (stride,) * len(size)).conv
    image = noise(1, channels, *size)
    expected = conv(image)
    with torch.inference_mode():
        for x in (image, channels_last(image), torch.cat([image, image])):
            found = prediction.convolved(conv, x)
            torch.testing.assert_close(found[:1], expected, rtol=1e-5, atol=1e-5)
        assert prediction.convolved(conv.double(), image.double()).dtype == torch.float64


def test_only_predictions_on_a_processor_are_normalised_in_place() -> None:
    image = channels_last(noise(2, 3, 4, 5))
    assert not prediction.may_overwrite(image)
    with torch.no_grad():
        assert prediction.may_overwrite(image)
        assert not prediction.may_overwrite(image.contiguous())
        assert not prediction.may_overwrite(image.double())
        assert not prediction.may_overwrite(image[:, :2])


def test_gradient_of_the_norm_by_finite_differences() -> None:
    norm = make_norm(3).double()
    x = channels_last(noise(2, 3, 3, 4).double()).requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))


def test_low_precision_norm() -> None:
    norm = make_norm(8)
    image = channels_last(noise(2, 8, 10, 10))
    upstream = channels_last(noise(2, 8, 10, 10, seed=1))
    x, low = image.requires_grad_(), image.detach().bfloat16().requires_grad_()
    y, low_y = norm(x), norm(low)
    assert low_y.dtype == torch.bfloat16
    torch.testing.assert_close(low_y.float(), y, rtol=0.02, atol=0.02)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    (low_gradient,) = torch.autograd.grad(low_y, low, upstream.bfloat16())
    assert low_gradient.dtype == torch.bfloat16
    torch.testing.assert_close(low_gradient.float(), gradient, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(2, 5, 6, 7, 4), (3, 4, 9, 8)])
def test_batch_norm_equals_pytorchs(shape: tuple[int, ...]) -> None:
    ours = BatchNorm(shape[1])
    theirs = torch.nn.BatchNorm3d(shape[1]) if len(shape) == 5 else torch.nn.BatchNorm2d(shape[1])
    for step in range(3):
        image = noise(*shape, seed=step) * 3 + 7
        assert torch.equal(ours(image), theirs(image))
    kept = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in kept.items())
    ours(torch.full(shape, torch.inf))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in ours.state_dict().items())
    ours.eval(), theirs.eval()
    assert torch.equal(ours(image), theirs(image))


def test_conv_unit_keeps_size_and_divides_by_stride() -> None:
    unit = ConvUnit(2, 3, (1, 3, 3), (1, 2, 2))
    assert unit(noise(1, 2, 5, 8, 8)).shape == (1, 3, 5, 4, 4)
    linear = ConvUnit(2, 3, (3, 3), activate=False)
    x = noise(1, 2, 6, 6)
    expected = F.instance_norm(F.conv2d(x, linear.conv.weight, linear.conv.bias, padding=1))
    torch.testing.assert_close(linear(x), expected)
    linear.activate = True
    torch.testing.assert_close(linear(x), F.leaky_relu(expected, SLOPE))


def test_head_is_a_pointwise_convolution() -> None:
    head = Head(4, 3, ndim=3)
    head.weight.data, head.bias.data = noise(3, 4, 1, 1, 1), noise(3, seed=1)
    for x in (noise(2, 4, 3, 4, 5), channels_last(noise(2, 4, 3, 4, 5))):
        torch.testing.assert_close(head(x), F.conv3d(x, head.weight, head.bias))


def test_residual_block_with_silent_second_unit_is_its_shortcut() -> None:
    x = noise(2, 3, 4, 6)
    same = ResidualBlock(3, 3, (3, 3), (1, 2))
    torch.nn.init.zeros_(same.second.norm.weight)
    torch.testing.assert_close(same(x), F.leaky_relu(F.avg_pool2d(x, (1, 2)), SLOPE))
    assert not list(same.shortcut.parameters())
    wider = ResidualBlock(3, 5, (3, 3), (1, 1))
    torch.nn.init.zeros_(wider.second.norm.weight)
    torch.testing.assert_close(wider(x), F.leaky_relu(wider.shortcut(x), SLOPE))
    assert wider.shortcut.conv.bias is None
