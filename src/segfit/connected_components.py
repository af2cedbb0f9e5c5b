"""Connected components of label maps, and the post-processing steps made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from segfit.files import GrownRecord

__all__ = [
    "PostprocessingStep",
    "Slices",
    "SlicesByValue",
    "apply_steps",
    "components",
    "fill_holes",
    "holes",
    "inside",
    "keep_largest",
    "label_boxes",
    "remove_small",
    "strays",
]

_Label = TypeVar("_Label", bound=np.generic)
Slices = tuple[slice, ...]
SlicesByValue = Sequence[Slices | None]  # by value - 1


class PostprocessingStep(GrownRecord):
    """One change of a finished label map, found useful in cross-validation."""

    LATER: ClassVar[frozenset[str]] = frozenset({"min_voxels"})

    kind: Literal["keep_largest", "remove_small", "fill_holes"] = "keep_largest"
    values: tuple[int, ...]  # label values whose union is looked at
    text: str  # for readers, e.g. "keep only the largest connected component of liver"
    min_voxels: int = Field(0, ge=0)  # of remove_small: components with fewer go

    @classmethod
    def largest_of(cls, name: str, values: tuple[int, ...]) -> PostprocessingStep:
        """Return the step that keeps the largest connected component of what is called `name`."""
        return cls(values=values, text=f"keep only the largest connected component of {name}")

    @classmethod
    def from_size(cls, name: str, values: tuple[int, ...], min_voxels: int) -> PostprocessingStep:
        """Return the step that removes the connected components of `name` below a size."""
        text = f"remove connected components of {name} below {min_voxels} voxels"
        return cls(kind="remove_small", values=values, text=text, min_voxels=min_voxels)

    @classmethod
    def filling(cls, name: str, value: int) -> PostprocessingStep:
        """Return the step that fills the holes of `name`."""
        return cls(kind="fill_holes", values=(value,), text=f"fill the holes of {name}")


def apply_steps(labels: NDArray[_Label], steps: Sequence[PostprocessingStep]) -> NDArray[_Label]:
    """Apply the steps in order; `labels` is an integer label map ``(z, y, x)`` or ``(y, x)`` and is not changed."""
    for step in steps:
        if step.kind == "keep_largest":
            labels = keep_largest(labels, step.values)
        elif step.kind == "remove_small":
            labels = remove_small(labels, step.values, step.min_voxels)
        else:
            labels = fill_holes(labels, step.values[0])
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


def remove_small(labels: NDArray[_Label], values: Sequence[int], min_voxels: int) -> NDArray[_Label]:
    """Set the connected components of the voxels with one of `values` (above 0) that have fewer voxels to 0.

    Connected as in `keep_largest`. Returns `labels` itself if there is nothing to remove, else a changed copy.
    """
    found = inside(labels, values)
    if found is None:
        return labels
    box, mask = found
    numbers, sizes = components(mask)
    small = sizes < min_voxels
    small[0] = False
    return _changed(labels, box, small[numbers], 0)


def fill_holes(labels: NDArray[_Label], value: int) -> NDArray[_Label]:
    """Give the voxels of the background (0) that `value` encloses this value.

    Enclosed is what no path of voxels that share a face leads out of, to the border of the image, past those with the
    value; other values in there stay. Returns `labels` itself if there are no holes, else a changed copy.
    """
    found = inside(labels, (value,))
    if found is None:
        return labels
    box, mask = found
    return _changed(labels, box, holes(mask) & (labels[box] == 0), value)


def _changed(labels: NDArray[_Label], box: Slices, mask: NDArray[np.bool_], value: int) -> NDArray[_Label]:
    if not mask.any():
        return labels
    result = labels.copy()
    result[box][mask] = value
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

    `boxes` as in `inside`.
    """
    there = inside(labels, values, boxes)
    if there is None:
        return None
    box, mask = there
    found, sizes = components(mask)
    if len(sizes) == 2:
        return None
    sizes[0] = 0  # the background is no component
    small = sizes < sizes.max()
    small[0] = False
    return (box, small[found]) if small.any() else None


def inside(
    labels: NDArray[Any], values: Sequence[int], boxes: SlicesByValue | None = None
) -> tuple[Slices, NDArray[np.bool_]] | None:
    """Return the box around the voxels with one of `values` (above 0) and their mask in it; None if there are none.

    `boxes` (of `label_boxes`) saves finding them anew for every value.
    """
    boxes = label_boxes(labels) if boxes is None else boxes
    parts = [box for value in values if 0 < value <= len(boxes) and (box := boxes[value - 1]) is not None]
    if not parts:
        return None
    box = tuple(
        slice(min(part.start for part in axis), max(part.stop for part in axis)) for axis in zip(*parts, strict=True)
    )
    mask: NDArray[np.bool_] = labels[box] == values[0] if len(values) == 1 else np.isin(labels[box], np.asarray(values))
    return box, mask


def holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return what the mask encloses in its array; outside are voxels that reach a border through shared faces."""
    outside = np.pad(~mask, 1, constant_values=True)
    found, _ = components(outside, faces=True)
    enclosed: NDArray[np.bool_] = outside & (found != found.flat[0])
    return enclosed[(slice(1, -1),) * mask.ndim]


def components(mask: NDArray[np.bool_], *, faces: bool = False) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """Return the number of each voxel's component, 0 outside the mask, and their sizes, that of the outside first.

    Voxels that share a corner are connected, with `faces` only those that share a face (an edge in 2D).
    """
    import cc3d

    # As uint8 on purpose: for Booleans (and with binary_image=True) cc3d 4.1 labels rows of a single voxel's thickness
    # wrongly or raises.
    neighbours = {2: (8, 4), 3: (26, 6)}[mask.ndim][faces]
    found, count = cc3d.connected_components(
        np.ascontiguousarray(mask, dtype=np.uint8), connectivity=neighbours, return_N=True
    )
    return found, np.bincount(found.reshape(-1), minlength=count + 1)
