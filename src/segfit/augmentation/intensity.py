"""Changes of the grey values of one sample. Arrays are `(c, *spatial)` float; parameters have one entry per channel.

Formulas are those of nnU-Net 2.8.1. Pure functions of their arguments, on the device of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["blur", "change_contrast", "change_gamma", "lower_resolution", "make_noise"]

_TINY = 1e-7
_LINEAR = {2: "bilinear", 3: "trilinear"}


def make_noise(shape: Sequence[int], std: float, seed: int, device: torch.device) -> Tensor:
    """Return Gaussian noise of this shape, float32, of its own random stream.

    The same seed gives other numbers on another kind of device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=device) * std


def blur(channel: Tensor, sigma: NDArray[np.float64]) -> Tensor:
    """Blur one channel `(*spatial)` by a Gaussian of `sigma` voxels per axis, mirrored at the borders.

    The kernel has the odd length nearest to 6 sigma + 0.5: 3, 5 or 7 voxels for the usual range.
    """
    for axis, width in enumerate(sigma):
        radius = int((6 * width + 0.5) / 2)
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / width) ** 2)
        weights /= weights.sum()
        size = channel.shape[axis]
        extended = channel.index_select(axis, _mirrored(size, radius, channel.device))
        channel = extended.narrow(axis, 0, size) * float(weights[0])
        for start, weight in enumerate(weights[1:], start=1):
            channel.add_(extended.narrow(axis, start, size), alpha=float(weight))
    return channel


def _mirrored(size: int, radius: int, device: torch.device) -> Tensor:
    """Return the indices -radius ... size + radius - 1 of an axis, mirrored at the centres of its outermost voxels."""
    index = torch.arange(-radius, size + radius, device=device)
    if size == 1:
        return torch.zeros_like(index)
    period = 2 * (size - 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)


def change_contrast(channel: Tensor, factor: float) -> Tensor:
    """Stretch one channel `(*spatial)` about its mean, within the range it has."""
    low, high = channel.aminmax()
    mean = channel.mean()
    return torch.clamp((channel - mean) * factor + mean, low, high)


def lower_resolution(channel: Tensor, scale: float, axes: Sequence[int]) -> Tensor:
    """Take one channel `(*spatial)` to `scale` times its size on `axes` and back: nearest down, linear up."""
    full = tuple(channel.shape)
    size = [max(1, round(n * scale)) if axis in axes else n for axis, n in enumerate(full)]
    small = F.interpolate(channel[None, None], size=size, mode="nearest-exact")
    return F.interpolate(small, size=full, mode=_LINEAR[len(full)], align_corners=False)[0, 0]


def change_gamma(channel: Tensor, gamma: float, *, inverted: bool = False) -> Tensor:
    """Raise one channel `(*spatial)`, scaled to 0...1, to the power `gamma`.

    Mean and standard deviation stay as they were. With `inverted` the power acts on the negative.
    """
    channel = -channel if inverted else channel
    std, mean = torch.std_mean(channel)
    low, high = channel.aminmax()
    extent = high - low
    changed = ((channel - low) / extent.clamp(min=_TINY)).pow_(gamma) * extent + low
    new_std, new_mean = torch.std_mean(changed)
    changed = (changed - new_mean) * (std / new_std.clamp(min=_TINY)) + mean
    return -changed if inverted else changed
