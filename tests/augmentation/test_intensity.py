from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from segfit.augmentation import intensity
from segfit.augmentation.intensity import (
    blur_kernels,
    change_gamma,
    lower_resolution_by_index,
    make_noise,
    resolution_indices,
)

CPU = torch.device("cpu")


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 2 + 1


def amounts(*values: float, ndim: int) -> Tensor:
    """One number per channel."""
    return torch.tensor(values).view(-1, *(1,) * ndim)


def blur(channel: Tensor, sigma: np.ndarray) -> Tensor:
    """Blur one channel `(*spatial)`."""
    return intensity.blur(channel[None], [kernel[0].tolist() for kernel in blur_kernels(sigma[None])])[0]


def change_contrast(channel: Tensor, factor: float) -> Tensor:
    """Change one channel `(*spatial)`."""
    return intensity.change_contrast(channel[None], factor)[0]


def lower_resolution(channel: Tensor, scale: float, axes: tuple[int, ...]) -> Tensor:
    """Change one channel `(*spatial)`."""
    return intensity.lower_resolution(channel[None], scale, axes)[0]


def test_noise_has_its_own_stream() -> None:
    first = make_noise((2, 40, 40), 0.1, 5, CPU)
    state = torch.get_rng_state()
    assert torch.equal(first, make_noise((2, 40, 40), 0.1, 5, CPU))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, make_noise((2, 40, 40), 0.1, 6, CPU))
    assert first.std().item() == pytest.approx(0.1, rel=0.05)
    assert abs(first.mean().item()) < 0.01


