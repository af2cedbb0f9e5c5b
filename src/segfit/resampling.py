"""Resampling to another grid size: separable interpolation, axis by axis (see `segfit.interpolation`).

Rules follow nnU-Net's default resampler (spec: preprocessing, sections 3, 5 and 6): half-pixel centres, edge
values repeated, no anti-aliasing, a strongly anisotropic axis resampled on its own by nearest neighbour.
Pure numpy; the alternative method "torch" loads torch when it is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from segfit.cropping import bounding_box
from segfit.errors import InputError
from segfit.interpolation import FAR_REACH, REACH, AxisOperator, axis_operator
from segfit.specs import ResamplingSpec

if TYPE_CHECKING:
    import torch

__all__ = ["RowResampling", "new_shape", "resample_image", "resample_labels", "separate_axis"]

_CUBIC, _LINEAR = ResamplingSpec(order=3), ResamplingSpec(order=1)
_SLAB_BYTES = 1 << 22  # of output that is worked on at a time
_CHUNK = 1 << 18  # mixed label voxels decided at a time
_LARGE, _FAR = 128, 16  # beyond this value, and this many times the range, float32 rounds visibly: see `_working`


def new_shape(shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float | None]) -> tuple[int, ...]:
    """Return the voxels per axis at the target spacing, at least 1; None keeps an axis as it is.

    Rounds half to even, evaluated as (spacing / target) * n in float64 like nnU-Net.
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


def resample_image(
    array: NDArray[np.floating[Any]],
    shape: Sequence[int],
    current_mm: Sequence[float],
    new_mm: Sequence[float],
    spec: ResamplingSpec = _CUBIC,
) -> NDArray[Any]:
    """Resample ``(c, *spatial)`` intensities or logits to the spatial `shape`.

    Spacings in mm, array order, decide only whether an axis is treated on its own. Each channel (each slice, when an
    axis is separate) stays within the range it had. Computed in float32, in float64 for float64 input and for
    channels of large values; the dtype is kept. Equal shapes return the input itself.
    """
    shape = tuple(shape)
    if array.shape[1:] == shape or spec.method == "none":
        return array
    separate = separate_axis(current_mm, new_mm, force=spec.force_separate, threshold=spec.separate_threshold)
    if spec.method == "torch":
        return _torch_image(array, shape, separate)
    result = np.empty((array.shape[0], *shape), dtype=array.dtype)
    for channel, target in zip(array, result, strict=True):
        volume = _working(channel)
        if separate is None:
            _resize(volume, target, spec.order, tuple(range(volume.ndim)))
        else:
            _resize_slices(volume, target, spec.order, spec.order_separate_axis, separate)
    return result


@dataclass(frozen=True, slots=True)
class RowResampling:
    """What `resample_image` does with a float32 image, for a part of the rows along its first spatial axis at a time.

    Parameters
    ----------
    old, new : spatial shapes
    spec : how; not by torch
    separate : from `separate_axis`: the first axis or none
    limits : lowest and highest value of each channel of the whole image
    """

    old: tuple[int, ...]
    new: tuple[int, ...]
    spec: ResamplingSpec
    separate: int | None
    limits: tuple[tuple[float, float], ...]

    @property
    def _dtype(self) -> type[np.floating[Any]]:
        wide = any(_is_wide(low, high) for low, high in self.limits)
        return np.float64 if wide else np.float32

    def _operator(self, axis: int) -> AxisOperator:
        order = self.spec.order_separate_axis if axis == self.separate else self.spec.order
        reach = FAR_REACH if self._dtype is np.float64 else REACH
        return axis_operator(self.old[axis], self.new[axis], order, reach)

    def needed(self, start: int, stop: int) -> tuple[int, int]:
        """Return which rows, half-open, the rows [start, stop) of the result are made of."""
        first = self._operator(0)
        if self.old == self.new or first.is_identity:
            return start, stop
        return int(first.starts[start]), int(first.starts[stop - 1]) + first.weights.shape[1]

    def apply(self, rows: NDArray[np.float32], out: NDArray[np.float32], start: int) -> None:
        """Make the rows of the result from `start` on, as many as `out` (c, n, *rest) has, of those they need."""
        first = self._operator(0)
        low, _ = self.needed(start, start + out.shape[1])
        inner = sorted(range(1, len(self.old)), key=lambda a: self.new[a] / self.old[a])
        for channel, target, (least, most) in zip(rows, out, self.limits, strict=True):
            for begin, end in _slabs(target):
                if first.is_identity:
                    part = channel[begin:end]
                elif first.order == 0:
                    part = channel[first.starts[start + begin : start + end] - low]
                else:
                    above, below, matrix = first.rows(start + begin, start + end)
                    lines = matrix.astype(self._dtype) @ channel[above - low : below - low].reshape(below - above, -1)
                    part = lines.reshape(end - begin, *channel.shape[1:])
                part = part.astype(self._dtype, copy=False)
                limits = (least, most)
                if self.separate is not None and self.spec.order > 0:  # every slice keeps its own range
                    plane = tuple(range(1, part.ndim))
                    limits = (part.min(plane, keepdims=True), part.max(plane, keepdims=True))
                for axis in inner:
                    part = self._operator(axis).apply(part, axis)
                target[begin:end] = part if self.spec.order == 0 else np.clip(part, *limits)


