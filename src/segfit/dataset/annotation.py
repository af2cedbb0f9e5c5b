"""The annotation of a case as inner label values, from one label file or one mask per class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.dataset.label_grid import on_image_grid
from segfit.dataset.label_plausibility import FEWEST_VALUES, label_doubt
from segfit.dataset.manifest import Case, Mask
from segfit.dataset.object_numbers import as_classes
from segfit.geometry import Grid
from segfit.images.formats import read_label
from segfit.images.image import FileError, Image
from segfit.images.open_files import OpenFiles
from segfit.labels import LabelScheme
from segfit.text import count

__all__ = ["LABEL_BYTES_PER_VOXEL", "MergedMasks", "as_seen", "count_values", "merged_masks", "read_labels"]

LABEL_BYTES_PER_VOXEL = 10  # that reading a label map and finding its values takes (measured)
_PART = 1 << 16  # voxels counted at a time


@dataclass(frozen=True, slots=True, eq=False)
class MergedMasks:
    """What the masks of a case became, by inner label values."""

    labels: Image  # (1, *spatial)
    voxels: Mapping[int, int]  # of every mask by itself
    lost: Mapping[tuple[int, int], int]  # of the first value of a pair, where the mask of the second lies over it


def read_labels(case: Case, scheme: LabelScheme, grid: Grid | None = None) -> Image:
    """Return the inner label values (1, *spatial) of a case that has an annotation, as all stages see them.

    They are brought onto the grid of the image as `on_image_grid` does it. Raises `InputError` for a file that cannot
    be read, and for masks of one case on different grids.

    Parameters
    ----------
    grid : that of the image; read from its header if it is not given
    """
    return as_seen(
        case, scheme, merged_masks(case).labels if case.label is None else read_label(case.label, case.spacing_mm), grid
    )


def as_seen(case: Case, scheme: LabelScheme, label: Image, grid: Grid | None = None) -> Image:
    """Return what `read_labels` does from the label file of a case as it was read, or from its `merged_masks`."""
    if case.numbers_objects:
        label = on_image_grid(case, label, grid)  # first: a boundary is as wide as voxels of the image
        return Image(as_classes(label.array, scheme, boundary=case.label_use == "objects-as-boundary"), label.grid)
    if case.label is not None:
        label = Image(scheme.to_inner(label.array), label.grid)
    return on_image_grid(case, label, grid)


def merged_masks(case: Case, files: OpenFiles | None = None) -> MergedMasks:
    """Merge the masks of a case with one per class (or object), on their grid.

    Masks are painted in their order: where two overlap, the later one wins. Raises `InputError` for a file that cannot
    be read or does not look like a mask, and for masks on different grids.
    """
    assert case.masks, case.id
    first: Image | None = None
    voxels, lost = Counter[int](), Counter[tuple[int, int]]()
    read: dict[Path, Image] = {}
    for mask in case.masks:
        if mask.path not in read:  # segments of one file follow each other
            read = {mask.path: _read_mask(mask, case, files)}
        image = read[mask.path]
        if mask.layer >= len(image.array):
            problem = f"has {count(len(image.array), 'layer')}, but a segment in layer {mask.layer}"
            raise FileError(mask.path, problem, "export it again")
        image = Image(image.array[mask.layer : mask.layer + 1], image.grid)
        if first is None:
            first = Image(np.zeros(image.array.shape, dtype=np.int16), image.grid)
        image = image.turned_to(first.grid)
        difference = first.grid.mismatch(image.grid)
        if difference:
            raise FileError(
                mask.path, f"does not fit {case.masks[0].path.name}: {difference}", "resample it to that file's grid"
            )
        inside = image.array != 0 if mask.label is None else image.array == mask.label
        for value, number in count_values(first.array[inside]).items() if inside.any() else ():
            voxels[mask.value] += number
            if value not in (0, mask.value):
                lost[value, mask.value] += number
        first.array[inside] = mask.value
    assert first is not None
    return MergedMasks(first, voxels, lost)


def _read_mask(mask: Mask, case: Case, files: OpenFiles | None) -> Image:
    if mask.label is not None:
        return read_label(mask.path, case.spacing_mm, files, layered=True)
    image = read_label(mask.path, case.spacing_mm, files)
    reason = label_doubt(image.array) if len(count_values(image.array)) >= FEWEST_VALUES else ""
    if reason:
        action = "save a lossless mask: 0 outside, one value inside"
        raise FileError(mask.path, f"is not a binary mask ({reason})", action)
    return image


def count_values(array: NDArray[np.integer[Any]]) -> dict[int, int]:
    """Return how often each value occurs, in ascending order.

    Counted in parts that the processor has close at hand, which is much faster than sorting where the range is small;
    most parts of a label map hold one value.
    """
    low, high = int(array.min()), int(array.max())
    if high - low >= 2**16:
        values, counts = np.unique(array, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))
    flat = array.ravel(order="K")
    total = np.zeros(high - low + 1, dtype=np.int64)
    for start in range(0, flat.size, _PART):
        part = flat[start : start + _PART]
        first, last = int(part.min()) - low, int(part.max()) - low
        if first == last:
            total[first] += part.size
        else:
            total[first : last + 1] += np.bincount(part.astype(np.int64) - (low + first))
    return {int(index) + low: int(total[index]) for index in np.flatnonzero(total)}
