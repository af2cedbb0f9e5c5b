"""What the strong augmentation adds: turns and swaps of axes, and artefacts of images.

After nnU-Net's `nnUNetTrainerDA5`; docs/decisions/augmentation.md says what differs. As in `segfit.augmentation.policy`
all that is random is drawn first, on the host, and then applied by pure functions on the device of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segfit.specs import AugmentationSpec

__all__ = ["Extras", "apply_extras", "draw_extras"]

_CHANNEL = 0.5  # probability of each channel of a sample that gets an artefact
_OFFSET_STD = 0.5
_MOST_BOXES = 4
_BOX_SHARE = (10, 3)  # the side of a box is a tenth to a third of the patch
_PEAK_RANGE = (1.0, 5.0)
_LOW_GAMMA, _HIGH_GAMMA = (0.01, 0.8), (1.5, 4.0)
_SHARPNESS_RANGE = (0.1, 1.0)
_CENTRE_RANGE = (-0.5, 1.5)  # of a blob, in sizes of the patch
_WIDEST = 6.0  # times as wide as the narrowest: a blob's width is a sixth of the patch to all of it
_TINY = 1e-7

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """Everything random about them, of `b` samples with `c` channels and `n` axes; neutral values change nothing."""

    axes: tuple[int, ...]  # of equal size, that may change places
    turns: NDArray[np.int64]  # (b,) quarter turns; neutral: 0
    plane: NDArray[np.int64]  # (b, 2) which two of `axes` are turned
    order: NDArray[np.int64]  # (b, len(axes)) the axes in their new order; neutral: ascending
    offset: Array  # (b, c) added; neutral: 0
    boxes: NDArray[np.int64]  # (b, c, 4, 2, n) start and size, filled by their mean; neutral: size 0
    peak: Array  # (b, c) of a blob that is added; neutral: 0
    local_gamma: Array  # (b, c) exponent where a second blob is; neutral: 1
    blobs: Array  # (b, c, 2, 2, n) centre and width of both, voxels
    sharpness: Array  # (b, c); neutral: 0


def draw_extras(
    spec: AugmentationSpec, patch: Sequence[int], batch: int, channels: int, rng: np.random.Generator
) -> Extras | None:
    """Draw them for a batch; None, and no random number used, where the recipe has none."""
    probabilities = (
        spec.quarter_turn_probability,
        spec.axis_swap_probability,
        spec.offset_probability,
        spec.blank_probability,
        spec.shading_probability,
        spec.local_gamma_probability,
        spec.sharpening_probability,
    )
    if not any(probabilities):
        return None
    axes, ndim, size = _exchangeable(spec, patch), len(patch), np.array(patch)
    each = (batch, channels)

    def gate(probability: float) -> NDArray[np.bool_]:
        """Whether a channel is changed."""
        return (rng.random(batch) < probability)[:, None] & (rng.random(each) < _CHANNEL)

    turned, swapped = (rng.random(batch) < probability for probability in probabilities[:2])
    pairs = np.array([rng.permutation(len(axes))[:2] for _ in range(batch)]).reshape(batch, -1)
    orders = np.array([rng.permutation(len(axes)) for _ in range(batch)])
    sides = rng.integers(
        np.maximum(1, size // _BOX_SHARE[0]), np.maximum(2, size // _BOX_SHARE[1]), (*each, _MOST_BOXES, ndim)
    )
    starts = rng.integers(0, size - np.minimum(sides, size) + 1)
    used = np.arange(_MOST_BOXES) < rng.integers(1, _MOST_BOXES + 1, each)[..., None]
    used &= gate(spec.blank_probability)[..., None]
    peaks = rng.uniform(*_PEAK_RANGE, each) * rng.choice((-1.0, 1.0), each)
    gammas = np.where(rng.random(each) < 0.5, rng.uniform(*_LOW_GAMMA, each), rng.uniform(*_HIGH_GAMMA, each))
    centres = rng.uniform(*_CENTRE_RANGE, (*each, 2, ndim)) * size
    widths = size / _WIDEST ** rng.random((*each, 2, ndim))
    return Extras(
        axes=axes,
        turns=np.where(turned, rng.integers(0, 4, batch), 0) if axes else np.zeros(batch, np.int64),
        plane=pairs,
        order=np.where(swapped[:, None], orders, np.arange(len(axes))),
        offset=np.where(gate(spec.offset_probability), rng.normal(0.0, _OFFSET_STD, each), 0.0),
        boxes=np.stack((starts, np.where(used[..., None], sides, 0)), axis=-2),
        peak=np.where(gate(spec.shading_probability), peaks, 0.0),
        local_gamma=np.where(gate(spec.local_gamma_probability), gammas, 1.0),
        blobs=np.stack((centres, widths), axis=-2),
        sharpness=np.where(gate(spec.sharpening_probability), rng.uniform(*_SHARPNESS_RANGE, each), 0.0),
    )


def _exchangeable(spec: AugmentationSpec, patch: Sequence[int]) -> tuple[int, ...]:
    """Return the axes that may change places: as long as each other, and flipped without another meaning of labels."""
    fixed = {0} if spec.dummy_2d else set()
    fixed |= set() if spec.exchange is None else {spec.exchange.axis}
    free = [axis for axis in spec.mirror_axes if axis not in fixed]
    groups = [tuple(axis for axis in free if patch[axis] == patch[first]) for first in free]
    longest: tuple[int, ...] = max(groups, key=len, default=())
    return longest if len(longest) > 1 else ()


def apply_extras(extras: Extras, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Change a batch `(b, c, *patch)` and its labels `(b, 1, *patch)`, both in place."""
    for sample in range(len(image)):
        _move(extras, sample, image[sample])
        _move(extras, sample, labels[sample])
        for channel in range(image.shape[1]):
            _mar(extras, (sample, channel), image[sample, channel])
    return image, labels


