"""Means and their uncertainty over groups of cases: what belongs together (a patient, a specimen) varies together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from segfit.files import Record

__all__ = ["FEWEST_GROUPS", "Difference", "Estimate", "difference", "estimate"]

FEWEST_GROUPS = 5
"""Fewer say too little of others for an interval: drawn with replacement, they are hardly ever more different."""
_RESAMPLES, _CONFIDENCE, _SEED = 5000, 0.95, 12345


class Estimate(Record):
    """A mean over cases; its interval, of 95 %, is None where there are fewer than `FEWEST_GROUPS` groups."""

    mean: float | None
    low: float | None = None
    high: float | None = None
    cases: int
    groups: int


class Difference(Estimate):
    """The mean difference of paired cases, and Wilcoxon's signed-rank test (two-sided) over groups.

    `p_value` is None where there is no interval.
    """

    p_value: float | None = None


def estimate(values: Mapping[str, float | None], groups: Mapping[str, str]) -> Estimate:
    """Return the mean of values by case, and its bootstrap interval over groups.

    Cases without a value are left out. A case that is in none of `groups` is a group of its own. Groups are drawn with
    replacement, with all their cases; the interval holds the middle 95 % of the means.
    """
    sums, counts = _by_group(values, groups)
    cases = int(counts.sum())
    mean = math.fsum(value for value in values.values() if value is not None) / cases if cases else None
    low, high = _interval(sums, counts)
    return Estimate(mean=mean, low=low, high=high, cases=cases, groups=len(sums))


def difference(
    first: Mapping[str, float | None], second: Mapping[str, float | None], groups: Mapping[str, str]
) -> Difference:
    """Return how much larger the values of the first are, over the cases that have one in both."""
    paired: dict[str, float | None] = {}
    for case, one in first.items():
        other = second.get(case)
        if one is not None and other is not None:
            paired[case] = one - other
    found = estimate(paired, groups)
    p_value = None
    if found.low is not None:
        from scipy.stats import wilcoxon

        sums, counts = _by_group(paired, groups)
        means = sums / counts
        p_value = float(wilcoxon(means).pvalue) if means.any() else 1.0
    return Difference(**found.model_dump(), p_value=p_value)


def _by_group(
    values: Mapping[str, float | None], groups: Mapping[str, str]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the sum and number of the values of every group."""
    found: dict[tuple[bool, str], list[float]] = defaultdict(list)
    for case, value in sorted(values.items()):
        if value is not None:
            found[case in groups, groups.get(case, case)].append(value)
    sums = np.array([math.fsum(group) for group in found.values()], dtype=np.float64)
    return sums, np.array([len(group) for group in found.values()], dtype=np.int64)


def _interval(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float | None, float | None]:
    if len(sums) < FEWEST_GROUPS:
        return None, None
    from scipy.stats import bootstrap

    found = bootstrap(
        (sums, counts),
        lambda total, count, axis: total.sum(axis) / count.sum(axis),
        n_resamples=_RESAMPLES,
        vectorized=True,
        paired=True,
        batch=max(1, 2**20 // len(sums)),
        confidence_level=_CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)
