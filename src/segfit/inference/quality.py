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

__all__ = ["TraitSums", "low_quality", "predicted_quality", "traits_of"]

_SLAB_VALUES = {"cpu": 2**18, "cuda": 2**24}  # probabilities in flight


def predicted_quality(traits: Sequence[TraitSums], known: Mapping[str, QualityFit]) -> tuple[ClassQuality, ...]:
    """Return the predicted Dice of the classes of which it is `known` how it goes with the traits of all members."""
    if not known:
        return ()
    mean = mean_traits([one.traits() for one in traits])
    return tuple(known[name].predict(name, one) for name, one in mean.items() if name in known)


def low_quality(quality: Sequence[ClassQuality], name: str, file: str | Path) -> list[Problem]:
    """Return a warning if the prediction of a case is likely to be bad."""
    low = [f"{one.name} (Dice {dice(one.dice)})" for one in quality if one.dice is not None and one.dice < LOW]
    if not low:
        return []
    problem = f"{name}: the prediction is likely to be bad for {listing(low)}"
    return [warning("low_quality", problem, "look at it before it is used", file=file)]


def traits_of(field: LogitField, labels: LabelScheme) -> dict[str, Traits]:
    """Return the traits of every class of logits that nobody else asks for."""
    return TraitSums(field, labels).traits()


class TraitSums:
    """What traits are made of, summed over logits; over those of a stream while others have its blocks computed."""

    def __init__(self, field: LogitField, labels: LabelScheme) -> None:
        self._field, self._labels = field, labels
        self._sums = torch.zeros(len(labels.classes), 5, dtype=torch.float64)  # p in the mask, p, mask, steps, edges
        self._last: Tensor | None = None  # row of logits before those to come
        if isinstance(field.logits, Tensor):
            self._add(field.logits)
        else:
            field.logits.watch(self._add)

    def traits(self) -> dict[str, Traits]:
        """Return the traits of every class, when all has been computed that others ask for."""
        if not isinstance(self._field.logits, Tensor):
            self._field.logits.finish()
        classes, voxel = self._labels.classes, self._field.voxel_size
        return {
            class_.name: Traits(
                soft_dice=min(1.0, 2 * inside / (total + number)) if number else 0.0,
                step=min(1.0, steps / edges) if edges else 0.0,
                size=number * voxel,
            )
            for class_, (inside, total, number, steps, edges) in zip(classes, self._sums.tolist(), strict=True)
        }

    @torch.inference_mode()
    def _add(self, logits: Tensor) -> None:
        first = 0 if self._labels.has_regions else 1  # channel of the first class
        values_at_once = _SLAB_VALUES.get(logits.device.type, _SLAB_VALUES["cpu"])
        thickness = max(1, values_at_once // (logits.shape[0] * prod(logits.shape[2:])))
        for start in range(0, logits.shape[1], thickness):
            slab = logits[:, start : start + thickness]
            before = slab[:, :0] if self._last is None else self._last
            # Joined, they are a copy: probabilities of regions replace their logits.
            values = probabilities(torch.cat([before, slab], dim=1).float(), self._labels)
            best = None if self._labels.has_regions else values.argmax(0)
            for index in range(len(self._sums)):
                p = values[first + index]
                mask = p > 0.5 if best is None else best == first + index
                self._sums[index] += _sums(p, mask, before.shape[1])
            self._last = slab[:, -1:].clone()


def _sums(p: Tensor, mask: Tensor, known: int) -> Tensor:
    """Return sums over all rows but the `known` first ones, and over pairs of neighbours unless both are known."""
    steps = edges = 0.0
    rows = p.shape[0] - known
    for axis in range(p.ndim):
        values, inside = (one if axis == 0 else one.narrow(0, known, rows) for one in (p, mask))
        length = p.shape[axis] - 1
        edge = inside.narrow(axis, 0, length) != inside.narrow(axis, 1, length)
        change = (values.narrow(axis, 0, length) - values.narrow(axis, 1, length)).abs_()
        edges += float(edge.sum())
        steps += float(change.mul_(edge).sum(dtype=torch.float64))
    p, mask = p.narrow(0, known, rows), mask.narrow(0, known, rows)
    found = ((p * mask).sum(dtype=torch.float64), p.sum(dtype=torch.float64), mask.sum(dtype=torch.float64))
    return torch.tensor([*(float(one) for one in found), steps, edges], dtype=torch.float64)
