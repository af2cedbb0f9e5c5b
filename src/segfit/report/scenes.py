"""What the viewer of a report scrolls through: a case in 8 bits around its labels, small enough to lie in a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scene", "as_jpeg", "in_8_bits"]

_MAX_SIDE = 96  # voxels of a volume per axis; pictures are larger, as there is one slice of them
_MAX_PICTURE = 1024
_MARGIN = 0.2  # beyond the labels on either side, as a share of their extent
_FEWEST_MARGIN = 8  # voxels
_BLOCK = 8  # pixels of a side that JPEG packs together: slices do not share any
_AROUND = 0.25  # of the range of grey values that is shown first, kept below and above it


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A part of a case, turned as it is looked at.

    Parameters
    ----------
    box : first voxel and the one after the last, per axis of the case
    step : how many voxels of the case are one here, per axis
    flipped : all axes run the other way than in the case: radiological order of one in RAS+
    sheet : JPEG of the slices along the first axis (the whole picture in 2D), `columns` of them beside each other,
        each filled up to whole blocks of 8 x 8 pixels
    window : 8-bit values that are shown as black and white at first
    reference : integer labels of what is shown
    """

    box: tuple[tuple[int, int], ...]
    step: tuple[int, ...]
    flipped: bool
    sheet: bytes
    columns: int
    window: tuple[int, int]
    reference: NDArray[Any]

    @classmethod
    def of(
        cls,
        picture: NDArray[Any],
        window: tuple[float, float],
        reference: NDArray[Any],
        prediction: NDArray[Any] | None = None,
        *,
        flipped: bool = False,
    ) -> Self:
        """Cut the surroundings of what is labelled, in the reference or else in the prediction, out of a case.

        Parameters
        ----------
        picture : grey values (*spatial), or colours (rows, columns, 3)
        window : values that are shown as black and white at first
        """
        most = _MAX_SIDE if reference.ndim == 3 else _MAX_PICTURE
        box = _box(reference, prediction, most)
        step = tuple(ceil((stop - start) / most) for start, stop in box)
        coloured = picture.ndim > reference.ndim
        low, high = window
        around = 0.0 if coloured else _AROUND * (high - low)
        shown = _averaged(picture[tuple(slice(*ends) for ends in box)], step)
        pixels = in_8_bits(shown, low - around, high + around)
        first = round(255 * around / max(high - low + 2 * around, 1e-12))
        columns, sheet = _sheet(_flipped(pixels, reference.ndim, flipped), reference.ndim)
        seen = _cut(reference, box, step, flipped)
        return cls(box, step, flipped, as_jpeg(sheet), columns, (first, 255 - first), seen)

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels shown per axis."""
        return tuple(ceil((stop - start) / step) for (start, stop), step in zip(self.box, self.step, strict=True))

    def cut(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Return the part of a label map of the whole case that is shown."""
        return _cut(labels, self.box, self.step, self.flipped)

    def share_outside(self, labels: NDArray[Any]) -> float:
        """Return which share of what is labelled in a map of the whole case lies beyond what is shown."""
        total = np.count_nonzero(labels)
        inside = np.count_nonzero(labels[tuple(slice(*ends) for ends in self.box)])
        return 1 - inside / total if total else 0.0


def _cut(labels: NDArray[Any], box: Sequence[tuple[int, int]], step: Sequence[int], flipped: bool) -> NDArray[Any]:
    """Return the labels in the middle of every block of `step` voxels."""
    places = [
        np.minimum(np.arange(start, stop, length) + length // 2, stop - 1)
        for (start, stop), length in zip(box, step, strict=True)
    ]
    return np.ascontiguousarray(_flipped(labels[np.ix_(*places)], labels.ndim, flipped))


def in_8_bits(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Return values as bytes: 0 for those up to `low`, 255 for those from `high` on."""
    scaled = (np.nan_to_num(values.astype(np.float32)) - low) / max(high - low, 1e-12)
    return (scaled.clip(0, 1) * 255).round().astype(np.uint8)


def as_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Return a grey or coloured picture as JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="JPEG", quality=82)
    return buffer.getvalue()


def _box(reference: NDArray[Any], prediction: NDArray[Any] | None, most: int) -> tuple[tuple[int, int], ...]:
    """Return from where to where to show: all along axes that fit, else what is labelled and a margin."""
    if reference.ndim == 2 or max(reference.shape) <= most:
        return tuple((0, size) for size in reference.shape)
    labelled = reference > 0
    if prediction is not None and not labelled.any():
        labelled = prediction > 0
    flat = np.logical_or.reduce(labelled, axis=0)
    places = [np.flatnonzero(line) for line in (labelled.any(axis=(1, 2)), flat.any(axis=1), flat.any(axis=0))]
    return tuple(_reach(found, size, most) for found, size in zip(places, reference.shape, strict=True))


def _reach(found: NDArray[np.intp], size: int, most: int) -> tuple[int, int]:
    if size <= most or not found.size:
        return 0, size
    start, stop = int(found[0]), int(found[-1]) + 1
    margin = max(_FEWEST_MARGIN, round(_MARGIN * (stop - start)), (most - (stop - start)) // 2)
    return max(0, start - margin), min(size, stop + margin)


def _averaged(values: NDArray[Any], step: Sequence[int]) -> NDArray[Any]:
    """Return the means of blocks of `step` voxels; those at the end of an axis may be smaller."""
    for axis, length in enumerate(step):
        if length > 1:
            shape, before = values.shape, (slice(None),) * axis
            whole = shape[axis] // length * length
            blocks = values[(*before, slice(whole))].reshape(*shape[:axis], -1, length, *shape[axis + 1 :])
            means = [blocks.mean(axis=axis + 1, dtype=np.float32)]
            if whole < shape[axis]:
                means.append(values[(*before, slice(whole, None))].mean(axis=axis, dtype=np.float32, keepdims=True))
            values = np.concatenate(means, axis=axis)
    return values


def _flipped(values: NDArray[Any], ndim: int, flipped: bool) -> NDArray[Any]:
    return values[(slice(None, None, -1 if flipped else 1),) * ndim]


def _sheet(pixels: NDArray[np.uint8], ndim: int) -> tuple[int, NDArray[np.uint8]]:
    """Return how many slices are beside each other, and the picture of all."""
    slices = pixels if ndim == 3 else pixels[None]
    rows, columns = (-(-n // _BLOCK) * _BLOCK for n in slices.shape[1:3])
    beside = ceil(sqrt(len(slices)))
    below = ceil(len(slices) / beside)
    filling = ((0, beside * below - len(slices)), (0, rows - slices.shape[1]), (0, columns - slices.shape[2]))
    filled = np.pad(slices, (*filling, (0, 0))[: slices.ndim], mode="edge")
    tiles = filled.reshape(below, beside, rows, columns, *slices.shape[3:]).swapaxes(1, 2)
    return beside, np.ascontiguousarray(tiles.reshape(below * rows, beside * columns, *slices.shape[3:]))
