"""What an image looks like in a few numbers: its grey values, and where they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.cropping import bounding_box, slices
from segfit.fingerprint.fingerprint import ChannelIntensities, ImageFingerprint, Orientation
from segfit.geometry import AxisMap, canonical_map
from segfit.images.image import Image

__all__ = ["BLOCKS", "SHARES", "measure_image", "oriented_crop"]

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
    shape = tuple(image.grid.shape[axis] for axis in axes.order)
    most = _SAMPLED[image.grid.ndim]
    sampled = cropped[(slice(None), *(slice(None, None, max(1, n // most)) for n in cropped.shape[1:]))]
    return ImageFingerprint(
        shape=shape,
        spacing_mm=axes.permute(image.grid.spacing_mm),
        shape_after_crop=cropped.shape[1:],
        relative_size_after_crop=float(np.prod(cropped.shape[1:]) / np.prod(shape)),
        channels=tuple(
            ChannelIntensities(min=float(whole.min()), max=float(whole.max()), quantiles=_quantiles(part))
            for whole, part in zip(image.array, sampled, strict=True)
        ),
        layout=_layout(sampled),
        sized=image.grid.spacing_known,
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
