"""What a report tells, as plain frozen records; whoever owns a project fills them.

Every part may be missing (None or empty): the page then says what has not been done yet. Nothing here imports
matplotlib or jinja2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from segfit.errors import Problem
from segfit.evaluation.summary import CaseMetrics, Summary
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.planning.plan import Plan, StageForecast
from segfit.report.scenes import in_8_bits
from segfit.report.views import View, thinned
from segfit.selection.select import Selection
from segfit.selection.verdict import Verdict

__all__ = [
    "THUMB",
    "Kind",
    "Overlay",
    "Rank",
    "ReportData",
    "StageUse",
    "TrainingCurve",
    "choose_examples",
    "flagged",
    "ranked",
]

Kind = Literal["validation", "test", "evaluation"]
Rank = Literal["best", "median", "worst", "flagged", ""]
THUMB = 224  # pixels of a side of the slice that is shown of a case without a rank


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCurve:
    """How one training went. `share` runs from 0 to 1 of the training's budget; a value that is not finite is a gap."""

    configuration: str
    fold: int
    share: tuple[float, ...] = ()
    loss: tuple[float, ...] = ()  # one per entry of `share`
    learning_rate: tuple[float, ...] = ()  # one per entry of `share`
    validation_share: tuple[float, ...] = ()
    dice: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by class, per `validation_share`
    steps: int | None = None
    seconds: float | None = None
    skipped: int = 0  # steps left out because their gradient was not finite

    @classmethod
    def from_events(cls, configuration: str, fold: int, events: Iterable[Mapping[str, Any]]) -> TrainingCurve:
        """Read the events of a training's log, of the kinds named here; others are ignored.

        What a training started from ("before") is the first point of the Dice.
        """
        by_kind: dict[str, list[Mapping[str, Any]]] = {"step": [], "before": [], "validation": [], "skipped": []}
        for event in events:
            by_kind.get(event["kind"], []).append(event)
        steps, validations = by_kind["step"], by_kind["before"] + by_kind["validation"]
        names = dict.fromkeys(name for event in validations for name in event["dice"])
        return cls(
            configuration=configuration,
            fold=fold,
            share=_column(steps, "share"),
            loss=_column(steps, "loss"),
            learning_rate=_column(steps, "learning_rate"),
            validation_share=_column(validations, "share"),
            dice={name: _column([event["dice"] for event in validations], name) for name in names},
            steps=steps[-1]["step"] if steps else None,
            seconds=steps[-1]["seconds"] if steps else None,
            skipped=len(by_kind["skipped"]),
        )


