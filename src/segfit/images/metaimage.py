"""MetaImage, whole (.mha) or a header beside its voxels (.mhd).

The header lists sizes, voxel size and place in LPS millimetres, x first. Fields as ITK reads them:
https://itk.org/Wiki/ITK/MetaIO/Documentation
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.files import write_bytes
from segfit.geometry import Grid, is_invertible
from segfit.images.image import FileError, Image, foreign, mm_per_unit, reading
from segfit.images.open_files import OpenFiles, opened
from segfit.images.raw_voxels import COMPRESSION_LEVEL, Payload, TextHeader, numbers, whole_numbers
from segfit.text import numbers as shown

__all__ = ["companions", "read", "read_grid", "write"]

_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "long": "i4"},
    **{"ulong": "u4", "long_long": "i8", "ulong_long": "u8", "float": "f4", "double": "f8"},
}
_LAST_FIELD = "ElementDataFile"
# Names of one thing: the first that is there counts.
_VOXEL_SIZE, _PLACE = ("ElementSpacing", "ElementSize"), ("Offset", "Position", "Origin")
_AXES = ("TransformMatrix", "Rotation", "Orientation")
_LONGEST_LINE, _LARGEST_HEADER = 2**12, 2**20  # bytes (assumption; real headers have a few hundred)
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
# Our `Grid.header`: mark, spacing, origin, axes (one after the other), in LPS mm.
_GEOMETRY = struct.Struct("<4s3d3d9d")
_MARK = b"META"


def read(path: Path, files: OpenFiles | None = None) -> Image:
    """Read a file as (c, z, y, x) or (c, y, x); dtype as stored, in native byte order.

    Components of a voxel and the volumes of a 4D file are channels. Raises `FileError` for missing, truncated, overlong
    or foreign files and impossible geometry.
    """
    with reading(path):
        header = _Header.of(path, files)
        grid = header.grid()
        array = header.payload().read(files)
    if header.channels() > 1:
        array = np.moveaxis(array, -1, 0)
    return Image(np.ascontiguousarray(array.reshape(-1, *grid.shape)), grid)


def read_grid(path: Path, files: OpenFiles | None = None) -> Grid:
    """Read the header alone; raises `FileError` as `read` does."""
    with reading(path):
        header = _Header.of(path, files)
        header.payload()
        return header.grid()


def companions(path: Path, files: OpenFiles | None = None) -> tuple[Path, ...]:
    """Return the file that holds the voxels of a detached header, nothing for files that are whole.

    Raises `FileError` if the voxels lie in several files.
    """
    with reading(path):
        part = _Header.of(path, files).detached()
    return () if part is None else (part,)


def write(path: Path, array: NDArray[Any], grid: Grid) -> None:
    """Write a spatial array on `grid`, compressed; each file appears whole, the header last.

    If `grid` comes from a MetaImage, its spacing, offset and axes are written back bit for bit.
    """
    axes = grid.ndim
    spacing, origin, matrix = _placement(grid)
    names = {np.dtype(code): name for name, code in reversed(_TYPES.items())}
    detached = path.suffix.lower() == ".mhd"
    voxels = path.with_name(f"{path.name[: -len(path.suffix)]}.zraw")
    packed = zlib.compress(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes(), COMPRESSION_LEVEL)
    fields = {
        "ObjectType": "Image",
        "NDims": axes,
        "BinaryData": True,
        "BinaryDataByteOrderMSB": False,
        "CompressedData": True,
        "CompressedDataSize": len(packed),
        "TransformMatrix": _text(matrix),
        "Offset": _text(origin),
        "CenterOfRotation": _text([0] * axes),
        "ElementSpacing": _text(spacing),
        "DimSize": _text(grid.shape[::-1]),
        "ElementType": f"MET_{names[array.dtype.newbyteorder('=')].upper()}",
        _LAST_FIELD: voxels.name if detached else "LOCAL",
    }
    header = "".join(f"{field} = {value}\n" for field, value in fields.items()).encode()
    if detached:
        write_bytes(voxels, packed)
    write_bytes(path, header if detached else header + packed)


def _text(values: Any) -> str:
    return " ".join(map(repr, values))


def _placement(grid: Grid) -> tuple[list[float], list[float], list[float]]:
    """Return voxel size, offset and axes, one after the other; along the axes where the place is unknown."""
    spacing = list(map(float, grid.spacing_mm[::-1]))
    if grid.affine is None:
        return spacing, [0.0] * grid.ndim, np.eye(grid.ndim).ravel().tolist()
    if grid.header is not None and grid.header.startswith(_MARK):
        _, *values = _GEOMETRY.unpack(grid.header)
        return values[:3], values[3:6], values[6:]
    vectors = grid.affine[:3, :3].T * _LPS_TO_RAS
    lengths = np.linalg.norm(vectors, axis=1)
    origin: list[float] = (grid.affine[:3, 3] * _LPS_TO_RAS).tolist()
    return lengths.tolist(), origin, (vectors / lengths[:, None]).ravel().tolist()


@dataclass(frozen=True, slots=True)
class _Header(TextHeader):
    """The fields of a MetaImage."""

    @classmethod
    def of(cls, path: Path, files: OpenFiles | None) -> _Header:
        fields: dict[str, str] = {}
        with opened(path, files) as handle:
            while (line := handle.readline(_LONGEST_LINE)) and handle.tell() < _LARGEST_HEADER:
                name, equals, value = line.decode("utf-8", "replace").partition("=")
                if not equals and line.strip():
                    break
                fields[name.strip().lower()] = value.strip()
                if _LAST_FIELD.lower() in fields:
                    break
            length = handle.tell()
        header = cls(path, fields, length)
        if not {"ndims", "dimsize", _LAST_FIELD.lower()} & set(fields):
            raise foreign(path, "a MetaImage file", files, "export it as MetaImage or correct its ending")
        for name in ("NDims", "DimSize", "ElementType", _LAST_FIELD):
            header.field(name)
        return header

    def floats(self, names: tuple[str, ...], count: int) -> list[float] | None:
        """Return the numbers of the first of some fields that is there, None if none is."""
        found = next((name for name in names if name.lower() in self.fields), None)
        return None if found is None else numbers(self.path, found, self.fields[found.lower()], count)

    def is_true(self, *names: str) -> bool:
        return any(self.fields.get(name.lower(), "").lower() in ("true", "1", "t") for name in names)

    def sizes(self) -> list[int]:
        """Return the sizes of the 2, 3 or 4 axes, x first."""
        (axes,) = whole_numbers(self.path, "NDims", self.field("NDims"), 1, 1)
        sizes = whole_numbers(self.path, "DimSize", self.field("DimSize"), axes, 1)
        channels = self.channels()
        if axes not in (2, 3, 4) or (axes == 4 and sizes[3] > 1 and channels > 1):
            shape = "x".join(map(str, sizes)) + f", {channels} channels" * (channels > 1)
            raise FileError(self.path, f"is {axes}D ({shape})", "split it into one file per channel or time point")
        return sizes

    def channels(self) -> int:
        """Return how many components a voxel has."""
        name = "ElementNumberOfChannels"
        return whole_numbers(self.path, name, self.fields.get(name.lower(), "1"), 1, 1)[0]

    def grid(self) -> Grid:
        sizes = self.sizes()
        axes, used = len(sizes), min(3, len(sizes))
        mm = mm_per_unit(self.fields.get("distanceunits", "mm")) or 1.0
        given = self.floats(_VOXEL_SIZE, axes)
        spacing = [size * mm for size in given or [1.0] * axes][:used]
        if not all(np.isfinite(size) and size > 0 for size in spacing):
            problem = f"has the voxel size {shown(spacing)} mm (x, y, z)"
            raise FileError(self.path, problem, "write the true positive sizes into it")
        shape = tuple(sizes[:used][::-1])
        if used == 2 or given is None:
            return Grid(shape, tuple(spacing[::-1]), spacing_known=given is not None)
        matrix = self.floats(_AXES, axes**2)
        vectors = np.eye(3) if matrix is None else np.reshape(matrix, (axes, axes))[:3, :3]
        origin = [value * mm for value in self.floats(_PLACE, axes) or [0.0] * axes][:3]
        affine = np.eye(4)
        affine[:3, :3] = (vectors * _LPS_TO_RAS).T * np.array(spacing)
        affine[:3, 3] = np.array(origin) * _LPS_TO_RAS
        if not np.isfinite(origin).all():
            action = "write its true offset into it or export it again"
            raise FileError(self.path, f"lies at {shown(origin)} mm (x, y, z)", action)
        if not is_invertible(affine):
            problem = f"has a singular orientation matrix ({' '.join(f'{value:g}' for value in vectors.ravel())})"
            raise FileError(self.path, problem, "export it again with a valid direction")
        return Grid(shape, tuple(spacing[::-1]), affine, _GEOMETRY.pack(_MARK, *spacing, *origin, *vectors.ravel()))

    def detached(self) -> Path | None:
        """Return the file of the voxels if it is another one."""
        name = self.field(_LAST_FIELD)
        return None if name.upper() == "LOCAL" else self.file_beside(name)

    def payload(self) -> Payload:
        """Return where the voxels are and how; their file exists."""
        detached = self.detached()
        kind = self.field("ElementType").removeprefix("MET_").removesuffix("_ARRAY").lower()
        if kind not in _TYPES:
            problem = f"has the ElementType {self.field('ElementType')}, which is not supported"
            raise FileError(self.path, problem, "export it with another type")
        big = self.is_true("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
        binary = "binarydata" not in self.fields or self.is_true("BinaryData")
        # Bytes of the file before its voxels, whatever comes first; -1: all that the voxels leave.
        (skipped,) = whole_numbers(self.path, "HeaderSize", self.fields.get("headersize", "0"), 1, -1)
        sizes, channels = tuple(self.sizes()[::-1]), self.channels()
        return Payload(
            path=self.path,
            file=detached or self.path,
            start=skipped if skipped > 0 else 0 if detached else self.length,
            encoding="text" if not binary else "zlib" if self.is_true("CompressedData") else "raw",
            dtype=np.dtype(_TYPES[kind]).newbyteorder(">" if big else "<"),
            shape=(*sizes, channels) if channels > 1 else sizes,
            skip_bytes=min(0, skipped),
        )
