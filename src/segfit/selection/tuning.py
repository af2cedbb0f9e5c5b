"""Which cheaper ways to predict lose nothing, measured on cases that the networks had not seen: ``segfit tune``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

from segfit.bundle.bundle import ModelManifest
from segfit.bundle.speeds import Speed, SpeedName
from segfit.dataset.annotation import read_labels
from segfit.dataset.manifest import Case, Dataset
from segfit.dataset.splits import Splits
from segfit.device import measure_hardware
from segfit.errors import InputError
from segfit.evaluation.metrics import case_metrics
from segfit.evaluation.statistics import FEWEST_GROUPS, difference
from segfit.inference.model import Model, load_model
from segfit.inference.open_model import open_model
from segfit.progress import SILENT, Progress
from segfit.text import count

__all__ = ["LOSS", "Tuning", "tune"]

LOSS = 0.002
"""Mean Dice of a class that a faster way may lose at most, by its lower 95 % bound; a quarter of that is balanced."""
_Dice = dict[str, dict[str, float]]  # by class and case


@dataclass(frozen=True, slots=True)
class _Measured:
    dice: _Dice
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was tried, in order, and the ways that are taken, by name."""

    tried: tuple[Speed, ...]
    speeds: dict[SpeedName, Speed]
    cases: int
    groups: int

    def facts(self) -> dict[str, Any]:
        """Return it as plain values."""
        tried = [one.model_dump(mode="json") for one in self.tried]
        names = {name: speed.words for name, speed in self.speeds.items()}
        return {"cases": self.cases, "groups": self.groups, "tried": tried, "speeds": names}


def tune(
    path: Path,
    dataset: Dataset,
    splits: Splits,
    groups: Mapping[str, str],
    *,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Tuning:
    """Measure cheaper ways to predict on the validation cases of a model's folds.

    Each case is predicted by the network of its fold alone, so by one that had not seen it. A way that loses is
    combined with no other. Of those whose lower 95 % bound of the mean change of Dice is above -`LOSS` in every class,
    the cheapest is "fast"; "balanced" is the cheapest with a quarter of that; "accurate" is the model's own way.

    Parameters
    ----------
    path : a model of segfit
    splits : the folds that the model was trained on
    groups : group by case; others are groups of their own

    Raises `InputError` if the model has no network of single folds, or too few groups of cases to tell.
    """
    manifest = open_model(path).manifest
    cases = _cases_by_fold(manifest, dataset, splits)
    ids = [case.id for own in cases.values() for case in own]
    num_groups = len({groups.get(case, f"\0{case}") for case in ids})
    if num_groups < FEWEST_GROUPS:
        raise InputError(
            f"{count(num_groups, 'group')} of validation cases cannot tell what a faster way loses",
            f"validate {FEWEST_GROUPS} at least: train more folds (--set planning.folds=0,1,2,3,4)",
        )
    ways = _ways(manifest, device)
    with progress.task("tuning", (len(ways) + 1) * len(ids)) as task:

        def measured(way: Speed) -> _Measured:
            found = _Measured({one.name: {} for one in dataset.labels.classes}, {})
            for fold, own in cases.items():
                model = load_model(
                    path, device, [fold], mirror=way.mirror, tile_step=way.tile_step, precision=way.precision
                )
                for case in own:
                    _measure(model, case, dataset, found)
                    task.advance(1, case.id)
            return found

        own = measured(Speed())
        tried: list[Speed] = [Speed(dice=_means(own.dice))]
        lost: list[Speed] = []
        for way in ways:
            if any(_includes(way, one) for one in lost):
                task.advance(len(ids))
                continue
            speed = _compared(way, measured(way), own, groups)
            tried.append(speed)
            if not _passes(speed, LOSS):
                lost.append(way)
    return Tuning(tuple(tried), _chosen(tried), len(ids), num_groups)


def _chosen(tried: Sequence[Speed]) -> dict[SpeedName, Speed]:
    return {"fast": _cheapest(tried, LOSS), "balanced": _cheapest(tried, LOSS / 4), "accurate": tried[0]}


def _cases_by_fold(manifest: ModelManifest, dataset: Dataset, splits: Splits) -> dict[int, list[Case]]:
    """Return the validation cases that only the network of their fold has not seen."""
    if dataset.labels != manifest.labels:
        raise InputError(f"{dataset.name} has other labels than {manifest.name}", "give the dataset it was trained on")
    folds = [int(name) for name in manifest.members[0].weights if name.isdigit() and int(name) < len(splits.folds)]
    found = {fold: [dataset.case(name) for name in splits.folds[fold].validation] for fold in folds}
    if not any(found.values()):
        raise InputError(f"{manifest.name} has no network that left cases out", "tune a model of single folds")
    return found


def _ways(manifest: ModelManifest, device: str) -> list[Speed]:
    """Return what is tried: each way alone, then together, those that cost least last."""
    single: list[dict[str, Any]] = []
    if any(member.mirror_axes for member in manifest.members):
        single.append({"mirror": False})
    if any(member.tile_step < 0.75 for member in manifest.members):
        single.append({"tile_step": 0.75})
    if measure_hardware(device).fast_bf16 and any(member.precision == "fp32" for member in manifest.members):
        single.append({"precision": "bf16"})
    together = [parts for size in range(1, len(single) + 1) for parts in combinations(single, size)]
    return [Speed.model_validate({key: value for part in parts for key, value in part.items()}) for parts in together]


def _includes(way: Speed, part: Speed) -> bool:
    """Whether a way does all that another one does."""
    asked = part.model_dump(include={"mirror", "tile_step", "precision"}, exclude_none=True)
    return all(getattr(way, key) == value for key, value in asked.items())


def _measure(model: Model, case: Case, dataset: Dataset, found: _Measured) -> None:
    started = perf_counter()
    prediction = model.predict(list(case.images), case.spacing_mm)
    found.seconds[case.id] = perf_counter() - started
    inner = dataset.labels.to_inner(prediction.labels)
    reference = read_labels(case, dataset.labels).array[0]
    for name, one in case_metrics(inner, reference, dataset.labels).items():
        found.dice[name][case.id] = 1.0 if one.dice is None else one.dice  # rightly empty; false specks are no gap


def _means(dice: _Dice) -> dict[str, float]:
    return {name: fmean(by_case.values()) for name, by_case in dice.items()}


def _compared(way: Speed, found: _Measured, own: _Measured, groups: Mapping[str, str]) -> Speed:
    changes = {name: difference(dict(by_case), dict(own.dice[name]), groups) for name, by_case in found.dice.items()}
    return way.model_copy(
        update={
            "time": median(found.seconds[case] / seconds for case, seconds in own.seconds.items()),
            "dice": _means(found.dice),
            "least": {name: one.low for name, one in changes.items() if one.low is not None},
        }
    )


def _passes(speed: Speed, loss: float) -> bool:
    """Whether every class is known to lose less."""
    return all(speed.least.get(name, -inf) > -loss for name in speed.dice)


def _cheapest(tried: Sequence[Speed], loss: float) -> Speed:
    own, *ways = tried
    return min((own, *(one for one in ways if _passes(one, loss))), key=lambda one: one.time)
