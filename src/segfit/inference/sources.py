"""What a model can be asked to segment: files, arrays with their geometry, images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from segfit.errors import InputError, Problem, warning
from segfit.geometry import Grid
from segfit.images.formats import check, find_format, read_image, read_label, stacked
from segfit.images.image import Image
from segfit.images.image_checks import grid_problems, header_remarks, voxel_problems
from segfit.images.open_files import OpenFiles
from segfit.labels import LabelScheme
from segfit.text import by_axis, count, numbers

__all__ = [
    "Array",
    "Geometry",
    "Source",
    "as_spacing",
    "header_warnings",
    "read_previous_stage",
    "read_source",
    "source_files",
]

Geometry = Grid | Sequence[float] | NDArray[np.floating[Any]]  # a grid, a spacing in mm (array order), or an affine
Array = NDArray[Any] | torch.Tensor
Source = str | Path | Sequence[str | Path] | Image | Array | tuple[Array, Geometry]

_SAME_SPACING = 1e-3  # relative; beyond, two statements contradict each other


def read_source(
    source: Source, ndim: int, channels: int, spacing_mm: tuple[float, ...] | None, files: OpenFiles
) -> tuple[Image, str, list[Problem]]:
    """Return the image, what to call it in messages, and warnings about it.

    All is asked of it that is asked of a training image (`segfit.images.image_checks`).

    Parameters
    ----------
    ndim, channels : spatial axes and channels that the model takes
    spacing_mm : voxel size of what does not say its own, from `as_spacing`
    files : those that are open, as in `segfit.images.formats.read_image`

    Raises `InputError` for a file that cannot be read, an array of another kind or shape, an unknown spacing, and
    voxels that cannot be computed with.
    """
    paths = source_files(source)
    if paths:
        return _from_files(paths, spacing_mm, files)
    if isinstance(source, Image):
        image = source
    elif isinstance(source, tuple) and len(source) == 2:
        image = _from_array(_as_array(source[0]), source[1], ndim, channels)
    else:
        image = _from_array(_as_array(source), spacing_mm, ndim, channels)
        spacing_mm = None
    problems = _usable(voxel_problems(image.array, "the image"))
    problems += [
        warning("file_header", f"the image {remark.problem}", remark.action) for remark in header_remarks(image.grid)
    ]
    return Image(image.array, _sized(image.grid, spacing_mm)), "the image", problems


def _from_files(
    paths: Sequence[Path], spacing_mm: tuple[float, ...] | None, files: OpenFiles
) -> tuple[Image, str, list[Problem]]:
    images: list[Image] = []
    problems: list[Problem] = []
    for path in paths:
        image = read_image(path, spacing_mm, files)
        colours = find_format(path).channel_kind is not None
        found = voxel_problems(image.array, str(path), colours=colours)
        if images:
            found += grid_problems(path, images[0].grid, image.grid, paths[0])
        problems += [replace(item, file=str(path)) for item in _usable(found)]
        images.append(image)
    whole = stacked(paths, images)
    return whole, str(paths[0]), problems + header_warnings(paths, whole, files)


def header_warnings(paths: Sequence[Path], whole: Image, files: OpenFiles) -> list[Problem]:
    """Return what is odd in the headers of a case's files."""
    known = Image(whole.array, replace(whole.grid, spacing_known=True))  # a size that is assumed is told elsewhere
    remarks = [(path, remark) for path in paths for remark in check(path, known, files)]
    remarks += [(paths[0], remark) for remark in header_remarks(whole.grid)]
    return [warning("file_header", f"{path} {remark.problem}", remark.action, file=path) for path, remark in remarks]


def _usable(problems: list[Problem]) -> list[Problem]:
    """Return problems; raise the first that leaves nothing to compute with."""
    for item in problems:
        if item.fatal:
            raise InputError(item.problem, item.action)
    return problems


def source_files(source: Source) -> tuple[Path, ...]:
    """Return the files of a source; none of arrays and images."""
    if isinstance(source, str | Path):
        return (Path(source),)
    if isinstance(source, list | tuple) and source and all(isinstance(path, str | Path) for path in source):
        return tuple(Path(path) for path in source)
    return ()


def as_spacing(value: Any) -> tuple[float, ...] | None:
    """Return a voxel size in mm; `InputError` for what is none. One number stands for all axes."""
    if value is None:
        return None
    try:
        found = np.atleast_1d(np.asarray(value, dtype=np.float64)) if not isinstance(value, str) else np.zeros(0)
    except (TypeError, ValueError):
        found = np.zeros(0)
    if isinstance(value, bool) or found.ndim != 1 or found.size not in (1, 2, 3) or not _is_positive(found):
        raise InputError(
            f"a voxel size is one positive number in mm, or one for each axis in array order, got {value!r}",
            "give for example (3.0, 0.8, 0.8)",
        )
    return tuple(found.tolist())


def _is_positive(values: NDArray[np.float64]) -> bool:
    return bool(np.isfinite(values).all() and (values > 0).all())


