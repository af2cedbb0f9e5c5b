"""How much memory a case takes, how much it may take, and how it is predicted in less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeVar

from segfit.bundle.bundle import ModelManifest
from segfit.device import is_memory_shortage
from segfit.errors import InputError, warning
from segfit.execution.memory import free_memory_gb
from segfit.execution.scratch import Scratch
from segfit.geometry import Grid
from segfit.preprocessing.dataset import most_voxels
from segfit.progress import Progress
from segfit.text import gigabytes

__all__ = ["Room", "forecast_gb", "with_less_each_time"]

_Result = TypeVar("_Result")
_ARRAYS = 3  # of float32 that are held of each channel: as read, as preprocessed, in the window
_SHARE = 16  # of the room that an array of a streamed case may take in memory
_LEAST_GB = 1 / 64  # what is tried last
_LESS = 8  # times less memory in every further attempt


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that a case may take, and the folder of what does not fit.

    A case whose forecast is larger is streamed: finished rows leave memory, and large arrays are files in `folder`
    (None: the system's for temporary files).
    """

    gb: float
    folder: Path | None = None

    @classmethod
    def of(cls, gb: float | None, folder: Path | None) -> Room:
        """Return the room that was asked for; None: what is free now."""
        if gb is not None and not gb > 0:
            raise InputError(f"memory is a number of GB above 0, got {gb:g}")
        return cls(free_memory_gb() if gb is None else gb, folder)

    @property
    def scratch(self) -> Scratch:
        """Where arrays of a streamed case are made."""
        return Scratch(self.gb * 2**30 / _SHARE, self.folder)

    def rows(self, outputs: int, shape: Sequence[int]) -> int:
        """Return how many rows of a streamed case ``(c, *spatial)`` are held at a time where tiles need no more."""
        row = 4 * (outputs + shape[0]) * prod(shape[2:])
        return int(self.gb * 2**30 / _SHARE / row)


def forecast_gb(manifest: ModelManifest, grid: Grid) -> float:
    """Return the memory in GiB that predicting an image takes, about, if all of it is held; 0 if it is of another kind.

    The networks themselves and what they hold of a tile are not in it.
    """
    needed = (
        most_voxels(grid, one.configuration.preprocessing)
        * (_ARRAYS * one.configuration.network.in_channels + one.configuration.network.num_outputs + 1)
        for one in manifest.stages
    )
    return 4 * max(needed) / 2**30


def with_less_each_time(attempt: Callable[[float | None], _Result], gb: float | None, progress: Progress) -> _Result:
    """Return what an attempt in `gb` of memory returns (None: what is free); without memory, in less and less of it."""
    while True:
        try:
            return attempt(gb)
        except (MemoryError, RuntimeError) as error:
            if not is_memory_shortage(error) or (gb is not None and gb <= _LEAST_GB):
                raise
        gb = max(_LEAST_GB, (free_memory_gb() if gb is None else gb) / _LESS)
        problem = f"out of memory; retrying the case in {gigabytes(gb)}, row by row where that is less than it takes"
        progress.warn(warning("out_of_memory", problem))
