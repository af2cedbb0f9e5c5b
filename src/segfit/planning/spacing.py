"""Target spacing, axis order and median size: what the network will see of the data.

All functions are pure. Per-case arrays are ``(cases, axes)`` float64 in array order; 2D images come here with a leading
axis of one slice (`segfit.planning.planner` adds it).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["ANISOTROPY", "axis_order", "coarse_axis", "median_shape", "target_spacing"]

ANISOTROPY = 3.0
"""An axis is coarse when its voxels are more than this many times longer (and its size this many times smaller)."""


def coarse_axis(spacing: Sequence[float], shape: Sequence[float]) -> int | None:
    """Return the axis that is more than three times coarser than the others and has less than a third of their voxels.

    `spacing` (mm) and `shape` (voxels) are medians over the cases. None where no axis is like that.
    """
    coarse = spacing.index(max(spacing))
    others = [axis for axis in range(len(spacing)) if axis != coarse]
    coarser = spacing[coarse] > ANISOTROPY * max(spacing[axis] for axis in others)
    return coarse if coarser and shape[coarse] * ANISOTROPY < min(shape[axis] for axis in others) else None


def target_spacing(spacings: NDArray[np.float64], shapes: NDArray[np.float64]) -> tuple[float, ...]:
    """Return the spacing all cases are resampled to: the median, except along a coarse axis.

    Parameters
    ----------
    spacings : (cases, axes) in mm
    shapes : (cases, axes) voxels after cropping

    Where one axis is more than three times coarser than the others and has less than a third of their voxels, its
    10th percentile is taken, so that thin-sliced cases are not thinned out; it never gets finer than the other axes.
    """
    target = [float(v) for v in np.median(spacings, axis=0)]
    size = [float(v) for v in np.median(shapes, axis=0)]
    coarse = coarse_axis(target, size)
    if coarse is not None:
        widest = max(mm for axis, mm in enumerate(target) if axis != coarse)
        finer = float(np.percentile(spacings[:, coarse], 10))
        target[coarse] = widest + 1e-5 if finer < widest else finer
    return tuple(target)


def axis_order(spacing: tuple[float, ...]) -> tuple[int, ...]:
    """Return the transposition: the coarsest axis (the first of several) comes first, the others keep their order."""
    coarse = spacing.index(max(spacing))
    return (coarse, *(axis for axis in range(len(spacing)) if axis != coarse))


def median_shape(
    spacings: NDArray[np.float64], shapes: NDArray[np.float64], target: tuple[float, ...]
) -> tuple[float, ...]:
    """Return the per-axis median of the shapes that the cases have at the target spacing; may end in .5."""
    resampled = np.rint(spacings / np.asarray(target) * shapes)
    return tuple(float(v) for v in np.median(resampled, axis=0))
