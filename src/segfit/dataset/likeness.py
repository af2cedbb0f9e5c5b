"""Images that are copies of each other though their files differ: turned, mirrored, cropped or of other intensities.

A case has a small `Likeness`: a thumbnail of its first image, and the mean intensity along each axis. `copies` finds
pairs: profiles tell which axes correspond, in which direction and from which voxel on, and thumbnails laid over each
other in that way tell whether it is the same image. They are compared without what is smooth in them, which images of
one kind share, by values (robust to noise) and by ranks (robust to any contrast curve).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Likeness", "copies", "likeness"]

_Array = NDArray[np.float32]
_Place = tuple[float, float]
"""From where to where something lies along an axis of length 1."""
_CELLS = {2: 48, 3: 24}  # of a stored thumbnail along each axis, by number of axes
_COMPARED = {2: 32, 3: 16}  # the same where two are compared
_SHORTEST = 16  # voxels along an axis; smaller images have too few details to be told apart
_SAMPLES = 2**16  # voxels that are averaged, about; more change nothing that is seen in a thumbnail
_MOST_CROPPED = 6  # voxels along an axis, both ends together
_PROFILE = 24  # values that a profile is compared by
_LIKE_PROFILE = {2: 0.85, 3: 0.75}  # correlation of the slopes of two profiles; copies of 36 voxels less 6 have .8
_LIKE = (0.985, 0.965)  # correlation of details by values, by ranks: others have .976 and .958 at most (six datasets)
_LEAST_VALUES = 0.75  # the first of these in copies that the second tells
_LIKE_BESIDE = (0.9, 0.85)  # the same without what all images share, such as the edge of a field of view
_FEWEST_USUAL = 10  # images that show what all share
_PARTNERS = 16  # cases with the most similar profiles that a case is compared with
_LEVELS = 65535  # of values in a thumbnail
_STEP = 16  # of these levels: values that differ less have one rank
_MOST_CASES = 5000  # among which pairs are looked for
_PAIRS_AT_ONCE = 2**22  # of profiles


@dataclass(frozen=True, slots=True, eq=False)
class Likeness:
    """What an image is recognised by."""

    shape: tuple[int, ...]
    thumbnail: NDArray[np.uint16]
    profiles: tuple[NDArray[np.uint16], ...]  # mean of all voxels with the same index along an axis, as many as voxels


def likeness(array: NDArray[Any]) -> Likeness | None:
    """Return what an image (channel, *axes) is recognised by; None for one that is small, constant or not finite."""
    shape = array.shape[1:]
    if len(shape) not in _CELLS or min(shape) < _SHORTEST:
        return None
    cells = _CELLS[len(shape)]
    step = int((np.prod(shape, dtype=np.int64) / _SAMPLES) ** (1 / len(shape)))
    steps = [min(max(1, step), max(1, length // (2 * cells))) for length in shape]
    means: dict[tuple[int, ...], _Array] = {}  # small images are averaged once

    def mean(*every: int) -> _Array:
        if every not in means:
            means[every] = _mean(array, every)
        return means[every]

    thumbnail = mean(*steps)
    for axis, length in enumerate(thumbnail.shape):
        thumbnail = _along(_weights(length, 0, length, cells), thumbnail, axis)
    low, high = float(thumbnail.min()), float(thumbnail.max())
    if not 0 < high - low < np.inf:
        return None
    rows, columns = mean(*steps[:-2], 1, steps[-1]), mean(*steps[:-1], 1)
    profiles = [rows.mean(axis=-1), columns.mean(axis=-2)]
    if len(shape) == 3:
        depths = mean(1, *steps[1:])
        profiles = [depths.mean(axis=(1, 2)), *(one.mean(axis=0) for one in profiles)]
    scaled = [
        ((one - low) * (_LEVELS / (high - low))).clip(0, _LEVELS).astype(np.uint16) for one in (thumbnail, *profiles)
    ]
    return Likeness(shape, scaled[0], tuple(scaled[1:]))


def _mean(array: NDArray[Any], steps: Sequence[int]) -> _Array:
    """Return the mean over channels at every so many voxels along each axis."""
    part = array[(slice(None), *(slice(None, None, step) for step in steps))]
    return np.asarray(part[0] if len(part) == 1 else part.mean(axis=0, dtype=np.float32), dtype=np.float32)


def _along(matrix: _Array, array: _Array, axis: int) -> _Array:
    """Return an array with the matrix applied to the values along one axis."""
    if axis == array.ndim - 1:
        return np.asarray(array @ matrix.T)
    flat = array.reshape(*array.shape[: axis + 1], -1)
    return np.asarray((matrix @ flat).reshape(*array.shape[:axis], len(matrix), *array.shape[axis + 1 :]))


@cache
def _weights(length: int, start: float, stop: float, cells: int) -> _Array:
    """Return the matrix (cells, length) that averages what lies between two places into equal cells."""
    return np.asarray(_all_weights(length, np.array([start]), np.array([stop]), cells)[0])


def _all_weights(length: int, starts: NDArray[Any], stops: NDArray[Any], cells: int) -> _Array:
    """Return `_weights` for several pairs of places: (pair, cell, index)."""
    edges = starts[:, None] + (stops - starts)[:, None] * (np.arange(cells + 1) / cells)
    index = np.arange(length)
    inside = (np.minimum(edges[:, 1:, None], index + 1) - np.maximum(edges[:, :-1, None], index)).clip(min=0)
    return np.asarray(inside / inside.sum(axis=2, keepdims=True), dtype=np.float32)


@cache
def _smooth(cells: int) -> _Array:
    """Return the matrix that smooths along an axis with a Gaussian of 2 cells."""
    index = np.arange(cells)
    kernel = np.exp(-((index[:, None] - index) ** 2) / 8)
    return np.asarray(kernel / kernel.sum(axis=1, keepdims=True), dtype=np.float32)


def _unit(values: _Array) -> _Array:
    """Return values along the last axis with mean 0 and length 1; zeros for constants."""
    centred = values - values.mean(axis=-1, keepdims=True)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    return np.asarray(centred / np.where(length > 1e-6, length, np.inf), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _Profiles:
    """The profiles of all axes of all cases, alike in number of axes."""

    lengths: NDArray[np.int64]  # of each axis of each case, case by case
    values: dict[int, tuple[NDArray[np.int64], _Array]]  # by length: which they are, and their profiles

    @classmethod
    def of(cls, items: Sequence[Likeness]) -> _Profiles:
        lengths = np.array([length for item in items for length in item.shape])
        profiles = [profile for item in items for profile in item.profiles]
        return cls(
            lengths,
            {
                int(length): (which, np.stack([profiles[n] for n in which]).astype(np.float32))
                for length in np.unique(lengths)
                for which in [np.flatnonzero(lengths == length)]
            },
        )

    def cut(self, length: int, shortest: int) -> _Array:
        """Return the profiles of a length from all places on, down to the shortest: (way to cut, profile, slope)."""
        cuts = [(start, start + size) for size in range(length, shortest - 1, -1) for start in range(length - size + 1)]
        starts, stops = np.array(cuts).T
        weights = _all_weights(length, starts, stops, _PROFILE)
        parts = (self.values[length][1] @ weights.reshape(-1, length).T).reshape(-1, len(cuts), _PROFILE)
        return _unit(np.diff(parts.swapaxes(0, 1)))

    def compare(self, first: int, last: int) -> tuple[_Array, NDArray[np.int8]]:
        """Compare the axes from `first` to `last` with all: correlation, and voxel from which the longer corresponds.

        Both have the axes (axis, axis, whether one of the two is mirrored).
        """
        size = (last - first, len(self.lengths), 2)
        best, starts = np.zeros(size, np.float32), np.zeros(size, np.int8)
        lengths = sorted(self.values)
        inside = {
            length: (which[chosen] - first, chosen)
            for length, (which, _) in self.values.items()
            for chosen in [np.flatnonzero((which >= first) & (which < last))]
        }
        for length in lengths:
            least = length - min(_MOST_CROPPED, length // 4)
            near = [
                one for one in lengths if least <= one <= length and (len(inside[one][0]) or len(inside[length][0]))
            ]
            parts = self.cut(length, min(near)) if near else np.zeros(0)
            for shorter in near:
                cut = length - shorter
                part = parts[cut * (cut + 1) // 2 : (cut + 1) * (cut + 2) // 2]
                found = np.stack([part @ side for side in self.sides(shorter)], axis=-1)
                start, value = found.argmax(axis=0), found.max(axis=0)
                rows, chosen = inside[length]
                place = np.ix_(rows, self.values[shorter][0])
                best[place], starts[place] = value[chosen], start[chosen]
                rows, chosen = inside[shorter]
                place = np.ix_(rows, self.values[length][0])
                best[place], starts[place] = value[:, chosen].swapaxes(0, 1), start[:, chosen].swapaxes(0, 1)
        return best, starts

    def sides(self, length: int) -> tuple[_Array, _Array]:
        """Return the whole profiles of a length as they are and mirrored, as columns."""
        whole = self.cut(length, length)[0]
        return whole.T, -whole[:, ::-1].T


def copies(items: Sequence[Likeness | None]) -> Iterator[tuple[int, int]]:
    """Yield the numbers of two images each that are copies of each other, the smaller first."""
    for ndim in _CELLS:
        numbers = [number for number, item in enumerate(items) if item is not None and len(item.shape) == ndim]
        alike = [item for number in numbers if (item := items[number]) is not None]
        if 1 < len(alike) <= _MOST_CASES:
            yield from ((numbers[one], numbers[two]) for one, two in _copies(alike, ndim))


def _copies(items: Sequence[Likeness], ndim: int) -> Iterator[tuple[int, int]]:
    profiles, orders, comparison = _Profiles.of(items), list(permutations(range(ndim))), _Comparison(items)
    rows = max(1, _PAIRS_AT_ONCE // (len(items) * ndim**2))
    for first in range(0, len(items), rows):
        last = min(first + rows, len(items))
        best, starts = profiles.compare(first * ndim, last * ndim)
        by_axis = best.max(axis=2).reshape(last - first, ndim, len(items), ndim)
        by_order = [np.min([by_axis[:, n, :, axis] for n, axis in enumerate(order)], axis=0) for order in orders]
        likest = np.max(by_order, axis=0)
        likest[np.arange(len(items)) <= np.arange(first, last)[:, None]] = 0
        for row in np.flatnonzero((likest >= _LIKE_PROFILE[ndim]).any(axis=1)).tolist():
            partners = np.argsort(-likest[row], kind="stable")[:_PARTNERS]
            for other in partners[likest[row, partners] >= _LIKE_PROFILE[ndim]].tolist():
                place = np.s_[row * ndim : (row + 1) * ndim, other * ndim : (other + 1) * ndim]
                if comparison.same(first + row, other, best[place], starts[place]):
                    yield first + row, other


class _Comparison:
    """Compares images by their thumbnails."""

    def __init__(self, items: Sequence[Likeness]) -> None:
        self._items = items
        self._whole: dict[tuple[int, bool], _Array] = {}
        self._usual: _Array | None = None
        if len(items) >= _FEWEST_USUAL:
            self._usual = np.mean([item.thumbnail for item in items], axis=0, dtype=np.float32)

    def same(self, one: int, two: int, best: _Array, starts: NDArray[np.int8]) -> bool:
        """Return whether two images are copies; `best` and `starts` are what `_Profiles.compare` says of their axes."""
        first, second = self._items[one].shape, self._items[two].shape
        ndim = len(first)
        for order, mirrored in product(permutations(range(ndim)), product((0, 1), repeat=ndim)):
            ways = list(zip(range(ndim), order, mirrored, strict=True))
            if min(best[way] for way in ways) < _LIKE_PROFILE[ndim]:
                continue
            pairs = [(first[n], second[axis], int(starts[n, axis, mirror])) for n, axis, mirror in ways]
            own = [_place(length, other, start) for length, other, start in pairs]
            turned = [_place(other, length, start) for length, other, start in pairs]
            others = [turned[order.index(axis)] for axis in range(ndim)]
            flips = tuple(slice(None, None, -1 if mirror else 1) for mirror in mirrored)
            found = 0.0
            for ranked, least in enumerate(_LIKE):
                parts = self._details(one, own, bool(ranked)), self._details(two, others, bool(ranked))
                details = parts[0], parts[1].transpose(order)[flips]
                found = float(np.vdot(*details))
                if found >= least and self._beside_usual(*details, own, bool(ranked)) >= _LIKE_BESIDE[ranked]:
                    return True
                if found < _LEAST_VALUES:
                    break
        return False

    def _details(self, number: int, places: Sequence[_Place], ranked: bool) -> _Array:
        """Return the details of an image between two places along each axis."""
        if any(place != (0, 1) for place in places):
            return _details(self._items[number].thumbnail, places, ranked)
        if (number, ranked) not in self._whole:
            self._whole[number, ranked] = _details(self._items[number].thumbnail, places, ranked)
        return self._whole[number, ranked]

    def _beside_usual(self, one: _Array, two: _Array, places: Sequence[_Place], ranked: bool) -> float:
        """Return the correlation of details without what all images share there."""
        if self._usual is None:
            return 1.0
        usual = _details(self._usual, places, ranked)
        left = [_unit((part - np.vdot(part, usual) * usual).reshape(-1)) for part in (one, two)]
        return float(np.vdot(*left))


def _place(length: int, other: int, start: int) -> _Place:
    """Return which part of an axis corresponds to one of another length, from a voxel on if that is shorter."""
    return (0, 1) if other >= length else (start / length, (start + other) / length)


def _details(thumbnail: NDArray[Any], places: Sequence[_Place], ranked: bool) -> _Array:
    """Return what a thumbnail has between two places along each axis beside what is smooth in it, with length 1.

    That is of its values, or of their ranks.
    """
    cells, stored = _COMPARED[len(places)], _CELLS[len(places)]
    values = thumbnail.astype(np.float32)
    for axis, (start, stop) in enumerate(places):
        values = _along(_weights(stored, start * stored, stop * stored, cells), values, axis)
    if ranked:
        steps = np.round(values.reshape(-1) / _STEP)  # what is flat stays flat
        values = np.unique(steps, return_inverse=True)[1].astype(np.float32).reshape(values.shape)
    smooth = values
    for axis in range(values.ndim):
        smooth = _along(_smooth(cells), smooth, axis)
    return _unit((values - smooth).reshape(-1)).reshape(values.shape)
