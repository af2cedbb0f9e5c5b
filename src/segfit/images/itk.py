"""Pictures that only ITK decodes in full depth (SimpleITK, extra ``itk``): PNG with 16 bits per colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from segfit.images.image import COPY_AGAIN, FileError, optional_package, reading

__all__ = ["read_colours"]


def read_colours(path: Path) -> NDArray[Any]:
    """Read the pixels (y, x, colours) of a PNG; `FileError` where ITK cannot or is not installed."""
    sitk = optional_package(path, "SimpleITK", "SimpleITK", "itk")
    with reading(path):
        try:
            pixels: NDArray[Any] = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="PNGImageIO"))
        except RuntimeError as error:  # a page of source lines and addresses, the reason last
            reason = str(error).strip().splitlines()[-1].strip()
            raise FileError(path, f"cannot be read ({reason})", COPY_AGAIN) from error
    return pixels
