"""NIfTI-1 and NIfTI-2 single files, plain or gzipped; the volumes of a 4D file are channels.

Voxels run x fastest in the file, so the array in C order is ``(c, z, y, x)`` without moving a byte. The header is
parsed with nibabel; voxels are decoded by `segfit.images.gzipped`.

Field names and codes: NIfTI-1.1 header, https://nifti.nimh.nih.gov/nifti-1 (xyzt_units, sform_code, qform_code,
scl_slope). Extensions with a table of labels are those of Connectome Workbench, which TotalSegmentator writes too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.geometry import Grid, canonical_map, is_invertible
from segfit.images import gzipped
from segfit.images.image import FileError, Image, Remark, Segment, foreign_start, reading
from segfit.images.open_files import OpenFiles

__all__ = ["read", "read_grid", "remarks", "segments", "write"]

_LARGEST_HEADER = 540  # NIfTI-2; NIfTI-1 has 348
_MM_PER_UNIT = {1: 1e3, 3: 1e-3}  # metre, micrometre; everything else counts as mm
_LARGEST_TABLE = 1 << 20  # bytes of extensions that are looked through for names of labels (assumption)
_LABEL = re.compile(rb'<Label\b[^>]*\bKey="(\d{1,9})"[^>]*>\s*(?:<!\[CDATA\[)?([^<\]]+)')
# What places the voxels. Other fields (description, patient-related text, display range) are not copied to outputs.
_GEOMETRY_FIELDS = (
    "xyzt_units",
    "qform_code",
    "sform_code",
    *("quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)


def read(path: Path, files: OpenFiles | None = None) -> Image:
    """Read a file as (1, z, y, x), (c, z, y, x) if it is 4D, or (1, y, x) if its header has two axes.

    The dtype is the file's, in native byte order; float32 where the header scales (``scl_slope``). Raises `FileError`
    for missing, truncated or foreign files, several series of volumes, colour volumes and impossible spacings.
    """
    with reading(path), gzipped.unpacked(path, files) as stream:
        start = stream.read(_LARGEST_HEADER)
        header, raw = _parse(path, start)
        grid, volumes = _grid(path, header, raw)
        dtype: np.dtype[Any] = header.get_data_dtype()
        if dtype.fields is not None or dtype.kind not in "iuf":
            raise FileError(path, f"holds voxels of type {dtype}", "export each colour or component as a channel file")
        offset = max(int(header["vox_offset"]), len(raw) + 4)
        stored = gzipped.read_voxels(path, stream, start, offset, dtype, (volumes, *grid.shape))
        slope, intercept = _scaling(path, header)
        if (slope, intercept) != (1.0, 0.0):
            with np.errstate(over="ignore"):  # becomes infinite, which is reported for all images
                scaled = stored * np.float64(slope) + np.float64(intercept)
                return Image(scaled.astype(np.float32), grid)
        return Image(stored.astype(dtype.newbyteorder("="), copy=False), grid)


def segments(path: Path, files: OpenFiles | None = None) -> tuple[Segment, ...]:
    """Return what a table of labels in the extensions of a header names; raises `FileError` as `read` does."""
    with reading(path), gzipped.unpacked(path, files) as stream:
        start = stream.read(_LARGEST_HEADER)
        header, raw = _parse(path, start)
        end = min(int(header["vox_offset"]), len(raw) + _LARGEST_TABLE)
        content = start + stream.read(max(0, end - len(start)))
    if b"<LabelTable" not in content[len(raw) : end]:
        return ()
    named = [(unescape(name.decode("utf-8", "replace")).strip(), int(key)) for key, name in _LABEL.findall(content)]
    return tuple(Segment(name, value) for name, value in named if name and value)


def read_grid(path: Path, files: OpenFiles | None = None) -> Grid:
    """Read the header alone; raises `FileError` as `read` does."""
    with reading(path):
        return _grid(path, *_parse(path, _start(path, files)))[0]


def write(path: Path, array: NDArray[Any], grid: Grid) -> None:
    """Write a spatial array atomically on `grid`, gzipped if the name ends in ``.gz``.

    If `grid` comes from a NIfTI file, its zooms, units, forms and their codes are written back bit for bit.
    """
    header = _header(grid)
    header.set_data_shape(grid.shape[::-1])
    header.set_data_dtype(array.dtype)
    offset = header.sizeof_hdr + 4  # four zero bytes: no extensions
    header["vox_offset"] = offset
    header["scl_slope"], header["scl_inter"] = 1, 0
    content = header.binaryblock + bytes(4) + array.tobytes()
    gzipped.write(path, content, packed=path.name.lower().endswith(".gz"))


def _start(path: Path, files: OpenFiles | None) -> bytes:
    return gzipped.first_bytes(path, files, _LARGEST_HEADER)


def _parse(path: Path, content: bytes) -> tuple[Any, bytes]:
    """Return nibabel's header and its raw bytes."""
    if content.startswith(gzipped.GZIP_MAGIC):
        raise FileError(path, "is not a NIfTI file (it is gzipped twice)", "unpack it once")
    kind = _header_kind(content)
    if kind is None:
        raise foreign_start(path, "a NIfTI file", content, "export it as NIfTI or correct its ending")
    raw = content[: kind.sizeof_hdr]
    if len(raw) < kind.sizeof_hdr:
        raise FileError(path, "is truncated (its header is incomplete)", "copy or export it again")
    return kind(raw, check=False), raw


