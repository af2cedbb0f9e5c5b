"""What the output channels of a network mean: probabilities, label values, and the masks that they learn.

Exclusive labels are softmax channels, background first; regions are sigmoid channels, each above 0.5 or not. A class's
value is its channel: label schemes are consecutive from 0, and the ignore value follows the highest label.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segfit.labels import LabelScheme

__all__ = ["class_masks", "decode", "probabilities"]


def probabilities(logits: Tensor, labels: LabelScheme) -> Tensor:
    """Return the probabilities of logits ``(num_outputs, *spatial)``; those of regions replace their logits."""
    return logits.sigmoid_() if labels.has_regions else logits.softmax(0)


def decode(channels: Iterable[Tensor], labels: LabelScheme, *, activated: bool = False) -> NDArray[np.integer[Any]]:
    """Return the inner label values ``(*spatial)``, uint8 or int32: the rule of `LabelScheme.to_labels`.

    Parameters
    ----------
    channels : logits, or probabilities where they are `activated`, one ``(*spatial)`` at a time
    """
    rest = iter(channels)
    best = next(rest)
    kind = torch.uint8 if max(labels.all_values) < 255 else torch.int32
    winner = torch.zeros(best.shape, dtype=kind, device=best.device)

    def paint(mask: Tensor, value: int) -> None:  # arithmetic, because masked assignment is slow on CPUs
        chosen = mask.to(kind)
        winner.mul_(1 - chosen).add_(chosen, alpha=value)

    if labels.region_order is None:
        winner.fill_(labels.all_values[0])
        for channel, value in zip(rest, labels.all_values[1:], strict=True):
            paint(channel > best, value)  # strictly: the lowest label wins ties
            best = torch.maximum(best, channel)
    else:
        threshold = 0.5 if activated else 0.0
        paint(best > threshold, labels.region_order[0])
        for channel, value in zip(rest, labels.region_order[1:], strict=True):
            paint(channel > threshold, value)
    return winner.cpu().numpy()


def class_masks(target: Tensor, labels: LabelScheme) -> Tensor:
    """Return where labels ``(b, 1, *spatial)`` have each class or region, ``(b, classes, *spatial)`` bool.

    Background is none of them; nothing is where labels are ignored.
    """
    if not labels.has_regions:
        values = torch.arange(1, 1 + len(labels.foreground_values), dtype=target.dtype, device=target.device)
        return target == values.view(1, -1, *(1,) * (target.ndim - 2))
    return torch.cat([_is_any(target, region.values) for region in labels.classes], dim=1)


def _is_any(target: Tensor, values: Sequence[int]) -> Tensor:
    """Return where labels have one of the values: comparisons with numbers, none of which a GPU has to be sent."""
    ordered = sorted(values)
    starts = [value for value in ordered if value - 1 not in ordered]
    ends = [value for value in ordered if value + 1 not in ordered]
    runs = [(target >= start) & (target <= end) for start, end in zip(starts, ends, strict=True)]
    return reduce(torch.logical_or, runs)
