"""A large case as the network sees it, made row by row when it is asked for.

The image is read twice by region, or three times where it has a border of zeros: what normalisation must know of the
whole image is found in passes over it, then rows are read, normalised and resampled. They are those of
`segfit.preprocessing.pipeline.preprocess` but for the rounding of means and deviations, which here are summed in
float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import inf, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.cropping import Box, slices
from segfit.errors import InputError
from segfit.execution.scratch import Scratch
from segfit.fingerprint.appearance import sampling
from segfit.geometry import AxisMap
from segfit.images.image import Regions
from segfit.preprocessing.normalize import ChannelStatistics, normalize
from segfit.preprocessing.pipeline import CaseProperties, network_axes, properties_of, require_kind
from segfit.resampling import RowResampling, separate_axis
from segfit.specs import PreprocessingSpec

__all__ = ["CaseByRegion", "Survey", "survey", "why_whole"]

_PART = 2**22  # voxels of an image that are read at once


def why_whole(spec: PreprocessingSpec, spacing_mm: Sequence[float]) -> str:
    """Say why a case cannot be preprocessed row by row; nothing where it can. `spacing_mm` is on the network's axes."""
    if any(one.scheme == "zscore" and one.use_mask for one in spec.normalization):
        return "its normalisation asks which voxels lie inside the object"
    image = spec.resample_image
    target = spec.target_mm(spacing_mm)
    if image.method == "none" or target == tuple(spacing_mm):
        return ""
    if image.method == "torch":
        return "it is resampled by torch"
    across = separate_axis(spacing_mm, target, force=image.force_separate, threshold=image.separate_threshold)
    if across is not None and (across != 0 or image.order_separate_axis != 0):
        return "slices along another axis than the first are resampled one by one"
    return ""


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """What was found in passes over an image.

    Parameters
    ----------
    box : of the non-zero voxels, on the network's axes; the full extent if there are none
    extremes : lowest and highest value of each channel of the whole image, as stored
    statistics : of each channel inside the box
    sampled : voxels inside the box at the steps of `sampling`, (c, *spatial) on the network's axes
    """

    box: Box
    extremes: tuple[tuple[float, float], ...]
    statistics: tuple[ChannelStatistics, ...]
    sampled: NDArray[Any]


def survey(image: Regions, axes: AxisMap, name: str) -> Survey:
    """Pass over an image; `InputError` if it holds NaN or infinite values."""
    whole = tuple((0, n) for n in axes.permute(image.grid.shape))
    box, statistics, sampled = _pass(image, axes, whole, name)
    extremes = tuple((float(one.min), float(one.max)) for one in statistics)
    if box != whole:
        _, statistics, sampled = _pass(image, axes, box, name)
    return Survey(box, extremes, statistics, sampled)


