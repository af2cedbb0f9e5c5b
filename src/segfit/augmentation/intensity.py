"""Changes of grey values. Arrays are `(n, *spatial)` float, n channels of any samples, each changed on its own.

What says how much is one number where n is 1, and a tensor `(n, 1, ...)` on their device otherwise. Formulas are those
of nnU-Net 2.8.1. Pure functions of their arguments, which never make the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Amount",
    "blur",
    "blur_kernels",
    "change_contrast",
    "change_gamma",
    "lower_resolution",
    "lower_resolution_by_index",
    "make_noise",
    "resolution_indices",
]

Amount = float | Tensor
"""One number for one channel, or one per channel, `(n, 1, ...)`."""

Array = NDArray[np.float64]

_TINY = 1e-7
_LINEAR = {2: "bilinear", 3: "trilinear"}


def make_noise(shape: Sequence[int], std: float, seed: int, device: torch.device) -> Tensor:
    """Return Gaussian noise of this shape, float32, of its own random stream.

    The same seed gives other numbers on another kind of device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=device).mul_(std)


def blur_kernels(sigma: Array) -> list[Array]:
    """Return for each axis the weights `(n, 2 r + 1)` of Gaussians of `sigma` `(n, axes)` voxels; 0 blurs nothing.

    A kernel has the odd length nearest to 6 sigma + 0.5: 3, 5 or 7 voxels for the usual range; beyond it are zeros.
    """
    kernels = []
    for widths in sigma.T:
        radii = ((6 * widths + 0.5) / 2).astype(int)
        distance = np.abs(np.arange(-radii.max(), radii.max() + 1))
        weights = np.exp(-0.5 * (distance / np.where(widths > 0, widths, 1.0)[:, None]) ** 2)
        weights = np.where(distance <= radii[:, None], weights, 0.0)
        kernels.append(weights / weights.sum(axis=1, keepdims=True))
    return kernels


def blur(channels: Tensor, kernels: Sequence[Sequence[Amount]]) -> Tensor:
    """Convolve with a kernel per axis, of odd length, mirrored at the borders."""
    for axis, weights in enumerate(kernels, start=1):
        size = channels.shape[axis]
        extended = channels.index_select(axis, _mirrored(size, len(weights) // 2, channels.device))
        channels = extended.narrow(axis, 0, size) * weights[0]
        for start, weight in enumerate(weights[1:], start=1):
            part = extended.narrow(axis, start, size)
            if isinstance(weight, Tensor):
                channels.addcmul_(part, weight)
            else:
                channels.add_(part, alpha=weight)
    return channels


def _mirrored(size: int, radius: int, device: torch.device) -> Tensor:
    """Return the indices -radius ... size + radius - 1 of an axis, mirrored at the centres of its outermost voxels."""
    index = torch.arange(-radius, size + radius, device=device)
    if size == 1:
        return torch.zeros_like(index)
    period = 2 * (size - 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)


def change_contrast(channels: Tensor, factor: Amount) -> Tensor:
    """Stretch each channel about its mean, within the range it has."""
    low, high = _range(channels)
    mean = channels.mean(_space(channels), keepdim=True)
    changed = (channels - mean).mul_(factor).add_(mean)
    return torch.maximum(torch.minimum(changed, high, out=changed), low, out=changed)  # clamp takes four times as long


def lower_resolution(channels: Tensor, scale: float, axes: Sequence[int]) -> Tensor:
    """Take channels to `scale` times their size on the spatial `axes` and back: nearest down, linear up."""
    full = tuple(channels.shape[1:])
    size = [_lowered(n, scale) if axis in axes else n for axis, n in enumerate(full)]
    small = F.interpolate(channels.unsqueeze(0), size=size, mode="nearest-exact")
    return F.interpolate(small, size=full, mode=_LINEAR[len(full)], align_corners=False).squeeze(0)


def resolution_indices(size: int, scales: Array) -> tuple[NDArray[np.float32], ...]:
    """Return what `lower_resolution` does to an axis of this size for each of `scales`; 1 changes nothing.

    Returns two indices `(n, size)` and the share `(n, size)` of the second one's voxel.
    """
    # In torch's arithmetic, on which it depends between which voxels a position lies: its ratios have 32 bits, and a
    # product and a sum are rounded once.
    full, small = np.float32(size), np.array([_lowered(size, scale) for scale in scales], np.float32)[:, None]
    position = (small / full).astype(float) * (np.arange(size) + 0.5) - 0.5
    position = np.maximum(position, 0).astype(np.float32)
    below, half = np.floor(position), np.float32(0.5)
    first, second = (
        np.minimum(np.floor(full / small * (index + half)), size - 1)
        for index in (below, np.minimum(below + 1, small - 1))
    )
    return first, second, position - below


def lower_resolution_by_index(channels: Tensor, indices: Mapping[int, tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Do what `lower_resolution` does, to each channel by its own scale, by `resolution_indices` of spatial axes."""
    for axis, (first, second, share) in indices.items():
        axis += 1
        shape = (len(channels), *(-1 if other == axis else 1 for other in range(1, channels.ndim)))
        low, high = (channels.gather(axis, index.view(shape).expand_as(channels)) for index in (first, second))
        channels = low.lerp_(high, share.view(shape))
    return channels


def _lowered(size: int, scale: float) -> int:
    return max(1, round(size * scale))


def change_gamma(channels: Tensor, gamma: Amount, *, inverted: bool = False) -> Tensor:
    """Raise each channel, scaled to 0...1, to the power `gamma`.

    Mean and standard deviation stay as they were. With `inverted` the power acts on the negative.
    """
    low, high = _range(channels)
    extent, mean = high - low, channels.mean(_space(channels), keepdim=True)
    std = _length(channels - mean)
    changed = (high - channels if inverted else channels - low).div_(extent.clamp(min=_TINY)).pow_(gamma)
    changed.sub_(changed.mean(_space(channels), keepdim=True))
    stretched = std * extent / (_length(changed) * extent).clamp(min=_TINY)
    return changed.mul_(-stretched if inverted else stretched).add_(mean)


def _length(centred: Tensor) -> Tensor:
    """Return the standard deviation of each channel, whose mean is 0: several times faster here than torch's own."""
    voxels = centred[0].numel()
    length: Tensor = torch.linalg.vector_norm(centred, dim=_space(centred), keepdim=True)
    return length / sqrt(max(1, voxels - 1))


def _space(channels: Tensor) -> tuple[int, ...]:
    return tuple(range(1, channels.ndim))


def _range(channels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest value of each channel."""
    if len(channels) == 1:  # torch looks for them in an axis by one thread
        return channels.aminmax()
    low, high = channels.flatten(1).aminmax(dim=1)
    shape = (-1, *(1,) * (channels.ndim - 1))
    return low.view(shape), high.view(shape)
