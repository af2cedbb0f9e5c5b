"""Means and their uncertainty over groups of cases: what belongs together (a patient, a specimen) varies together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from segfit.files import Record

__all__ = ["FEWEST_GROUPS", "Difference", "Estimate", "difference", "estimate", "estimate_over"]

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
    return estimate_over([values], groups)


def estimate_over(classes: Sequence[Mapping[str, float | None]], groups: Mapping[str, str]) -> Estimate:
    """Return the mean over classes of the means of their values by case, with its interval, as `estimate` does."""
    known = [[value for value in values.values() if value is not None] for values in classes]
    means = [math.fsum(values) / len(values) for values in known if values]
    sums, counts = _by_group(classes, groups)
    low, high = _interval(sums, counts)
    cases = {case for values in classes for case, value in values.items() if value is not None}
    mean = math.fsum(means) / len(means) if means else None
    return Estimate(mean=mean, low=low, high=high, cases=len(cases), groups=sums.shape[1])


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

        sums, counts = _by_group([paired], groups)
        means = (sums / counts)[0]
        p_value = float(wilcoxon(means).pvalue) if means.any() else 1.0
    return Difference(**found.model_dump(), p_value=p_value)


def _by_group(
    classes: Sequence[Mapping[str, float | None]], groups: Mapping[str, str]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the sum and number of the values of every group that has any, a row for each class."""
    found: dict[tuple[bool, str], list[list[float]]] = defaultdict(lambda: [[] for _ in classes])
    for case in sorted({case for values in classes for case in values}):
        for row, values in enumerate(classes):
            if (value := values.get(case)) is not None:
                found[case in groups, groups.get(case, case)][row].append(value)
    shape = len(found), len(classes)
    sums = np.array([[math.fsum(own) for own in rows] for rows in found.values()], np.float64).reshape(shape)
    return sums.T, np.array([[len(own) for own in rows] for rows in found.values()], np.int64).reshape(shape).T


def _interval(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float | None, float | None]:
    groups = sums.shape[1]
    if groups < FEWEST_GROUPS:
        return None, None
    from scipy.stats import bootstrap

    def mean(drawn: NDArray[np.intp], axis: int) -> NDArray[np.float64]:
        number = counts[:, drawn].sum(axis)
        with np.errstate(invalid="ignore"):  # of a class that is in none of the groups drawn
            means: NDArray[np.float64] = np.nanmean(sums[:, drawn].sum(axis) / number, axis=0)
        return means

    found = bootstrap(
        (np.arange(groups),),
        mean,
        n_resamples=_RESAMPLES,
        vectorized=True,
        batch=max(1, 2**20 // sums.size),
        confidence_level=_CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)
