"""Connected components of label maps, and the post-processing steps made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from segfit.files import Record

__all__ = [
    "PostprocessingStep",
    "Slices",
    "SlicesByValue",
    "apply_steps",
    "components",
    "keep_largest",
    "label_boxes",
    "strays",
]

_Label = TypeVar("_Label", bound=np.generic)
Slices = tuple[slice, ...]
SlicesByValue = Sequence[Slices | None]  # by value - 1


class PostprocessingStep(Record):
    """One change of a finished label map, found useful in cross-validation."""

    kind: Literal["keep_largest"] = "keep_largest"
    values: tuple[int, ...]  # label values whose union is looked at
    text: str  # for readers, e.g. "keep only the largest connected component of liver"

    @classmethod
    def largest_of(cls, name: str, values: tuple[int, ...]) -> PostprocessingStep:
        """Return the step that keeps the largest connected component of what is called `name`."""
        return cls(values=values, text=f"keep only the largest connected component of {name}")


def apply_steps(labels: NDArray[_Label], steps: Sequence[PostprocessingStep]) -> NDArray[_Label]:
    """Apply the steps in order; `labels` is an integer label map ``(z, y, x)`` or ``(y, x)`` and is not changed."""
    for step in steps:
        labels = keep_largest(labels, step.values)
    return labels


def keep_largest(labels: NDArray[_Label], values: Sequence[int]) -> NDArray[_Label]:
    """Keep the largest connected component of the voxels with one of `values` (above 0), set the others of them to 0.

    Voxels that share a corner are connected (26 neighbours in 3D, 8 in 2D). Equally large components are all kept,
    other values are left alone. Returns `labels` itself if there is nothing to remove, else a changed copy.
    """
    found = strays(labels, values)
    if found is None:
        return labels
    box, mask = found
    result = labels.copy()
    result[box][mask] = 0
    return result


def label_boxes(labels: NDArray[Any], highest: int = 0) -> SlicesByValue:
    """Return the bounding box of every value from 1 to `highest` in `labels` (*spatial), integer, in one pass.

    It is None for values that do not occur. 0 is for the highest value there is.
    """
    from scipy import ndimage

    return ndimage.find_objects(labels, highest)


def strays(
    labels: NDArray[Any], values: Sequence[int], boxes: SlicesByValue | None = None
) -> tuple[Slices, NDArray[np.bool_]] | None:
    """Return the voxels that `keep_largest` removes: a box and a mask of its shape; None if there are none.

    Only the box around the values is looked at; `boxes` (of `label_boxes`) saves finding it anew for every value.
    """
    boxes = label_boxes(labels) if boxes is None else boxes
    parts = [box for value in values if 0 < value <= len(boxes) and (box := boxes[value - 1]) is not None]
    if not parts:
        return None
    box = tuple(
        slice(min(part.start for part in axis), max(part.stop for part in axis)) for axis in zip(*parts, strict=True)
    )
    inside = labels[box]
    mask: NDArray[np.bool_] = inside == values[0] if len(values) == 1 else np.isin(inside, np.asarray(values))
    found, sizes = components(mask)
    if len(sizes) == 2:
        return None
    sizes[0] = 0  # the background is no component
    small = sizes < sizes.max()
    small[0] = False
    return (box, small[found]) if small.any() else None


def components(mask: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """Return the number of each voxel's component, 0 outside the mask, and their sizes, that of the outside first.

    Voxels that share a corner are connected.
    """
    import cc3d

    # As uint8 on purpose: for Booleans (and with binary_image=True) cc3d 4.1 labels rows of a single voxel's thickness
    # wrongly or raises.
    found, count = cc3d.connected_components(
        np.ascontiguousarray(mask, dtype=np.uint8), connectivity=26 if mask.ndim == 3 else 8, return_N=True
    )
    return found, np.bincount(found.reshape(-1), minlength=count + 1)
