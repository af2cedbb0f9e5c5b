"""The part of an image that the sliding window is at: its voxels, and the sums of weighted logits over them.

It holds rows along the first axis, all of them or as many as neighbouring tiles need, and moves on over the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segfit.execution.scratch import Scratch
from segfit.inference.tiles import axis_coverage, axis_importance, padding, tile_starts

__all__ = ["Rows", "Tiling", "Window"]


class Rows(Protocol):
    """A preprocessed image ``(c, *spatial)`` of which rows are asked for: an array, or what makes them when asked."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        ...

    def __getitem__(self, index: tuple[slice, slice], /) -> NDArray[np.float32]:
        """Return rows, the index being ``[:, start:stop]``."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Tiling:
    """Where the tiles of an image lie. `margins` bring it up to the `patch`; all else is told of the padded image."""

    patch: tuple[int, ...]
    margins: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    profiles: tuple[NDArray[np.float64], ...]  # weights along each axis of a tile

    @classmethod
    def of(cls, shape: Sequence[int], patch: tuple[int, ...], step: float, *, gaussian: bool) -> Tiling:
        """Tile an image of a shape."""
        margins = padding(shape, patch)
        padded = tuple(low + n + high for n, (low, high) in zip(shape, margins, strict=True))
        starts = tuple(tile_starts(n, p, step) for n, p in zip(padded, patch, strict=True))
        return cls(patch, margins, padded, starts, tuple(axis_importance(p) if gaussian else np.ones(p) for p in patch))

    def fewest_rows(self, tiles: int) -> int:
        """Return how many rows `tiles` that follow each other lie in, at most."""
        first = self.starts[0]
        further = ceil((tiles - 1) / prod(map(len, self.starts[1:])))
        apart = max(first[min(place + further, len(first) - 1)] - start for place, start in enumerate(first))
        return apart + self.patch[0]


class Window:
    """Rows of the padded image and of the sums, from `base` on.

    Parameters
    ----------
    image, tiling : what it moves over
    outputs : channels of the sums
    views : how many views of each voxel of a tile are summed
    rows : how many are held at a time
    base : the first of them
    store : where they are held
    """

    def __init__(
        self,
        image: Rows,
        tiling: Tiling,
        outputs: int,
        views: int,
        rows: int,
        base: int,
        store: torch.device,
        scratch: Scratch,
    ) -> None:
        self._image, self._tiling, self._views, self._scratch, self._store = image, tiling, views, scratch, store
        self._all = rows == tiling.shape[0]
        self.base, self.stop = base, min(base + rows, tiling.shape[0])
        self.source = self._zeros((image.shape[0], rows, *tiling.shape[1:]))
        self.sums = self._zeros((outputs, rows, *tiling.shape[1:]))
        self._coverage = [
            torch.from_numpy(axis_coverage(size, begin, profile)).float().to(store)
            for size, begin, profile in zip(tiling.shape, tiling.starts, tiling.profiles, strict=True)
        ]
        self._load(base)

    def move(self, base: int) -> Tensor:
        """Move on to the row `base`; return the finished logits of those before it, without margins."""
        finished = self._finished(min(base, self.stop))
        shift, kept = base - self.base, max(0, self.stop - base)
        for row in range(kept):  # one by one, as they overlap
            self.source[:, row] = self.source[:, row + shift]
            self.sums[:, row] = self.sums[:, row + shift]
        self.source[:, kept:] = 0
        self.sums[:, kept:] = 0
        loaded = self.stop
        self.base, self.stop = base, min(base + self.sums.shape[1], self._tiling.shape[0])
        self._load(max(loaded, base))
        return finished

    def rest(self) -> Tensor:
        """Return the finished logits of all rows that are held, without margins."""
        return self._finished(self.stop)

    def _load(self, first: int) -> None:
        """Read the rows of the image from the padded row `first` on to the last one that is held."""
        low, inside = self._tiling.margins[0][0], self._inside()
        start, stop = (min(max(row - low, 0), self._image.shape[1]) for row in (first, self.stop))
        if start < stop:
            place = slice(start + low - self.base, stop + low - self.base)
            rows = np.ascontiguousarray(self._image[:, start:stop])
            self.source[:, place][:, :, *inside] = torch.from_numpy(rows).to(self._store)

    def _finished(self, stop: int) -> Tensor:
        """Turn the sums before the row `stop` into means, and return them; a copy if the window is to move on."""
        sums = self.sums[:, : stop - self.base]
        sums /= self._views
        for axis, coverage in enumerate(self._coverage):
            factor = coverage[self.base : stop] if axis == 0 else coverage
            sums /= factor.reshape([-1 if a == axis else 1 for a in range(sums.ndim - 1)])
        low, high = self._tiling.margins[0][0], self._tiling.margins[0][0] + self._image.shape[1]
        rows = slice(max(low, self.base) - self.base, max(low, min(stop, high)) - self.base)
        means = sums[:, rows][:, :, *self._inside()]
        return means if self._all else self._zeros(means.shape).copy_(means)

    def _inside(self) -> tuple[slice, ...]:
        """Where the image lies in the padded one, beyond the first axis."""
        sizes = self._image.shape[2:]
        return tuple(slice(low, low + n) for (low, _), n in zip(self._tiling.margins[1:], sizes, strict=True))

    def _zeros(self, shape: Sequence[int]) -> Tensor:
        if self._store.type == "cpu":
            array: NDArray[Any] = self._scratch.zeros(shape, np.float32)
            return torch.from_numpy(array)
        return torch.zeros(tuple(shape), device=self._store)
