"""Whether a file looks like a label map, or like a photograph or labels that were smoothed or compressed with losses.

Label maps are made of areas of one value each. Between neighbours in a photograph nearly every value differs, by
little; labels that were smoothed, resized or saved as JPEG keep their areas and get seams of many values between them.
The bounds were measured on scans, photographs and damaged labels, and on organ maps, dense maps of up to 300 classes,
coarse maps and landmarks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST_VALUES", "label_doubt"]

FEWEST_VALUES = 5  # different values; with fewer nothing is reported
_NEAR_ENDS = 15  # how far from 0 and 255 JPEG of good quality moves black and white
_WHITES = 3  # values near 255 besides those near 0, at least: one or two may be marks, as of what is to be ignored
_PLANES = 16  # of a volume that are looked at
_PHOTO_VALUES = 25  # different values besides 0 of a photograph, at least
_PHOTO_CHANGES = 0.4  # share of neighbours that differ: 0.5 to 0.98 in photographs and scans, up to 0.36 in labels
_NOISE_CHANGES = 0.75  # from this share on, values that differ by much are noise, not classes
_NOISE_PAIRS = 0.1  # share of neighbours that are both labelled, then at least: single voxels are no noise
_PHOTO_SMALL = 0.55  # share of those that differ by little: 0.66 to 1.0, up to 0.34 in labels that change so often
_LITTLE = 16  # a sixteenth of the range is little
_MOST_AREAS = 8  # values with areas in smoothed labels, at most
_SEAM_VALUES = 8  # values in seams, at least
_SEAM_BETWEEN = 0.35  # share of seam voxels whose value lies between their neighbours': 0.36 to 1.0, else up to 0.31
_SEAM_VOXELS = 0.5  # share of labelled voxels that lie in seams, at most: 0.48 in small pictures


def label_doubt(labels: NDArray[np.integer]) -> str:
    """Return what a file (1, *spatial) looks like if not like a label map; an empty string if it does.

    Only for maps of `FEWEST_VALUES` different values or more.
    """
    volume = labels[0] if labels.ndim == 4 else labels
    planes = volume[np.unique(np.linspace(0, len(volume) - 1, _PLANES).astype(int))].astype(np.int32)
    distinct = np.unique(planes)
    values = int(np.count_nonzero(distinct))
    if len(distinct) < FEWEST_VALUES or min(planes.shape[1:]) < 3:
        return ""
    if values >= _PHOTO_VALUES and _is_photograph(planes):
        return f"looks like a photograph, a scan or JPEG artefacts: {values} values that change from pixel to pixel"
    low, high = distinct[distinct <= _NEAR_ENDS], distinct[distinct >= 255 - _NEAR_ENDS]
    at_ends = len(low) + len(high) == len(distinct) and distinct[0] == 0 and distinct[-1] <= 255
    if at_ends and len(low) > 1 and len(high) >= _WHITES:
        return (
            f"looks like black and white with JPEG artefacts: values up to {low[-1]} and from {high[0]} to {high[-1]}"
        )
    seams = _seam_values(planes)
    if seams:
        return f"looks like labels that were smoothed, resized or saved as JPEG: {seams} values occur only at edges"
    return ""


def _is_photograph(planes: NDArray[np.int32]) -> bool:
    """Whether labelled neighbours in planes (n, y, x) often differ by little, or nearly always by anything."""
    little = max(1, (int(planes.max()) - int(planes.min())) // _LITTLE)
    pairs = both = changes = small = 0
    for one, other in _neighbours(planes):
        labelled = (one != 0) & (other != 0)
        difference = np.abs(one - other)[labelled]
        pairs += labelled.size
        both += difference.size
        changes += int((difference > 0).sum())
        small += int(((difference > 0) & (difference <= little)).sum())
    if both == 0 or changes < _PHOTO_CHANGES * both:
        return False
    noise = changes >= _NOISE_CHANGES * both and both >= _NOISE_PAIRS * pairs
    return noise or small >= _PHOTO_SMALL * changes


def _seam_values(planes: NDArray[np.int32]) -> int:
    """Return how many values lie only in seams between areas of a few others; 0 if that is not what is seen."""
    inside = np.ones(planes.shape, dtype=bool)  # among four neighbours of the same value
    between = np.zeros(planes.shape, dtype=bool)
    for axis in (1, 2):
        values, area, middle = (np.moveaxis(array, axis, 0) for array in (planes, inside, between))
        same = values[:-1] == values[1:]
        area[:-1] &= same
        area[1:] &= same
        low, high = np.minimum(values[:-2], values[2:]), np.maximum(values[:-2], values[2:])
        middle[1:-1] |= (low < values[1:-1]) & (values[1:-1] < high)
    areas = np.unique(planes[inside])
    if not 2 <= len(areas) <= _MOST_AREAS:
        return 0
    seam = ~np.isin(planes, areas)
    count, voxels = len(np.unique(planes[seam])), int(seam.sum())
    few = count < max(_SEAM_VALUES, 2 * len(areas)) or voxels > _SEAM_VOXELS * np.count_nonzero(planes)
    return 0 if few or (between & seam).sum() < _SEAM_BETWEEN * voxels else count


def _neighbours(planes: NDArray[np.int32]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    yield planes[:, :-1], planes[:, 1:]
    yield planes[:, :, :-1], planes[:, :, 1:]