def _pass(
    image: Regions, axes: AxisMap, box: Box, name: str
) -> tuple[Box, tuple[ChannelStatistics, ...], NDArray[Any]]:
    """Return the box of the non-zero voxels inside a box, and the statistics and sample of all that is inside."""
    low, high = np.full(image.channels, inf), np.full(image.channels, -inf)
    sums, squares = np.zeros(image.channels), np.zeros(image.channels)
    steps = sampling([stop - start for start, stop in box])
    sampled = np.zeros((image.channels, *(len(range(*one, step)) for one, step in zip(box, steps, strict=True))))
    found = [[stop, start] for start, stop in box]
    for part, voxels in _parts(image, axes, box):
        for number, channel in enumerate(voxels):
            wide = channel.ravel().astype(np.float64)
            low[number], high[number] = np.minimum(low[number], wide.min()), np.maximum(high[number], wide.max())
            with np.errstate(over="ignore"):  # values that are too large are told by their extremes
                sums[number] += wide.sum()
                squares[number] += wide @ wide
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise InputError(f"{name} contains NaN or infinite values", "replace them in the image file")
        mask = (voxels != 0).any(axis=0)
        for axis in range(mask.ndim):
            inside = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
            if inside.size:
                start = part[axis][0]
                found[axis] = [
                    min(found[axis][0], start + int(inside[0])),
                    max(found[axis][1], start + int(inside[-1]) + 1),
                ]
        first = [-(start - begin) % step for (start, _), (begin, _), step in zip(part, box, steps, strict=True)]
        taken = voxels[(slice(None), *(slice(a, None, step) for a, step in zip(first, steps, strict=True)))]
        places = [
            (start + a - begin) // step for (start, _), a, (begin, _), step in zip(part, first, box, steps, strict=True)
        ]
        sampled[(slice(None), *(slice(p, p + n) for p, n in zip(places, taken.shape[1:], strict=True)))] = taken
    voxels_inside = prod(stop - start for start, stop in box)
    statistics = []
    for least, most, total, square in zip(low, high, sums, squares, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            mean = total / voxels_inside
            deviation = sqrt(max(0.0, square / voxels_inside - mean**2))
            statistics.append(ChannelStatistics(*map(np.float32, (least, most, mean, deviation))))
    empty = any(start >= stop for start, stop in found)
    return box if empty else tuple((start, stop) for start, stop in found), tuple(statistics), sampled


class CaseByRegion:
    """A preprocessed case ``(c, *properties.shape)``, of which rows are made: ``case[:, start:stop]``.

    Parameters
    ----------
    image, found : the image, and what `survey` found in it on the axes of `spec`
    spec : one that `why_whole` has nothing against
    scratch : where rows are made
    """

    def __init__(
        self,
        image: Regions,
        found: Survey,
        spec: PreprocessingSpec,
        scratch: Scratch,
        case: str = "",
        source_files: Sequence[Path] = (),
    ) -> None:
        require_kind(image.grid, image.channels, spec, case)
        self._image, self._found, self._spec, self._scratch = image, found, spec, scratch
        self._axes = network_axes(image.grid, spec)
        self.properties: CaseProperties = properties_of(image.grid, spec, found.box, case, source_files)
        ends = np.array([(one.min, one.max) for one in found.statistics], np.float32)
        try:
            normalized = self._normalized(ends)
        except InputError as error:
            raise InputError(f"{case or 'the image'}: {error.problem}", error.action) from None
        spacing, resampling = self.properties.spacing_mm, spec.resample_image
        force, threshold = resampling.force_separate, resampling.separate_threshold
        across = separate_axis(spacing, spec.target_mm(spacing), force=force, threshold=threshold)
        self._resampling = RowResampling(
            self.properties.shape_after_crop,
            self.properties.shape,
            resampling,
            across,
            tuple((float(low), float(high)) for low, high in normalized),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels and the shape on the network's grid."""
        return self._image.channels, *self.properties.shape

    def __getitem__(self, index: tuple[slice, slice]) -> NDArray[np.float32]:
        """Return rows, the index being ``[:, start:stop]``."""
        start, stop, _ = index[1].indices(self.shape[1])
        low, high = self._resampling.needed(start, stop)
        (begin, _), *rest = self._found.box
        box = ((begin + low, begin + high), *rest)
        rows = self._scratch.zeros((self._image.channels, *(b - a for a, b in box)), np.float32)
        for part, voxels in _parts(self._image, self._axes, box):
            place = tuple((a - first, b - first) for (a, b), (first, _) in zip(part, box, strict=True))
            rows[(slice(None), *slices(place))] = self._normalized(voxels.astype(np.float32))
        if self.properties.shape == self.properties.shape_after_crop:
            return rows
        out: NDArray[np.float32] = self._scratch.zeros((len(rows), stop - start, *self.shape[2:]), np.float32)
        self._resampling.apply(rows, out, start)
        return out

    def _normalized(self, voxels: NDArray[np.float32]) -> NDArray[np.float32]:
        inside = np.zeros((1,) * (voxels.ndim - 1), np.int16)
        return normalize(voxels, inside, self._spec.normalization, statistics=self._found.statistics)


def _parts(image: Regions, axes: AxisMap, box: Box) -> Iterator[tuple[Box, NDArray[Any]]]:
    """Yield a box on the network's axes in parts, each whole chunks of the file where it can, with their voxels."""
    chunk = axes.permute(image.chunk)
    shape = axes.permute(image.grid.shape)
    sizes = list(chunk)
    for axis in reversed(range(len(sizes))):
        sizes[axis] = min(shape[axis], sizes[axis] * max(1, _PART // prod(sizes)))
    spans = []
    for (start, stop), size in zip(box, sizes, strict=True):
        edges = [start, *range((start // size + 1) * size, stop, size), stop]
        spans.append(list(pairwise(edges)))
    back = axes.inverse().order
    for part in product(*spans):
        stored = [
            (n - high, n - low) if flipped else (low, high)
            for (low, high), n, flipped in zip(part, shape, axes.flip, strict=True)
        ]
        yield part, axes.apply(image.read([slice(*stored[axis]) for axis in back]))
