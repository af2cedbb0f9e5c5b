"""DICOM series (extra ``dicom``): the folder of one series of slices is one volume.

The slices lie directly in the folder, or in a folder inside, the only one with slices. They are known by their content,
not by their names; other files, hidden ones and the index of a medium (``DICOMDIR``) are left aside.

Attributes and formulas: DICOM PS3.3, C.7.6.2 (image plane) and C.11.1 (modality: rescaling).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.geometry import Grid
from segfit.images.image import FileError, Image, optional_package, reading

__all__ = ["files", "holds_slices", "num_voxels", "read", "read_grid"]

# How far a distance between slices may be from the usual one (assumptions): a share of it, or what positions written
# with two decimals make of it, but never so much that another distance could be meant.
_DISTANCE_TOLERANCE, _ROUNDING_MM, _LARGEST_TOLERANCE = 0.01, 0.02, 0.1
_TILT_TOLERANCE_PIXELS = 0.5  # half a pixel away from the straight stack, voxels no longer correspond
_DIRECTION_TOLERANCE = 1e-4  # of the cosines in ImageOrientationPatient, written with about six digits (assumption)
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
_MAGIC = b"DICM"  # behind 128 free bytes: PS3.10, 7.1
_INDEX = "DICOMDIR"  # lists the files of a medium: PS3.10, 8.6
# What places and groups slices; with these alone a header is read quickly.
_PLACING = (
    *("SeriesInstanceUID", "SeriesDescription", "SeriesNumber", "Modality"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PixelSpacing"),
    *("ImagePositionPatient", "ImageOrientationPatient", "SliceThickness", "SpacingBetweenSlices"),
)


def holds_slices(folder: Path, *, nested: bool = True) -> bool:
    """Return whether a folder has DICOM files directly inside; `nested`: or in a folder inside."""
    try:
        return _has_slices(folder) or (nested and any(_has_slices(inside) for inside in _folders(folder)))
    except OSError:  # whoever reads the folder is told
        return False


def files(path: Path) -> tuple[Path, ...]:
    """Return the DICOM files of a series; `FileError` where `read` would not know which series is meant."""
    with reading(path):
        return tuple(_dicom_files(_slices_folder(path)))


def read(path: Path) -> Image:
    """Read the series in a folder as (1, z, y, x), z along the normal of the slices.

    The dtype is the files', float32 where they rescale their values. Raises `FileError` for anything but one series of
    parallel slices at even distances, for colours, multi-frame files and compressions that no installed decoder knows,
    and where pydicom is not installed.
    """
    pydicom = _package(path)
    with reading(path):
        slices, grid = _series(path, _datasets(pydicom, path, headers_only=False))
    array: NDArray[Any] | None = None
    scaled = any(_rescale(dataset) != (1.0, 0.0) for dataset in slices)
    for number, dataset in enumerate(slices):
        file = Path(dataset.filename)
        with reading(file):
            pixels = _pixels(file, dataset)
            if scaled:
                slope, intercept = _rescale(dataset)
                pixels = (pixels * slope + intercept).astype(np.float32)
            if array is None:
                array = np.empty(grid.shape, pixels.dtype)
            if pixels.dtype != array.dtype:
                raise FileError(file, f"holds {pixels.dtype}, the slices before it {array.dtype}", "export it again")
            array[number] = pixels
    assert array is not None
    return Image(array[None], grid)


def read_grid(path: Path) -> Grid:
    """Read the headers alone; raises `FileError` as `read` does."""
    pydicom = _package(path)
    with reading(path):
        return _series(path, _datasets(pydicom, path, headers_only=True))[1]


def num_voxels(path: Path) -> int:
    """Return the voxels if all files of the series are slices like the first; raises `FileError` as `read` does."""
    slices = files(path)
    first = _header(_package(path), slices[0])
    if "Rows" in first and "Columns" in first:
        return len(slices) * int(first.Rows) * int(first.Columns)
    return prod(read_grid(path).shape)


def _package(path: Path) -> Any:
    return optional_package(path, "pydicom", "pydicom", "dicom")


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(132)[128:] == _MAGIC


def _dicom_files(folder: Path) -> Iterator[Path]:
    """Yield the DICOM files directly inside a folder, in order of their names."""
    for path in sorted(folder.iterdir()):
        if path.name[0] != "." and path.name.upper() != _INDEX and path.is_file() and _is_dicom(path):
            yield path


def _has_slices(folder: Path) -> bool:
    return next(_dicom_files(folder), None) is not None


def _folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.is_dir()]


def _slices_folder(path: Path) -> Path:
    """Return the folder that has the slices directly inside: `path`, or the only such folder in it."""
    if _has_slices(path):
        return path
    inside = [folder for folder in _folders(path) if _has_slices(folder)]
    if len(inside) > 1:  # structure sets and the like may lie in folders of their own
        pydicom = _package(path)
        inside = [folder for folder in inside if any(_is_picture(_header(pydicom, f)) for f in _dicom_files(folder))]
    if len(inside) > 1:
        names = ", ".join(folder.name for folder in inside)
        action = f"keep the one that is meant; channels are folders {path.name}_0000, {path.name}_0001, ..."
        raise FileError(path, f"holds {len(inside)} series, in the folders {names}", action)
    if not inside:
        raise _no_images(path)
    return inside[0]


def _no_images(path: Path) -> FileError:
    action = "give the folder that has the slices directly inside, or take this one away from the images"
    return FileError(path, "holds no DICOM images", action)


def _header(pydicom: Any, file: Path) -> Any:
    return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_PLACING))


def _is_picture(dataset: Any) -> bool:
    return "Rows" in dataset and "Columns" in dataset


def _datasets(pydicom: Any, folder: Path, *, headers_only: bool) -> list[Any]:
    """Return the images among the files of a folder: what has rows and columns of pixels."""
    datasets: list[Any] = []
    for file in _dicom_files(_slices_folder(folder)):
        with reading(file):
            dataset = _header(pydicom, file) if headers_only else pydicom.dcmread(file)
        if _is_picture(dataset):
            datasets.append(dataset)
    if not datasets:
        raise _no_images(folder)
    return datasets


def _series(folder: Path, datasets: list[Any]) -> tuple[list[Any], Grid]:
    """Return the slices in order and their grid."""
    _require_one_series(folder, datasets)
    for dataset in datasets:
        _require_slice(Path(dataset.filename), dataset)
    _require_same(folder, datasets)
    first = datasets[0]
    row, column = np.array(first.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    normal = np.cross(row, column)
    positions = np.array([dataset.ImagePositionPatient for dataset in datasets], dtype=np.float64)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    between, across = (float(value) for value in first.PixelSpacing)  # PS3.3, 10.7.1.3: between rows, between columns
    step = _slice_distance(folder, positions @ normal, first)
    drift = positions - positions[0] - np.outer((positions - positions[0]) @ normal, normal)
    shift = float(np.linalg.norm(drift, axis=1).max())
    if shift > _TILT_TOLERANCE_PIXELS * min(between, across):
        raise FileError(
            folder,
            f"has slices that are shifted against each other by up to {shift:.3g} mm (gantry tilt)",
            "straighten the volume with a DICOM converter and give its NIfTI file",
        )
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([row * across, column * between, normal * step]) * _LPS_TO_RAS[:, None]
    affine[:3, 3] = positions[0] * _LPS_TO_RAS
    shape = (len(datasets), int(first.Rows), int(first.Columns))
    return [datasets[number] for number in order], Grid(shape, (step, between, across), affine)


def _require_one_series(folder: Path, datasets: Sequence[Any]) -> None:
    kinds = Counter((str(d.get("SeriesInstanceUID", "")), _describe(d)) for d in datasets)
    if len(kinds) > 1:
        found = ", ".join(f"{text} ({count} image{'s' * (count > 1)})" for (_, text), count in sorted(kinds.items()))
        raise FileError(folder, f"holds {len(kinds)} series: {found}", "give each series a folder of its own")


def _describe(dataset: Any) -> str:
    parts = [str(dataset.get("Modality", "")), str(dataset.get("SeriesNumber", "") or "")]
    text = str(dataset.get("SeriesDescription", "") or "")
    return " ".join(part for part in (*parts, repr(text) if text else "") if part) or "unnamed"


def _require_slice(file: Path, dataset: Any) -> None:
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if frames > 1:
        raise FileError(file, f"holds {frames} frames in one file", "convert it to NIfTI with a DICOM converter")
    if int(dataset.get("SamplesPerPixel", 1)) != 1:
        raise FileError(file, "holds a colour picture", "export it as .png or .tif")
    for name, length in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
        value = dataset.get(name)
        numbers = np.array([] if value is None else value, dtype=np.float64)
        if numbers.shape != (length,) or not np.isfinite(numbers).all():
            raise FileError(file, f"has no {name}, which says where the slice lies", "export the series again")
    row, column = np.array(dataset.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    faults = (row @ column, np.linalg.norm(row) - 1, np.linalg.norm(column) - 1)
    if max(abs(float(fault)) for fault in faults) > 10 * _DIRECTION_TOLERANCE:
        raise FileError(file, "has an ImageOrientationPatient whose axes are not perpendicular", "export it again")
    if min(map(float, dataset.PixelSpacing)) <= 0:
        raise FileError(file, f"has the PixelSpacing {list(dataset.PixelSpacing)}", "export the series again")


def _require_same(folder: Path, datasets: Sequence[Any]) -> None:
    """Raise `FileError` unless all slices have one size, pixel spacing and orientation."""
    first = datasets[0]
    for dataset in datasets[1:]:
        before, here = Path(first.filename).name, Path(dataset.filename).name
        size, expected = ((int(d.Rows), int(d.Columns)) for d in (dataset, first))
        if size != expected:
            problem = f"mixes sizes: {here} has {size} rows and columns, {before} {expected}"
        elif not np.allclose(dataset.PixelSpacing, first.PixelSpacing, rtol=1e-4, atol=0):
            problem = f"mixes pixel spacings: {list(dataset.PixelSpacing)} in {here}, {list(first.PixelSpacing)} before"
        elif not np.allclose(
            np.array(dataset.ImageOrientationPatient, dtype=np.float64),
            np.array(first.ImageOrientationPatient, dtype=np.float64),
            rtol=0,
            atol=_DIRECTION_TOLERANCE,
        ):
            problem = f"mixes orientations: {here} is not parallel to {before} (a scout view or another plane)"
        else:
            continue
        raise FileError(folder, problem, "keep the slices of one volume in the folder")


def _slice_distance(folder: Path, along: NDArray[np.float64], first: Any) -> float:
    """Return the distance between slices in mm from their ascending positions along the normal."""
    if len(along) == 1:
        stated: float | None = first.get("SpacingBetweenSlices") or first.get("SliceThickness")
        return 1.0 if stated is None else abs(float(stated))
    distances = np.diff(along)
    usual = float(np.median(distances))
    twice = int((distances <= _DISTANCE_TOLERANCE * distances.max()).sum())
    if twice:
        raise FileError(
            folder,
            f"has {twice} slice{'s' * (twice > 1)} at the place of another (copies, time points or echoes)",
            "keep one slice per place, or give each time point a folder of its own",
        )
    tolerance = min(max(_DISTANCE_TOLERANCE * usual, _ROUNDING_MM), _LARGEST_TOLERANCE * usual)
    uneven = np.flatnonzero(abs(distances - usual) > tolerance)
    if len(uneven):
        at = int(uneven[0])
        raise FileError(
            folder,
            f"has uneven distances between slices: {distances[at]:.4g} mm behind slice {at + 1} of {len(along)}, "
            f"usually {usual:.4g} mm ({len(uneven)} such place{'s' * (len(uneven) > 1)})",
            "add the missing slices or convert the series to evenly spaced NIfTI",
        )
    return float((along[-1] - along[0]) / (len(along) - 1))


def _rescale(dataset: Any) -> tuple[float, float]:
    """Return slope and intercept of the stored values (PS3.3, C.11.1.1.2)."""
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    return 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)


def _pixels(file: Path, dataset: Any) -> NDArray[Any]:
    """Return the stored values (y, x) of one slice."""
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:  # so pydicom says that it knows no decoder of this transfer syntax, installed or not
        decoder = None
    if decoder is None or not decoder.is_available:
        raise FileError(
            file,
            f"is compressed in a way that no installed decoder knows ({syntax.name}, transfer syntax {syntax})",
            'pip install "segfit[dicom]" if that is not done yet, or decompress the series with a DICOM converter',
        )
    pixels: NDArray[Any] = dataset.pixel_array
    return pixels
