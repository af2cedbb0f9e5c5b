"""Normalisation of intensities, one scheme per channel (spec: preprocessing, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError
from segfit.specs import Normalization

__all__ = ["ChannelStatistics", "normalize"]

_SMALLEST = np.float32(1e-8)  # what is divided by is at least this


class ChannelStatistics(NamedTuple):
    """What normalisation asks of a channel, inside the crop."""

    min: np.float32
    max: np.float32
    mean: np.float32
    std: np.float32


def normalize(
    image: NDArray[np.float32],
    labels: NDArray[np.int16],
    schemes: Sequence[Normalization],
    *,
    out: NDArray[np.float32] | None = None,
    statistics: Sequence[ChannelStatistics] | None = None,
) -> NDArray[np.float32]:
    """Return the image with every channel normalised; the input is left as it is unless it is `out`.

    Parameters
    ----------
    image : (c, *spatial), cropped
    labels : (*spatial); only whether a voxel is -1 (background outside the non-zero mask) matters, for masked z-scores
    schemes : one per channel
    out : where the result goes, `image` itself if it is not needed any more; None: a new array
    statistics : of the whole image where this is a part of it, one per channel; not for masked z-scores

    Statistics are float32, as in nnU-Net.
    """
    result = np.empty_like(image) if out is None else out
    for index, (channel, scheme, target) in enumerate(zip(image, schemes, result, strict=True)):
        known = None if statistics is None else statistics[index]
        if scheme.scheme == "zscore" and known is not None:
            np.subtract(channel, known.mean, out=target)
            target /= max(known.std, _SMALLEST)
        elif scheme.scheme == "zscore":
            _zscore(channel, labels >= 0 if scheme.use_mask else None, target)
        elif scheme.scheme == "ct":
            _ct(channel, scheme, target)
        elif scheme.scheme == "rescale_to_0_1":
            low = channel.min() if known is None else known.min
            np.subtract(channel, low, out=target)
            target /= max(target.max() if known is None else known.max - low, _SMALLEST)
        elif scheme.scheme == "rgb_to_0_1":
            low, high = float(channel.min()), float(channel.max())
            if low < 0 or high > 255:
                raise InputError(
                    f"channel {index} is normalised as a picture and must hold 0 to 255, got {low:g} to {high:g}",
                    "give the channel another name, so that another normalisation is chosen",
                )
            np.divide(channel, np.float32(255), out=target)
        else:
            target[...] = channel
    return result


def _zscore(channel: NDArray[np.float32], mask: NDArray[np.bool_] | None, target: NDArray[np.float32]) -> None:
    """Zero mean and unit deviation; with a mask, of and inside the mask, the rest as it was."""
    if mask is None:
        mean, deviation = channel.mean(), max(channel.std(), _SMALLEST)
        np.subtract(channel, mean, out=target)
        target /= deviation
        return
    target[...] = channel
    inside = channel[mask]
    if inside.size:
        target[mask] = (inside - inside.mean()) / max(inside.std(), _SMALLEST)


def _ct(channel: NDArray[np.float32], scheme: Normalization, target: NDArray[np.float32]) -> None:
    """Clip to the dataset's foreground percentiles, then its foreground z-score."""
    statistics = scheme.statistics
    assert statistics is not None, "a ct channel has statistics"
    np.clip(channel, np.float32(statistics.percentile_00_5), np.float32(statistics.percentile_99_5), out=target)
    target -= np.float32(statistics.mean)
    target /= max(np.float32(statistics.std), _SMALLEST)
