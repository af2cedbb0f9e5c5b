"""What of the labels is left on a coarser grid: the best Dice that a network with larger voxels could reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["kept_dice", "mean_kept_dice"]

_LINEAR = {2: "bilinear", 3: "trilinear"}


def kept_dice(labels: NDArray[np.integer], shape: Sequence[int]) -> dict[int, float]:
    """Return, for every label value above 0, its Dice after the way to a grid of `shape` and back.

    Parameters
    ----------
    labels : (*spatial) integers; what is below 0 counts as background
    shape : voxels per axis of the coarser grid

    The way there averages the share of every label over the larger voxels, the way back is linear and the largest share
    wins, as the probabilities of a network are brought to the grid of an image.
    """
    whole = torch.from_numpy(np.ascontiguousarray(labels.clip(min=0)).astype(np.int64))
    values = [int(value) for value in torch.unique(whole)]
    best = torch.full(whole.shape, -1.0)
    winner = torch.zeros_like(whole)
    for value in values:
        share = _there_and_back((whole == value).float(), shape)
        better = share > best
        best = torch.where(better, share, best)
        winner[better] = value
    result = {}
    for value in values:
        before, after = whole == value, winner == value
        if value > 0:
            result[value] = 2 * int((before & after).sum()) / int(before.sum() + after.sum())
    return result


def mean_kept_dice(cases: Iterable[Mapping[int, float]]) -> float:
    """Return the mean over label values of the means over the cases that have the value; 1 without any."""
    by_value: dict[int, list[float]] = {}
    for case in cases:
        for value, dice in case.items():
            by_value.setdefault(value, []).append(dice)
    return fmean(fmean(found) for found in by_value.values()) if by_value else 1.0


def _there_and_back(share: Tensor, shape: Sequence[int]) -> Tensor:
    small = F.interpolate(share[None, None], size=tuple(shape), mode="area")
    return F.interpolate(small, size=tuple(share.shape), mode=_LINEAR[share.ndim], align_corners=False)[0, 0]
