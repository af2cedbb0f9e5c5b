"""One series out of its slices: what they must have in common, their order, and the grid that their headers place.

Attributes: DICOM PS3.3, C.7.6.2 (image plane).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.geometry import Grid
from segfit.images.dicom_frames import frame_name
from segfit.images.dicom_pixels import rescaling
from segfit.images.image import FileError, reading
from segfit.text import count
from segfit.text import numbers as shown

__all__ = ["place_slices"]

# How far a distance between slices may be from the usual one (assumptions): a share of it, or what positions written
# with two decimals make of it, but never so much that another distance could be meant.
_DISTANCE_TOLERANCE, _ROUNDING_MM, _LARGEST_TOLERANCE = 0.01, 0.02, 0.1
_COARSE_MM = 0.1  # to which some devices round positions
_TILT_TOLERANCE_PIXELS = 0.5  # half a pixel away from the straight stack, voxels no longer correspond
_DIRECTION_TOLERANCE = 1e-4  # of the cosines in ImageOrientationPatient, written with about six digits (assumption)
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
# What slices of one volume have in common besides sizes and orientation.
_SHARED = {
    "PatientID": "patients",
    "FrameOfReferenceUID": "frames of reference",
    "PhotometricInterpretation": "meanings of grey values",
}


def place_slices(folder: Path, datasets: list[Any]) -> tuple[list[Any], Grid]:
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
    slope, intercept = rescaling(dataset)
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
            before, here = frame_name(first), frame_name(other)
            problem = f"mixes {what}: {name} is not the same in {here} and {before}"
            raise FileError(folder, problem, "keep the slices of one volume in the folder")
    for name in ("RescaleSlope", "RescaleIntercept"):
        without = next((d for d in datasets if d.get(name) is None), None)
        if without is not None and any(d.get(name) is not None for d in datasets):
            problem = f"has no {name}, which other slices of its series have"
            raise FileError(Path(without.filename), problem, "export the series again")
    for dataset in datasets[1:]:
        before, here = frame_name(first), frame_name(dataset)
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
    names = [frame_name(dataset) for dataset in slices]
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
            "convert each volume in it to NIfTI with a DICOM converter"
            if slices[twice[0]].filename == slices[twice[0] + 1].filename
            else "keep one slice per position, or give each time point its own folder",
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
