"""FreeSurfer volumes, gzipped (.mgz) or plain (.mgh); the frames of a file are channels.

Voxels run x fastest in the file, so the array in C order is ``(c, z, y, x)`` without moving a byte. The header is
parsed with nibabel. Fields: https://surfer.nmr.mgh.harvard.edu/fswiki/FsTutorial/MghFormat
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.geometry import Grid, is_invertible
from segfit.images import gzipped
from segfit.images.image import COPY_AGAIN, FileError, Image, foreign_start, reading
from segfit.images.open_files import OpenFiles

__all__ = ["read", "read_grid", "write"]

_HEADER_SIZE, _FIELDS_SIZE = 284, 90  # bytes; what is between is not used
_VERSION = 1  # in the last of four bytes; those between it and the first say what a file is meant for
_GEOMETRY_FIELDS = ("goodRASFlag", "delta", "Mdc", "Pxyz_c")


def read(path: Path, files: OpenFiles | None = None) -> Image:
    """Read a file as (c, z, y, x); the dtype is the file's, in native byte order.

    Raises `FileError` for missing, truncated or foreign files, unknown types and impossible geometry.
    """
    with reading(path), gzipped.unpacked(path, files) as stream:
        start = stream.read(_HEADER_SIZE)
        header = _parse(path, start)
        grid, frames = _grid(path, header, start)
        try:
            dtype: np.dtype[Any] = header.get_data_dtype()
        except KeyError:
            problem = f"holds voxels of type {int(header['type'])}, which is not supported"
            raise FileError(path, problem, "export it with another type, such as float or int") from None
        stored = gzipped.read_voxels(path, stream, start, _HEADER_SIZE, dtype, (frames, *grid.shape))
        return Image(stored.astype(dtype.newbyteorder("="), copy=False), grid)


def read_grid(path: Path, files: OpenFiles | None = None) -> Grid:
    """Read the header alone; raises `FileError` as `read` does."""
    with reading(path):
        start = gzipped.first_bytes(path, files, _HEADER_SIZE)
        return _grid(path, _parse(path, start), start)[0]


def write(path: Path, array: NDArray[Any], grid: Grid) -> None:
    """Write a spatial array atomically on `grid`, gzipped if the name ends in ``.mgz``.

    If `grid` comes from such a file, its geometry is written back bit for bit. Values of 16 bits are written in 32:
    not every program knows the type of unsigned ones.
    """
    from nibabel.freesurfer.mghformat import MGHHeader

    if grid.ndim != 3:
        raise FileError(path, "cannot hold a 2D label map", "write .nii.gz or .png instead")
    array = array.astype(">f4" if array.dtype.kind == "f" else ">u1" if array.dtype == np.uint8 else ">i4")
    header = MGHHeader()
    header.set_data_shape(grid.shape[::-1])
    header.set_data_dtype(array.dtype)
    for field, value in _geometry(grid).items():
        header[field] = value
    fields, footer = header.binaryblock[:_FIELDS_SIZE], header.binaryblock[_FIELDS_SIZE:]
    content = fields.ljust(_HEADER_SIZE, b"\0") + array.tobytes() + footer
    gzipped.write(path, content, packed=path.suffix.lower() == ".mgz")


def _parse(path: Path, content: bytes) -> Any:
    """Return nibabel's header of the first bytes of a file."""
    from nibabel.freesurfer.mghformat import MGHHeader

    if content.startswith(gzipped.GZIP_MAGIC):
        raise FileError(path, "is not a FreeSurfer volume (it is gzipped twice)", "unpack it once")
    if not _is_header(content):
        action = "export it as .mgz or correct its ending"
        raise foreign_start(path, "a FreeSurfer volume", content, action)
    if len(content) < _HEADER_SIZE:
        raise FileError(path, "is truncated (its header is incomplete)", "copy or export it again")
    return MGHHeader(content, check=False)


def _is_header(content: bytes) -> bool:
    return len(content) > 3 and content[0] == 0 and content[3] == _VERSION


def _grid(path: Path, header: Any, raw: bytes) -> tuple[Grid, int]:
    """Return the grid of one frame and how many frames the file has.

    Where a file does not say how its voxels lie, nothing is assumed (FreeSurfer takes them for coronal, of 1 mm).
    """
    *sizes, frames = (int(n) for n in header["dims"])
    if any(n < 1 for n in (*sizes, frames)):
        raise FileError(path, f"has no voxels (dimensions {[*sizes, frames]})", "export it again or remove the case")
    shape = tuple(sizes[::-1])
    if not _says_where(raw):
        return Grid(shape, (1.0, 1.0, 1.0), spacing_known=False), frames
    spacing = [float(size) for size in header["delta"]]
    if not all(math.isfinite(size) and size > 0 for size in spacing):
        action = "write the true positive sizes into its header (delta)"
        raise FileError(path, f"has the voxel size {tuple(spacing)} mm (x, y, z)", action)
    with np.errstate(invalid="ignore", over="ignore"):  # becomes infinite, which is refused
        affine: NDArray[np.float64] = header.get_affine().astype(np.float64)
    if not is_invertible(affine):
        raise FileError(path, "has a singular orientation matrix", COPY_AGAIN)
    return Grid(shape, tuple(spacing[::-1]), affine, raw), frames


def _says_where(raw: bytes) -> bool:
    """Return whether the fields of the geometry count, which nibabel fills in where they do not."""
    return int.from_bytes(raw[28:30], "big", signed=True) > 0


def _geometry(grid: Grid) -> dict[str, Any]:
    """Return the fields of the geometry: the source's, or of the affine; along RAS+ where the place is unknown."""
    if grid.header is not None and len(grid.header) == _HEADER_SIZE and _is_header(grid.header):
        from nibabel.freesurfer.mghformat import MGHHeader

        source = MGHHeader(grid.header, check=False)
        return {field: source[field] for field in _GEOMETRY_FIELDS}
    if grid.affine is None and not grid.spacing_known:
        return {"goodRASFlag": 0}
    spacing = np.array(grid.spacing_mm[::-1])
    affine = np.diag([*spacing, 1.0]) if grid.affine is None else grid.affine
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    middle = affine[:3, :3] @ (np.array(grid.shape[::-1]) / 2) + affine[:3, 3]
    return {"goodRASFlag": 1, "delta": lengths, "Mdc": (affine[:3, :3] / lengths).T, "Pxyz_c": middle}
