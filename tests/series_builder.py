"""Writes small DICOM series for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SPACING = (2.25, 0.9, 1.25)
ORIGIN = (5.0, -3.0, 7.0)  # LPS


def write_series(
    folder: Path, array: NDArray[Any], spacing: tuple[float, ...] = SPACING, origin: tuple[float, ...] = ORIGIN
) -> Path:
    """Write (z, y, x) integers as an axial series, the files named without ending and against their order."""
    folder.mkdir(parents=True)
    series = generate_uid(entropy_srcs=[str(folder)])
    for number, pixels in enumerate(array):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[f"{folder}{number}"])
        dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
        dataset.SeriesInstanceUID, dataset.Modality = series, "CT"
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 1
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelSpacing, dataset.ImageOrientationPatient = list(spacing[1:]), [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient = [*origin[:2], origin[2] + spacing[0] * number]
        dataset.PixelData = np.ascontiguousarray(pixels, np.int16).tobytes()
        dataset.save_as(folder / f"slice{999 - number}", enforce_file_format=True)
    return folder


def affine_of(spacing: tuple[float, ...] = SPACING, origin: tuple[float, ...] = ORIGIN) -> NDArray[np.float64]:
    """Return the affine of such a series: voxels (x, y, z) to RAS+ mm."""
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    affine[:3, 3] = -origin[0], -origin[1], origin[2]
    return affine


def clutter(folder: Path) -> None:
    """Put beside slices what is found beside slices."""
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (folder / "README.txt").write_text("exported by a console")
    (folder / ".DS_Store").write_bytes(b"Bud1")
    (folder / "._slice999").write_bytes(bytes(128) + b"DICM")
