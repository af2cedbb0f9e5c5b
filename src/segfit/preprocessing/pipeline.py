"""From an image as stored to the arrays a network sees, and what brings a result back.

Order of the steps (spec: preprocessing, section 1): orientation, transposition, crop to the non-zero region,
normalisation on the cropped grid, resampling, sampling of class locations. The orientation step is ours; with
`stored` plans it changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.cropping import Box, bounding_box, nonzero_mask, slices
from segfit.errors import InputError
from segfit.files import Record
from segfit.geometry import AxisMap, Grid, canonical_map
from segfit.images.image import Image
from segfit.labels import LabelScheme
from segfit.preprocessing.locations import class_locations
from segfit.preprocessing.normalize import normalize
from segfit.resampling import new_shape, resample_image, resample_labels
from segfit.specs import PreprocessingSpec
from segfit.text import count, extent, gigabytes

__all__ = [
    "CaseProperties",
    "Preprocessed",
    "TooLargeError",
    "network_axes",
    "preprocess",
    "properties_of",
    "require_kind",
    "with_previous_stage",
]


class TooLargeError(InputError):
    """A case has more voxels at the spacing of the plan than fit into memory."""


class CaseProperties(Record):
    """Where a preprocessed case comes from: everything that brings a result back onto the stored grid."""

    case: str
    stored_shape: tuple[int, ...]  # as in the file, array order
    stored_spacing_mm: tuple[float, ...]
    affine: tuple[tuple[float, ...], ...] | None  # of the stored grid, see `Grid`
    axis_order: tuple[int, ...]  # stored axes -> oriented axes, see `AxisMap`
    axis_flip: tuple[bool, ...]
    transpose: tuple[int, ...]  # oriented axes -> network axes
    spacing_mm: tuple[float, ...]  # after orientation and transposition, as all that follows
    shape_before_crop: tuple[int, ...]
    crop_box: Box
    shape_after_crop: tuple[int, ...]
    shape: tuple[int, ...]  # after resampling
    source_files: tuple[str, ...] = ()  # paths when the case was preprocessed
    header: str | None = None  # of the stored grid, in hexadecimal digits
    spacing_known: bool = True

    @property
    def grid(self) -> Grid:
        """The stored grid."""
        header = None if self.header is None else bytes.fromhex(self.header)
        affine = None if self.affine is None else np.array(self.affine)
        return Grid(self.stored_shape, self.stored_spacing_mm, affine, header, spacing_known=self.spacing_known)


@dataclass(frozen=True, slots=True, eq=False)
class Preprocessed:
    """A case as the network sees it.

    Parameters
    ----------
    image : (c, *spatial) float32
    labels : (*spatial) int16, -1 = background outside the non-zero region; None without a label
    locations : (n, spatial axes) int32 by class, plus "annotated" with an ignore label; empty without a label
    """

    image: NDArray[np.float32]
    labels: NDArray[np.int16] | None
    properties: CaseProperties
    locations: dict[str, NDArray[np.int32]]


def preprocess(
    image: Image,
    label: Image | None,
    spec: PreprocessingSpec,
    labels: LabelScheme,
    case: str = "",
    *,
    source_files: Sequence[Path] = (),
    overwrite: bool = False,
    room: float = inf,
) -> Preprocessed:
    """Preprocess one case; inputs are left as they are unless their voxels may be overwritten, which saves memory.

    `room` is the memory there is, in bytes: a case that cannot fit (`TooLargeError`) is refused before it is resampled.
    `image` is float32 (c, *spatial) as `read_case` gives it, `label` has one integer channel on the same grid. Raises
    `InputError` if number of axes or channels is not the plan's, label and image differ in shape, or values are not
    finite.
    """
    _check(image, label, spec, case)
    grid = image.grid
    axes = network_axes(grid, spec)
    voxels = np.ascontiguousarray(axes.apply(image.array.astype(np.float32, copy=False)))
    given = None if label is None else np.ascontiguousarray(axes.apply(label.array[0]))
    box, cropped, marked = _crop(voxels, given, overwrite=overwrite)
    properties = properties_of(grid, spec, box, case, source_files)
    shape, spacing = properties.shape, properties.spacing_mm
    labelled = label is not None
    del image, label, voxels, given

    target = spec.target_mm(spacing)
    _check_memory(properties, target, len(cropped), room)
    in_place = overwrite and cropped.flags.c_contiguous  # resampling reads parts of it many times
    try:
        cropped = normalize(cropped, marked, spec.normalization, out=cropped if in_place else None)
    except InputError as error:
        raise InputError(f"{case or 'the image'}: {error.problem}", error.action) from None
    final = resample_image(cropped, shape, spacing, target, spec.resample_image)
    del cropped
    if not labelled:
        return Preprocessed(final, None, properties, {})
    resampled = resample_labels(marked, shape, spacing, target, spec.resample_label)
    del marked
    return Preprocessed(final, resampled, properties, class_locations(resampled, labels))


def network_axes(grid: Grid, spec: PreprocessingSpec) -> AxisMap:
    """Return the map from stored axes to those of the network: orientation, then transposition."""
    return _orientation(grid, spec).then(AxisMap(spec.transpose, (False,) * spec.image_ndim))


def _orientation(grid: Grid, spec: PreprocessingSpec) -> AxisMap:
    return canonical_map(grid) if spec.orientation == "canonical" else AxisMap.identity(grid.ndim)


def properties_of(
    grid: Grid, spec: PreprocessingSpec, box: Box, case: str = "", source_files: Sequence[Path] = ()
) -> CaseProperties:
    """Return the way of a case whose non-zero region is `box` on the axes of the network."""
    orientation, axes = _orientation(grid, spec), network_axes(grid, spec)
    spacing, cropped = axes.permute(grid.spacing_mm), tuple(high - low for low, high in box)
    keeps_grid = spec.resample_image.method == "none"
    return CaseProperties(
        case=case,
        **_stored(grid),
        axis_order=orientation.order,
        axis_flip=orientation.flip,
        transpose=spec.transpose,
        spacing_mm=spacing,
        shape_before_crop=axes.permute(grid.shape),
        crop_box=box,
        shape_after_crop=cropped,
        shape=cropped if keeps_grid else new_shape(cropped, spacing, spec.spacing_mm),
        source_files=tuple(str(path) for path in source_files),
    )


def with_previous_stage(
    image: NDArray[np.float32], labels: NDArray[np.integer[Any]] | None, scheme: LabelScheme
) -> NDArray[np.float32]:
    """Return what the second stage of a cascade sees: the image (c, *spatial) and a channel per foreground label.

    A channel is 1 where `labels` (*spatial), those that the first stage predicted, have it. None: the image alone.
    """
    if labels is None:
        return image
    return np.concatenate([image, *((labels == value)[None].astype(np.float32) for value in scheme.foreground_values)])


def _stored(grid: Grid) -> dict[str, Any]:
    """Return what `CaseProperties.grid` is made of again."""
    return {
        "stored_shape": grid.shape,
        "stored_spacing_mm": grid.spacing_mm,
        "affine": None if grid.affine is None else tuple(map(tuple, grid.affine.tolist())),
        "header": None if grid.header is None else grid.header.hex(),
        "spacing_known": grid.spacing_known,
    }


def require_kind(grid: Grid, channels: int, spec: PreprocessingSpec, case: str) -> None:
    """Raise `InputError` unless number of axes and channels are the plan's."""
    name = case or "the image"
    if grid.ndim != spec.image_ndim:
        raise InputError(
            f"{name} has {grid.ndim} spatial axes, the training images {spec.image_ndim}",
            "give images like the training images",
        )
    expected = len(spec.normalization)
    if channels != expected:
        action = "give the same channels in the same order, one file or channel for each"
        if grid.ndim == 2 and channels == expected + 1 and channels in (2, 4):
            action = "save it without its alpha channel, if that is one; else give the channels of the training images"
        raise InputError(f"{name} has {count(channels, 'channel')}, the training images {expected}", action)


