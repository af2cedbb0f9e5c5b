"""Computed values, such as probabilities, as images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.geometry import Grid
from segfit.images.formats import find_format
from segfit.images.image import LabelMap

__all__ = ["channel_files", "write_channels"]

_FOR_PICTURES = ".tif"  # in the place of formats that hold whole numbers alone


def channel_files(folder: Path, case: str, ending: str, channels: int) -> list[Path]:
    """Return the files of a case with several channels, ``CASE_0000.END`` and so on; END is one that holds values."""
    ending = ending if find_format(Path(f"a{ending}")).reals else _FOR_PICTURES
    return [folder / f"{case}_{number:04d}{ending}" for number in range(channels)]


def write_channels(paths: list[Path], values: NDArray[np.floating[Any]], grid: Grid) -> None:
    """Write ``(c, *spatial)``, each channel into a file of its own on `grid`, from the last to the first."""
    for path, channel in reversed(list(zip(paths, values, strict=True))):
        write = find_format(path).write
        assert write is not None
        array: NDArray[Any] = np.ascontiguousarray(channel)
        write(path, LabelMap(array, grid))
