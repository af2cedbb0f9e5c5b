"""What was trained, found and used: records in, plain values for the template out. None = not done yet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from segfit.evaluation.statistics import Estimate
from segfit.evaluation.summary import Summary
from segfit.planning.plan import StageForecast
from segfit.report import figures
from segfit.report.data import ReportData, StageUse, TrainingCurve
from segfit.text import count, dice, duration, gigabytes, listing, measure_name, number

__all__ = ["found", "interval_of", "resources", "scores", "slices", "training"]

_MAX_CELLS = 20_000  # of a per-case table; the worst cases come first
_MAX_LINES = 8  # classes in one figure
_LAST_QUARTER, _ENDED = 0.75, 0.99  # shares of the budget of a training
_RISING = 0.01  # Dice that a falling learning rate alone may give in the last quarter


def training(trainings: Sequence[TrainingCurve]) -> list[dict[str, Any]] | None:
    """Return the curves, grouped by configuration."""
    if not trainings:
        return None
    groups = []
    for number_, name in enumerate(dict.fromkeys(curve.configuration for curve in trainings)):
        curves = sorted((c for c in trainings if c.configuration == name), key=lambda curve: curve.fold)
        classes = list(dict.fromkeys(class_ for curve in curves for class_ in curve.dice))
        shown = _hardest(curves, classes)
        prefix = f"train{number_}"
        drawn = [figures.loss_figure(curves, prefix)]
        if shown:
            drawn.append(figures.validation_figure(curves, shown, prefix))
        drawn.append(figures.learning_rate_figure(curves, prefix))
        groups.append(
            {
                "name": name,
                "figures": drawn,
                "folds": [
                    {
                        "fold": curve.fold,
                        "colour": figures.fold_colour(curve.fold),
                        "steps": number(curve.steps),
                        "time": duration(curve.seconds),
                        "done": f"{100 * curve.share[-1]:.0f} %" if curve.share else "0 %",
                        "loss": number(_last_finite(curve.loss)),
                    }
                    for curve in curves
                ],
                "gain": _gain(curves),
                "classes": [{"name": class_, "colour": figures.class_colour(i)} for i, class_ in enumerate(shown)],
                "hidden": len(classes) - len(shown),
            }
        )
    return groups


def found(data: ReportData) -> dict[str, Any] | None:
    """Return the candidates, best first, the winner, and the post-processing that was tried."""
    selection = data.selection
    if selection is None:
        return None
    candidates = sorted(selection.candidates, key=lambda one: 1.0 if one.mean_dice is None else -one.mean_dice)
    classes = list(dict.fromkeys(name for candidate in candidates for name in candidate.per_class))
    return {
        "classes": classes if len(classes) <= _MAX_LINES else [],
        "candidates": [
            {
                "name": " + ".join(candidate.members),
                "mean": dice(candidate.mean_dice),
                "bar": _percent(candidate.mean_dice),
                "dice": [dice(candidate.per_class.get(name)) for name in classes],
                "winner": candidate.members == selection.winner,
            }
            for candidate in candidates
        ],
        "winner": " + ".join(selection.winner),
        "reason": selection.reason,
        "notes": selection.notes,
        "steps": [step.text for step in selection.steps],
        "before": dice(selection.dice_before_steps),
        "after": dice(selection.dice_after_steps),
    }


def scores(
    summary: Summary | None,
    folds: Mapping[str, int] | None = None,
    shown: Mapping[str, int] | None = None,
    flags: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:
    """Return one row per class with its distribution, and one row per case, the worst first.

    Parameters
    ----------
    folds : whose network predicted a case, where that is told
    shown : which of the pictures is that of a case
    flags : what to say beside the names of cases
    """
    if summary is None:
        return None
    values = {name: [case.metrics[name].dice for case in summary.cases] for name in summary.mean}
    known = {name: [value for value in column if value is not None] for name, column in values.items()}
    estimates = {name: summary.estimates.get(name, {}).get("dice") for name in values}
    low = max(0.0, min(0.8, math.floor(10 * min(chain(*known.values()), default=0.0)) / 10))
    ranked = sorted(summary.cases, key=lambda case: 2.0 if case.mean_dice is None else case.mean_dice)
    listed = ranked[: max(20, _MAX_CELLS // (len(values) + 1))]
    return {
        "mean": dice(summary.mean_dice),
        "interval": interval_of(summary.mean_dice_estimate) or "–",
        "axis": figures.strip_axis(low),
        "few": any(one is not None and one.low is None for one in estimates.values()),
        "classes": [
            {
                "name": name,
                "colour": figures.class_colour(i),
                "strip": figures.strip(known[name], low, index=i, estimate=estimates[name]),
                "mean": dice(summary.mean[name].dice),
                "interval": interval_of(estimates[name]) or "–",
                "median": dice(float(np.median(known[name])) if known[name] else None),
                "worst": dice(min(known[name], default=None)),
                "absent": column.count(None),
            }
            for i, (name, column) in enumerate(values.items())
        ],
        "measures": _measures(summary),
        "total": count(len(ranked), "case"),
        "folds": bool(folds),
        "cases": [
            {
                "case": case.case,
                "number": (shown or {}).get(case.case),
                "flag": (flags or {}).get(case.case, ""),
                "fold": str((folds or {}).get(case.case, "")),
                "mean": dice(case.mean_dice),
                "bar": _percent(case.mean_dice),
                "dice": [(dice(one.dice), one.dice is not None and one.dice < 0.5) for one in case.metrics.values()],
            }
            for case in listed
        ],
        "hidden": len(ranked) - len(listed),
    }


def _measures(summary: Summary) -> list[dict[str, Any]]:
    """Return what was measured beside Dice, a row each, with its means by class."""
    keys = dict.fromkeys(key for values in summary.estimates.values() for key in values if key != "dice")
    none = Estimate(mean=None, cases=0, groups=0)
    return [
        {
            "name": measure_name(key, summary.unit),
            "values": [
                (dice(one.mean), interval_of(one))
                for name in summary.mean
                for one in [summary.estimates.get(name, {}).get(key, none)]
            ],
        }
        for key in keys
    ]


def slices(summary: Summary) -> dict[str, Any] | None:
    """Return the Dice of the cases of each value of the column that was asked for, and where one falls behind."""
    if not summary.slices:
        return None
    return {
        "by": summary.by,
        "classes": list(summary.mean),
        "rows": [
            {
                "value": one.value or "not told",
                "cases": max((of["dice"].cases for of in one.estimates.values()), default=0),
                "values": [(dice(of["dice"].mean), interval_of(of["dice"])) for of in one.estimates.values()],
            }
            for one in summary.slices
        ],
        "behind": [f"{one.value or 'not told'} in {listing(one.behind)}" for one in summary.slices if one.behind],
    }


def interval_of(found: Estimate | None) -> str:
    """Return an interval in words; empty where there is none."""
    if found is None or found.low is None or found.high is None:
        return ""
    return f"{dice(found.low)} to {dice(found.high)}"


def _gain(curves: Sequence[TrainingCurve]) -> str:
    """Say how much Dice rose at the end of trainings that were validated then: whether more time would give more."""
    gains = []
    for curve in curves:
        shares = np.asarray(curve.validation_share)
        values = np.array([curve.dice[name] for name in curve.dice if len(curve.dice[name]) == len(shares)])
        if len(shares) > 3 and values.size and shares[-1] >= _ENDED and shares[0] <= _LAST_QUARTER:
            with np.errstate(invalid="ignore"):
                mean = np.nanmean(values[:, np.isfinite(values).any(0)], axis=0)
            shares = shares[np.isfinite(values).any(0)]
            if len(shares) > 3:
                gains.append(float(mean[-1] - np.interp(_LAST_QUARTER, shares, mean)))
    if not gains:
        return ""
    gain = float(np.mean(gains))
    more = "more time would probably help" if gain > _RISING else "more time would hardly help"
    return f"In the last quarter the Dice of the watched cases changed by {gain:+.3f}: {more}."


def resources(stages: Sequence[StageUse]) -> dict[str, Any] | None:
    """Return one row per stage with bars on a common time scale, and the totals: forecast and used side by side."""
    if not stages:
        return None
    known = [stage.forecast for stage in stages if stage.forecast is not None]
    longest = max((*(f.seconds for f in known), *(s.used_s or 0.0 for s in stages)), default=0.0) or 1.0
    amounts = [_amounts(stage) for stage in stages]
    kinds = [kind for kind in ("RAM", "Device memory", "Disk") if any(v is not None for a in amounts for v in a[kind])]
    total = {
        kind: [_combined([a[kind][side] for a in amounts], add=kind == "Disk") for side in (0, 1)] for kind in kinds
    }
    return {
        "kinds": kinds,
        "stages": [
            {
                "name": stage.name,
                "forecast": duration(stage.forecast.seconds if stage.forecast else None),
                "used": duration(stage.used_s),
                "forecast_bar": f"{100 * (stage.forecast.seconds if stage.forecast else 0) / longest:.1f}",
                "used_bar": f"{100 * (stage.used_s or 0) / longest:.1f}",
                "amounts": [gigabytes(value) for kind in kinds for value in amount[kind]],
            }
            for stage, amount in zip(stages, amounts, strict=True)
        ],
        "forecast": duration(_combined([f.seconds for f in known], add=True)),
        "used": duration(_combined([stage.used_s for stage in stages], add=True)),
        "amounts": [gigabytes(value) for kind in kinds for value in total[kind]],
    }


def _amounts(stage: StageUse) -> dict[str, tuple[float | None, float | None]]:
    """Return what was forecast and what was used, by kind."""
    forecast = stage.forecast or StageForecast(seconds=0)
    return {
        "RAM": (forecast.memory_gb, stage.peak_memory_gb),
        "Device memory": (forecast.device_memory_gb, stage.device_memory_gb),
        "Disk": (forecast.disk_gb, stage.disk_gb),
    }


def _combined(values: Sequence[float | None], *, add: bool) -> float | None:
    """Return the sum or the maximum of what is known."""
    known = [value for value in values if value is not None]
    return (sum(known) if add else max(known)) if known else None


def _hardest(curves: Sequence[TrainingCurve], classes: Sequence[str]) -> list[str]:
    """Return at most `_MAX_LINES` classes: those with the lowest last values, in declared order."""
    if len(classes) <= _MAX_LINES:
        return list(classes)
    last = {name: np.nanmean([_last_finite(c.dice.get(name, ())) or 0.0 for c in curves]) for name in classes}
    keep = set(sorted(classes, key=lambda name: last[name])[:_MAX_LINES])
    return [name for name in classes if name in keep]


def _last_finite(values: Sequence[float]) -> float | None:
    return next((value for value in reversed(values) if math.isfinite(value)), None)


def _percent(value: float | None) -> str:
    return "0" if value is None else f"{100 * value:.1f}"
