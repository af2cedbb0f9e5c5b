"""Exact moments and near-exact percentiles of a mixture of cases, in memory that does not grow with their number.

Intensities are counted in bins of a fixed, floating-point-like scale: float32 values rounded to 14 significant bits.
Integers up to 16384 have a bin of their own, any other value is off by at most 6e-5 of itself. All cases share the
bins, so that a mixture is a sum of weighted counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.specs import IntensityStatistics

__all__ = ["ChannelDistribution", "Mixture"]

_ROUNDING = 1e-10  # of sums of weights: a share that is met exactly counts as met
_DROPPED_BITS = 10  # of the 23 stored bits of a float32's significand


@dataclass(frozen=True, slots=True, eq=False)
class ChannelDistribution:
    """The foreground intensities of one channel of one case."""

    moments: NDArray[np.float64]  # mean, population variance, minimum, maximum
    bins: NDArray[np.int32]  # ascending
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> ChannelDistribution:
        """Measure the values (n,) of a channel, at least one and all finite."""
        bits = (values + np.float32(0)).view(np.int32)  # + 0: there is one zero
        bins, counts = np.unique((bits + (1 << (_DROPPED_BITS - 1))) >> _DROPPED_BITS, return_counts=True)
        moments = (values.mean(dtype=np.float64), values.var(dtype=np.float64), values.min(), values.max())
        return cls(np.array(moments, dtype=np.float64), bins.astype(np.int32), counts.astype(np.int64))


class Mixture:
    """A mixture of cases with equal weights, whatever their size.

    This is what nnU-Net estimates by drawing equally often from every case.
    """

    def __init__(self) -> None:
        self._moments: list[NDArray[np.float64]] = []
        self._bins = np.zeros(0, dtype=np.int32)
        self._weights: NDArray[Any] = np.zeros(0)

    def add(self, case: ChannelDistribution) -> None:
        """Add one case."""
        self._moments.append(case.moments)
        bins, position = np.unique(np.concatenate([self._bins, case.bins]), return_inverse=True)
        share = case.counts / case.counts.sum()
        self._weights = np.bincount(position, np.concatenate([self._weights, share]), bins.size)
        self._bins = bins

    def __len__(self) -> int:
        return len(self._moments)

    def statistics(self) -> IntensityStatistics:
        """Return mean, deviation and extremes (exact) and percentiles (to the bin) of at least one case."""
        mean, variance, low, high = np.array(self._moments).T
        values = (self._bins << _DROPPED_BITS).view(np.float32).astype(np.float64)
        order = np.argsort(values)
        values, weights = values[order].clip(low.min(), high.max()), self._weights[order]
        median, lowest, highest = _quantiles(values, weights, (0.5, 0.005, 0.995))
        return IntensityStatistics(
            mean=float(mean.mean()),
            median=median,
            std=float(np.sqrt(variance.mean() + mean.var())),
            min=float(low.min()),
            max=float(high.max()),
            percentile_00_5=lowest,
            percentile_99_5=highest,
        )


def _quantiles(values: NDArray[np.float64], weights: NDArray[np.float64], shares: Sequence[float]) -> tuple[float, ...]:
    """Return the smallest values up to which at least the given shares of the weight lie.

    Where a value and all below it weigh just as much, as the darker half of the cases can, the way to the next value
    is divided as linear interpolation divides it in a large sample: the median lies in the middle.
    """
    cumulated = np.cumsum(weights)
    wanted = np.asarray(shares) * cumulated[-1]
    index = np.searchsorted(cumulated, wanted * (1 - _ROUNDING)).clip(0, values.size - 1)
    above = (index + 1).clip(0, values.size - 1)
    fraction = np.where(cumulated[index] <= wanted * (1 + _ROUNDING), 1 - np.asarray(shares), 0)
    found = values[index] + fraction * (values[above] - values[index])
    return tuple(float(value) for value in found)
