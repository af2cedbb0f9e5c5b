"""NRRD and MetaImage through SimpleITK (extra ``itk``): .nrrd and .nhdr, .mha and .mhd.

ITK describes a grid by spacing, direction and origin in LPS millimetres, x first; the affine here is RAS. Both agree on
which voxel lies where, so the same volume saved as NIfTI has the same array and affine.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.files import write_bytes
from segfit.geometry import Grid, is_invertible
from segfit.images.image import FileError, Image, optional_package, reading

__all__ = ["companions", "read", "read_colours", "read_grid", "write"]

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
_READER = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
# The line of a detached header that names the file of the voxels, and headers that can have one.
_DATA_FILE = {".nhdr": ("data file:", "datafile:"), ".mhd": ("elementdatafile =", "elementdatafile=")}
_LONGEST_HEADER = 2**16  # of a detached header, in bytes (assumption; real ones have a few hundred)
_HEADER = struct.Struct("<4s3d3d9d")  # our `Grid.header`: mark, spacing, origin, direction (row by row) as ITK has them
_MARK = b"ITK1"
_ORIGIN = re.compile(r"^(\[\w+\] )?(\w+: )?")  # of a line in an error: library and function


def read(path: Path) -> Image:
    """Read a file as (c, z, y, x) or (c, y, x); dtype as stored.

    Components of a voxel and the volumes of a 4D file are channels. Raises `FileError` for missing, truncated or
    foreign files and complex values, and where SimpleITK is not installed.
    """
    sitk = _package(path)
    with reading(path), _short_errors(path):
        reader = _reader(sitk, path)
        grid = _grid(path, reader)
        image = reader.Execute()
        array = sitk.GetArrayFromImage(image)
        if image.GetNumberOfComponentsPerPixel() > 1:
            array = np.moveaxis(array, -1, 0)
    if array.dtype.kind not in "iuf":
        raise FileError(path, f"holds values of type {array.dtype}", "export real numbers, one channel per component")
    return Image(np.ascontiguousarray(array.reshape(-1, *grid.shape)), grid)


def read_colours(path: Path) -> NDArray[Any]:
    """Read the pixels (y, x, colours) of a PNG; `FileError` where ITK cannot or is not installed."""
    sitk = _package(path)
    with reading(path), _short_errors(path):
        pixels: NDArray[Any] = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="PNGImageIO"))
    return pixels


def read_grid(path: Path) -> Grid:
    """Read the header alone; raises `FileError` as `read` does."""
    sitk = _package(path)
    with reading(path), _short_errors(path):
        return _grid(path, _reader(sitk, path))


def write(path: Path, array: NDArray[Any], grid: Grid) -> None:
    """Write a spatial array on `grid`, compressed; each file appears whole, the header last.

    If `grid` comes from a file of this module, its spacing, direction and origin are written back bit for bit
    (NRRD stores their product, which may move the last digit of a double).
    """
    sitk = _package(path)
    image = sitk.GetImageFromArray(array)
    spacing, origin, direction = _placement(grid)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    with tempfile.TemporaryDirectory() as folder:
        sitk.WriteImage(image, str(Path(folder) / path.name), True)
        for part in sorted(Path(folder).iterdir(), key=lambda part: part.name == path.name):
            write_bytes(path.with_name(part.name), part.read_bytes())


def companions(path: Path) -> tuple[Path, ...]:
    """Return the file that holds the voxels of a detached header (.nhdr, .mhd), nothing for files that are whole.

    Raises `FileError` if the voxels lie in several files.
    """
    names = _DATA_FILE.get(path.suffix.lower())
    if names is None:
        return ()
    with reading(path), path.open("rb") as handle:
        lines = handle.read(_LONGEST_HEADER).decode("latin-1").splitlines()
    for line in lines:
        found = next((name for name in names if line.lower().startswith(name)), None)
        if found is None:
            continue
        value = line[len(found) :].strip()
        if value.upper() == "LOCAL":
            return ()
        if value.upper().startswith("LIST") or "%" in value:
            raise FileError(path, "keeps its voxels in several files", "save it as one .nrrd or .mha")
        return (path.parent / value.encode("latin-1").decode("utf-8", "replace"),)
    return ()


def _package(path: Path) -> Any:
    return optional_package(path, "SimpleITK", "SimpleITK", "itk")


def _reader(sitk: Any, path: Path) -> Any:
    """Return a reader that has read the header."""
    if path.stat().st_size == 0:
        raise FileError(path, "is empty", "copy or export it again, or remove the case")
    for part in companions(path):
        if not part.exists():
            raise FileError(path, f"keeps its voxels in {part.name}, which is missing", "copy both files")
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_READER[path.suffix.lower()])
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


@contextmanager
def _short_errors(path: Path) -> Iterator[None]:
    """Take the reason out of ITK's errors, which are a page of source lines and addresses."""
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = _ORIGIN.sub("", lines[-1]) if lines else "no reason given"
        action = "copy or export it again, or remove the case"
        raise FileError(path, f"cannot be read ({reason})", action) from error


def _grid(path: Path, reader: Any) -> Grid:
    sizes = [int(n) for n in reader.GetSize()]
    axes = min(len(sizes), 3)
    if len(sizes) > 4 or (len(sizes) == 4 and sizes[3] > 1 and reader.GetNumberOfComponents() > 1):
        shape = "x".join(map(str, sizes))
        raise FileError(path, f"is {len(sizes)}D ({shape})", "split it into one file per channel or time point")
    full = np.array(reader.GetDirection()).reshape(len(sizes), len(sizes))
    spacing, origin, direction = reader.GetSpacing()[:axes], reader.GetOrigin()[:axes], full[:axes, :axes]
    if not all(np.isfinite(s) and s > 0 for s in spacing):
        raise FileError(path, f"has the voxel size {spacing} mm (x, y, z)", "write the true positive sizes into it")
    shape_, spacing_mm = tuple(sizes[:axes][::-1]), tuple(spacing[::-1])
    nowhere = reader.GetImageIO() == "NrrdImageIO" and not reader.HasMetaDataKey("NRRD_space")
    if axes == 2 or nowhere:
        return Grid(shape_, spacing_mm)
    affine = np.eye(4)
    affine[:3, :3] = _LPS_TO_RAS @ direction * np.array(spacing)
    affine[:3, 3] = _LPS_TO_RAS @ np.array(origin)
    if not is_invertible(affine):
        raise FileError(path, "has a singular orientation matrix", "export it again with a valid direction")
    return Grid(shape_, spacing_mm, affine, _HEADER.pack(_MARK, *spacing, *origin, *direction.ravel()))


def _placement(grid: Grid) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Return spacing, origin and direction as ITK takes them; along the axes where the place is unknown."""
    if grid.affine is None:
        axes = grid.ndim
        return grid.spacing_mm[::-1], (0.0,) * axes, tuple(np.eye(axes).ravel().tolist())
    if grid.header is not None and grid.header.startswith(_MARK):
        _, *numbers = _HEADER.unpack(grid.header)
        return tuple(numbers[:3]), tuple(numbers[3:6]), tuple(numbers[6:])
    columns = _LPS_TO_RAS @ grid.affine[:3, :3]
    spacing = np.linalg.norm(columns, axis=0)
    origin = _LPS_TO_RAS @ grid.affine[:3, 3]
    return tuple(spacing.tolist()), tuple(origin.tolist()), tuple((columns / spacing).ravel().tolist())
