"""An image: voxels and where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.geometry import AxisMap, Grid

__all__ = ["Image"]


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """Voxels with their grid.

    Parameters
    ----------
    array : (c, z, y, x) or (c, y, x); dtype as read, float32 after `read_case`; label maps have one channel
    grid : geometry of the spatial axes, in the order of the array
    """

    array: NDArray[Any]
    grid: Grid

    def __post_init__(self) -> None:
        if self.array.shape[1:] != self.grid.shape:
            raise ValueError(f"array with spatial shape {self.array.shape[1:]} does not fit its grid {self.grid.shape}")

    def reoriented(self, axes: AxisMap) -> Image:
        """Return the image with its axes reordered and flipped; its affine follows."""
        if axes.is_identity:
            return self
        return Image(np.ascontiguousarray(axes.apply(self.array)), axes.apply_grid(self.grid))
