"""Cropping to the non-zero region (spec: fingerprint and preprocessing)."""

from __future__ import annotations

from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

__all__ = ["Box", "bounding_box", "nonzero_mask", "slices"]

Box = tuple[tuple[int, int], ...]  # half-open [low, high) per axis


def nonzero_mask(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where any channel of ``(c, *spatial)`` is non-zero; in 3D enclosed holes are filled.

    A hole is a part of the background that does not reach the border of the image (6-neighbourhood). In 2D nothing is
    filled, as in the reference, where every pixel of a one-slice volume touches the outside.
    """
    mask: NDArray[np.bool_] = array[0] != 0
    for channel in array[1:]:
        mask |= channel != 0
    if mask.ndim == 3 and min(mask.shape) > 2:  # thinner ones are all border
        inside = mask[slices(bounding_box(mask))]  # around the box everything is outside
        if not inside.all():
            _fill_holes(inside)
    return mask


def _fill_holes(mask: NDArray[np.bool_]) -> None:
    parts = cc3d.connected_components(~mask, connectivity=6)
    outside = np.zeros(int(parts.max()) + 1, dtype=bool)
    for axis in range(mask.ndim):
        for face in (0, -1):
            outside[parts.take(face, axis)] = True
    holes = ~outside
    holes[0] = False  # the mask itself
    if holes.any():
        mask |= holes[parts]


def bounding_box(mask: NDArray[np.bool_]) -> Box:
    """Return the half-open box around the true voxels; the full extent if there are none."""
    box: list[tuple[int, int]] = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        inside = np.flatnonzero(mask.any(axis=others))
        box.append((int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, mask.shape[axis]))
    return tuple(box)


def slices(box: Box) -> tuple[slice, ...]:
    """Return the box as slices."""
    return tuple(slice(low, high) for low, high in box)
