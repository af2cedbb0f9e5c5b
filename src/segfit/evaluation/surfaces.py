"""Distances between the surfaces of two masks, and what is read off them.

The surface runs between the voxels: each corner where voxels of the mask meet others holds a piece of it, whose area
is that of the marching cubes there. So `surface-distance` of Google DeepMind defines it; the tests compare with that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["surface_measures"]

_SHARE = 0.95  # of a surface that lies within the distance HD95
_ROUNDING = 1e-6  # relative, of distances in single precision that are compared with a tolerance

# Triangles of a corner by its code (8 voxels, the bits of `_codes`), their normals in eighths of a voxel, signs left
# out; a code and its complement have the same. After the tables of google-deepmind/surface-distance (Apache-2.0).
_TRIANGLES = {
    "0": "", "a": "111", "b": "004 004", "c": "022 022", "d": "040 040", "e": "111 111", "f": "202 202",
    "g": "220 220", "h": "400 400", "i": "004 111 222", "j": "022 022 111", "k": "040 111 222", "l": "111 111 111",
    "m": "111 202 202", "n": "111 220 220", "o": "111 222 400", "p": "004 111 111 222", "q": "022 022 022 022",
    "r": "022 111 202 333", "s": "022 111 220 333", "t": "040 111 111 222", "u": "111 111 111 111",
    "v": "111 111 222 222", "w": "111 111 222 400", "x": "111 202 220 333", "y": "202 202 202 202",
    "z": "220 220 220 220",
}  # fmt: skip
_FORMS = (
    "0aagafeoaefogoohacekeilvejmrnswoaeckemjrelivnwsogkkdnxtkntxkznng"
    "aeencijselmwkvrofimxibpimpymximfeljtjpqjlupltljeovrksijcwlmeneea"
)


def surface_measures(
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    spacing: Sequence[float],
    tolerance: float,
    left_out: NDArray[np.bool_] | None = None,
    threads: int = 1,
) -> dict[str, float | None]:
    """Return surface Dice, HD95 and the average surface distance of two masks, neither of them empty.

    Parameters
    ----------
    prediction, reference : masks of equal shape, in 2D or 3D; what touches the edge of the array ends there
    spacing : voxel size per axis; distances and `tolerance` are in its unit
    left_out : voxels of neither mask that do not count: nor do the parts of both surfaces that touch them
    threads : of the distance transform; they change no value

    Surface Dice is the share of both surfaces that lies within the tolerance of the other. HD95 is the larger of the
    two distances within which 95 % of one surface lie from the other. The average is over both surfaces. They are None
    where nothing of the surfaces counts.
    """
    codes = [_codes(prediction), _codes(reference)]
    sizes = _sizes(spacing)
    inner = (0, len(sizes) - 1)
    surfaces = [(code != inner[0]) & (code != inner[1]) for code in codes]
    counted = None if left_out is None else _codes(left_out) == 0
    found = []
    for one, other in ((0, 1), (1, 0)):
        own = surfaces[one] if counted is None else surfaces[one] & counted
        if own.any():
            found.append((_distances(own, surfaces[other], spacing, threads), sizes[codes[one][own]]))
    if not found:
        return dict.fromkeys(("surface_dice", "hd95", "average_surface_distance"))
    total = sum(float(size.sum()) for _, size in found)
    near = sum(float(size[distance <= tolerance * (1 + _ROUNDING)].sum()) for distance, size in found)
    return {
        "surface_dice": near / total,
        "hd95": max(_percentile(*each) for each in found),
        "average_surface_distance": sum(float(distance @ size) for distance, size in found) / total,
    }


def _distances(
    points: NDArray[np.bool_], surface: NDArray[np.bool_], spacing: Sequence[float], threads: int
) -> NDArray[np.float64]:
    """Return the distance of each point from the nearest one of a surface."""
    import edt

    nearest: NDArray[np.float32] = edt.edt(~surface, anisotropy=tuple(spacing), black_border=False, parallel=threads)
    return nearest[points].astype(np.float64)


def _percentile(distances: NDArray[np.float64], sizes: NDArray[np.float64]) -> float:
    order = np.argsort(distances)
    share = np.cumsum(sizes[order])
    place = int(np.searchsorted(share, _SHARE * share[-1]))
    return float(distances[order][place])


def _codes(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return which voxels around every corner are of the mask, a bit each: of the first voxel the highest one."""
    padded = np.pad(mask, 1).view(np.uint8)
    shape = tuple(length - 1 for length in padded.shape)
    codes: NDArray[np.uint8] = np.zeros(shape, np.uint8)
    for place in product((0, 1), repeat=mask.ndim):
        codes <<= 1
        codes |= padded[tuple(slice(low, low + length) for low, length in zip(place, shape, strict=True))]
    return codes


def _sizes(spacing: Sequence[float]) -> NDArray[np.float64]:
    """Return the area, in 2D the length, of the surface at a corner by its code."""
    if len(spacing) == 2:
        slant = math.hypot(*spacing) / 2
        half = [0.0, slant, slant, spacing[1], slant, spacing[0], 2 * slant, slant]
        return np.array([*half, *reversed(half)])
    z, y, x = spacing
    faces = np.array([y * x, z * x, z * y]) / 8
    half = [sum(float(np.linalg.norm(faces * normal)) for normal in _normals(form)) for form in _FORMS]
    return np.array([*half, *reversed(half)])


def _normals(form: str) -> Iterator[NDArray[Any]]:
    return (np.array([int(digit) for digit in triangle]) for triangle in _TRIANGLES[form].split())
