"""DICOM series (extra ``dicom``): the folder of one series of slices, or of one file of frames, is one volume.

The slices lie directly in the folder, or in a folder below it, the only one with slices. They are known by their
content, not by their names; other files, hidden ones and the index of a medium (``DICOMDIR``) are left aside. Files
that are named like slices and are none are damaged slices, and no volume is made without them.

Here the files of a series are found and read; its slices are compared and placed in `dicom_series`, their values
decoded in `dicom_pixels`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.geometry import Grid
from segfit.images.dicom_frames import GROUPS, as_slices
from segfit.images.dicom_pixels import EXPORT_AGAIN, rescaling, stored_values
from segfit.images.dicom_series import place_slices
from segfit.images.image import FileError, Image, absence, optional_package, reading, require_memory
from segfit.images.open_files import OpenFiles, shared

__all__ = ["files", "holds_slices", "num_voxels", "read", "read_grid"]

_MAGIC, _MAGIC_AT = b"DICM", 128  # behind free bytes: PS3.10, 7.1
_INDEX = "DICOMDIR"  # lists the files of a medium: PS3.10, 8.6
# What places and groups slices; with these alone a header is read quickly.
_PLACING = (
    *("SOPClassUID", "SeriesInstanceUID", "SeriesDescription", "SeriesNumber", "Modality"),
    *("PatientID", "FrameOfReferenceUID", "RescaleSlope", "RescaleIntercept"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PixelSpacing"),
    *("ImagePositionPatient", "ImageOrientationPatient", "SliceThickness", "SpacingBetweenSlices"),
    *GROUPS,
)
_SHARED_BY_FRAMES = (*(name for name in _PLACING if name not in ("NumberOfFrames", *GROUPS)), "BitsAllocated")
_DEEPEST = 5  # folders that a series may lie below that of its case: patient, study and series make three (assumption)
_SHOWN_FOLDERS = 5
_SLICE_NAME = re.compile(r".+\.(dcm|dicom|ima)", re.IGNORECASE)
_NO_PICTURES = ("RTSTRUCT", "RTPLAN", "SR", "REG", "PR", "KO")  # modalities: PS3.3, C.7.3.1.1.1
_NO_IMAGES = ("holds no DICOM images", "give the folder of one complete series, or remove this folder")


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
    parallel slices at even distances, for colours, frames without places, compressions that no installed decoder knows,
    and where pydicom is not installed.
    """
    pydicom = _package(path)
    with reading(path), shared(files) as files:
        slices, grid = place_slices(path, _datasets(pydicom, path, files, headers_only=False))
    require_memory(path, grid.shape[::-1], prod(grid.shape) * int(slices[0].get("BitsAllocated") or 0) // 8)
    array: NDArray[Any] | None = None
    scaled = any(rescaling(dataset) != (1.0, 0.0) for dataset in slices)
    for number, dataset in enumerate(slices):
        file = Path(dataset.filename)
        with reading(file):
            pixels = stored_values(file, dataset)
            if scaled:
                slope, intercept = rescaling(dataset)
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
        return place_slices(path, _datasets(pydicom, path, files, headers_only=True))[1]


def num_voxels(path: Path, files: OpenFiles | None = None) -> int:
    """Return the voxels if all files beside the first slice are slices like it; raises `FileError` as `read` does."""
    with reading(path), shared(files) as files:
        folder = _slices_folder(path, files)
        first = _header(_package(path), next(_dicom_files(folder, files)), files)
        if "Rows" in first and "Columns" in first:
            frames = int(first.get("NumberOfFrames", 1) or 1)
            return len(_visible_files(folder)) * frames * int(first.Rows) * int(first.Columns)
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
            with reading(file):
                datasets += as_slices(file, dataset, _SHARED_BY_FRAMES)
        elif _should_be_picture(dataset):
            raise FileError(file, "is truncated or damaged (an image without rows and columns)", EXPORT_AGAIN)
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
            raise FileError(file, *absence(file, EXPORT_AGAIN))
        if named and file.name[0] != "." and file.is_file():
            problem = "is named like a slice but is not a DICOM file"
            raise FileError(file, "is empty" if file.stat().st_size == 0 else problem, EXPORT_AGAIN)


def _without_digits(file: Path) -> str:
    return re.sub(r"\d+", "0", file.name)
