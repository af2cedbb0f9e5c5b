"""DICOM series (extra ``dicom``): the folder of one series of slices is one volume.

The slices lie directly in the folder, or in a folder below it, the only one with slices. They are known by their
content, not by their names; other files, hidden ones and the index of a medium (``DICOMDIR``) are left aside. Files
that are named like slices and are none are damaged slices, and no volume is made without them.

Attributes and formulas: DICOM PS3.3, C.7.6.2 (image plane) and C.11.1 (modality: rescaling). Values stay as they are
stored and rescaled where low ones are shown bright (MONOCHROME1).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.geometry import Grid
from segfit.images.image import FileError, Image, absence, optional_package, reading, require_memory
from segfit.images.open_files import OpenFiles, shared
from segfit.words import count
from segfit.words import numbers as shown

__all__ = ["files", "holds_slices", "num_voxels", "read", "read_grid"]

# How far a distance between slices may be from the usual one (assumptions): a share of it, or what positions written
# with two decimals make of it, but never so much that another distance could be meant.
_DISTANCE_TOLERANCE, _ROUNDING_MM, _LARGEST_TOLERANCE = 0.01, 0.02, 0.1
_COARSE_MM = 0.1  # to which some devices round positions
_TILT_TOLERANCE_PIXELS = 0.5  # half a pixel away from the straight stack, voxels no longer correspond
_DIRECTION_TOLERANCE = 1e-4  # of the cosines in ImageOrientationPatient, written with about six digits (assumption)
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
_MAGIC, _MAGIC_AT = b"DICM", 128  # behind free bytes: PS3.10, 7.1
_INDEX = "DICOMDIR"  # lists the files of a medium: PS3.10, 8.6
# What places and groups slices; with these alone a header is read quickly.
_PLACING = (
    *("SOPClassUID", "SeriesInstanceUID", "SeriesDescription", "SeriesNumber", "Modality"),
    *("PatientID", "FrameOfReferenceUID", "RescaleSlope", "RescaleIntercept"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PixelSpacing"),
    *("ImagePositionPatient", "ImageOrientationPatient", "SliceThickness", "SpacingBetweenSlices"),
)
# What slices of one volume have in common besides sizes and orientation.
_SHARED = {
    "PatientID": "patients",
    "FrameOfReferenceUID": "frames of reference",
    "PhotometricInterpretation": "meanings of grey values",
}
_DEEPEST = 5  # folders that a series may lie below that of its case: patient, study and series make three (assumption)
_SHOWN_FOLDERS = 5
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_SLICE_NAME = re.compile(r".+\.(dcm|dicom|ima)", re.IGNORECASE)
_NO_PICTURES = ("RTSTRUCT", "RTPLAN", "SR", "REG", "PR", "KO")  # modalities: PS3.3, C.7.3.1.1.1
_NO_IMAGES = ("holds no DICOM images", "give the folder of one complete series, or remove this folder")
_EXPORT_AGAIN = "copy or export the series again; remove the file if it is not a slice"


def holds_slices(folder: Path, *, nested: bool = True) -> bool:
    """Return whether a folder has DICOM files directly inside; `nested`: or in a folder below."""
    try:
        with OpenFiles() as files:
            return any(_has_slices(one, files) for one in (folder, *(_folders(folder) if nested else ())))
    except OSError:  # whoever reads the folder is told
        return False


def files(path: Path, files: OpenFiles | None = None) -> tuple[Path, ...]:
    """Return the DICOM files of a series; `FileError` where `read` would not know which series is meant."""
    with reading(path), shared(files) as files:
        return tuple(_dicom_files(_slices_folder(path, files), files))


def read(path: Path, files: OpenFiles | None = None) -> Image:
    """Read the series in a folder as (1, z, y, x), z along the normal of the slices.

    The dtype is the files', float32 where they rescale their values. Raises `FileError` for anything but one series of
    parallel slices at even distances, for colours, multi-frame files and compressions that no installed decoder knows,
    and where pydicom is not installed.
    """
    pydicom = _package(path)
    with reading(path), shared(files) as files:
        slices, grid = _series(path, _datasets(pydicom, path, files, headers_only=False))
    require_memory(path, grid.shape[::-1], prod(grid.shape) * int(slices[0].get("BitsAllocated") or 0) // 8)
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


def read_grid(path: Path, files: OpenFiles | None = None) -> Grid:
    """Read the headers alone; raises `FileError` as `read` does."""
    pydicom = _package(path)
    with reading(path), shared(files) as files:
        return _series(path, _datasets(pydicom, path, files, headers_only=True))[1]


def num_voxels(path: Path, files: OpenFiles | None = None) -> int:
    """Return the voxels if all files beside the first slice are slices like it; raises `FileError` as `read` does."""
    with reading(path), shared(files) as files:
        folder = _slices_folder(path, files)
        first = _header(_package(path), next(_dicom_files(folder, files)), files)
        if "Rows" in first and "Columns" in first:
            return len(_visible_files(folder)) * int(first.Rows) * int(first.Columns)
        return prod(read_grid(path, files).shape)


def _package(path: Path) -> Any:
    return optional_package(path, "pydicom", "pydicom", "dicom")


def _visible_files(folder: Path) -> list[Path]:
    """Return the files directly inside a folder that may be slices, in order of their names."""
    names = (path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.name.upper() != _INDEX)
    return [path for path in names if path.is_file()]


def _dicom_files(folder: Path, files: OpenFiles) -> Iterator[Path]:
    """Yield the DICOM files directly inside a folder, in order of their names."""
    length = _MAGIC_AT + len(_MAGIC)
    return (path for path in _visible_files(folder) if files.start(path, length).endswith(_MAGIC, _MAGIC_AT))


def _has_slices(folder: Path, files: OpenFiles) -> bool:
    return next(_dicom_files(folder, files), None) is not None


def _folders(folder: Path, depth: int = _DEEPEST) -> Iterator[Path]:
    """Yield the folders below a folder in order, except hidden ones and chunks of arrays."""
    for path in sorted(folder.iterdir()) if depth else ():
        if path.name[0] != "." and path.suffix.lower() != ".zarr" and path.is_dir():
            yield path
            yield from _folders(path, depth - 1)


def _slices_folder(path: Path, files: OpenFiles) -> Path:
    """Return the folder that has the slices directly inside: `path`, or the only such folder below it."""
    if _has_slices(path, files):
        return path
    inside = [folder for folder in _folders(path) if _has_slices(folder, files)]
    if len(inside) > 1:  # structure sets and the like may lie in folders of their own
        pydicom = _package(path)
        inside = [
            folder
            for folder in inside
            if any(_is_picture(_header(pydicom, file, files)) for file in _dicom_files(folder, files))
        ]
    if len(inside) > 1:
        names = ", ".join(folder.relative_to(path).as_posix() for folder in inside[:_SHOWN_FOLDERS])
        more = ", ..." if len(inside) > _SHOWN_FOLDERS else ""
        action = "keep the one series that is meant, all its slices in one folder"
        raise FileError(path, f"has slices in {len(inside)} folders: {names}{more}", action)
    if not inside:
        _require_no_damaged_slice(path, files)
        raise FileError(path, *_NO_IMAGES)
    return inside[0]


def _header(pydicom: Any, file: Path, files: OpenFiles) -> Any:
    return pydicom.dcmread(files.at_start(file), stop_before_pixels=True, specific_tags=list(_PLACING))


def _is_picture(dataset: Any) -> bool:
    return "Rows" in dataset and "Columns" in dataset


def _datasets(pydicom: Any, path: Path, files: OpenFiles, *, headers_only: bool) -> list[Any]:
    """Return the images among the files of a folder: what has rows and columns of pixels."""
    folder = _slices_folder(path, files)
    datasets: list[Any] = []
    for file in _dicom_files(folder, files):
        with reading(file):
            dataset = _header(pydicom, file, files) if headers_only else pydicom.dcmread(files.at_start(file))
        if _is_picture(dataset):
            datasets.append(dataset)
        elif _should_be_picture(dataset):
            raise FileError(file, "is truncated or damaged (an image without rows and columns)", _EXPORT_AGAIN)
    _require_no_damaged_slice(folder, files)
    if not datasets:
        raise FileError(path, *_NO_IMAGES)
    series = datasets[0].get("SeriesInstanceUID")
    for inside in _folders(folder):
        other = next(_dicom_files(inside, files), None)
        found = None if other is None else _header(pydicom, other, files).get("SeriesInstanceUID")
        if found is not None and found == series:
            problem = f"has slices of its series also in the folder {inside.relative_to(folder).as_posix()}"
            raise FileError(folder, problem, "put all slices of the series into one folder, each once")
    return datasets


def _should_be_picture(dataset: Any) -> bool:
    """Return whether a file without rows and columns says that it is an image, or does not say what it is."""
    kind = dataset.file_meta.get("MediaStorageSOPClassUID") or dataset.get("SOPClassUID")
    image = kind is None or "Image Storage" in kind.name  # so PS3.4, B.5, names images
    return image and dataset.get("Modality") not in _NO_PICTURES


def _require_no_damaged_slice(folder: Path, files: OpenFiles) -> None:
    """Raise `FileError` for a file that is no DICOM file but is named like one, or but for digits as the slices are."""
    slices = set(_dicom_files(folder, files))
    names = {_without_digits(file) for file in slices}
    for file in sorted(set(folder.iterdir()) - slices):
        named = _SLICE_NAME.fullmatch(file.name) or _without_digits(file) in names
        if named and file.is_symlink() and not file.exists():
            raise FileError(file, *absence(file, _EXPORT_AGAIN))
        if named and file.name[0] != "." and file.is_file():
            problem = "is named like a slice but is not a DICOM file"
            raise FileError(file, "is empty" if file.stat().st_size == 0 else problem, _EXPORT_AGAIN)


def _without_digits(file: Path) -> str:
    return re.sub(r"\d+", "0", file.name)


def _series(folder: Path, datasets: list[Any]) -> tuple[list[Any], Grid]:
    """Return the slices in order and their grid."""
    _require_one_series(folder, datasets)
    for dataset in datasets:
        with reading(Path(dataset.filename)):
            _require_slice(Path(dataset.filename), dataset)
    _require_same(folder, datasets)
    first = datasets[0]
    row, column = np.array(first.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    normal = np.cross(row, column)
    positions = np.array([dataset.ImagePositionPatient for dataset in datasets], dtype=np.float64)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    between, across = (float(value) for value in first.PixelSpacing)  # PS3.3, 10.7.1.3: between rows, between columns
    slices = [datasets[number] for number in order]
    step = _slice_distance(folder, positions, normal, slices)
    drift = positions - positions[0] - np.outer((positions - positions[0]) @ normal, normal)
    shift = float(np.linalg.norm(drift, axis=1).max())
    if shift > _TILT_TOLERANCE_PIXELS * min(between, across):
        raise FileError(
            folder,
            f"has slices that are shifted against each other by up to {shift:.3g} mm (gantry tilt)",
            "straighten the volume with a DICOM converter and use its NIfTI file",
        )
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([row * across, column * between, normal * step]) * _LPS_TO_RAS[:, None]
    affine[:3, 3] = positions[0] * _LPS_TO_RAS
    shape = (len(datasets), int(first.Rows), int(first.Columns))
    return slices, Grid(shape, (step, between, across), affine)


def _require_one_series(folder: Path, datasets: Sequence[Any]) -> None:
    kinds = Counter((str(d.get("SeriesInstanceUID", "")), _describe(d)) for d in datasets)
    if len(kinds) > 1:
        found = ", ".join(f"{text} ({count(amount, 'image')})" for (_, text), amount in sorted(kinds.items()))
        action = "keep the one that is meant, or give each series its own folder"
        raise FileError(folder, f"holds {len(kinds)} series: {found}", action)


def _describe(dataset: Any) -> str:
    parts = [str(dataset.get("Modality", "")), str(dataset.get("SeriesNumber", "") or "")]
    text = str(dataset.get("SeriesDescription", "") or "")
    return " ".join(part for part in (*parts, repr(text) if text else "") if part) or "unnamed"


def _require_slice(file: Path, dataset: Any) -> None:
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if frames > 1:
        raise FileError(file, f"has {frames} frames", "convert it to NIfTI with a DICOM converter")
    if int(dataset.get("SamplesPerPixel", 1)) != 1 or dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        raise FileError(file, "is a colour image", "export it as .png or .tif")
    if not (dataset.Rows and dataset.Columns):
        problem = f"has no pixels ({dataset.Rows} rows, {dataset.Columns} columns)"
        raise FileError(file, problem, "export the series again")
    for name, length in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
        _require_numbers(file, dataset, name, length)
    row, column = np.array(dataset.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    faults = (row @ column, np.linalg.norm(row) - 1, np.linalg.norm(column) - 1)
    if max(abs(float(fault)) for fault in faults) > 10 * _DIRECTION_TOLERANCE:
        shown = ", ".join(map(str, dataset.ImageOrientationPatient))
        problem = f"has the ImageOrientationPatient ({shown}), which is not two perpendicular axes of length 1"
        raise FileError(file, problem, "export the series again")
    if min(map(float, dataset.PixelSpacing)) <= 0:
        shown = ", ".join(map(str, dataset.PixelSpacing))
        raise FileError(file, f"has the PixelSpacing ({shown}), expected positive numbers", "export the series again")
    slope, intercept = _rescale(dataset)
    if not (slope and isfinite(slope) and isfinite(intercept)):
        problem = f"has the RescaleSlope {slope:g} and RescaleIntercept {intercept:g}, which is unusable"
        raise FileError(file, problem, "export the series again")


def _require_numbers(file: Path, dataset: Any, name: str, length: int) -> None:
    try:
        value = dataset.get(name)
        numbers = np.array([] if value is None else value, dtype=np.float64).ravel()
    except (ValueError, TypeError) as error:
        problem = f"has a {name} that is not {length} numbers ({error})"
        raise FileError(file, problem, "export the series again") from error
    if not numbers.size:
        raise FileError(file, f"has no {name}, which says where its pixels lie", "export the series again")
    if numbers.size != length or not np.isfinite(numbers).all():
        problem = f"has the {name} {shown(numbers)}, expected {length} finite numbers"
        raise FileError(file, problem, "export the series again")


def _require_same(folder: Path, datasets: Sequence[Any]) -> None:
    """Raise `FileError` unless slices are of one patient, size, pixel spacing and orientation, all rescaled or none."""
    first = datasets[0]
    for name, what in _SHARED.items():
        other = next((d for d in datasets if d.get(name) != first.get(name)), None)
        if other is not None:
            before, here = Path(first.filename).name, Path(other.filename).name
            problem = f"mixes {what}: {name} is not the same in {here} and {before}"
            raise FileError(folder, problem, "keep the slices of one volume in the folder")
    for name in ("RescaleSlope", "RescaleIntercept"):
        without = next((d for d in datasets if d.get(name) is None), None)
        if without is not None and any(d.get(name) is not None for d in datasets):
            problem = f"has no {name}, which other slices of its series have"
            raise FileError(Path(without.filename), problem, "export the series again")
    for dataset in datasets[1:]:
        before, here = Path(first.filename).name, Path(dataset.filename).name
        size, expected = ((int(d.Rows), int(d.Columns)) for d in (dataset, first))
        if size != expected:
            problem = f"mixes sizes: {here} has {size} rows and columns, {before} {expected}"
        elif not np.allclose(dataset.PixelSpacing, first.PixelSpacing, rtol=1e-4, atol=0):
            problem = f"mixes pixel spacings: {list(dataset.PixelSpacing)} in {here}, {list(first.PixelSpacing)} before"
        elif not np.allclose(
            dataset.ImageOrientationPatient, first.ImageOrientationPatient, rtol=0, atol=_DIRECTION_TOLERANCE
        ):
            problem = f"mixes orientations: {here} is not parallel to {before} (a scout view or another plane)"
        else:
            continue
        raise FileError(folder, problem, "keep the slices of one volume in the folder")


def _on_a_line(positions: NDArray[np.float64], normal: NDArray[np.float64]) -> bool:
    """Return whether positions (in order along the normal) are those of even distances, rounded to 0.1 mm.

    Of all lines through them, position by number, the one counts from which the farthest is nearest; how far that is
    is convex in the slope.
    """
    if np.abs(positions - np.round(positions, 1)).max() > 1e-6:
        return False
    along, numbers = positions @ normal, np.arange(len(positions))
    step = float(along[-1] - along[0]) / (len(along) - 1)

    def farthest(slope: float) -> float:
        return float(np.ptp(along - slope * numbers)) / 2

    low, high = step * (1 - _LARGEST_TOLERANCE), step * (1 + _LARGEST_TOLERANCE)
    for _ in range(60):  # two thirds are left each time
        third = (high - low) / 3
        low, high = (low, high - third) if farthest(low + third) < farthest(high - third) else (low + third, high)
    most = min(_COARSE_MM / 2 * float(np.abs(normal).sum()), _LARGEST_TOLERANCE * step)
    return farthest(low) <= most + 1e-6


def _slice_distance(
    folder: Path, positions: NDArray[np.float64], normal: NDArray[np.float64], slices: Sequence[Any]
) -> float:
    """Return the distance between slices in mm from their positions, ascending along the normal."""
    along = positions @ normal
    names = [Path(dataset.filename).name for dataset in slices]
    if len(along) == 1:
        with reading(Path(slices[0].filename)):
            stated = slices[0].get("SpacingBetweenSlices") or slices[0].get("SliceThickness") or 1.0
            return abs(float(stated))
    distances = np.diff(along)
    usual = float(np.median(distances))
    twice = np.flatnonzero(distances <= _DISTANCE_TOLERANCE * distances.max())
    if len(twice):
        first, second = sorted(names[twice[0] : twice[0] + 2])
        raise FileError(
            folder,
            f"has {count(len(twice), 'slice')} at the position of another (copies, times or echoes), "
            f"such as {second} and {first}",
            "keep one slice per position, or give each time point its own folder",
        )
    tolerance = min(max(_DISTANCE_TOLERANCE * usual, _ROUNDING_MM), _LARGEST_TOLERANCE * usual)
    uneven = np.flatnonzero(abs(distances - usual) > tolerance)
    if len(uneven) and not _on_a_line(positions, normal):
        at = int(uneven[0])
        raise FileError(
            folder,
            f"has uneven distances between slices: {distances[at]:.4g} mm after slice {at + 1} of {len(along)} "
            f"({names[at]}), usually {usual:.4g} mm ({count(len(uneven), 'such place')})",
            "add the missing slices or convert the series to evenly spaced NIfTI",
        )
    return float((along[-1] - along[0]) / (len(along) - 1))


def _rescale(dataset: Any) -> tuple[float, float]:
    """Return slope and intercept of the stored values (PS3.3, C.11.1.1.2)."""
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    return 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)


def _pixels(file: Path, dataset: Any) -> NDArray[Any]:
    """Return the values (y, x) of one slice, looked up where it has a table of values, but not rescaled."""
    from pydicom.pixels import apply_modality_lut, get_decoder

    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        problem = "has no TransferSyntaxUID, which says how its pixels are stored"
        raise FileError(file, problem, "export the series again")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:  # so pydicom says that it knows no decoder of this transfer syntax, installed or not
        decoder = None
    if decoder is None or not decoder.is_available:
        raise FileError(
            file,
            f"is compressed with {syntax.name} (transfer syntax {syntax}), for which no decoder is installed",
            'pip install "segfit[dicom]", or decompress the series with a DICOM converter',
        )
    _cut_to_size(file, dataset, compressed=syntax.is_compressed)
    pixels: NDArray[Any] = dataset.pixel_array
    return apply_modality_lut(pixels, dataset) if dataset.get("ModalityLUTSequence") else pixels


def _cut_to_size(file: Path, dataset: Any, *, compressed: bool) -> None:
    """Raise `FileError` unless a slice holds as many bytes as its rows and columns need, where that can be told.

    Up to a row more is what some devices fill up with, and is taken away.
    """
    name = next((name for name in _PIXELS if name in dataset), None)
    stored = None if name is None else dataset[name].value
    if name is None or not stored:
        raise FileError(file, "holds no pixels", _EXPORT_AGAIN)
    bits = int(dataset.get("BitsAllocated", 0))
    if compressed or bits < 8:
        return
    row = int(dataset.Columns) * bits // 8
    expected = int(dataset.Rows) * row
    sizes = f"{dataset.Rows} rows of {dataset.Columns} pixels of {bits} bits"
    if len(stored) < expected:
        raise FileError(file, f"is truncated ({len(stored)} of {expected} bytes of pixels: {sizes})", _EXPORT_AGAIN)
    if len(stored) >= expected + row:
        problem = f"holds {len(stored)} bytes of pixels, its header asks for {expected} ({sizes})"
        raise FileError(file, problem, "export the series again")
    if len(stored) > expected + 1:  # one byte makes the length even: PS3.5, 8.1.1
        dataset[name].value = stored[:expected]
