"""What an image looks like in a few numbers: its grey values, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.cropping import bounding_box, slices
from segfit.fingerprint.fingerprint import ChannelIntensities, ImageFingerprint, Orientation
from segfit.geometry import AxisMap, Grid, canonical_map
from segfit.images.image import Image

__all__ = ["BLOCKS", "SHARES", "measure_image", "measured", "oriented_crop", "sampling"]

SHARES = (0.005, 0.05, 0.15, 0.25, 0.35, 0.5, 0.65, 0.75, 0.85, 0.95, 0.995)  # of the quantiles
BLOCKS = 6  # per axis, of the layout
_SAMPLED = {2: 512, 3: 64}  # voxels per axis that are looked at, at most about twice as many


def oriented_crop(image: Image, orientation: Orientation) -> tuple[AxisMap, tuple[slice, ...], NDArray[Any]]:
    """Return how an image is turned, the box of its non-zero voxels, and the voxels inside, (c, *spatial)."""
    axes = canonical_map(image.grid) if orientation == "canonical" else AxisMap.identity(image.grid.ndim)
    voxels = axes.apply(image.array)
    box = slices(bounding_box((voxels != 0).any(axis=0)))  # filling holes would not change the box
    return axes, box, voxels[(slice(None), *box)]


def measure_image(image: Image, axes: AxisMap, cropped: NDArray[Any]) -> ImageFingerprint:
    """Measure one image without its annotation; `axes` and `cropped` are from `oriented_crop`."""
    sampled = cropped[(slice(None), *(slice(None, None, step) for step in sampling(cropped.shape[1:])))]
    extremes = [(float(whole.min()), float(whole.max())) for whole in image.array]
    return measured(image.grid, axes, cropped.shape[1:], extremes, sampled)


def sampling(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the steps along the axes of a crop at which its voxels are looked at."""
    return tuple(max(1, n // _SAMPLED[len(shape)]) for n in shape)


def measured(
    grid: Grid,
    axes: AxisMap,
    cropped: tuple[int, ...],
    extremes: Sequence[tuple[float, float]],
    sampled: NDArray[Any],
) -> ImageFingerprint:
    """Return what `measure_image` does from the shape of the crop, the extremes of each channel and the sample."""
    shape = tuple(grid.shape[axis] for axis in axes.order)
    return ImageFingerprint(
        shape=shape,
        spacing_mm=axes.permute(grid.spacing_mm),
        shape_after_crop=cropped,
        relative_size_after_crop=float(np.prod(cropped) / np.prod(shape)),
        channels=tuple(
            ChannelIntensities(min=low, max=high, quantiles=_quantiles(part))
            for (low, high), part in zip(extremes, sampled, strict=True)
        ),
        layout=_layout(sampled),
        sized=grid.spacing_known,
    )


def _quantiles(channel: NDArray[Any]) -> tuple[float, ...]:
    """Return the quantiles of the voxels that are not 0, which often is the padding around an image."""
    values = channel[channel != 0]
    found = np.quantile(values, SHARES) if values.size else np.zeros(len(SHARES))
    return tuple(float(f"{value:.6g}") for value in found)


def _layout(voxels: NDArray[Any]) -> tuple[float, ...]:
    """Return the mean brightness of `BLOCKS` parts per axis, all channels alike, in deviations from their mean."""
    total = np.zeros((BLOCKS,) * (voxels.ndim - 1))
    for channel in voxels:
        blocks = channel.astype(np.float64)
        for axis, n in enumerate(channel.shape):
            starts = np.arange(BLOCKS) * n // BLOCKS
            sizes = np.maximum(np.diff(np.append(starts, n)), 1)
            blocks = np.add.reduceat(blocks, starts, axis) / sizes.reshape(
                [-1 if a == axis else 1 for a in range(channel.ndim)]
            )
        deviation = blocks.std()
        total += (blocks - blocks.mean()) / deviation if deviation > 0 else 0.0
    return tuple(np.round(total.ravel() / len(voxels), 3).tolist())