def _header_kind(content: bytes) -> Any:
    """Return nibabel's class for the header at the start of `content`, None if there is none."""
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    sizes = {int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big")}
    return Nifti1Header if 348 in sizes else Nifti2Header if 540 in sizes else None


def _grid(path: Path, header: Any, raw: bytes) -> tuple[Grid, int]:
    """Return the grid of one volume and how many volumes the file has."""
    sizes = [int(n) for n in header["dim"][1 : 1 + int(header["dim"][0])]]
    if len(sizes) < 2 or any(n < 1 for n in sizes[:3]):
        raise FileError(path, f"has no voxels (dimensions {sizes})", "export it again or remove the case")
    sizes, series = sizes[:3], [n for n in sizes[3:] if n > 1]
    if len(series) > 1:
        shape = "x".join(map(str, [*sizes, *series]))
        raise FileError(path, f"is {3 + len(series)}D ({shape})", "split it into one file per channel or time point")
    unit = _unit(header)
    spacing = tuple(float(abs(size)) * unit for size in header["pixdim"][1 : 1 + len(sizes)])
    if not all(math.isfinite(s) and s > 0 for s in spacing):
        action = "write the true positive sizes into its header (pixdim)"
        raise FileError(path, f"has the voxel size {spacing} mm (x, y, z)", action)
    affine = _affine(path, header) if len(sizes) == 3 else None
    return Grid(tuple(sizes[::-1]), spacing[::-1], affine, raw), math.prod(series)


def _unit(header: Any) -> float:
    return _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)


def _affine(path: Path, header: Any) -> NDArray[np.float64] | None:
    """Return the affine in mm: sform before qform, the first that is declared and invertible; None if undeclared."""
    declared = False
    for _, affine in _forms(header):
        if affine is not None:
            return affine
        declared = True
    if declared:
        raise FileError(path, "has a singular orientation matrix", "export it again with a valid sform or qform")
    return None


def _forms(header: Any) -> Iterator[tuple[str, NDArray[np.float64] | None]]:
    """Yield the declared ones of sform and qform, in this order, as affines in mm; None for one that is unusable."""
    for name, form in (("sform", header.get_sform), ("qform", partial(_qform, header))):
        if int(header[f"{name}_code"]) > 0:
            affine: NDArray[np.float64] = np.array(form(), dtype=np.float64)
            affine[:3] *= _unit(header)
            yield name, affine if is_invertible(affine) else None


def _qform(header: Any) -> NDArray[np.float64]:
    """Return the matrix of the quaternion; zeros if it is longer than 1.

    NIfTI-1.1, qsform.html: sizes are positive, and qfac (``pixdim[0]``) is -1 or counts as 1.
    """
    from nibabel.spatialimages import HeaderDataError

    plain = header.copy()
    plain["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1
    plain["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
    try:
        matrix: NDArray[np.float64] = plain.get_qform()
    except (ValueError, HeaderDataError):
        return np.zeros((4, 4))
    return matrix


def _scaling(path: Path, header: Any) -> tuple[float, float]:
    """Return slope and intercept of the voxels: 1 and 0 where the slope is 0 or no number, as the standard says."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0
    if not math.isfinite(intercept):
        problem = f"scales its voxels by {slope:g} and adds {intercept:g} (scl_slope, scl_inter)"
        raise FileError(path, problem, "correct its header")
    return slope, intercept


def remarks(path: Path, files: OpenFiles | None = None) -> tuple[Remark, ...]:
    """Return what a header says in two ways.

    Which of two forms counts is a matter of taste: nibabel and FSL take the sform first, as is done here; ITK takes it
    first only if its code is 1 and its axes are at right angles (5.4, measured).
    """
    with reading(path):
        header, raw = _parse(path, _start(path, files))
        grid, _ = _grid(path, header, raw)
    found: list[Remark] = []
    forms = {} if grid.affine is None else dict(_forms(header))
    for name, affine in forms.items():
        if affine is None:
            other = "qform" if name == "sform" else "sform"
            found.append(Remark(f"has a singular {name}; its {other} is used", f"fix the {name} in its header"))
    if len(forms) == 2 and forms["qform"] is not None and forms["sform"] is not None:
        other_place = replace(grid, affine=forms["qform"])
        if grid.mismatch(other_place):
            apart = grid.corner_distance(other_place).mm
            codes = " and ".join(str(int(header[f"{name}_code"])) for name in forms)
            turned = "" if canonical_map(grid) == canonical_map(other_place) else ", along other axes"
            problem = (
                f"has an sform and a qform (codes {codes}) that lie up to {apart:.3g} mm apart{turned}; the sform is "
                "used, other programs (ITK-SNAP, Slicer) may show it by its qform"
            )
            action = "check the overlay; if it is misaligned, set sform and qform to the same matrix"
            found.append(Remark(problem, action))
    offset = float(header["scl_inter"])
    if header["scl_slope"] == 0 and offset and math.isfinite(offset):
        problem = f"has scl_slope 0 and scl_inter {offset:g}; its values are used as stored"
        found.append(Remark(problem, "set scl_slope to 1 if the offset is meant"))
    return tuple(found)


def _header(grid: Grid) -> Any:
    """Return a fresh header with the geometry of `grid`: the source's fields, or sform and qform from the affine."""
    from nibabel.nifti1 import Nifti1Header

    ndim = grid.ndim
    kind = None if grid.header is None else _header_kind(grid.header)
    if kind is not None:
        source, header = kind(grid.header, check=False), kind()
        for field in _GEOMETRY_FIELDS:
            header[field] = source[field]
        header["pixdim"][: ndim + 1] = source["pixdim"][: ndim + 1]
        return header
    header = Nifti1Header()
    header.set_xyzt_units("mm")
    if grid.affine is not None:
        header.set_qform(grid.affine, code="scanner")
        header.set_sform(grid.affine, code="scanner")
    header["pixdim"][1 : ndim + 1] = grid.spacing_mm[::-1]
    return header
