"""Labels that lie on another grid than their image, brought onto it."""

from __future__ import annotations

import numpy as np

from segfit.dataset.manifest import Case
from segfit.geometry import Grid, canonical_map
from segfit.images.formats import read_grid
from segfit.images.image import FileError, Image

__all__ = ["on_image_grid", "uncropped"]


def on_image_grid(case: Case, label: Image, grid: Grid | None = None) -> Image:
    """Return the label map of a case on the grid of its image.

    A label map that lies on that grid is kept; one that only stores the same voxels in another order of axes is turned
    (`Grid.turn`); one that is a part of it, as its file says, is set into it (`uncropped`). Any other is kept unless
    labels are to be resampled (`Case.resample_label`): then every voxel of the image gets the value of the nearest
    voxel of the label map, and 0 outside of it. Raises `InputError` if a file does not say where it lies, or if nothing
    that is labelled lies inside the image.

    Parameters
    ----------
    grid : that of the image; read from its header if it is not given
    """
    if grid is None:
        grid = read_grid(case.images[0], case.spacing_mm)
    label = uncropped(label.turned_to(grid), grid)
    difference = grid.mismatch(label.grid)
    if not difference or not case.resample_label:
        return label
    files = case.label_files[0], case.images[0].name
    problem = f"does not fit {files[1]} ({difference}) and cannot be resampled"
    if grid.affine is None or label.grid.affine is None:
        raise FileError(files[0], f"{problem}: they do not both say where they lie", "make it on the image's grid")
    result = _resampled(label, grid)
    if label.array.any() and not result.array.any():
        raise FileError(files[0], f"{problem}: nothing that is labelled lies in the image", "correct its header")
    return result


def uncropped(label: Image, grid: Grid) -> Image:
    """Return a label map (1, *spatial) that may be cropped (`Grid.cropped`) with 0 around it, as its image lies.

    Nothing is interpolated: it is left as it is where its voxels do not lie on those of the image, or where something
    that is labelled lies outside.
    """
    if not label.grid.cropped or label.grid.affine is None or grid.affine is None or not grid.mismatch(label.grid):
        return label
    turned = label.reoriented(canonical_map(label.grid).then(canonical_map(grid).inverse()))
    assert turned.grid.affine is not None
    affine = turned.grid.affine.copy()
    place = np.rint(np.linalg.solve(grid.affine, affine[:, 3])[:3])  # x, y, z of its first voxel in the image
    affine[:3, 3] -= affine[:3, :3] @ place
    start, size = place[::-1].astype(int), np.array(turned.grid.shape)
    whole = Grid(grid.shape, turned.grid.spacing_mm, affine)
    if grid.mismatch(whole):
        return label
    low, high = np.clip(-start, 0, size), np.clip(np.array(grid.shape) - start, 0, size)
    inside = tuple(map(slice, low, high))
    result = np.zeros((1, *grid.shape), label.array.dtype)
    result[0][tuple(map(slice, low + start, high + start))] = turned.array[0][inside]
    return label if np.count_nonzero(result) < np.count_nonzero(label.array) else Image(result, whole)


def _resampled(label: Image, grid: Grid) -> Image:
    """Return the nearest values of a label map (1, *spatial) on another grid, 0 outside."""
    from scipy.ndimage import affine_transform

    assert label.grid.affine is not None
    assert grid.affine is not None
    way = np.linalg.solve(label.grid.affine, grid.affine)  # from voxels (x, y, z) of the image to those of the label
    values = affine_transform(
        label.array[0], way[:3, :3][::-1, ::-1], way[:3, 3][::-1], grid.shape, order=0, mode="grid-constant"
    )
    return Image(values[None], grid)
