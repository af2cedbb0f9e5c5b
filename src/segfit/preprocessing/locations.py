"""Where each class is: a sample of its voxels, so that training can cut patches around it.

Spec: preprocessing, section 7. The sample only steers where patches lie.
"""

from __future__ import annotations

from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

from segfit.cropping import bounding_box, slices
from segfit.labels import LabelScheme

__all__ = ["ANNOTATED", "Region", "class_locations"]

Region = tuple[slice, ...]
"""One slice per spatial axis, inside the array."""

ANNOTATED = "annotated"
"""Key of the voxels that carry any label but the ignore label; present in datasets that have one."""

_SEED = 1234
_AT_LEAST, _SHARE = 10_000, 0.01  # voxels per class: all up to the first, then this share of them
_SMALL = 1 << 21  # voxels up to which nnU-Net's generator, which permutes them all, is cheap
_SLAB = 1 << 20  # voxels searched at a time


def class_locations(labels: NDArray[np.integer[Any]], scheme: LabelScheme) -> dict[str, NDArray[np.int32]]:
    """Return up to max(10 000, 1 %) voxels of every class, drawn without replacement: (n, ndim) int32 by name.

    The draws are nnU-Net's (legacy generator, one stream over all classes) as long as no class exceeds two
    million voxels; from there on a cheaper generator takes over. Classes that are absent have n = 0.
    """
    items = [(class_.name, class_.values) for class_ in scheme.classes]
    if scheme.ignore_value is not None:
        items.append((ANNOTATED, (-1, *scheme.all_values)))
    regions = _boxes(labels)
    counts = {value: _count(labels, value, regions) for value in {v for _, values in items for v in values}}
    legacy, modern = np.random.RandomState(_SEED), np.random.default_rng(_SEED)
    result: dict[str, NDArray[np.int32]] = {}
    for name, values in items:
        total = sum(counts[value] for value in values)
        size = max(min(_AT_LEAST, total), int(np.ceil(_SHARE * total)))
        if total == 0:
            ranks = np.zeros(0, dtype=np.int64)
        elif total <= _SMALL:
            ranks = legacy.permutation(total)[:size]
        else:
            ranks = modern.choice(total, size, replace=False)
        result[name] = _voxels(labels, values, ranks, counts, regions)
    return result


def _boxes(labels: NDArray[np.integer[Any]]) -> dict[int, Region]:
    """Return the bounding box of every value above 0 that is there; only the box around all of them is searched."""
    foreground = labels > 0
    if not foreground.any():
        return {}
    around = slices(bounding_box(foreground))
    values = np.where(foreground[around], labels[around], 0).astype(np.uint32)
    if values.max() < values.size:  # what cc3d can do
        found = cc3d.statistics(values)
        boxes = {v: box for v, box in enumerate(found["bounding_boxes"]) if v and found["voxel_counts"][v]}
    else:
        boxes = {int(v): slices(bounding_box(values == v)) for v in np.unique(values) if v}
    return {
        value: tuple(slice(outer.start + p.start, outer.start + p.stop) for p, outer in zip(box, around, strict=True))
        for value, box in boxes.items()
    }


def _region(labels: NDArray[Any], value: int, regions: dict[int, Region]) -> Region | None:
    """Return a box that holds every voxel of `value`: its bounding box, or everything for background."""
    return regions.get(value) if value > 0 else (slice(None),) * labels.ndim


def _count(labels: NDArray[Any], value: int, regions: dict[int, Region]) -> int:
    region = _region(labels, value, regions)
    return 0 if region is None else int(np.count_nonzero(labels[region] == value))


def _voxels(
    labels: NDArray[Any],
    values: tuple[int, ...],
    ranks: NDArray[np.int64],
    counts: dict[int, int],
    regions: dict[int, Region],
) -> NDArray[np.int32]:
    """Return the voxels with the given ranks in the list of all voxels of `values`, value by value in C order."""
    result = np.empty((ranks.size, labels.ndim), dtype=np.int32)
    order = np.argsort(ranks, kind="stable")
    wanted = ranks[order]
    seen = 0
    for value in values:
        region = _region(labels, value, regions)
        if region is None or counts[value] == 0:
            continue
        inside = labels[region]
        corner = [part.start or 0 for part in region]
        depth = max(1, _SLAB // max(1, inside[0].size))
        for start in range(0, len(inside), depth):
            slab = inside[start : start + depth]
            found = np.flatnonzero(slab == value)
            first, last = np.searchsorted(wanted, (seen, seen + found.size))
            chosen = found[wanted[first:last] - seen]
            for axis, index in enumerate(np.unravel_index(chosen, slab.shape)):
                result[order[first:last], axis] = index + corner[axis] + (start if axis == 0 else 0)
            seen += found.size
    return result
