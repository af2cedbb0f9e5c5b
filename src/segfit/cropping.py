"""Cropping to the non-zero region (spec: fingerprint and preprocessing)."""

from __future__ import annotations

from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

__all__ = ["Box", "bounding_box", "nonzero_mask", "slices"]

_SCATTERED = 1 / 32  # of the voxels may be background that is joined voxel by voxel

Box = tuple[tuple[int, int], ...]  # half-open [low, high) per axis


def nonzero_mask(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where any channel of ``(c, *spatial)`` is non-zero; in 3D enclosed holes are filled.

    A hole is a part of the background that does not reach the border of the image (6-neighbourhood). In 2D nothing is
    filled, as in nnU-Net, where every pixel of a one-slice volume touches the outside.
    """
    mask: NDArray[np.bool_] = array[0] != 0
    for channel in array[1:]:
        mask |= channel != 0
    if mask.ndim == 3 and min(mask.shape) > 2:  # thinner ones are all border
        inside = mask[slices(bounding_box(mask))]  # around the box everything is outside
        if not inside.all():
            filled = np.ascontiguousarray(inside)
            _fill_holes(filled)
            if filled is not inside:
                inside[...] = filled
    return mask


def _fill_holes(mask: NDArray[np.bool_]) -> None:
    """Fill what does not reach the border.

    Scattered background, noise that is zero by chance, is joined voxel by voxel: labelling the whole array takes much
    longer there.
    """
    if np.count_nonzero(mask) > (1 - _SCATTERED) * mask.size:
        _fill_scattered_holes(mask)
    else:
        _fill_large_holes(mask)


def _fill_large_holes(mask: NDArray[np.bool_]) -> None:
    parts = cc3d.connected_components(~mask, connectivity=6)
    outside = np.zeros(int(parts.max()) + 1, dtype=bool)
    for axis in range(mask.ndim):
        for side in (0, -1):
            outside[parts.take(side, axis)] = True
    holes = ~outside
    holes[0] = False  # the mask itself
    if holes.any():
        mask |= holes[parts]


def _fill_scattered_holes(mask: NDArray[np.bool_]) -> None:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    voxels = np.flatnonzero(~mask)
    places = np.unravel_index(voxels, mask.shape)
    border = np.zeros(voxels.size, dtype=bool)
    pairs = []
    stride = 1
    for place, size in zip(reversed(places), reversed(mask.shape), strict=True):
        border |= (place == 0) | (place == size - 1)
        following = np.searchsorted(voxels, voxels + stride).clip(max=voxels.size - 1)
        joined = np.flatnonzero((voxels[following] == voxels + stride) & (place < size - 1))
        pairs.append((joined, following[joined]))
        stride *= size
    first, second = (np.concatenate(side) for side in zip(*pairs, strict=True))
    graph = coo_array((np.ones(first.size, dtype=bool), (first, second)), shape=(voxels.size, voxels.size))
    count, part = connected_components(graph, directed=False)
    outside = np.zeros(count, dtype=bool)
    outside[part[border]] = True
    mask.ravel()[voxels[~outside[part]]] = True  # contiguous, so that this is a view


def bounding_box(mask: NDArray[np.bool_]) -> Box:
    """Return the half-open box around the true voxels of `mask` (*spatial); the full extent if there are none."""
    box: list[tuple[int, int]] = []
    for axis in range(mask.ndim):
        if mask.take(0, axis).any() and mask.take(-1, axis).any():  # no need to look inside
            box.append((0, mask.shape[axis]))
            continue
        others = tuple(a for a in range(mask.ndim) if a != axis)
        inside = np.flatnonzero(mask.any(axis=others))
        box.append((int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, mask.shape[axis]))
    return tuple(box)


def slices(box: Box) -> tuple[slice, ...]:
    """Return the box as slices."""
    return tuple(slice(low, high) for low, high in box)