def _as_array(value: Any) -> NDArray[Any]:
    """Return an array or tensor as an array; `InputError` for anything else."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise InputError("the image is a sparse, quantized or empty tensor", "give one that holds all its voxels")
        value = value.detach().cpu()
        return np.asarray(value.float() if value.dtype.is_floating_point and value.itemsize < 4 else value)
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise InputError("the image has masked voxels", "give image.filled(0), or another value that stands for them")
    if not isinstance(value, np.ndarray):
        nothing = value is None or (isinstance(value, list | tuple) and not value)
        what = "no image was given" if nothing else f"an image was expected, got a value of type {type(value).__name__}"
        action = (
            "give a file, a list of files (one per channel), an Image, or an array or tensor with its spacing in mm"
        )
        raise InputError(what, action)
    return np.asarray(value).astype(np.uint8) if value.dtype == bool else np.asarray(value)


def _from_array(array: NDArray[Any], geometry: Any, ndim: int, channels: int) -> Image:
    """Return an array of `ndim` spatial axes, with or without a channel axis in front, as an image."""
    if array.dtype.kind not in "biuf":
        raise InputError(f"the image must hold real numbers, its dtype is {array.dtype}")
    if 0 in array.shape:
        raise InputError(f"the image has the shape {array.shape}: it holds nothing", "give an image with voxels")
    if array.ndim not in (ndim, ndim + 1):
        what = f"the image has {count(array.ndim, 'axis', 'axes')}, the model takes {ndim}"
        action = "predict its slices one by one" if array.ndim > ndim else "give the whole volume"
        raise InputError(f"{what}, or {ndim + 1} with channels first", action)
    given = array if array.ndim == ndim + 1 else array[None]
    if len(given) != channels:
        shape, takes = by_axis(array.shape), f"the model takes {count(channels, 'channel')} of {ndim} axes"
        problem, action = f"the image of shape {shape} has {count(len(given), 'channel')}, {takes}", ""
        if array.ndim == ndim:
            action = "stack all channels along a first axis"
        elif array.shape[-1] == channels:
            problem = f"the image of shape {shape} seems to have its channels last, {takes}, channels first"
            action = f"give numpy.moveaxis(image, -1, 0){'[0]' if channels == 1 else ''}"
        elif ndim == 2:
            problem = f"the image of shape {shape} seems to be a volume, {takes}"
            action = "predict its slices one by one"
        raise InputError(problem, action)
    return Image(given, _grid(given.shape[1:], geometry))


def _grid(shape: tuple[int, ...], geometry: Any) -> Grid:
    if isinstance(geometry, Grid):
        if geometry.shape != shape:
            raise InputError(f"the image has the shape {shape}, its grid {geometry.shape}", "they must agree")
        return geometry
    if geometry is None and len(shape) == 3:
        raise InputError("the spacing of the image is unknown", "give (array, spacing in mm) or (array, affine)")
    if geometry is None:
        return Grid(shape, (1.0,) * len(shape), spacing_known=False)
    if np.shape(geometry) == (4, 4):
        try:
            affine = np.array(geometry).astype(np.float64, casting="same_kind")
            if not np.array_equal(affine[3], (0, 0, 0, 1)):
                raise ValueError(f"the last row of an affine is (0, 0, 0, 1), got {numbers(affine[3])}")
            return Grid(shape, tuple(np.linalg.norm(affine[:3, :3], axis=0)[::-1].tolist()), affine)
        except (TypeError, ValueError) as error:
            raise InputError(f"the geometry of the image is unusable: {error}") from None
    return _sized(Grid(shape, (1.0,) * len(shape), spacing_known=False), as_spacing(geometry))


def _sized(grid: Grid, spacing_mm: tuple[float, ...] | None) -> Grid:
    """Return a grid with a voxel size from elsewhere, if it has none of its own; `InputError` if it has another."""
    if spacing_mm is None:
        return grid
    given = spacing_mm * (grid.ndim if len(spacing_mm) == 1 else 1)
    if len(given) != grid.ndim:
        raise InputError(f"the image has {grid.ndim} axes but the voxel size {numbers(given)} mm", "give one per axis")
    if grid.spacing_known and not np.allclose(given, grid.spacing_mm, rtol=_SAME_SPACING, atol=0):
        problem = f"the image has voxels of {numbers(grid.spacing_mm)} mm but was given {numbers(given)} mm"
        raise InputError(problem, "give one of the two")
    return grid if grid.spacing_known else replace(grid, spacing_mm=given, spacing_known=True)


def read_previous_stage(source: str | Path | Array, grid: Grid, name: str, labels: LabelScheme) -> Image:
    """Return the inner labels ``(1, *spatial)`` of the previous stage, given as stored ones.

    Raises `InputError` unless they lie on the grid of the image `name`.
    """
    if not isinstance(source, str | Path):
        source = _as_array(source)
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
