"""Cropping to the non-zero region (spec: fingerprint and preprocessing)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["Box", "bounding_box", "nonzero_mask"]

Box = tuple[tuple[int, int], ...]  # half-open [low, high) per axis


def nonzero_mask(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where any channel of ``(c, *spatial)`` is non-zero; in 3D enclosed holes are filled.

    Holes are closed with the 6-neighbourhood. In 2D nothing is filled, as in the reference, where every pixel of a
    one-slice volume touches the outside.
    """
    mask: NDArray[np.bool_] = (array != 0).any(axis=0)
    if mask.ndim == 3 and mask.shape[0] > 1 and not mask.all():
        mask = ndimage.binary_fill_holes(mask)
    return mask


def bounding_box(mask: NDArray[np.bool_]) -> Box:
    """Return the half-open box around the true voxels; the full extent if there are none."""
    box: list[tuple[int, int]] = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        inside = np.flatnonzero(mask.any(axis=others))
        box.append((int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, mask.shape[axis]))
    return tuple(box)