def _column(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[float, ...]:
    """Return one number per row; a missing or null value is NaN."""
    values = (row.get(key) for row in rows)
    return tuple(math.nan if value is None else float(value) for value in values)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Overlay:
    """One case to look at.

    Parameters
    ----------
    rank : why it is shown; empty for one of the many others, of which a small slice is shown
    view : slices of image and reference, and with a rank more to scroll through
    cuts : the prediction in the slices of the view, thinned alike
    volume : the prediction in its scene
    outside : share of what is predicted that lies beyond the scene
    probability : of any class in its scene, 0 to 255, where it is at hand
    """

    case: str
    kind: Kind
    rank: Rank
    dice: float | None
    view: View
    cuts: tuple[NDArray[Any], ...]
    volume: NDArray[Any] | None = None
    outside: float = 0.0
    probability: NDArray[np.uint8] | None = None

    @classmethod
    def of(
        cls,
        case: str,
        kind: Kind,
        rank: Rank,
        dice: float | None,
        view: View,
        prediction: NDArray[Any],
        *,
        probability: NDArray[Any] | None = None,
        whole: bool = False,
    ) -> Overlay:
        """Return what is shown of a case, whole if it has a rank or that is asked for.

        `prediction` is integer labels, `probability` that of any class, 0 to 1, with the axes of the view.
        """
        small = not (rank or whole)
        seen = view.smaller(THUMB) if small else view
        cuts = tuple(thinned(one.of(prediction)) for one in seen.slices)
        if small:
            cuts = tuple(thinned(cut, THUMB) for cut in cuts)
        if seen.scene is None:
            return cls(case=case, kind=kind, rank=rank, dice=dice, view=seen, cuts=cuts)
        volume, outside = seen.scene.cut(prediction), seen.scene.share_outside(prediction)
        chance = None if probability is None else in_8_bits(seen.scene.cut(probability), 0.0, 1.0)
        return cls(
            case=case,
            kind=kind,
            rank=rank,
            dice=dice,
            view=seen,
            cuts=cuts,
            volume=volume,
            outside=outside,
            probability=chance,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageUse:
    """What one stage was forecast to need and what it used."""

    name: str
    forecast: StageForecast | None = None
    used_s: float | None = None
    peak_memory_gb: float | None = None  # RAM of the process
    device_memory_gb: float | None = None
    disk_gb: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything the page shows."""

    dataset: str
    verdict: Verdict | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # `Options.model_dump()`, nested or with dotted keys
    fingerprint: Fingerprint | None = None
    label_names: Mapping[int, str] = field(default_factory=dict)  # foreground label value -> name
    plan: Plan | None = None
    trainings: tuple[TrainingCurve, ...] = ()
    selection: Selection | None = None
    validation: Summary | None = None
    folds: Mapping[str, int] = field(default_factory=dict)  # whose network predicted a validation case
    test: Summary | None = None
    overlays: tuple[Overlay, ...] = ()
    pages: Mapping[str, str] = field(default_factory=dict)  # that show cases whole, see `write_case_pages`
    no_images: bool = False  # pictures were left out as asked
    resources: tuple[StageUse, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)  # "machine", "segfit", "torch", "command", ...
    model_path: str = ""  # folder of the bundle, once there is one
    file_ending: str = ""  # of the dataset's labels, with the leading dot
    image_ending: str = ""  # of its images; empty: as the labels
    warnings: tuple[Problem, ...] = ()  # beside the plan's own


def flagged(summary: Summary, verdict: Verdict | None, most: int = 4) -> list[str]:
    """Return cases that need a look, at most so many: those a verdict names, then those where a class was missed."""
    known = [case.case for case in sorted(summary.cases, key=lambda case: (case.mean_dice or 0.0, case.case))]
    named = [case for item in (verdict.findings if verdict else ()) for case in item.cases if case in known]
    missed = {case.case for case in summary.cases if any(one.dice == 0 for one in case.metrics.values())}
    return list(dict.fromkeys([*named, *(case for case in known if case in missed)]))[:most]


def ranked(summary: Summary, verdict: Verdict | None = None, others: int = 200) -> list[tuple[CaseMetrics, Rank]]:
    """Return the cases to show, those with a rank first, then the others, the worst first."""
    found: dict[str, Rank] = {case.case: rank for rank, case in choose_examples(summary).items()}
    for case in flagged(summary, verdict):
        found.setdefault(case, "flagged")
    cases = {case.case: case for case in summary.cases}
    rest = sorted(
        (c for c in summary.cases if c.case not in found), key=lambda case: (case.mean_dice or 0.0, case.case)
    )
    return [*((cases[name], rank) for name, rank in found.items()), *((case, "") for case in rest[:others])]


def choose_examples(summary: Summary) -> dict[Literal["best", "median", "worst"], CaseMetrics]:
    """Pick the best, median and worst case by mean Dice; fewer where there are fewer than three cases with a Dice."""
    scored = [(mean, case) for case in summary.cases if (mean := case.mean_dice) is not None]
    ranked = [case for _, case in sorted(scored, key=lambda item: item[0])]
    if not ranked:
        return {}
    picks: dict[Literal["best", "median", "worst"], CaseMetrics] = {"best": ranked[-1]}
    if len(ranked) > 2:
        picks["median"] = ranked[len(ranked) // 2]
    if len(ranked) > 1:
        picks["worst"] = ranked[0]
    return picks