def _check(image: Image, label: Image | None, spec: PreprocessingSpec, case: str) -> None:
    require_kind(image.grid, image.array.shape[0], spec, case)
    name = case or "the image"
    if not (np.isfinite(image.array.min()) and np.isfinite(image.array.max())):
        raise InputError(f"{name} contains NaN or infinite values", "replace them in the image file")
    if label is not None and label.array.shape[1:] != image.grid.shape:
        raise InputError(
            f"the label of {name} has shape {label.array.shape[1:]}, its image {image.grid.shape}", "they must agree"
        )


def _check_memory(case: CaseProperties, spacing_mm: Sequence[float], channels: int, room: float) -> None:
    least = prod(case.shape) * (4 * channels + 2)  # bytes of the results alone
    unit = case.grid.unit
    if least > room:
        raise TooLargeError(
            f"{case.case or 'the image'}: {extent(case.shape_after_crop)} voxels of {extent(case.spacing_mm)} {unit} "
            f"would become {extent(case.shape)} of {extent(spacing_mm)} {unit}, which take {gigabytes(least / 2**30)} "
            f"of memory where {gigabytes(room / 2**30)} are free",
            "correct the voxel size in its header if the unit was mistaken, or leave the case out",
        )


def _crop(
    image: NDArray[np.float32], label: NDArray[Any] | None, *, overwrite: bool
) -> tuple[Box, NDArray[np.float32], NDArray[np.int16]]:
    """Return the box of the non-zero region, and image and label inside it.

    Background outside the non-zero mask becomes -1; without a label the mask alone is told, as 0 and -1.
    """
    mask = nonzero_mask(image)
    box = bounding_box(mask)
    inside = slices(box)
    mask = mask[inside]
    if label is None:
        marked = np.zeros(mask.shape, dtype=np.int16)
    else:
        marked = label[inside].astype(np.int16, copy=not overwrite)
    if not mask.all():
        marked[~mask & (marked == 0)] = -1
    return box, image[(slice(None), *inside)], marked
