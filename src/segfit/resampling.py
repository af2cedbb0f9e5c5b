"""Resampling to another grid size: separable spline interpolation as small banded matrices.

Along one axis, interpolation from `old` to `new` samples is linear, hence a matrix (new, old). For the cubic spline it
is the product of the B-spline weights and the inverse of the B-spline prefilter, whose entries fall off as
(2 - sqrt 3)^k, so that the matrix is banded. It is built once per (old, new, order) and applied axis by axis.

Rules follow the reference's default resampler (spec: preprocessing, sections 3, 5 and 6): half-pixel centres, edge
values repeated, no anti-aliasing, a strongly anisotropic axis resampled on its own by nearest neighbour.
Pure numpy; the alternative method "torch" loads torch when it is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["AxisOperator", "Method", "axis_operator", "new_shape", "resample_image", "resample_labels", "separate_axis"]

Method = Literal["spline", "torch", "none"]

_POLE = np.sqrt(3.0) - 2.0  # of the cubic B-spline prefilter
_REACH = 16  # samples on each side that the prefilter looks at; what is left out is below 1e-9 of the range
_FAR_REACH = 24  # and below 1e-13, for work in float64
_ROWS = 32  # output samples per matrix product: wide enough for BLAS, narrow enough to stay near the band
_SLAB_BYTES = 1 << 22  # of output that is worked on at a time
_CHUNK = 1 << 18  # mixed label voxels decided at a time
_LARGE, _FAR = 128, 16  # beyond this value, and this many times the range, float32 rounds visibly: see `_working`


def new_shape(shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float | None]) -> tuple[int, ...]:
    """Return the voxels per axis at the target spacing, at least 1; None keeps an axis as it is.

    Rounds half to even, evaluated as (spacing / target) * n in float64 like the reference.
    """
    return tuple(
        n if target is None else max(1, round((spacing / target) * n))
        for n, spacing, target in zip(shape, spacing_mm, target_mm, strict=True)
    )


def separate_axis(
    current_mm: Sequence[float],
    new_mm: Sequence[float],
    *,
    force: bool | None = None,
    threshold: float = 3.0,
) -> int | None:
    """Return the axis that is resampled on its own, or None.

    It is the coarsest axis of the current spacing if that is anisotropic beyond `threshold`, else of the new spacing.
    Two equally coarse axes cancel it. `force` True takes the coarsest current axis whatever the ratio, False never
    separates. 2D images never separate.
    """
    if force is False or len(current_mm) < 3:
        return None
    if force or max(current_mm) / min(current_mm) > threshold:
        spacing = current_mm
    elif max(new_mm) / min(new_mm) > threshold:
        spacing = new_mm
    else:
        return None
    coarsest = [axis for axis, value in enumerate(spacing) if value == max(spacing)]
    return coarsest[0] if len(coarsest) == 1 else None


@dataclass(frozen=True, slots=True, eq=False)
class AxisOperator:
    """The interpolation matrix (new, old) of one axis, stored as its band.

    Output sample j is ``weights[j] @ x[starts[j] : starts[j] + width]``. Rows sum to 1; `starts` never decreases, so
    a run of output samples depends on one contiguous run of inputs. Arrays are read-only and shared.
    """

    old: int
    new: int
    order: int
    starts: NDArray[np.intp]  # (new,)
    weights: NDArray[np.float64]  # (new, width)

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes: interpolation at the samples themselves."""
        return self.old == self.new

    def rows(self, start: int, stop: int) -> tuple[int, int, NDArray[np.float64]]:
        """Return ``(low, high, matrix)``: outputs [start, stop) are ``matrix @ x[low:high]``."""
        low, high = int(self.starts[start]), int(self.starts[stop - 1]) + self.weights.shape[1]
        matrix = np.zeros((stop - start, high - low))
        columns = self.starts[start:stop, None] - low + np.arange(self.weights.shape[1])
        np.put_along_axis(matrix, columns, self.weights[start:stop], axis=1)
        return low, high, matrix

    def dense(self) -> NDArray[np.float64]:
        """Return the whole matrix, (new, old)."""
        low, high, band = self.rows(0, self.new)
        matrix = np.zeros((self.new, self.old))
        matrix[:, low:high] = band
        return matrix

    def part(self, array: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
        """Return the outputs [start, stop) of interpolating `array` along its first axis; dtypes as in `apply`."""
        if self.order == 0:
            chosen: NDArray[Any] = array[self.starts[start:stop]]
            return chosen
        low, high, matrix = self.rows(start, stop)
        lines: NDArray[Any] = matrix.astype(array.dtype) @ array[low:high].reshape(high - low, -1)
        return lines.reshape(stop - start, *array.shape[1:])

    def apply(self, array: NDArray[Any], axis: int) -> NDArray[Any]:
        """Interpolate `array` along `axis`, one block of the band at a time.

        The dtype is kept: float32 or float64, for order 0 any.
        """
        if self.is_identity:
            return array
        axis %= array.ndim
        if self.order == 0:
            return array.take(self.starts, axis=axis)
        lead, trail = array.shape[:axis], array.shape[axis + 1 :]
        source = np.ascontiguousarray(array).reshape(-1, self.old, int(np.prod(trail)))
        result = np.empty((source.shape[0], self.new, source.shape[2]), dtype=array.dtype)
        for start in range(0, self.new, _ROWS):
            stop = min(start + _ROWS, self.new)
            low, high, matrix = self.rows(start, stop)
            matrix = matrix.astype(array.dtype)
            if trail:
                np.matmul(matrix, source[:, low:high], out=result[:, start:stop])
            else:  # the last axis: one product for all lines at once
                np.matmul(source[:, low:high, 0], matrix.T, out=result[:, start:stop, 0])
        return result.reshape(*lead, self.new, *trail)


@lru_cache(maxsize=64)
def axis_operator(old: int, new: int, order: int, reach: int = _REACH) -> AxisOperator:
    """Return the matrix that interpolates `old` samples at the centres of `new` ones.

    Parameters
    ----------
    order : 0 nearest (ties go up), 1 linear, 3 interpolating cubic B-spline; beyond the ends the edge values repeat

    The cubic spline prefilter sees an endless repetition of the edge; the reference repeats it 12 times and mirrors
    that, which differs by less than 1e-11 of the range.
    """
    if order not in (0, 1, 3):
        raise InputError(f"resampling knows the orders 0, 1 and 3, got {order}; change the plan's resampling order")
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    if order == 0:
        first = np.floor(centres + 0.5)
        kernel = np.ones((new, 1))
    elif order == 1:
        centres = centres.clip(0, old - 1)
        first = np.floor(centres)
        kernel = np.stack([1.0 - (centres - first), centres - first], axis=1)
    else:
        first = np.floor(centres)
        kernel = _cardinal_spline(centres - first, reach)
        first = first - 1 - reach
    taps = kernel.shape[1]
    width = min(taps, old)
    first = first.astype(np.intp)
    starts = first.clip(0, old - width)
    columns = (first[:, None] + np.arange(taps)).clip(0, old - 1) - starts[:, None]
    weights = np.zeros((new, width))
    np.add.at(weights, (np.arange(new)[:, None], columns), kernel)
    if order == 3:
        weights /= weights.sum(axis=1, keepdims=True)  # a constant stays that constant
    starts.flags.writeable = False
    weights.flags.writeable = False
    return AxisOperator(old, new, order, starts, weights)


def _cardinal_spline(fraction: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Return the weights of samples -1 - reach ... 2 + reach for a point at `fraction` between samples 0 and 1.

    The prefilter's impulse response is sqrt(3) * pole^|k|; it is summed over the four B-splines around the point.
    """
    taps = np.arange(-1 - reach, 3 + reach)
    kernel = np.zeros((fraction.size, taps.size))
    for knot in (-1, 0, 1, 2):
        distance = np.abs(fraction - knot)
        spline = np.where(distance < 1, (4 - 6 * distance**2 + 3 * distance**3) / 6, (2 - distance) ** 3 / 6)
        kernel += spline[:, None] * (np.sqrt(3.0) * _POLE ** np.abs(taps - knot))
    return kernel


def resample_image(
    array: NDArray[np.floating[Any]],
    shape: Sequence[int],
    current_mm: Sequence[float],
    new_mm: Sequence[float],
    *,
    method: Method = "spline",
    order: int = 3,
    order_separate_axis: int = 0,
    force_separate: bool | None = None,
    separate_threshold: float = 3.0,
) -> NDArray[Any]:
    """Resample ``(c, *spatial)`` intensities or scores to the spatial `shape`.

    Spacings in mm, array order, decide only whether an axis is treated on its own. Each channel (each slice, when an
    axis is separate) stays within the range it had. Computed in float32, in float64 for float64 input and for
    channels of large values; the dtype is kept. Equal shapes return the input itself.
    """
    shape = tuple(shape)
    if array.shape[1:] == shape or method == "none":
        return array
    separate = separate_axis(current_mm, new_mm, force=force_separate, threshold=separate_threshold)
    if method == "torch":
        return _torch_image(array, shape, separate)
    result = np.empty((array.shape[0], *shape), dtype=array.dtype)
    for channel, target in zip(array, result, strict=True):
        volume = _working(channel)
        if separate is None:
            _resize(volume, target, order, tuple(range(volume.ndim)))
        else:
            _resize_slices(volume, target, order, order_separate_axis, separate)
    return result


def _working(channel: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return the channel in the precision that it is computed in.

    float32 rounds by 6e-8 of the largest value in every sum. Normalised channels do not notice; raw ones, and those
    that vary little around a large value, would be off by more than their last digit.
    """
    if channel.dtype != np.float64 and channel.size:
        low, high = float(channel.min()), float(channel.max())
        largest = max(-low, high)
        if largest <= min(_LARGE, _FAR * (high - low)):
            return channel.astype(np.float32, copy=False)
    return channel.astype(np.float64, copy=False)


def _resize(
    volume: NDArray[np.floating[Any]], out: NDArray[np.floating[Any]], order: int, axes: tuple[int, ...]
) -> None:
    """Resize `axes` into `out` and clip to the range that each sub-array along `axes` had.

    The work goes slab by slab along the first axis, so that what lies between two axes stays in the processor's cache.
    The first axis comes first where it shrinks and last where it grows; the others in the order of their shrinking.
    """
    reach = _FAR_REACH if volume.dtype == np.float64 else _REACH
    operators = {axis: axis_operator(volume.shape[axis], out.shape[axis], order, reach) for axis in axes}
    inner = sorted((axis for axis in axes if axis > 0), key=lambda a: out.shape[a] / volume.shape[a])
    first = operators[0] if 0 in axes and not operators[0].is_identity else None
    grows = first is not None and first.new > first.old
    low = volume.min(axis=axes, keepdims=True) if order > 0 else None
    high = volume.max(axis=axes, keepdims=True) if order > 0 else None

    def within(part: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        for axis in inner:
            part = operators[axis].apply(part, axis)
        return part

    middle = np.empty((volume.shape[0], *out.shape[1:]), dtype=volume.dtype) if grows else out
    if first is None or grows:
        for start, stop in _slabs(middle):
            middle[start:stop] = within(volume[start:stop])
    if first is not None:
        for start, stop in _slabs(out):
            part = first.part(middle if grows else volume, start, stop)
            out[start:stop] = part if grows else within(part)
    if low is not None and high is not None:
        for start, stop in _slabs(out):
            rows = slice(start, stop) if low.shape[0] > 1 else slice(None)
            np.clip(out[start:stop], low[rows], high[rows], out=out[start:stop])


def _resize_slices(
    volume: NDArray[np.floating[Any]], out: NDArray[np.floating[Any]], order: int, order_across: int, across: int
) -> None:
    """Resize every slice in its plane, then along the axis `across`."""
    plane = tuple(axis for axis in range(volume.ndim) if axis != across)
    operator = axis_operator(volume.shape[across], out.shape[across], order_across)
    if order_across == 0 and operator.new < operator.old:  # choose the slices before resizing them: same result
        _resize(operator.apply(volume, across), out, order, plane)
        return
    if operator.is_identity:
        _resize(volume, out, order, plane)
        return
    resized = np.empty([volume.shape[a] if a == across else n for a, n in enumerate(out.shape)], dtype=volume.dtype)
    _resize(volume, resized, order, plane)
    out[...] = operator.apply(resized, across)


def _slabs(array: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield ranges along the first axis of about `_SLAB_BYTES`."""
    rows = max(1, _SLAB_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        yield start, min(start + rows, len(array))


def resample_labels(
    labels: NDArray[np.integer[Any]],
    shape: Sequence[int],
    current_mm: Sequence[float],
    new_mm: Sequence[float],
    *,
    method: Method = "spline",
    order: int = 1,
    order_separate_axis: int = 0,
    force_separate: bool | None = None,
    separate_threshold: float = 3.0,
) -> NDArray[Any]:
    """Resample an integer label map ``(*spatial)``; the dtype is kept, equal shapes return the input itself.

    Every label's indicator is interpolated linearly and the largest score wins. Ties go to the nearest neighbour's
    label if it is among them, else to the smallest label (the reference's current rule).
    """
    shape = tuple(shape)
    if labels.shape == shape or method == "none":
        return labels
    if order not in (0, 1) or order_separate_axis != 0:
        raise InputError(
            f"labels are resampled with order 0 or 1 and order 0 along a separate axis, got {order} and "
            f"{order_separate_axis}; change the plan's label resampling"
        )
    resize = _torch_votes if method == "torch" else _linear_votes if order == 1 else _nearest
    separate = separate_axis(current_mm, new_mm, force=force_separate, threshold=separate_threshold)
    if separate is None:
        return resize(labels, shape)
    # Whole slices are chosen along the separate axis, which commutes with work inside them: resize the fewer ones.
    chosen = tuple(n if axis == separate else labels.shape[axis] for axis, n in enumerate(shape))
    if shape[separate] < labels.shape[separate]:
        return resize(_nearest(labels, chosen), shape)
    resized = tuple(labels.shape[axis] if axis == separate else n for axis, n in enumerate(shape))
    return _nearest(resize(labels, resized), shape)


def _nearest(labels: NDArray[np.integer[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
    for axis, (old, new) in enumerate(zip(labels.shape, shape, strict=True)):
        labels = axis_operator(old, new, 0).apply(labels, axis)
    return labels


def _linear_votes(labels: NDArray[np.integer[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
    """Resize by the vote of the surrounding voxels, without an indicator per label.

    An output voxel depends on 2^d corners. Where they agree the result is known; elsewhere, a thin layer around the
    boundaries, each corner's label collects the weights of the corners that share it.
    """
    axes = [axis for axis in range(labels.ndim) if labels.shape[axis] != shape[axis]]
    if not axes:
        return labels
    corners = {axis: _corners(labels.shape[axis], shape[axis]) for axis in axes}
    order = sorted(axes, key=lambda a: shape[a] / labels.shape[a])
    result = np.empty(shape, dtype=labels.dtype)
    for start, stop in _slabs(result):
        source, bounds = slice(start, stop), {axis: corners[axis][:2] for axis in axes}
        if 0 in bounds:
            below, above = (index[start:stop] for index in bounds[0])
            source = slice(int(below[0]), int(above[-1]) + 1)
            bounds[0] = below - source.start, above - source.start
        low = high = labels[source]
        for axis in order:
            low = np.minimum(*(low.take(index, axis) for index in bounds[axis]))
            high = np.maximum(*(high.take(index, axis) for index in bounds[axis]))
        result[start:stop] = low
        mixed = np.flatnonzero(low != high) + start * low[0].size
        for first in range(0, mixed.size, _CHUNK):
            flat = mixed[first : first + _CHUNK]
            result.ravel()[flat] = _vote(labels, shape, np.unravel_index(flat, shape), corners)
    return result


def _corners(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Return, per output sample, the input samples below and above and the weight of the upper one."""
    centres = ((np.arange(new) + 0.5) * (old / new) - 0.5).clip(0, old - 1)
    below = np.floor(centres).astype(np.intp)
    fraction = centres - below
    return below, np.where(fraction > 0, below + 1, below), fraction


def _vote(
    labels: NDArray[np.integer[Any]],
    shape: tuple[int, ...],
    points: tuple[NDArray[np.intp], ...],
    corners: dict[int, tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]],
) -> NDArray[Any]:
    """Return the winning label at `points` (one index array per axis) of the output `shape`.

    Weights are multiplied in axis order and summed in C order over the corners, in float64: rounding, and with it
    the decision at ties, is that of a plain d-linear interpolation of each indicator.
    """
    values, weights = [], []
    for choice in itertools.product((0, 1), repeat=len(corners)):
        index = list(points)
        weight: NDArray[np.float64] | None = None
        for (axis, (below, above, fraction)), upper in zip(corners.items(), choice, strict=True):
            position = points[axis]
            index[axis] = (above if upper else below)[position]
            factor = fraction[position] if upper else 1.0 - fraction[position]
            weight = factor if weight is None else weight * factor
        assert weight is not None
        values.append(labels[tuple(index)])
        weights.append(weight)
    near = [axis_operator(old, new, 0).starts[p] for old, new, p in zip(labels.shape, shape, points, strict=True)]
    nearest = labels[tuple(near)]
    winner, best = values[0], np.full(nearest.size, -1.0)
    for value in values:
        score = np.zeros(nearest.size)
        for other, weight in zip(values, weights, strict=True):
            score += np.where(other == value, weight, 0.0)
        # Among equal scores: the nearest neighbour's label first, then the smallest.
        preferred = (winner != nearest) & ((value == nearest) | (value < winner))
        better = (score > best) | ((score == best) & preferred)
        winner = np.where(better, value, winner)
        best = np.where(better, score, best)
    return winner


def _torch_image(array: NDArray[np.floating[Any]], shape: tuple[int, ...], separate: int | None) -> NDArray[Any]:
    """Linear interpolation by torch of all channels at once, in float32."""
    import torch

    source = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    axes = [axis for axis in range(len(shape)) if axis != separate]
    return _nearest_across(_torch_linear(source, shape, axes).numpy(), shape, separate).astype(array.dtype)


def _nearest_across(array: NDArray[Any], shape: tuple[int, ...], separate: int | None) -> NDArray[Any]:
    if separate is None:
        return array
    return axis_operator(array.shape[1 + separate], shape[separate], 0).apply(array, 1 + separate)


def _torch_linear(source: torch.Tensor, shape: tuple[int, ...], axes: Sequence[int]) -> torch.Tensor:
    """Interpolate the spatial `axes` of ``(c, *spatial)`` linearly; the other axes are merged into the channels."""
    from torch.nn.functional import interpolate

    kept = [0, *(1 + axis for axis in range(len(shape)) if axis not in axes)]
    moved = source.permute(*kept, *(1 + axis for axis in axes))
    merged = moved.reshape(1, -1, *moved.shape[len(kept) :])
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(axes)]
    resized = interpolate(merged, size=[shape[axis] for axis in axes], mode=mode)
    unmerged = resized.reshape(*moved.shape[: len(kept)], *resized.shape[2:])
    back = np.argsort([*kept, *(1 + axis for axis in axes)])
    return unmerged.permute(*(int(axis) for axis in back))


def _labels_ascending(labels: NDArray[np.integer[Any]]) -> Iterator[int]:
    return (int(value) for value in np.unique(labels))


def _torch_votes(labels: NDArray[np.integer[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
    """Let the largest half-precision score win, the smallest label on ties, as the reference's torch resampler does.

    Its scores are 1000 times the indicator in float16, which is where its ties come from.
    """
    import torch

    axes = [axis for axis in range(labels.ndim) if labels.shape[axis] != shape[axis]]
    if not axes:
        return labels
    source = torch.from_numpy(np.ascontiguousarray(labels))[None]
    best = torch.full((1, *shape), -1.0, dtype=torch.float16)
    winner = torch.zeros((1, *shape), dtype=source.dtype)
    for value in _labels_ascending(labels):
        score = _torch_linear((source == value).float() * 1000, shape, axes).half()
        better = score > best
        winner[better] = value
        best = torch.where(better, score, best)
    result: NDArray[Any] = winner[0].numpy()
    return result
