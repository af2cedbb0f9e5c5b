"""The values of one DICOM slice.

Formulas: DICOM PS3.3, C.11.1 (modality: rescaling). Values stay as they are stored and rescaled where low ones are
shown bright (MONOCHROME1).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from segfit.images.image import FileError

__all__ = ["EXPORT_AGAIN", "rescaling", "stored_values"]

EXPORT_AGAIN = "copy or export the series again; remove the file if it is not a slice"
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def rescaling(dataset: Any) -> tuple[float, float]:
    """Return slope and intercept of the stored values (PS3.3, C.11.1.1.2)."""
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    return 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)


def stored_values(file: Path, dataset: Any) -> NDArray[Any]:
    """Return the values (y, x) of one slice, looked up where it has a table of values, but not rescaled."""
    from pydicom.pixels import apply_modality_lut, get_decoder, pixel_array

    frame, dataset = getattr(dataset, "index", None), getattr(dataset, "whole", dataset)
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
    several = frame is not None and int(dataset.get("NumberOfFrames", 1) or 1) > 1
    pixels: NDArray[Any] = pixel_array(dataset, index=frame) if several else dataset.pixel_array
    return apply_modality_lut(pixels, dataset) if dataset.get("ModalityLUTSequence") else pixels


def _cut_to_size(file: Path, dataset: Any, *, compressed: bool) -> None:
    """Raise `FileError` unless a slice holds as many bytes as its rows and columns need, where that can be told.

    Up to a row more is what some devices fill up with, and is taken away.
    """
    name = next((name for name in _PIXELS if name in dataset), None)
    stored = None if name is None else dataset[name].value
    if name is None or not stored:
        raise FileError(file, "holds no pixels", EXPORT_AGAIN)
    bits = int(dataset.get("BitsAllocated", 0))
    if compressed or bits < 8:
        return
    row = int(dataset.Columns) * bits // 8
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    expected = frames * int(dataset.Rows) * row
    sizes = f"{dataset.Rows} rows of {dataset.Columns} pixels of {bits} bits"
    sizes += f" in {frames} frames" * (frames > 1)
    if len(stored) < expected:
        raise FileError(file, f"is truncated ({len(stored)} of {expected} bytes of pixels: {sizes})", EXPORT_AGAIN)
    if len(stored) >= expected + row:
        problem = f"holds {len(stored)} bytes of pixels, its header asks for {expected} ({sizes})"
        raise FileError(file, problem, "export the series again")
    if len(stored) > expected + 1:  # one byte makes the length even: PS3.5, 8.1.1
        dataset[name].value = stored[:expected]
