"""Images of which parts are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segfit.images.formats import find_format, read_grid
from segfit.images.image import Regions

__all__ = ["read_regions"]


def read_regions(paths: Sequence[Path], spacing_mm: Sequence[float] | None = None) -> Regions | None:
    """Return the channel files of a case as one image of which parts are read; None where they must be read whole.

    That is for formats that are not read by region, and for files that differ in grid or tiles. `spacing_mm` as in
    `segfit.images.formats.read_image`.
    """
    found: list[Regions] = []
    for path in paths:
        format_ = find_format(path)
        one = None if format_.regions is None else format_.regions(path)
        if one is None or (found and (one.chunk != found[0].chunk or found[0].grid.mismatch(one.grid))):
            return None
        found.append(one)
    grid = read_grid(paths[0], spacing_mm)
    if len(found) == 1:
        return found[0]._replace(grid=grid)
    channels = sum(one.channels for one in found)
    return Regions(grid, channels, found[0].chunk, lambda box: np.concatenate([one.read(box) for one in found]))
