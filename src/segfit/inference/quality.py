"""What the probabilities of a prediction say of its quality, from one pass over the logits at network resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from segfit.errors import Problem, warning
from segfit.evaluation.quality import LOW, ClassQuality, QualityFit, Traits, mean_traits
from segfit.inference.to_input_grid import LogitField
from segfit.labels import LabelScheme
from segfit.networks.outputs import probabilities
from segfit.text import dice, listing

__all__ = ["low_quality", "predicted_quality", "traits_of"]

_SLAB_VALUES = 2**24  # probabilities in flight


def predicted_quality(
    fields: Sequence[LogitField], labels: LabelScheme, known: Mapping[str, QualityFit]
) -> tuple[ClassQuality, ...]:
    """Return the predicted Dice of the classes of which it is `known` how it goes with traits."""
    if not known:
        return ()
    traits = mean_traits([traits_of(field, labels) for field in fields])
    return tuple(known[name].predict(name, one) for name, one in traits.items() if name in known)


def low_quality(quality: Sequence[ClassQuality], name: str, file: str | Path) -> list[Problem]:
    """Return a warning if the prediction of a case is likely to be bad."""
    low = [f"{one.name} (Dice {dice(one.dice)})" for one in quality if one.dice is not None and one.dice < LOW]
    if not low:
        return []
    problem = f"{name}: the prediction is likely to be bad for {listing(low)}"
    return [warning("low_quality", problem, "look at it before it is used", file=file)]


@torch.inference_mode()
def traits_of(field: LogitField, labels: LabelScheme) -> dict[str, Traits]:
    """Return the traits of every class."""
    logits, classes = field.logits, labels.classes
    first = 0 if labels.has_regions else 1  # channel of the first class
    sums = torch.zeros(len(classes), 5, dtype=torch.float64)  # p in the mask, p, mask, steps, edges
    thickness = max(1, _SLAB_VALUES // (logits.shape[0] * prod(logits.shape[2:])))
    for start in range(0, logits.shape[1], thickness):
        slab = logits[:, start : start + thickness + 1].float()  # and one layer of the next
        own = min(thickness, slab.shape[1])
        values = probabilities(slab.clone() if labels.has_regions else slab, labels)
        best = None if labels.has_regions else values.argmax(0)
        for index in range(len(classes)):
            p = values[first + index]
            mask = p > 0.5 if best is None else best == first + index
            sums[index] += _sums(p, mask, own)
    voxel = field.voxel_size
    return {
        class_.name: Traits(
            soft_dice=min(1.0, 2 * inside / (total + number)) if number else 0.0,
            step=min(1.0, steps / edges) if edges else 0.0,
            size=number * voxel,
        )
        for class_, (inside, total, number, steps, edges) in zip(classes, sums.tolist(), strict=True)
    }


def _sums(p: Tensor, mask: Tensor, own: int) -> Tensor:
    """Return sums over the `own` first layers, and over pairs of neighbours that begin there."""
    steps = edges = 0.0
    for axis in range(p.ndim):
        length = p.shape[axis] - 1
        values, inside = (one if axis == 0 else one.narrow(0, 0, own) for one in (p, mask))
        edge = inside.narrow(axis, 0, length) != inside.narrow(axis, 1, length)
        change = (values.narrow(axis, 0, length) - values.narrow(axis, 1, length)).abs_()
        edges += float(edge.sum())
        steps += float(change.mul_(edge).sum(dtype=torch.float64))
    p, mask = p.narrow(0, 0, own), mask.narrow(0, 0, own)
    found = ((p * mask).sum(dtype=torch.float64), p.sum(dtype=torch.float64), mask.sum(dtype=torch.float64))
    return torch.tensor([*(float(one) for one in found), steps, edges], dtype=torch.float64)
