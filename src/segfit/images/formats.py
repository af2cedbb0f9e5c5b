"""Files of images and labels by their ending: one visible table, one way in, one way out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError, nearest
from segfit.geometry import Grid
from segfit.images import nifti, picture, tiff
from segfit.images.image import FileError, Image

__all__ = [
    "ENDINGS",
    "Format",
    "find_format",
    "read_case",
    "read_grid",
    "read_image",
    "read_label",
    "split_ending",
    "write_labels",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How files of one kind are read and written."""

    name: str
    read: Callable[[Path], Image]
    read_grid: Callable[[Path], Grid]
    read_label: Callable[[Path], Image]
    write: Callable[[Path, NDArray[Any], Grid], None] | None  # None: lossy, labels would change
    multichannel: bool  # whether one file can hold several channels


def _write_picture(path: Path, array: NDArray[Any], grid: Grid) -> None:
    if grid.ndim != 2:
        raise FileError(path, "cannot hold a 3D label map", "write .nii.gz or .tif instead")
    picture.write(path, array)


_NIFTI = Format(
    name="NIfTI",
    read=nifti.read,
    read_grid=nifti.read_grid,
    read_label=nifti.read,
    write=nifti.write,
    multichannel=False,
)
_PICTURE = Format(
    name="picture",
    read=picture.read,
    read_grid=picture.read_grid,
    read_label=picture.read_label,
    write=_write_picture,
    multichannel=True,
)
_JPEG = Format(
    name="JPEG",
    read=picture.read,
    read_grid=picture.read_grid,
    read_label=picture.read_label,
    write=None,
    multichannel=True,
)
_TIFF = Format(
    name="TIFF", read=tiff.read, read_grid=tiff.read_grid, read_label=tiff.read, write=tiff.write, multichannel=True
)

ENDINGS: dict[str, Format] = {
    ".nii.gz": _NIFTI,
    ".nii": _NIFTI,
    ".png": _PICTURE,
    ".bmp": _PICTURE,
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
}


def split_ending(name: str) -> tuple[str, str]:
    """Return ``(stem, ending)`` of a file name, the ending as written; `InputError` for an unknown ending."""
    for ending in ENDINGS:  # .nii.gz cannot be taken for .gz, and no ending is the tail of another
        if name.lower().endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)], name[-len(ending) :]
    found = Path(name).suffix
    raise InputError(
        f"{name}: the file ending {found!r} is not known{nearest(found, list(ENDINGS))}; known are {', '.join(ENDINGS)}"
    )


def find_format(path: Path) -> Format:
    """Return the format that the name of a file asks for; `InputError` for an unknown ending."""
    return ENDINGS[split_ending(path.name)[1].lower()]


def read_image(path: Path) -> Image:
    """Read one file: channels first, dtype as stored (float32 where the file scales its values).

    NIfTI gives (1, z, y, x); pictures (1, y, x), (3, y, x) or (4, y, x); TIFF stacks (c, z, y, x). Raises `InputError`
    saying what is wrong with the file and what to do.
    """
    return find_format(path).read(path)


def read_grid(path: Path) -> Grid:
    """Read where the voxels are, from the header alone where the format allows it."""
    return find_format(path).read_grid(path)


def read_case(paths: Sequence[Path]) -> Image:
    """Read the channel files of one case and stack them as float32 (c, *spatial); the grid is the first file's.

    Raises `InputError` if a file cannot be read or the files do not share one grid (`Grid.mismatch`).
    """
    assert paths
    images: list[Image] = []
    for path in paths:
        image = read_image(path)
        difference = images[0].grid.mismatch(image.grid) if images else ""
        if difference:
            raise FileError(path, f"does not fit {paths[0].name}: {difference}", "resample it to that file's grid")
        images.append(image)
    channels = sum(image.array.shape[0] for image in images)
    stacked = np.empty((channels, *images[0].grid.shape), dtype=np.float32)
    np.concatenate([image.array for image in images], out=stacked, casting="unsafe")
    return Image(stacked, images[0].grid)


def read_label(path: Path) -> Image:
    """Read a label map as (1, *spatial), int16, or int32 where values need it.

    Floating-point files are accepted if every value is an integer. Raises `InputError` otherwise, for more than one
    channel, and for lossy formats.
    """
    format_ = find_format(path)
    if format_.write is None:
        raise FileError(path, f"is {format_.name}, which changes label values", "save labels as .png")
    image = format_.read_label(path)
    array = image.array
    if array.shape[0] != 1:
        raise FileError(path, f"has {array.shape[0]} channels", "save labels as one channel of label values")
    if array.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = np.isfinite(array) & (array == np.rint(array))
        if not whole.all():
            example = array[~whole].flat[0]
            raise FileError(path, f"holds {example:g} where labels must be integers", "round it or export it again")
    low, high = int(array.min()), int(array.max())
    if low < -(2**31) or high >= 2**31:
        raise FileError(path, f"holds the label value {high if high >= 2**31 else low}", "number labels from 0")
    small = low >= -(2**15) and high < 2**15
    return Image(array.astype(np.int16 if small else np.int32), image.grid)


def write_labels(path: Path, labels: NDArray[np.integer[Any]], grid: Grid) -> None:
    """Write a label map atomically on the grid it belongs to.

    Parameters
    ----------
    labels : spatial integer array in the grid's (stored) order, values 0 to 65535; written as uint8 if all are below
        255, else as uint16, as the reference does
    grid : as read from the source file; NIfTI outputs get its header geometry back exactly
    """
    format_ = find_format(path)
    if format_.write is None:
        raise FileError(path, f"would be {format_.name}, which changes label values", "write .png instead")
    assert labels.shape == grid.shape, (labels.shape, grid.shape)
    low, high = int(labels.min()), int(labels.max())
    assert low >= 0, low
    assert high <= np.iinfo(np.uint16).max, high
    format_.write(path, np.ascontiguousarray(labels, dtype=np.uint8 if high < 255 else np.uint16), grid)
