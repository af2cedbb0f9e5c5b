"""Training cases that are unlike all others: values in another unit, and two classes exchanged.

Told only where the others leave no doubt: no case of six published datasets is (tests/dataset/test_outliers.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray

from segfit.geometry import AxisMap

__all__ = ["CaseSketch", "exchanged_classes", "odd_scales", "sketch"]

# All that follow are assumptions.
_FEWEST_CASES = 8  # among which one can be unlike the others
_FEWEST_VOXELS = 20  # of a class in the sample
_ODD_SCALE = log(400)  # to the nearest other case, as the logarithm of a factor
_FRIENDS = 20  # of so many cases one more may have the same odd scale
_MOST_CLASSES = 256  # more number objects
_UNLIKE_ITSELF, _LIKE_OTHER = 5.0, 3.0  # deviations at least, and at most
_LEAST_DEVIATION = 0.1  # of a logarithm of a share, or of a place or brightness in deviations of all


@dataclass(frozen=True, slots=True)
class CaseSketch:
    """What is compared: of each channel the logarithm of how wide its values spread, of each class some facts."""

    scales: tuple[float | None, ...]  # None: constant
    classes: Mapping[int, tuple[float, ...]]  # share of what is labelled, place in it, brightness by channel


def sketch(channels: Sequence[NDArray[np.generic]], labels: NDArray[np.integer], axes: AxisMap) -> CaseSketch:
    """Sketch a case of sampled voxels of its channels and labels (the same ones), turned by `axes`."""
    labels = axes.apply(labels)
    turned = [axes.apply(channel).astype(np.float64) for channel in channels]
    inside = labels > 0
    values, which, counts = np.unique(labels[inside], return_inverse=True, return_counts=True)
    facts = [np.log(counts / max(1, len(which)))]
    for place in np.nonzero(inside):
        facts.append(_means(place.astype(np.float64), which, counts, place))
    for channel in turned:
        facts.append(_means(channel[inside], which, counts, channel))
    classes = {
        int(value): tuple(float(fact[number]) for fact in facts)
        for number, value in enumerate(values)
        if counts[number] >= _FEWEST_VOXELS and len(values) <= _MOST_CLASSES
    }
    return CaseSketch(tuple(_scale(channel) for channel in turned), classes)


def _scale(channel: NDArray[np.float64]) -> float | None:
    values = channel[channel != 0]
    width = float(np.ptp(np.quantile(values, (0.05, 0.95)))) if values.size else 0.0
    return log(width) if 0 < width < np.inf else None


def _means(
    values: NDArray[np.float64], which: NDArray[np.intp], counts: NDArray[np.intp], everything: NDArray[np.generic]
) -> NDArray[np.float64]:
    """Return the mean of each class, in deviations of everything from its mean."""
    middle, deviation = (float(everything.mean()), float(everything.std())) if everything.size else (0.0, 0.0)
    result: NDArray[np.float64] = (np.bincount(which, values, len(counts)) / counts - middle) / (deviation or 1.0)
    return result


def odd_scales(cases: Sequence[CaseSketch | None]) -> Iterator[tuple[int, int, float]]:
    """Yield the number of each case whose values spread unlike those of all others, which channel, and the factor."""
    known = [(number, case) for number, case in enumerate(cases) if case is not None]
    for channel in range(max((len(case.scales) for _, case in known), default=0)):
        there = [
            (number, scale)
            for number, case in known
            if channel < len(case.scales) and (scale := case.scales[channel]) is not None
        ]
        if len(there) < _FEWEST_CASES:
            continue
        scales = np.array([scale for _, scale in there])
        apart = np.sort(np.abs(scales[:, None] - scales), axis=1)[:, 1 + len(there) // _FRIENDS]
        usual = float(np.median(scales))
        for row in np.flatnonzero(apart > max(_ODD_SCALE, 10 * float(np.median(apart)))):
            yield there[row][0], channel, float(np.exp(scales[row] - usual))


def exchanged_classes(cases: Sequence[CaseSketch | None]) -> Iterator[tuple[int, int, int]]:
    """Yield the number of each case in which two classes look like each other in all other cases, and the two."""
    lengths = Counter(len(facts) for case in cases if case is not None for facts in case.classes.values())
    usual_length = lengths.most_common(1)[0][0] if lengths else 0  # others have other axes or channels
    held = [
        {value: facts for value, facts in case.classes.items() if len(facts) == usual_length}
        if case is not None
        else {}
        for case in cases
    ]
    usual: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for value in sorted({value for classes in held for value in classes}):
        facts = np.array([classes[value] for classes in held if value in classes])
        if len(facts) >= _FEWEST_CASES:
            middle = np.median(facts, axis=0)
            deviation = 1.4826 * np.median(np.abs(facts - middle), axis=0)
            usual[value] = middle, np.maximum(deviation, _LEAST_DEVIATION)
    for number, classes in enumerate(held):
        values = sorted(classes.keys() & usual.keys())
        if len(values) < 2:
            continue
        own = np.array([classes[value] for value in values])
        middle, deviation = np.array([usual[value] for value in values]).swapaxes(0, 1)
        apart = np.abs((own[:, None] - middle) / deviation).max(axis=2)  # of a class from what another usually is
        alone, like = np.diag(apart) > _UNLIKE_ITSELF, apart < _LIKE_OTHER
        for one, two in np.argwhere(np.triu(like & like.T & alone & alone[:, None])).tolist():
            yield number, values[one], values[two]
