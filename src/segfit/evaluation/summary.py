"""Metrics of many cases and their means; nnU-Net's ``summary.json`` form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import AliasChoices, Field

from segfit.errors import InputError
from segfit.evaluation.measures import Measures, Unit
from segfit.evaluation.metrics import Metrics
from segfit.evaluation.statistics import Estimate
from segfit.files import Document, GrownRecord, Record, Warned
from segfit.labels import LabelClass
from segfit.notebook import html_table
from segfit.text import count, dice, listing

__all__ = ["CaseMetrics", "Estimates", "MeanMetrics", "Slice", "Summary", "summarize"]

Estimates = dict[str, dict[str, Estimate]]
"""By class and measure."""

# Field of our records -> key of nnU-Net.
_NNUNET_KEYS = {
    "dice": "Dice",
    "fn": "FN",
    "fp": "FP",
    "iou": "IoU",
    "tn": "TN",
    "tp": "TP",
    "n_pred": "n_pred",
    "n_ref": "n_ref",
}


class CaseMetrics(Record):
    """Metrics of one case by name of the class."""

    case: str
    prediction_file: str
    reference_file: str
    metrics: dict[str, Metrics] = Field(validation_alias=AliasChoices("metrics", "scores"))  # its old name

    @property
    def mean_dice(self) -> float | None:
        """Mean over the classes that have a Dice here; None if none has."""
        dice = [one.dice for one in self.metrics.values() if one.dice is not None]
        return math.fsum(dice) / len(dice) if dice else None


class MeanMetrics(GrownRecord):
    """Means of `Metrics` over cases or classes; None where no value exists."""

    LATER: ClassVar[frozenset[str]] = frozenset({"measures"})

    tp: float | None
    fp: float | None
    fn: float | None
    tn: float | None
    n_pred: float | None
    n_ref: float | None
    dice: float | None
    iou: float | None
    measures: dict[str, float | None] = {}


class Slice(Record):
    """The cases of which a table says the same: their means, and the classes in which they clearly fall behind."""

    value: str
    estimates: Estimates
    behind: tuple[str, ...] = ()


class Summary(Document):
    """Metrics of a set of cases.

    `mean` has one entry per class: the mean over the cases that have a value. `foreground_mean` follows
    nnU-Net: the plain mean over the classes, so its Dice is None (NaN there) as soon as one class has a value
    in no case. `mean_dice` is the mean over the classes that have a value; segfit selects by it.
    `warnings` say what to know about the comparison; `measures` what was asked for beside overlap, and `unit` in what
    distances are: None without any, or where it is not the same for all cases. `estimates` are means with intervals
    over groups of cases, `mean_dice_estimate` is that of `mean_dice`, and `slices` those by the values of the column
    `by`, where these were asked for.
    """

    SHARED = True
    classes: tuple[LabelClass, ...] = Field(validation_alias=AliasChoices("classes", "targets"))  # its old name
    cases: tuple[CaseMetrics, ...]
    mean: dict[str, MeanMetrics]
    foreground_mean: MeanMetrics
    mean_dice: float | None
    warnings: tuple[Warned, ...] = ()
    measures: Measures | None = None
    unit: Unit | None = None
    estimates: Estimates = {}
    mean_dice_estimate: Estimate | None = None
    by: str = ""
    slices: tuple[Slice, ...] = ()

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {dice(one.dice)}" for name, one in self.mean.items())
        return f"Summary({count(len(self.cases), 'case')}, mean Dice {dice(self.mean_dice)}: {means})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        names = list(self.mean)
        rows = [("mean", *(dice(one.dice) for one in self.mean.values()))]
        rows += [(case.case, *(dice(case.metrics[name].dice) for name in names)) for case in self.cases]
        title = f"{count(len(self.cases), 'case')}, mean Dice {dice(self.mean_dice)}"
        return html_table(title, ("Dice", *names), rows, [str(item) for item in self.warnings])

    def subset(self, case_ids: Iterable[str]) -> Summary:
        """Return the summary of some of the cases, for example of one fold."""
        wanted = set(case_ids)
        return summarize([case for case in self.cases if case.case in wanted], self.classes)

    def values(self, name: str) -> dict[str, dict[str, float | None]]:
        """Return what was measured of a class by measure and case."""
        each = {case.case: case.metrics[name].values for case in self.cases}
        keys = dict.fromkeys(key for values in each.values() for key in values)
        return {key: {case: values.get(key) for case, values in each.items()} for key in keys}

    def to_nnunet(self) -> dict[str, Any]:
        """Return the content of nnU-Net's ``summary.json``: keys sorted, NaN for missing values."""
        keys = {class_.name: _class_key(class_) for class_ in self.classes}
        mean = {keys[name]: _nnunet_values(one) for name, one in self.mean.items()}
        cases = [
            {
                "metrics": dict(sorted((keys[name], _nnunet_values(one)) for name, one in case.metrics.items())),
                "prediction_file": case.prediction_file,
                "reference_file": case.reference_file,
            }
            for case in self.cases
        ]
        return {
            "foreground_mean": _nnunet_values(self.foreground_mean),
            "mean": dict(sorted(mean.items())),
            "metric_per_case": cases,
        }


def summarize(cases: Sequence[CaseMetrics], classes: Sequence[LabelClass]) -> Summary:
    """Summarise cases, which keep their order; raise `InputError` if there are none."""
    if not cases:
        raise InputError("there is no case to summarise")
    twice = [case for case, count in Counter(item.case for item in cases).items() if count > 1]
    if twice:
        raise InputError(f"{listing(sorted(twice))} occurs twice", "every case may be evaluated once")
    mean = {class_.name: _mean([case.metrics[class_.name] for case in cases]) for class_ in classes}
    dice = [one.dice for one in mean.values() if one.dice is not None]
    return Summary(
        classes=tuple(classes),
        cases=tuple(cases),
        mean=mean,
        foreground_mean=_mean(list(mean.values()), skip_missing=False),
        mean_dice=float(np.mean(dice)) if dice else None,
    )


def _mean(items: Sequence[Metrics | MeanMetrics], *, skip_missing: bool = True) -> MeanMetrics:
    """Average each value over those that exist; without `skip_missing` one missing value makes the mean missing."""

    def mean(values: Sequence[float | None]) -> float | None:
        present = [value for value in values if value is not None]
        complete = len(present) == len(values)
        return float(np.mean(present)) if present and (skip_missing or complete) else None

    means = {key: mean([getattr(item, key) for item in items]) for key in _NNUNET_KEYS}
    names = dict.fromkeys(name for item in items for name in item.measures)
    measures = {name: mean([item.measures.get(name) for item in items]) for name in names}
    return MeanMetrics(**means, measures=measures)


def _nnunet_values(metrics: Metrics | MeanMetrics) -> dict[str, float]:
    values = {name: getattr(metrics, key) for key, name in _NNUNET_KEYS.items()}
    return {name: math.nan if value is None else value for name, value in values.items()}


def _class_key(class_: LabelClass) -> str:
    """Return nnU-Net's key: the value of a label, the text of a Python tuple for a region."""
    return str(class_.values[0]) if len(class_.values) == 1 else str(class_.values)
