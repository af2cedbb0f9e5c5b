"""Whether keeping only the largest component helps, decided on the cross-validation predictions.

The rule is nnU-Net's: first all foreground together, then each class on its own. The predictions are never
rewritten: per case a step moves the voxels that it removes from their column of the joint histogram to the background
column, so every candidate is scored from counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from segfit.connected_components import PostprocessingStep, apply_steps, label_boxes, strays
from segfit.evaluation.metrics import joint_histogram, metrics_from_histogram
from segfit.evaluation.pairs import Pair
from segfit.evaluation.summary import MeanMetrics, Summary, summarize
from segfit.execution.execution import LOCAL, Execution
from segfit.labels import LabelClass, LabelScheme

__all__ = ["PostprocessingDecision", "decide_postprocessing"]

_Histogram = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PostprocessingDecision:
    """The accepted steps in order (maybe none) and the metrics without and with them."""

    steps: tuple[PostprocessingStep, ...]
    before: Summary
    after: Summary


@dataclass(frozen=True, slots=True)
class _Counts:
    """Joint histograms of one case, both indexed ``[reference value, predicted value]``."""

    kept: _Histogram  # all voxels of the current prediction
    removed: _Histogram  # those of them that the candidate steps would set to background

    def without(self, values: Sequence[int]) -> _Histogram:
        """Return `kept` after the step for `values`; the candidates of one round touch disjoint columns."""
        columns = list(values)
        result = self.kept.copy()
        result[:, columns] -= self.removed[:, columns]
        result[:, 0] += self.removed[:, columns].sum(axis=1)
        return result


def decide_postprocessing(
    pairs: Sequence[Pair], scheme: LabelScheme, *, execution: Execution = LOCAL
) -> PostprocessingDecision:
    """Decide which "keep the largest component" steps improve the cross-validation predictions.

    1. All foreground labels together: taken if the foreground mean Dice rises and no class's mean Dice falls.
       A foreground mean without a value (one class has a Dice in no case) refuses the step.
    2. With more than one class, each in order on top of what was taken: taken if its own mean Dice rises.

    Cases are read once for step 1 and once for each run of classes that share no label (one for exclusive labels).
    """
    foreground = LabelClass(name="the foreground", values=scheme.foreground_values)
    counts = _count(pairs, scheme, (), [foreground], execution)
    current = [case.kept for case in counts]
    before = after = _summary(pairs, current, scheme.classes)
    steps: list[PostprocessingStep] = []

    cleaned = [case.without(foreground.values) for case in counts]
    summary = _summary(pairs, cleaned, scheme.classes)
    if _improves_foreground(before, summary):
        steps.append(_step(foreground))
        current, after = cleaned, summary

    for group in _disjoint_runs(scheme.classes) if len(scheme.classes) > 1 else []:
        removed = [case.removed for case in _count(pairs, scheme, steps, group, execution)]
        for class_ in group:
            cleaned = [_Counts(k, r).without(class_.values) for k, r in zip(current, removed, strict=True)]
            old, new = (_summary(pairs, histograms, [class_]).mean[class_.name] for histograms in (current, cleaned))
            if _dice(new) > _dice(old):
                steps.append(_step(class_))
                current = cleaned
                after = _summary(pairs, current, scheme.classes)
    return PostprocessingDecision(tuple(steps), before, after)


def _count(
    pairs: Sequence[Pair],
    scheme: LabelScheme,
    steps: Sequence[PostprocessingStep],
    candidates: Sequence[LabelClass],
    execution: Execution,
) -> list[_Counts]:
    """Return every case's histograms: the prediction after `steps`, and what the disjoint candidates remove from it."""
    tried = candidates[0].name if len(candidates) == 1 else f"{len(candidates)} classes"
    results = execution.map(
        partial(_count_case, scheme, tuple(steps), tuple(candidates)),
        pairs,
        description=f"post-processing {tried}",
        name=lambda pair: pair.case,
        size=Pair.predicted_bytes,
    )
    found = {pair.case: counts for pair, counts in results}
    return [found[pair.case] for pair in pairs]


def _count_case(
    scheme: LabelScheme, steps: Sequence[PostprocessingStep], candidates: Sequence[LabelClass], pair: Pair
) -> _Counts:
    loaded, reference = pair.load()
    prediction = apply_steps(loaded, steps)
    kept = joint_histogram(prediction, reference, scheme)
    removed = np.zeros_like(kept)
    boxes = label_boxes(prediction)
    for class_ in candidates:
        found = strays(prediction, class_.values, boxes)
        if found is not None:
            box, mask = found
            removed += joint_histogram(prediction[box][mask], reference[box][mask], scheme)
    return _Counts(kept, removed)


def _disjoint_runs(classes: Sequence[LabelClass]) -> list[list[LabelClass]]:
    """Split the classes, in order, into runs without common labels: a step of a run changes none of its others."""
    runs: list[list[LabelClass]] = [[]]
    for class_ in classes:
        if any(set(class_.values) & set(other.values) for other in runs[-1]):
            runs.append([])
        runs[-1].append(class_)
    return runs


def _summary(pairs: Sequence[Pair], histograms: Sequence[_Histogram], classes: Sequence[LabelClass]) -> Summary:
    cases = [pair.with_metrics(metrics_from_histogram(h, classes)) for pair, h in zip(pairs, histograms, strict=True)]
    return summarize(cases, classes)


def _improves_foreground(before: Summary, after: Summary) -> bool:
    # Comparisons with NaN are false: a missing foreground mean refuses, a missing class does not object.
    if not _dice(after.foreground_mean) > _dice(before.foreground_mean):
        return False
    return not any(_dice(after.mean[name]) < _dice(metrics) for name, metrics in before.mean.items())


def _dice(metrics: MeanMetrics) -> float:
    return math.nan if metrics.dice is None else metrics.dice


def _step(class_: LabelClass) -> PostprocessingStep:
    return PostprocessingStep.largest_of(class_.name, class_.values)
