"""What a model can be asked to segment: files, arrays with their geometry, images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError, Problem, warning
from segfit.geometry import Grid
from segfit.images.formats import check, read_case, read_label
from segfit.images.image import Image
from segfit.images.open_files import OpenFiles
from segfit.labels import LabelScheme

__all__ = ["Geometry", "Source", "read_previous_stage", "read_source", "source_files", "source_warnings"]

Geometry = Grid | Sequence[float] | NDArray[np.floating[Any]]  # a grid, a spacing in mm (array order), or an affine
Source = str | Path | Sequence[str | Path] | Image | NDArray[Any] | tuple[NDArray[Any], Geometry]


def read_source(
    source: Source, ndim: int, spacing_mm: Sequence[float] | None = None, files: OpenFiles | None = None
) -> tuple[Image, str]:
    """Return the image and what to call it in messages; `ndim` is the number of spatial axes the model takes.

    `spacing_mm` is the voxel size of files that do not say theirs, and `files` are those that are open, as in
    `segfit.images.formats.read_image`.
    Raises `InputError` for a file that cannot be read, an array of another kind or shape, and an unknown spacing.
    """
    if isinstance(source, Image):
        return source, "the image"
    if isinstance(source, str | Path):
        return read_case([Path(source)], spacing_mm, files), str(source)
    if isinstance(source, np.ndarray):
        return _from_array(source, None, ndim), "the image"
    if len(source) == 2 and isinstance(source[0], np.ndarray):
        return _from_array(source[0], source[1], ndim), "the image"  # type: ignore[arg-type]
    paths = [Path(path) for path in source]  # type: ignore[arg-type]
    if not paths:
        raise InputError("no image was given", "give a file, a list of files, an Image, or an array with its spacing")
    return read_case(paths, spacing_mm, files), str(paths[0])


def source_files(source: Source) -> tuple[Path, ...]:
    """Return the files of a source; none of arrays and images."""
    if isinstance(source, str | Path):
        source = [source]
    return tuple(Path(path) for path in source if isinstance(path, str | Path)) if isinstance(source, Sequence) else ()


def source_warnings(paths: Sequence[Path], image: Image, files: OpenFiles) -> list[Problem]:
    """Return warnings about the headers of the files of an image."""
    remarks = [(path, remark) for path in paths for remark in check(path, image, files)]
    return [warning("file_header", f"{path} {remark.problem}", file=path) for path, remark in remarks]


def _from_array(array: NDArray[Any], geometry: Geometry | None, ndim: int) -> Image:
    """Return an array of `ndim` spatial axes, with or without a channel axis in front, as an image."""
    if array.dtype.kind not in "biuf":
        raise InputError(f"the image must hold real numbers, its dtype is {array.dtype}")
    if array.ndim not in (ndim, ndim + 1):
        raise InputError(f"the image has {array.ndim} axes, the model takes {ndim}, or {ndim + 1} with channels first")
    channels = array if array.ndim == ndim + 1 else array[None]
    return Image(channels, _grid(channels.shape[1:], geometry))


def _grid(shape: tuple[int, ...], geometry: Geometry | None) -> Grid:
    if isinstance(geometry, Grid):
        if geometry.shape != shape:
            raise InputError(f"the image has the shape {shape}, its grid {geometry.shape}", "they must agree")
        return geometry
    if geometry is None and len(shape) == 3:
        raise InputError("the spacing of the image is unknown", "give (array, spacing in mm) or (array, affine)")
    if geometry is None:
        return Grid(shape, (1.0,) * len(shape), spacing_known=False)
    values = np.asarray(geometry, dtype=np.float64)
    try:
        if values.shape == (4, 4):
            spacing = np.linalg.norm(values[:3, :3], axis=0)[::-1]
            return Grid(shape, tuple(spacing.tolist()), values)
        return Grid(shape, tuple(values.tolist()))
    except (ValueError, TypeError) as error:
        raise InputError(f"the geometry of the image is unusable: {error}") from None


def read_previous_stage(
    source: str | Path | NDArray[np.integer[Any]], grid: Grid, name: str, labels: LabelScheme
) -> Image:
    """Return the inner labels ``(1, *spatial)`` of the previous stage, given as stored ones.

    Raises `InputError` unless they lie on the grid of the image `name`.
    """
    if isinstance(source, np.ndarray):
        if source.shape != grid.shape or source.dtype.kind not in "iu":
            raise InputError(
                f"the previous stage of {name} must be integer labels of shape {grid.shape}, "
                f"got {source.dtype} of shape {source.shape}"
            )
        return Image(labels.to_inner(source[None]), grid)
    image = read_label(Path(source), grid.spacing_mm).turned_to(grid)
    difference = grid.mismatch(image.grid)
    if difference:
        raise InputError(f"{source} does not lie on the grid of {name}: {difference}", "predict that stage again")
    return Image(labels.to_inner(image.array), image.grid)
