"""NRRD, whole (.nrrd) or a header beside its voxels (.nhdr).

Axes are listed fastest first. Those that lie in space are x, y and z; one other (components of a voxel, time) is the
channels. Fields, types, spaces and encodings: https://teem.sourceforge.net/nrrd/format.html

Segmentations of 3D Slicer (.seg.nrrd) tell names, values and layers of their segments in keys with values, and may be
cropped to what is labelled (vtkMRMLSegmentationStorageNode of Slicer).
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from segfit.files import write_bytes
from segfit.geometry import Grid, is_invertible
from segfit.images.image import COPY_AGAIN, FileError, Image, Segment, foreign, mm_per_unit, reading
from segfit.images.open_files import OpenFiles, opened
from segfit.images.raw_voxels import COMPRESSION_LEVEL, Encoding, Payload, TextHeader, numbers, whole_numbers
from segfit.text import numbers as shown

__all__ = ["companions", "read", "read_grid", "segments", "write"]

_MAGIC = b"NRRD"
_LONGEST_LINE = 2**20  # bytes (assumption; segmentations keep long texts in their header)
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_DTYPES = {name: np.dtype(code) for code, names in _TYPES.items() for name in names}
_ENCODINGS: dict[str, Encoding] = {
    "raw": "raw",
    **dict.fromkeys(("gzip", "gz"), "zlib"),
    **dict.fromkeys(("bzip2", "bz2"), "bzip2"),
    **dict.fromkeys(("txt", "text", "ascii"), "text"),
    "hex": "hex",
}
_RAS, _LAS, _LPS = (1.0, 1.0, 1.0), (-1.0, 1.0, 1.0), (-1.0, -1.0, 1.0)  # signs that make them RAS
_SPACES = {
    **dict.fromkeys(("right-anterior-superior", "ras", "right-anterior-superior-time", "rast"), _RAS),
    **dict.fromkeys(("left-anterior-superior", "las", "left-anterior-superior-time", "last"), _LAS),
    **dict.fromkeys(("left-posterior-superior", "lps", "left-posterior-superior-time", "lpst"), _LPS),
    # Spaces that name no direction of the body count as LPS, as with ITK.
    **dict.fromkeys(("scanner-xyz", "3d-right-handed", "3d-left-handed"), _LPS),
    **dict.fromkeys(("scanner-xyz-time", "3d-right-handed-time", "3d-left-handed-time"), _LPS),
}
_IN_SPACE = ("domain", "space", "???", "none")  # kinds of axes that may be x, y or z
_ALIASES = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip", "centers": "centerings"}
_VECTOR = re.compile(r"none|\([^()]*\)", re.IGNORECASE)
_TEXT = re.compile(r'"([^"]*)"')
_SEGMENT = re.compile(r"Segment(\d{1,6})_(?:Name|ID)")
_CROPPED = "Segmentation_ReferenceImageExtentOffset"

_Meaning = TypeVar("_Meaning")


def read(path: Path, files: OpenFiles | None = None) -> Image:
    """Read a file as (c, z, y, x) or (c, y, x); dtype as stored, in native byte order.

    Raises `FileError` for missing, truncated, overlong or foreign files, complex values and impossible geometry.
    """
    with reading(path):
        header = _Header.of(path, files)
        grid, spatial = header.grid()
        array = header.payload().read(files)
    others = [axis for axis in range(len(header.sizes)) if axis not in spatial]
    last = len(header.sizes) - 1  # of the array, whose axes stand in the opposite order
    array = array.transpose([last - axis for axis in (*others, *reversed(spatial))])
    return Image(np.ascontiguousarray(array.reshape(-1, *grid.shape)), grid)


def read_grid(path: Path, files: OpenFiles | None = None) -> Grid:
    """Read the header alone; raises `FileError` as `read` does."""
    with reading(path):
        header = _Header.of(path, files)
        header.payload()
        return header.grid()[0]


def companions(path: Path, files: OpenFiles | None = None) -> tuple[Path, ...]:
    """Return the file that holds the voxels of a detached header, nothing for files that are whole.

    Raises `FileError` if the voxels lie in several files.
    """
    with reading(path):
        part = _Header.of(path, files).detached()
    return () if part is None else (part,)


def segments(path: Path, files: OpenFiles | None = None) -> tuple[Segment, ...]:
    """Return the segments that 3D Slicer wrote into a header, in their order; raises `FileError` as `read` does.

    Old versions tell neither values nor layers: each segment is then a layer of its own, with the value 1.
    """
    with reading(path):
        texts = _Header.of(path, files).texts
    found: list[Segment] = []
    for number in sorted({int(match[1]) for key in texts if (match := _SEGMENT.fullmatch(key))}):
        key = f"Segment{number}_"
        name = (texts.get(f"{key}Name") or texts.get(f"{key}ID", "")).strip()
        old = "0" if f"{key}LabelValue" in texts else str(len(found))
        value, layer = texts.get(f"{key}LabelValue", "1"), texts.get(f"{key}Layer", old)
        if name and value.isdecimal() and layer.isdecimal() and int(value):
            found.append(Segment(name, int(value), int(layer)))
    return tuple(found)


def write(path: Path, array: NDArray[Any], grid: Grid) -> None:
    """Write a spatial array on `grid`, compressed; each file appears whole, the header last.

    The affine that is read from it is that of `grid` bit for bit.
    """
    detached = path.suffix.lower() == ".nhdr"
    types = {np.dtype(code): names[-1].removesuffix("_t") for code, names in _TYPES.items()}
    lines = {"type": types[array.dtype.newbyteorder("=")], "dimension": str(grid.ndim)}
    origin: dict[str, str] = {}
    if grid.affine is not None:
        vectors = (grid.affine[:3].T * _LPS).tolist()
        lines["space"] = "left-posterior-superior"
        lines["space directions"] = " ".join(map(_vector, vectors[:3]))
        origin = {"space origin": _vector(vectors[3])}
    else:
        lines["spacings"] = " ".join(map(repr, map(float, grid.spacing_mm[::-1])))
    lines |= {"sizes": " ".join(map(str, grid.shape[::-1])), "kinds": " ".join(["domain"] * grid.ndim)}
    lines |= {"endian": "little", "encoding": "gzip"} | origin
    voxels = path.with_name(f"{path.name[: -len(path.suffix)]}.raw.gz")
    lines |= {"data file": voxels.name} if detached else {}
    header = "NRRD0004\n" + "".join(f"{field}: {value}\n" for field, value in lines.items())
    content = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    packed = gzip.compress(content, COMPRESSION_LEVEL, mtime=0)  # no time stamp: equal labels give equal files
    if detached:
        write_bytes(voxels, packed)
        packed = b""
    write_bytes(path, header.encode() + b"\n" * (not detached) + packed)


def _vector(values: list[float]) -> str:
    return f"({','.join(map(repr, values))})"


@dataclass(frozen=True, slots=True)
class _Header(TextHeader):
    """The fields of an NRRD file."""

    sizes: tuple[int, ...]  # fastest axis first
    texts: Mapping[str, str]  # keys with values

    @classmethod
    def of(cls, path: Path, files: OpenFiles | None) -> _Header:
        fields: dict[str, str] = {}
        texts: dict[str, str] = {}
        with opened(path, files) as handle:
            magic = handle.readline(_LONGEST_LINE)
            if not magic.startswith(_MAGIC):
                raise foreign(path, "an NRRD file", files, "export it as NRRD or correct its ending")
            while line := handle.readline(_LONGEST_LINE):
                text = line.decode("utf-8", "replace").strip("\r\n")
                if not text:
                    break
                name, colon, value = text.partition(":")
                if value.startswith("=") and not text.startswith("#"):
                    texts[name.strip()] = value[1:]
                if text.startswith("#") or value.startswith("="):
                    continue
                if not colon:
                    raise FileError(path, f"has a header line that is not a field: {text[:40]!r}", COPY_AGAIN)
                name = _ALIASES.get(name.strip().lower(), name.strip().lower())
                fields[name] = value.strip()
                if name == "data file" and fields[name].upper().startswith("LIST"):
                    break  # names of files follow
            length = handle.tell()
        header = cls(path, fields, length, (), texts)
        (axes,) = whole_numbers(path, "dimension", header.field("dimension"), 1, 1)
        sizes = whole_numbers(path, "sizes", header.field("sizes"), axes, 1)
        return cls(path, fields, length, tuple(sizes), texts)

    def choice(self, name: str, known: Mapping[str, _Meaning]) -> _Meaning:
        value = self.field(name)
        if value.lower() not in known:
            problem = f'has the {name} "{value}", which is not supported'
            raise FileError(self.path, problem, f"export it with another {name}")
        return known[value.lower()]

    def grid(self) -> tuple[Grid, list[int]]:
        """Return the grid and which axes of the file are its x, y and z."""
        vectors = self._vectors("space directions", len(self.sizes)) if "space directions" in self.fields else None
        spatial = self._spatial(vectors)
        shape = tuple(self.sizes[axis] for axis in reversed(spatial))
        if vectors is None:
            spacing = [self._spacings()[axis] for axis in spatial]
        else:
            columns = np.array([vectors[axis] for axis in spatial]) * self._mm("space units", vectors)
            spacing = np.linalg.norm(columns, axis=1).tolist()
        if not all(np.isfinite(size) and size > 0 for size in spacing):
            problem = f"has the voxel size {shown(spacing)} mm (x, y, z)"
            raise FileError(self.path, problem, "write the true positive sizes into it")
        if vectors is None or len(spatial) < 3 or "space" not in self.fields:
            known = vectors is not None or "spacings" in self.fields
            return Grid(shape, tuple(spacing[::-1]), spacing_known=known), spatial
        signs = np.array(self.choice("space", _SPACES))
        affine = np.eye(4)
        affine[:3, :3] = (columns[:, :3] * signs).T
        if "space origin" in self.fields:
            (origin,) = self._vectors("space origin", 1)
            affine[:3, 3] = (np.array(origin) * self._mm("space units", [origin]))[:3] * signs
        if not np.isfinite(affine[:3, 3]).all():
            problem = f"lies at {self.fields['space origin']} (space origin)"
            raise FileError(self.path, problem, "write the true place into it or export it again")
        if not is_invertible(affine):
            problem = f"has a singular orientation matrix (space directions {self.fields['space directions']})"
            raise FileError(self.path, problem, "export it again with a valid direction")
        return Grid(shape, tuple(spacing[::-1]), affine, cropped=_CROPPED in self.texts), spatial

    def _spatial(self, vectors: list[list[float] | None] | None) -> list[int]:
        axes = range(len(self.sizes))
        kinds = self.fields.get("kinds", "???").lower().split()
        kinds = kinds * len(axes) if kinds == ["???"] else kinds
        if len(kinds) != len(axes):
            problem = f"has {len(kinds)} kinds for {len(axes)} axes"
            raise FileError(self.path, problem, "correct its header or export it again")
        if "complex" in kinds:
            raise FileError(self.path, "holds complex values", "export real numbers, one channel per component")
        found = [axis for axis in axes if kinds[axis] in _IN_SPACE and (vectors is None or vectors[axis] is not None)]
        spatial = found[:3]
        if len(spatial) < 2:
            problem = f"has {len(spatial)} axes in space (kinds {' '.join(kinds)})"
            action = 'export it again, or correct "kinds" and "space directions" in its header'
            raise FileError(self.path, problem, action)
        if sum(self.sizes[axis] > 1 for axis in axes if axis not in spatial) > 1:
            shape = "x".join(map(str, self.sizes))
            raise FileError(self.path, f"is {len(axes)}D ({shape})", "split it into one file per channel or time point")
        return spatial

    def _spacings(self) -> list[float]:
        """Return the size of voxels along every axis, 1 where the file does not say."""
        axes = len(self.sizes)
        if "spacings" not in self.fields:
            return [1.0] * axes
        units = [mm_per_unit(unit) or 1.0 for unit in _TEXT.findall(self.fields.get("units", ""))]
        units = units if len(units) == axes else [1.0] * axes
        values = numbers(self.path, "spacings", self.fields["spacings"], axes)
        return [value * unit for value, unit in zip(values, units, strict=True)]

    def _vectors(self, name: str, count: int) -> list[list[float] | None]:
        """Return vectors in space as the file has them, None for axes that lie in no space."""
        text = self.fields[name]
        found: list[list[float] | None] = []
        for word in _VECTOR.findall(text):
            parts = word[1:-1].split(",") if word.lower() != "none" else []
            values = numbers(self.path, name, " ".join(parts), len(parts))
            found.append(None if all(map(isnan, values)) else values)
        lengths = {len(vector) for vector in found if vector is not None}
        if len(found) != count or _VECTOR.sub("", text).strip() or lengths not in ({2}, {3}, {4}):
            expected = f"{count} vectors (x,y,z)" if count > 1 else "(x,y,z)"
            problem = f'has "{name}" {text!r} in its header, expected {expected}'
            raise FileError(self.path, problem, "correct it or export it again")
        return found

    def _mm(self, name: str, vectors: list[list[float] | None]) -> NDArray[np.float64]:
        """Return how many mm the units of space are, axis by axis."""
        axes = next(len(vector) for vector in vectors if vector is not None)
        units = [mm_per_unit(unit) or 1.0 for unit in _TEXT.findall(self.fields.get(name, ""))]
        return np.array(units if len(units) == axes else [1.0] * axes)

    def detached(self) -> Path | None:
        """Return the file of the voxels if it is another one."""
        name = self.fields.get("data file")
        return None if name is None else self.file_beside(name)

    def payload(self) -> Payload:
        """Return where the voxels are and how; their file exists."""
        detached = self.detached()
        encoding, dtype = self.choice("encoding", _ENCODINGS), self.choice("type", _DTYPES)
        if dtype.itemsize > 1 and encoding != "text":
            dtype = dtype.newbyteorder(self.choice("endian", {"little": "<", "big": ">"}))
        (skip_lines,) = whole_numbers(self.path, "line skip", self.fields.get("line skip", "0"), 1, 0)
        (skip_bytes,) = whole_numbers(self.path, "byte skip", self.fields.get("byte skip", "0"), 1, -1)
        return Payload(
            path=self.path,
            file=detached or self.path,
            start=0 if detached else self.length,
            encoding=encoding,
            dtype=dtype,
            shape=self.sizes[::-1],
            skip_lines=skip_lines,
            skip_bytes=skip_bytes,
        )
