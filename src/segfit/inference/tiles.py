"""Where a sliding window stands and how much each of its voxels counts. Pure numpy; no network.

Rules (padding, starts, order, mirroring, importance) are nnU-Net's. Two things differ on purpose: the
importance map is float32, because in float16 the outermost voxels of a patch lose their value, and since the map and
the grid of tiles are both products of one-dimensional factors, the sum of the weights is kept per axis instead of as
a volume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from math import ceil

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "axis_coverage",
    "axis_importance",
    "importance_map",
    "mirror_subsets",
    "padding",
    "tile_corners",
    "tile_starts",
]


def padding(shape: Sequence[int], patch: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return (before, after) per axis that bring `shape` to at least `patch`; an odd rest goes to the upper side."""
    missing = [max(0, p - n) for n, p in zip(shape, patch, strict=True)]
    return tuple((m // 2, m - m // 2) for m in missing)


def tile_starts(size: int, patch: int, step: float) -> tuple[int, ...]:
    """Return the starts of the tiles along one axis of `size` ≥ `patch` voxels.

    Neighbours are at most ``step * patch`` apart (`step` in (0, 1], at least one voxel) and spread evenly; the last
    tile ends with the image. A patch of one voxel, the slice axis of a 2D network, visits every voxel.
    """
    assert size >= patch
    assert 0 < step <= 1
    if size == patch:
        return (0,)
    count = ceil((size - patch) / max(1.0, patch * step)) + 1
    pace = (size - patch) / (count - 1)
    return tuple(round(pace * i) for i in range(count))  # round half to even, as nnU-Net


def tile_corners(starts: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """Return the lower corner of every tile from the starts of each axis, the last axis running fastest."""
    return product(*starts)


def axis_importance(patch: int) -> NDArray[np.float64]:
    """Return the weights along one axis of a patch: a Gaussian of sigma patch/8 with value 1 at index patch // 2."""
    return np.exp(-0.5 * ((np.arange(patch) - patch // 2) / (patch / 8)) ** 2)


def importance_map(patch: Sequence[int]) -> NDArray[np.float32]:
    """Return the importance of every voxel of a patch, ``(*patch)`` float32: maximum 1, nowhere 0."""
    result = np.ones((1,) * len(patch))
    for axis, size in enumerate(patch):
        result = result * axis_importance(size).reshape([-1 if a == axis else 1 for a in range(len(patch))])
    return result.astype(np.float32)


def axis_coverage(size: int, starts: Sequence[int], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum of the `weights` of all tiles along one axis of `size` voxels.

    The sum over the tiles of a volume is the product of these, one factor per axis.
    """
    total = np.zeros(size)
    for start in starts:
        total[start : start + len(weights)] += weights
    return total


def mirror_subsets(axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the axes flipped in each pass of test-time mirroring: all subsets by size, the empty one first."""
    return tuple(subset for size in range(len(axes) + 1) for subset in combinations(axes, size))
