"""What is wrong with one image, to train on or to predict: its voxels, and the geometry in its header."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.errors import Problem
from segfit.geometry import Grid
from segfit.images import omezarr
from segfit.images.image import Remark
from segfit.text import count, numbers

__all__ = ["extreme_problems", "grid_problems", "header_remarks", "voxel_problems"]

_LARGEST_INTENSITY = 1e15  # the squares of 10^8 such values, which deviations need, can still be summed in float32
_SPACING_TOLERANCE = 0.02  # between two places of a header; rounding in either is far below (assumption)
_MOST_SKEW = 1.0  # degrees that axes may be off from right angles (assumption; rounding is far below)


def voxel_problems(array: NDArray[Any], name: str, *, colours: bool = False) -> list[Problem]:
    """Return what is wrong with the voxels ``(c, *spatial)`` of an image, as stored; of no case yet.

    Parameters
    ----------
    name : of the image, for messages
    colours : whether its channels are those of a picture, of which the fourth is transparency
    """
    if array.dtype.kind == "f":
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            problem = f"{name} has {count(bad, 'NaN or infinite voxel')}"
            return [Problem("", problem, "replace them by a value such as 0, or remove the case", code="not_finite")]
    return extreme_problems([(float(channel.min()), float(channel.max())) for channel in array], name, colours=colours)


def extreme_problems(extremes: Sequence[tuple[float, float]], name: str, *, colours: bool = False) -> list[Problem]:
    """Return what is wrong with the voxels of an image by the lowest and highest value of each channel."""
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    if max(-low, high) > _LARGEST_INTENSITY:
        problem = f"{name} has values from {low:g} to {high:g}, too large for single precision"
        action = "replace them (they often mark missing values), or scale the image"
        return [Problem("", problem, action, code="too_large")]
    problems: list[Problem] = []
    for number, (low, high) in enumerate(extremes):
        if low == high:
            which = f" (channel {number} of the file)" if len(extremes) > 1 else ""
            problem = f"{name} is constant{which}: every voxel is {low:g}"
            action = "check the image; remove the case if it is empty"
            if (number, len(extremes)) == (3, 4) and colours:
                action = "save all images without an alpha channel (it is constant)"
            problems.append(Problem("", problem, action, fatal=False, code="constant_image"))
    return problems


def grid_problems(path: Path, expected: Grid, found: Grid, first: Path) -> list[Problem]:
    """Return how the grid of a file does not fit the `expected` one of the `first` file of its case; of no case yet."""
    difference, moved = expected.mismatch(found), expected.snapped(found)
    if difference and expected.turn(found) is not None:
        problem = f"{path.name} stores its axes in another order or direction than {first.name} and is reoriented to it"
        return [Problem("", problem, "nothing if its header is right", fatal=False, code="axes_turned")]
    action = "resample it to that image, or copy that image's header if the voxels already correspond"
    if expected.affine is None and found.affine is None:
        action = _fit_without_place(path, expected, found)
    if expected.ndim != found.ndim and prod(expected.shape) == prod(found.shape):
        action = f"save both with {min(expected.ndim, found.ndim)} axes, without the axis of length 1"
    if difference:
        return [Problem("", f"{path.name} does not fit {first.name}: {difference}", action)]
    apart = omezarr.translated(expected, found)
    if apart:
        problem = f"{path.name} is {apart} from {first.name} by its header; voxels are matched by index"
        action = "correct its translation or resample it if the voxels do not correspond"
        return [Problem("", problem, action, fatal=False, code="grid_moved")]
    if moved:
        problem = f"{path.name} is {moved} from {first.name} and is treated as aligned"
        return [Problem("", problem, "resample it if the voxels do not correspond", fatal=False, code="grid_moved")]
    return []


def _fit_without_place(path: Path, expected: Grid, found: Grid) -> str:
    """Return what to do where two files that do not say where they lie differ in shape or spacing."""
    if expected.shape == found.shape:
        if path.suffix.lower() in (".tif", ".tiff"):
            return 'write the true {"spacing": [z, y, x]} in mm into a .json beside each of the two'
        return "give both files the same voxel size if the voxels correspond, resample it if not"
    if sorted(expected.shape) == sorted(found.shape):
        return "it looks rotated or transposed: store its axes in the order of that image"
    return "draw it on that image, or resample both to one size"


def header_remarks(grid: Grid) -> list[Remark]:
    """Return what the geometry of a header says in two ways, or says and is not followed here."""
    found: list[Remark] = []
    if grid.affine is not None:
        lengths = np.linalg.norm(grid.affine[:3, :3], axis=0)
        if not np.allclose(lengths[::-1], grid.spacing_mm, rtol=_SPACING_TOLERANCE, atol=0):
            own, other = numbers(grid.spacing_mm), numbers(lengths[::-1])
            problem = f"has voxels of {own} mm, but its orientation matrix says {other} mm"
            found.append(Remark(problem, "correct its header; the voxel size is used"))
        axes = grid.affine[:3, :3] / lengths
        skew = np.degrees(np.arcsin(np.abs(axes.T @ axes - np.eye(3)).max().clip(max=1)))
        if skew > _MOST_SKEW:
            problem = f"has axes that are {skew:.2g} degrees off right angles, which is ignored"
            found.append(Remark(problem, "resample it to a grid with right angles, or correct its header"))
    return found