def _move(extras: Extras, sample: int, array: Tensor) -> None:
    """Turn `(c, *patch)` and exchange its axes, in place."""
    moved = array
    if extras.turns[sample]:
        first, second = (1 + extras.axes[index] for index in extras.plane[sample])
        moved = moved.rot90(int(extras.turns[sample]), (first, second))
    order = list(range(array.ndim))
    for place, index in zip(extras.axes, extras.order[sample], strict=True):
        order[1 + place] = 1 + extras.axes[index]
    moved = moved.permute(order)
    if moved.stride() != array.stride() or moved.data_ptr() != array.data_ptr():
        array.copy_(moved.clone())


def _mar(extras: Extras, place: tuple[int, int], values: Tensor) -> None:
    """Put the artefacts of one channel into `(*patch)`, in place."""
    if extras.offset[place]:
        values += float(extras.offset[place])
    for start, size in extras.boxes[place]:
        if size.all():
            box = values[tuple(slice(a, a + n) for a, n in zip(start.tolist(), size.tolist(), strict=True))]
            box.copy_(box.mean().expand_as(box))
    added, gamma_at = extras.blobs[place]
    if extras.peak[place]:
        values += _blob(values, added) * float(extras.peak[place])
    if extras.local_gamma[place] != 1:
        low, high = values.aminmax()
        extent = (high - low).clamp(min=_TINY)
        changed = ((values - low) / extent).pow_(float(extras.local_gamma[place])) * extent + low
        values.lerp_(changed, _blob(values, gamma_at))
    if extras.sharpness[place]:
        low, high = values.aminmax()
        edges = sum((_edges(values, axis) for axis in range(values.ndim)), torch.zeros_like(values))
        values.add_(edges, alpha=float(extras.sharpness[place])).clamp_(low, high)


def _blob(like: Tensor, shape: Array) -> Tensor:
    """Return a Gaussian of this centre and width per axis, 1 where it is highest in the patch."""
    blob = torch.ones((), dtype=like.dtype, device=like.device)
    for axis, (size, centre, width) in enumerate(zip(like.shape, *shape, strict=True)):
        exponent = ((torch.arange(size, device=like.device, dtype=like.dtype) - centre) / width).square_().div_(-2)
        profile = (exponent - exponent.max()).exp_()
        blob = blob * profile.view(-1, *(1,) * (like.ndim - 1 - axis))
    return blob


def _edges(values: Tensor, axis: int) -> Tensor:
    """Return how far each voxel is above its neighbours along an axis, which are repeated at the borders."""
    size = values.shape[axis]
    index = torch.arange(size, device=values.device)
    before, after = (index - 1).clamp_(min=0), (index + 1).clamp_(max=size - 1)
    return 2 * values - values.index_select(axis, before) - values.index_select(axis, after)