@pytest.mark.parametrize(("sigma", "length"), [(0.5, 3), (0.58, 3), (0.6, 5), (0.91, 5), (0.92, 7), (1.0, 7)])
def test_blur_of_an_impulse_is_the_kernel(sigma: float, length: int) -> None:
    impulse = torch.zeros(11, 11)
    impulse[5, 5] = 1
    line = np.exp(-0.5 * (np.arange(-5, 6) / sigma) ** 2) * (np.abs(np.arange(-5, 6)) <= length // 2)
    line /= line.sum()
    result = blur(impulse, np.array([sigma, sigma]))
    np.testing.assert_allclose(result, np.outer(line, line), atol=1e-7)


def test_blur_mirrors_at_the_border() -> None:
    channel, sigma = noise(9, 8, 7), np.array([0.55, 0.8, 1.0])
    expected = channel.numpy().astype(np.float64)
    for axis, (width, radius) in enumerate(zip(sigma, (1, 2, 3), strict=True)):
        expected = ndimage.gaussian_filter1d(expected, width, axis, mode="mirror", radius=radius)
    np.testing.assert_allclose(blur(channel, sigma), expected, atol=1e-5)


def test_blur_of_a_thin_patch() -> None:
    assert torch.equal(
        blur(torch.full((1, 2, 9), 3.0), np.array([1.0, 1.0, 1.0])).round(decimals=5), torch.full((1, 2, 9), 3.0)
    )


def test_contrast_is_about_the_mean_and_within_the_range() -> None:
    channel = noise(8, 9, 10)
    mean = channel.mean()
    torch.testing.assert_close(change_contrast(channel, 0.75), (channel - mean) * 0.75 + mean)
    stretched = change_contrast(channel, 1.25)
    assert stretched.min() == channel.min()
    assert stretched.max() == channel.max()
    inner = (channel - mean).abs() < 2
    torch.testing.assert_close(stretched[inner], ((channel - mean) * 1.25 + mean)[inner])


def test_lower_resolution_of_a_line() -> None:
    line = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(3, 1)
    expected = torch.tensor([[1.0, 1.5, 2.5, 3.0]]).repeat(3, 1)
    torch.testing.assert_close(lower_resolution(line, 0.5, (1,)), expected)
    torch.testing.assert_close(lower_resolution(line.T, 0.5, (0,)), expected.T)


def test_lower_resolution_leaves_other_axes_alone() -> None:
    channel = noise(4, 9, 10)
    result = lower_resolution(channel, 0.6, (1, 2))
    assert result.shape == channel.shape
    for before, after in zip(channel, result, strict=True):
        torch.testing.assert_close(lower_resolution(before, 0.6, (0, 1)), after)
    torch.testing.assert_close(lower_resolution(torch.full((5, 1), 2.0), 0.5, (0, 1)), torch.full((5, 1), 2.0))


@pytest.mark.parametrize("gamma", [0.7, 1.5])
def test_gamma_keeps_mean_and_deviation(gamma: float) -> None:
    channel = noise(9, 10, 11)
    values = channel.numpy().astype(np.float64)
    low, extent = values.min(), np.ptp(values)
    expected = ((values - low) / extent) ** gamma * extent + low
    expected = (expected - expected.mean()) * values.std(ddof=1) / expected.std(ddof=1) + values.mean()
    np.testing.assert_allclose(change_gamma(channel[None], gamma)[0], expected, atol=1e-4)
    inverted = change_gamma(channel[None], gamma, inverted=True)[0]
    torch.testing.assert_close(inverted, -change_gamma(-channel[None], gamma)[0])
    assert inverted.mean().item() == pytest.approx(values.mean(), abs=1e-4)
    assert inverted.std().item() == pytest.approx(values.std(ddof=1), rel=1e-4)


def test_gamma_one_and_constant_images_change_nothing() -> None:
    channel = noise(5, 6)
    torch.testing.assert_close(change_gamma(channel[None], 1.0)[0], channel)
    torch.testing.assert_close(change_gamma(torch.full((1, 5, 6), 4.0), 0.7)[0], torch.full((5, 6), 4.0))


@pytest.mark.parametrize("shape", [(9, 8, 7), (12, 13), (1, 2, 20)])
def test_channels_are_blurred_together_as_alone(shape: tuple[int, ...]) -> None:
    channels = noise(3, *shape)
    sigma = np.random.default_rng(0).uniform(0.5, 1.0, (3, len(shape)))
    sigma[1] = 0
    kernels = [
        torch.from_numpy(kernel).float().T.reshape(-1, 3, *(1,) * len(shape)).unbind() for kernel in blur_kernels(sigma)
    ]
    together = intensity.blur(channels, kernels)
    for index in (0, 2):
        torch.testing.assert_close(together[index], blur(channels[index], sigma[index]), rtol=0, atol=1e-6)
    assert torch.equal(together[1], channels[1])


@pytest.mark.parametrize("size", [1, 2, 5, 14, 30, 56, 97, 128, 192])
def test_resolution_by_index_is_that_of_interpolation(size: int) -> None:
    scales = np.array([1.0, *np.linspace(0.5, 1.0, 60)])
    channels = noise(len(scales), size, 3)
    first, second, share = resolution_indices(size, scales)
    indices = torch.from_numpy(first).long(), torch.from_numpy(second).long(), torch.from_numpy(share).float()
    together = lower_resolution_by_index(channels, {0: indices})
    alone = torch.stack([lower_resolution(c, scale, (0,)) for c, scale in zip(channels, scales, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert torch.equal(together[0], channels[0])


def test_contrast_and_gamma_of_channels_together_are_those_of_each() -> None:
    channels, values = noise(3, 7, 8, 9), (0.7, 1.3, 1.0)
    contrasted = intensity.change_contrast(channels, amounts(*values, ndim=3))
    raised = change_gamma(channels, amounts(*values, ndim=3), inverted=True)
    for index, value in enumerate(values):
        torch.testing.assert_close(contrasted[index], change_contrast(channels[index], value), rtol=0, atol=1e-5)
        alone = change_gamma(channels[index : index + 1], value, inverted=True)
        torch.testing.assert_close(raised[index : index + 1], alone, rtol=0, atol=1e-5)
