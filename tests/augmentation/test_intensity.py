from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from segfit.augmentation.intensity import blur, change_contrast, change_gamma, lower_resolution, make_noise

CPU = torch.device("cpu")


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 2 + 1


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
    np.testing.assert_allclose(change_gamma(channel, gamma), expected, atol=1e-4)
    inverted = change_gamma(channel, gamma, inverted=True)
    torch.testing.assert_close(inverted, -change_gamma(-channel, gamma))
    assert inverted.mean().item() == pytest.approx(values.mean(), abs=1e-4)
    assert inverted.std().item() == pytest.approx(values.std(ddof=1), rel=1e-4)


def test_gamma_one_and_constant_images_change_nothing() -> None:
    channel = noise(5, 6)
    torch.testing.assert_close(change_gamma(channel, 1.0), channel)
    torch.testing.assert_close(change_gamma(torch.full((5, 6), 4.0), 0.7), torch.full((5, 6), 4.0))