def _working(channel: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return the channel in the precision that it is computed in.

    float32 rounds by 6e-8 of the largest value in every sum. Normalised channels do not notice; raw ones, and those
    that vary little around a large value, would be off by more than their last digit.
    """
    narrow = channel.dtype != np.float64 and channel.size and not _is_wide(float(channel.min()), float(channel.max()))
    return channel.astype(np.float32 if narrow else np.float64, copy=False)


def _is_wide(low: float, high: float) -> bool:
    return max(-low, high) > min(_LARGE, _FAR * (high - low))


def _resize(
    volume: NDArray[np.floating[Any]], out: NDArray[np.floating[Any]], order: int, axes: tuple[int, ...]
) -> None:
    """Resize `axes` into `out` and clip to the range that each sub-array along `axes` had.

    The work goes slab by slab along the first axis, so that what lies between two axes stays in the processor's cache.
    The first axis comes first where it shrinks and last where it grows; the others in the order of their shrinking.
    """
    reach = FAR_REACH if volume.dtype == np.float64 else REACH
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

    source = volume
    if grows:
        source = np.empty((volume.shape[0], *out.shape[1:]), dtype=volume.dtype)
        for start, stop in _slabs(source):
            source[start:stop] = within(volume[start:stop])
    for start, stop in _slabs(out):
        part = source[start:stop] if first is None else first.part(source, start, stop)
        part = part if grows else within(part)
        if low is None or high is None:
            out[start:stop] = part
        else:
            rows = slice(start, stop) if low.shape[0] > 1 else slice(None)
            np.clip(part, low[rows], high[rows], out=out[start:stop])


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
    spec: ResamplingSpec = _LINEAR,
) -> NDArray[Any]:
    """Resample an integer label map ``(*spatial)``; the dtype is kept, equal shapes return the input itself.

    Every label's indicator is interpolated linearly and the largest score wins. Ties go to the nearest neighbour's
    label if it is among them, else to the smallest label (nnU-Net's current rule).
    """
    shape = tuple(shape)
    if labels.shape == shape or spec.method == "none":
        return labels
    if spec.order not in (0, 1) or spec.order_separate_axis != 0:
        raise InputError(
            f"labels are resampled with order 0 or 1 and order 0 along a separate axis, got {spec.order} and "
            f"{spec.order_separate_axis}",
            "change the plan's label resampling",
        )
    resize = _torch_votes if spec.method == "torch" else _linear_votes if spec.order == 1 else _nearest
    separate = separate_axis(current_mm, new_mm, force=spec.force_separate, threshold=spec.separate_threshold)
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
    boundaries, each corner's label collects the weights of the corners that share it. Most slabs have one label all
    around the classes: they are looked at inside the box of what differs from it.
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
        slab = labels[source]
        around = slab.flat[0]
        result[start:stop] = around
        differs = slab != around
        if not differs.any():
            continue
        target, taken = [slice(start, stop)], [slice(None)]
        for axis, (first, last) in enumerate(bounding_box(differs)[1:], start=1):
            inside = slice(first, last)
            if axis in bounds:
                below, above = bounds[axis]
                inside = slice(int(np.searchsorted(above, first)), int(np.searchsorted(below, last)))
                bounds[axis] = below[inside], above[inside]
            target.append(inside)
            taken.append(slice(None) if axis in bounds else inside)
        low = high = slab[tuple(taken)]
        for axis in order:
            low = np.minimum(*(low.take(index, axis) for index in bounds[axis]))
            high = np.maximum(*(high.take(index, axis) for index in bounds[axis]))
        result[tuple(target)] = low
        mixed = np.flatnonzero(low != high)
        for begin in range(0, mixed.size, _CHUNK):
            flat = np.unravel_index(mixed[begin : begin + _CHUNK], low.shape)
            points = tuple(index + part.start for index, part in zip(flat, target, strict=True))
            result[points] = _vote(labels, shape, points, corners)
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
    result: NDArray[Any] = _torch_linear(source, shape, axes).numpy()
    if separate is not None:
        result = axis_operator(array.shape[1 + separate], shape[separate], 0).apply(result, 1 + separate)
    return result.astype(array.dtype)


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


def _torch_votes(labels: NDArray[np.integer[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
    """Let the largest half-precision score win, the smallest label on ties, as nnU-Net's torch resampler does.

    Its scores are 1000 times the indicator in float16, which is where its ties come from.
    """
    import torch

    axes = [axis for axis in range(labels.ndim) if labels.shape[axis] != shape[axis]]
    if not axes:
        return labels
    source = torch.from_numpy(np.ascontiguousarray(labels))[None]
    best = torch.full((1, *shape), -1.0, dtype=torch.float16)
    winner = torch.zeros((1, *shape), dtype=source.dtype)
    for value in np.unique(labels).tolist():
        score = _torch_linear((source == value).float() * 1000, shape, axes).half()
        better = score > best
        winner[better] = value
        best = torch.where(better, score, best)
    result: NDArray[Any] = winner[0].numpy()
    return result
