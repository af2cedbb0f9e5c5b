"""Summaries and candidates made of tables of Dice."""

from __future__ import annotations

from collections.abc import Mapping

from segfit.evaluation.metrics import Metrics
from segfit.evaluation.summary import CaseMetrics, Summary, summarize
from segfit.labels import LabelClass
from segfit.selection.select import CandidateDice

__all__ = ["make_candidate", "make_summary"]


def make_summary(dice: Mapping[str, Mapping[str, float | None]]) -> Summary:
    """Metrics of cases with these Dice by class."""

    def metrics(value: float | None) -> Metrics:
        return Metrics.from_counts(0, 0, 0, 0).model_copy(update={"dice": value})

    cases = [
        CaseMetrics(case=case, prediction_file="", reference_file="", metrics={n: metrics(v) for n, v in one.items()})
        for case, one in dice.items()
    ]
    names = next(iter(dice.values()))
    return summarize(cases, [LabelClass(name=name, values=(value,)) for value, name in enumerate(names, 1)])


def make_candidate(name: str, mean: float | None, dice: dict[str, float | None]) -> CandidateDice:
    return CandidateDice(members=tuple(name.split(" + ")), mean_dice=mean, per_class=dice, per_fold={})
