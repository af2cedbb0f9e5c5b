"""From logits at network resolution to labels or probabilities on the grid of the input.

Interpolation between grids is linear and separable, so any box of the input's grid can be computed on its own. The
output is walked in slabs: each one is interpolated channel by channel, decided and dropped. Memory is the output, one
slab and the logits, however many labels there are. Logits may come as a stream: then what no slab needs any more is let
go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segfit.cropping import Box
from segfit.execution.scratch import IN_MEMORY, Scratch
from segfit.geometry import AxisMap
from segfit.interpolation import AxisOperator, axis_operator
from segfit.labels import LabelScheme
from segfit.networks.outputs import decode
from segfit.networks.outputs import probabilities as activated
from segfit.preprocessing.pipeline import CaseProperties
from segfit.resampling import resample_image, separate_axis
from segfit.specs import Configuration, ResamplingSpec

__all__ = [
    "LogitField",
    "LogitStream",
    "labels_on_grid_of",
    "merged",
    "merged_labels",
    "merged_probabilities",
    "stored_labels",
]

_BLOCK_ROWS = 32  # outputs per matrix product on a CPU: wide enough for BLAS, narrow enough to stay near the band
_SLAB_VOXELS = {"cpu": 2**20, "cuda": 2**25}  # values in flight: a processor's cache, or enough to fill a GPU


class LogitStream:
    """Logits that come in blocks of rows along the first axis; those before the last ones asked for are let go.

    Parameters
    ----------
    shape : of all of them
    blocks : ``(num_outputs, n, *rest)``, each computed when it is asked for
    device : where they are
    """

    def __init__(self, shape: Sequence[int], blocks: Iterable[Tensor], device: torch.device) -> None:
        self.shape, self.device = tuple(shape), device
        self._blocks = iter(blocks)
        self._held: deque[tuple[int, Tensor]] = deque()  # with the row that each begins with
        self._stop = 0

    def read(self, channel: int, box: Box) -> Tensor:
        """Return a channel on a box, whose first row never decreases."""
        (first, last), *others = box
        rows, rest = slice(first, last), _index(others)
        while self._held and self._held[0][0] + self._held[0][1].shape[1] <= rows.start:
            self._held.popleft()
        assert (self._held[0][0] if self._held else self._stop) <= rows.start, "those rows were let go"
        while self._stop < rows.stop:
            block = next(self._blocks)
            if self._stop + block.shape[1] > rows.start:
                self._held.append((self._stop, block.to(self.device)))
            self._stop += block.shape[1]
        parts = [
            block[channel][(slice(max(0, rows.start - start), max(0, rows.stop - start)), *rest)]
            for start, block in self._held
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def watch(self, see: Callable[[Tensor], None]) -> None:
        """Show every block to `see` when it is computed."""

        def shown(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
            for block in blocks:
                see(block)
                yield block

        self._blocks = shown(self._blocks)

    def finish(self) -> None:
        """Compute the blocks that nobody asked for, which none can be read from any more."""
        deque(self._blocks, maxlen=0)

    def whole(self, scratch: Scratch = IN_MEMORY) -> Tensor:
        """Return all of them."""
        result = torch.from_numpy(scratch.zeros(self.shape, np.float32)).to(self.device)
        for block in self._blocks:
            result[:, self._stop : self._stop + block.shape[1]] = block
            self._stop += block.shape[1]
        return result


class LogitField:
    """The logits of one configuration for one case, readable on any box of the stored grid.

    Parameters
    ----------
    logits : (num_outputs, *properties.shape), torch (any device), numpy, or a stream of them: then boxes must be
        asked for in the order of `slabs`
    properties : how the case came from the stored grid to the network's
    configuration : its spacing and resampling of logits

    `box` is the cropped region on the stored grid; outside of it everything is background. `voxel_size` is the
    volume or area of a voxel of the logits.
    """

    def __init__(self, logits: _Logits, properties: CaseProperties, configuration: Configuration) -> None:
        assert tuple(logits.shape[1:]) == properties.shape
        spec = configuration.preprocessing
        source_mm = spec.target_mm(properties.spacing_mm)
        self.logits, operators = _operators(logits, properties, source_mm, spec.resample_logits)
        self.voxel_size = prod(properties.spacing_mm) * prod(properties.shape_after_crop) / prod(self.logits.shape[1:])
        self._lines = [_Lines(operator, self.logits.device) for operator in operators]
        self._axes = AxisMap(  # from the stored grid to the network's axes: orientation, then transposition
            tuple(properties.axis_order[axis] for axis in properties.transpose),
            tuple(properties.axis_flip[axis] for axis in properties.transpose),
        )
        self._crop = properties.crop_box
        self._uncropped = properties.shape_before_crop
        self.shape = properties.stored_shape
        self.box = self._to_stored(self._crop)

    @property
    def num_outputs(self) -> int:
        """Channels of the logits."""
        return self.logits.shape[0]

    @property
    def slab_axis(self) -> tuple[int, bool]:
        """The stored axis along which thin slabs are cheapest, the network's first, and whether that runs backwards."""
        return self._axes.order[0], self._axes.flip[0]

    def slabs(self, box: Box, voxels: int) -> Iterator[Box]:
        """Cut a box along `slab_axis` into slabs of about `voxels` voxels, at least one layer each, in its order."""
        axis, backwards = self.slab_axis
        low, high = box[axis]
        layer = prod(b - a for i, (a, b) in enumerate(box) if i != axis)
        thickness = max(1, voxels // layer)
        starts = range(low, high, thickness)
        for start in reversed(starts) if backwards else starts:
            yield (*box[:axis], (start, min(start + thickness, high)), *box[axis + 1 :])

    def read(self, channel: int, box: Box) -> Tensor:
        """Return one channel's logits on `box` (stored grid, inside `self.box`), float32, on the logits' device."""
        ranges = [
            (low - crop, high - crop) for (low, high), (crop, _) in zip(self._to_network(box), self._crop, strict=True)
        ]
        inputs = tuple(line.inputs(*wanted) for line, wanted in zip(self._lines, ranges, strict=True))
        logits = self.logits
        values = logits[channel][_index(inputs)] if isinstance(logits, Tensor) else logits.read(channel, inputs)
        values = values.float()
        growth = [(b - a) / (d - c) for (a, b), (c, d) in zip(ranges, inputs, strict=True)]
        for axis in np.argsort(growth, kind="stable").tolist():  # shrinking axes first: least work for the others
            values = self._lines[axis].interpolate(values, axis, *ranges[axis])
        flipped = [axis for axis, reverse in enumerate(self._axes.flip) if reverse]
        return values.flip(flipped).permute(self._axes.inverse().order)

    def _to_network(self, box: Box) -> Box:
        """Return a box of the stored grid in network axes, before cropping."""
        moved = [box[axis] for axis in self._axes.order]
        return self._flipped(moved)

    def _to_stored(self, box: Box) -> Box:
        moved = self._flipped(box)
        return tuple(moved[axis] for axis in self._axes.inverse().order)

    def _flipped(self, box: Sequence[tuple[int, int]]) -> Box:
        return tuple(
            (n - high, n - low) if reverse else (low, high)
            for (low, high), n, reverse in zip(box, self._uncropped, self._axes.flip, strict=True)
        )


class _Lines:
    """Interpolation along one axis by torch, in blocks of the operator's band."""

    def __init__(self, operator: AxisOperator, device: torch.device) -> None:
        self._operator = operator
        self._device = device
        self._rows = _BLOCK_ROWS if device.type == "cpu" else operator.new
        self._blocks: dict[tuple[int, int], tuple[int, int, Tensor]] = {}

    def inputs(self, start: int, stop: int) -> tuple[int, int]:
        """Return the inputs, half-open, that the outputs [start, stop) are made of."""
        if self._operator.is_identity:
            return start, stop
        return int(self._operator.starts[start]), int(self._operator.starts[stop - 1]) + self._operator.weights.shape[1]

    def interpolate(self, values: Tensor, axis: int, start: int, stop: int) -> Tensor:
        """Return the outputs [start, stop) along `axis` from their `inputs`."""
        if self._operator.is_identity:
            return values
        first, _ = self.inputs(start, stop)
        lead, trail = values.shape[:axis], values.shape[axis + 1 :]
        lines = values.reshape(prod(lead), values.shape[axis], prod(trail))
        parts = []
        for begin in range(start, stop, self._rows):
            low, high, matrix = self._block(begin, min(begin + self._rows, stop))
            piece = lines[:, low - first : high - first]
            # Along the last axis one product does for all lines at once.
            parts.append(matrix @ piece if trail else (piece[:, :, 0] @ matrix.T)[:, :, None])
        return torch.cat(parts, dim=1).reshape(*lead, stop - start, *trail)

    def _block(self, start: int, stop: int) -> tuple[int, int, Tensor]:
        if (start, stop) not in self._blocks:
            low, high, matrix = self._operator.rows(start, stop)
            self._blocks[start, stop] = low, high, torch.from_numpy(matrix.astype(np.float32)).to(self._device)
        return self._blocks[start, stop]


_Logits = Tensor | NDArray[np.floating[Any]] | LogitStream


def _operators(
    logits: _Logits,
    properties: CaseProperties,
    source_mm: tuple[float, ...],
    spec: ResamplingSpec,
) -> tuple[Tensor | LogitStream, list[AxisOperator]]:
    """Return the logits and the interpolation from their grid to the cropped image's, axis by axis.

    A separate axis (spec: preprocessing, section 5.1) has an order of its own. Beyond order 1 the values must be
    clipped to the range of the whole volume: then they are resampled here at once.
    """
    target = properties.shape_after_crop
    axis_order = [1 if spec.method == "torch" else spec.order] * len(target)
    across = separate_axis(
        source_mm, properties.spacing_mm, force=spec.force_separate, threshold=spec.separate_threshold
    )
    if across is not None:
        axis_order[across] = spec.order_separate_axis
    if max(axis_order) > 1 and properties.shape != target:
        logits = logits.whole() if isinstance(logits, LogitStream) else logits
        array = logits.float().cpu().numpy() if isinstance(logits, Tensor) else logits
        logits = resample_image(array, target, source_mm, properties.spacing_mm, spec)
        axis_order = [0] * len(target)
    tensor = torch.from_numpy(np.ascontiguousarray(logits)) if isinstance(logits, np.ndarray) else logits
    return tensor, [
        axis_operator(old, new, order) for old, new, order in zip(tensor.shape[1:], target, axis_order, strict=True)
    ]


def merged_labels(fields: Sequence[LogitField], labels: LabelScheme) -> NDArray[np.unsignedinteger[Any]]:
    """Return the inner labels alone; see `merged`."""
    return merged(fields, labels)[0]


def labels_on_grid_of(
    other: CaseProperties,
    logits: Tensor | NDArray[np.floating[Any]],
    properties: CaseProperties,
    configuration: Configuration,
    labels: LabelScheme,
) -> NDArray[np.unsignedinteger[Any]]:
    """Return the inner labels of a case ``(*other.shape)``, as another configuration sees it.

    That is what the second stage of a cascade is trained on. As in nnU-Net the logits are resampled from cropped image
    to cropped image, without a second change of spacing.
    """
    order = tuple(other.transpose.index(axis) for axis in properties.transpose)
    shape = tuple(other.shape[axis] for axis in order)
    changed = properties.model_copy(
        update={
            "stored_shape": other.shape,
            "axis_order": tuple(range(len(order))),
            "axis_flip": (False,) * len(order),
            "transpose": order,
            "spacing_mm": configuration.preprocessing.target_mm(properties.spacing_mm),
            "shape_before_crop": shape,
            "crop_box": tuple((0, n) for n in shape),
            "shape_after_crop": shape,
        }
    )
    return merged_labels([LogitField(logits, changed, configuration)], labels)


def merged_probabilities(fields: Sequence[LogitField], labels: LabelScheme) -> NDArray[np.float32]:
    """Return the probabilities alone; see `merged`."""
    kept = merged(fields, labels, probabilities=True)[1]
    assert kept is not None
    return kept


@torch.inference_mode()
def merged(
    fields: Sequence[LogitField], labels: LabelScheme, *, probabilities: bool = False, scratch: Scratch = IN_MEMORY
) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.float32] | None]:
    """Return the inner labels ``(*stored)``, uint8 or uint16, by the mean probability of several configurations.

    Those of one are the argmax of its logits, or what the region rule of `labels` makes of them; 0 outside the crop.
    With `probabilities` also these, ``(num_outputs, *stored)`` float32: softmax, or sigmoid for regions; outside the
    crop background is 1. Both are made in `scratch`.
    """
    first = fields[0]
    found = scratch.zeros(first.shape, np.uint8 if max(labels.all_values) < 255 else np.uint16)
    kept = scratch.zeros((labels.num_outputs, *first.shape), np.float32) if probabilities else None
    if len(fields) > 1:
        for box, mean in _mean_probabilities(fields, labels):
            found[_index(box)] = decode(mean, labels, activated=True)
            if kept is not None:
                kept[:, *_index(box)] = mean.cpu().numpy()
        return found, kept
    if kept is not None and not labels.has_regions:
        kept[0] = 1.0
    for box in first.slabs(first.box, _slab_voxels(first) // (1 if kept is None else labels.num_outputs)):
        logits: Iterable[Tensor] = (first.read(channel, box) for channel in range(first.num_outputs))
        logits = logits if kept is None else torch.stack(list(logits))
        found[_index(box)] = decode(logits, labels)
        if kept is not None:
            assert isinstance(logits, Tensor)
            kept[:, *_index(box)] = activated(logits, labels).cpu().numpy()
    return found, kept


def stored_labels(
    inner: NDArray[np.unsignedinteger[Any]], labels: LabelScheme, scratch: Scratch
) -> NDArray[np.integer[Any]]:
    """Return inner labels as they are stored, made row by row in `scratch` if they are others."""
    if labels.stored is None:
        return inner
    result: NDArray[np.integer[Any]] = scratch.zeros(inner.shape, labels.to_stored(inner[:1, :1]).dtype)
    for target, row in zip(result, inner, strict=True):
        target[...] = labels.to_stored(row)
    return result


def _mean_probabilities(fields: Sequence[LogitField], labels: LabelScheme) -> Iterator[tuple[Box, Tensor]]:
    """Yield the mean probabilities of all fields, slab by slab over the whole stored grid."""
    first = fields[0]
    whole = tuple((0, n) for n in first.shape)
    for box in first.slabs(whole, _slab_voxels(first) // labels.num_outputs):
        total = _probabilities(first, box, labels)
        for field in fields[1:]:
            total += _probabilities(field, box, labels).to(total.device)
        yield box, total / len(fields)


def _probabilities(field: LogitField, box: Box, labels: LabelScheme) -> Tensor:
    """Return the probabilities on a box of the stored grid; outside the crop background is certain."""
    result = torch.zeros((field.num_outputs, *(high - low for low, high in box)), device=field.logits.device)
    if not labels.has_regions:
        result[0] = 1.0
    inner = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, field.box, strict=True))
    if all(low < high for low, high in inner):
        logits = torch.stack([field.read(channel, inner) for channel in range(field.num_outputs)])
        within = tuple(slice(low - a, high - a) for (low, high), (a, _) in zip(inner, box, strict=True))
        result[:, *within] = activated(logits, labels)
    return result


def _slab_voxels(field: LogitField) -> int:
    return _SLAB_VOXELS.get(field.logits.device.type, _SLAB_VOXELS["cpu"])


def _index(box: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(low, high) for low, high in box)
