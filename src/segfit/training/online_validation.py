"""Validation during training: Dice on a few whole validation cases, always the same ones.

They are predicted on the network's grid, by sliding window without mirroring, and scored as in the report: per case,
then the mean over cases, then the mean over classes. The Dice of all cases on their own grids is found after the
training, with finer steps of the window and usually a little higher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from math import prod
from time import perf_counter
from typing import Any

import numpy as np
from torch import Tensor

from segfit.errors import MemoryShortageError, StageError
from segfit.evaluation.metrics import Metrics, case_metrics
from segfit.evaluation.summary import CaseMetrics, summarize
from segfit.inference.predictor import Predictor
from segfit.inference.tiles import tile_starts
from segfit.labels import LabelScheme
from segfit.networks.outputs import decode
from segfit.preprocessing.pipeline import with_previous_stage
from segfit.specs import Configuration, TrainingSpec
from segfit.training.learner import Learner
from segfit.training.result import ValidationPoint
from segfit.training.sampler import TrainingCase

__all__ = ["TILE_STEP", "CaseValidation", "ValidationSchedule", "tile_count", "varied"]

TILE_STEP = 1.0  # of the sliding window: tiles overlap as little as they can, which never flatters
_MOST_CASES = 8
_MOST_VALIDATIONS = 20  # one per 5 % of the budget
_ENOUGH_VALIDATIONS = 5  # fewer cases rather than less than this
_FORWARD_COST = 1 / 3  # of a training step: no backward pass, no augmentation (assumption)


@dataclass(frozen=True, slots=True)
class ValidationSchedule:
    """How often a training is validated, on which cases, and what that takes."""

    count: int = 0  # validations over the whole budget, evenly spread, the last one at its end; 0: none
    cases: tuple[str, ...] = ()
    seconds: float = 0.0  # that one validation takes

    @classmethod
    def within(cls, allowance: float, costs: Mapping[str, float]) -> ValidationSchedule:
        """Return the schedule that takes at most `allowance` seconds.

        `costs` are the seconds of each case, the first ones preferred; none costs more than the allowance.
        """
        names = list(costs)[:_MOST_CASES]
        for number in range(len(names), 0, -1):
            seconds = sum(costs[name] for name in names[:number])
            count = min(_MOST_VALIDATIONS, int(allowance / seconds))
            if count >= _ENOUGH_VALIDATIONS or number == 1:
                return cls(count, tuple(names[:number]), seconds)
        return cls()

    def is_due(self, done: int, share: float) -> bool:
        """Whether the next validation is due when `done` were made and `share` of the budget is used."""
        return done < self.count and share >= (done + 1) / self.count


class CaseValidation:
    """The validations of one training: when they are due, what they take and what they found.

    Parameters
    ----------
    cases : candidates, some of which are used; without any nothing is ever due
    """

    def __init__(
        self,
        learner: Learner,
        configuration: Configuration,
        recipe: TrainingSpec,
        labels: LabelScheme,
        cases: Sequence[TrainingCase],
    ) -> None:
        self.curve: list[ValidationPoint] = []
        self.before: ValidationPoint | None = None  # of what the training started from
        self.schedule: ValidationSchedule | None = None  # None: not yet known
        self.seconds = 0.0  # that the next validation takes, as far as that is known
        self._learner = learner
        self._configuration = configuration
        self._recipe = recipe
        self._labels = labels
        self._cases = {case.id: case for case in cases}

    def plan(self, step_seconds: float, seconds: float) -> None:
        """Decide how often and on which cases to validate in a training of so many seconds.

        All of it takes the recipe's share of them, or, where not even one case fits into that, one case at the end
        takes twice the share; otherwise there is no validation. The smallest case is predicted to learn what a tile
        takes, unless it is too large for that by the time of a training step.
        """
        self.schedule = ValidationSchedule()
        allowance = self._recipe.validation_share * seconds
        if not self._cases or allowance <= 0:
            return
        tiles = {case.id: tile_count(case.shape, self._configuration.patch_size) for case in self._cases.values()}
        smallest = min(tiles, key=lambda name: (tiles[name], name))
        per_tile, spent = step_seconds * _FORWARD_COST / self._configuration.batch_size, 0.0
        if per_tile * tiles[smallest] <= allowance / 4:
            started = perf_counter()
            self._evaluate([smallest])
            spent = perf_counter() - started
            per_tile = spent / tiles[smallest]
        costs = {name: per_tile * number for name, number in tiles.items()}
        left = allowance - spent
        affordable = varied([case for case in self._cases.values() if costs[case.id] <= left], self._labels)
        if affordable:
            self.schedule = ValidationSchedule.within(left, {case.id: costs[case.id] for case in affordable})
        elif spent + costs[smallest] <= 2 * allowance:
            self.schedule = ValidationSchedule(1, (smallest,), costs[smallest])
        self.seconds = self.schedule.seconds

    def most_bytes(self) -> int:
        """Return what the input of a case and its logits take at most, about."""
        channels = self._configuration.network.in_channels + self._labels.num_outputs
        return 4 * channels * max((prod(case.shape) for case in self._cases.values()), default=0)

    def is_due(self, share: float) -> bool:
        """Whether to validate when `share` of the budget is used."""
        if self.schedule is None:
            return False
        # Of a training that goes on with a larger budget more are done than its share calls for.
        called_for = int(self.curve[-1].share * self.schedule.count + 1e-3) if self.curve else 0
        return self.schedule.is_due(min(len(self.curve), called_for), share)

    def rescale(self, share: Callable[[int, float], float]) -> None:
        """Have the points of the curve stand at the share of another budget, which is told for step and seconds."""
        self.curve = [point.model_copy(update={"share": share(point.step, point.seconds)}) for point in self.curve]

    def is_missing_at_end(self, step: int) -> bool:
        """Whether a training that ends after this step is still to be validated."""
        wanted = self.schedule is not None and self.schedule.count > 0
        return wanted and (not self.curve or self.curve[-1].step != step)

    def measure(self, *, step: int, seconds: float, share: float) -> ValidationPoint:
        """Score the present network on the cases of the schedule and add the point to the curve."""
        started = perf_counter()
        point = self._point(step, seconds, share)
        self.curve.append(point)
        self.seconds = perf_counter() - started
        return point

    def measure_before(self, weights: Mapping[str, Tensor], seconds: float) -> ValidationPoint | None:
        """Score the weights that the training started from; None where there is no time for any validation."""
        assert self.schedule is not None
        if self.schedule.count:
            with self._learner.holding(weights):
                self.before = self._point(0, seconds, 0.0)
        return self.before

    def _point(self, step: int, seconds: float, share: float) -> ValidationPoint:
        assert self.schedule is not None
        scored = [
            CaseMetrics(case=name, prediction_file="", reference_file="", metrics=metrics)
            for name, metrics in self._evaluate(self.schedule.cases).items()
        ]
        dice: dict[str, float | None] = {class_.name: None for class_ in self._labels.classes}
        mean = None
        if scored:
            summary = summarize(scored, self._labels.classes)
            dice, mean = {name: one.dice for name, one in summary.mean.items()}, summary.mean_dice
        return ValidationPoint(step=step, seconds=seconds, share=share, dice=dice, mean=mean)

    def _evaluate(self, names: Sequence[str]) -> dict[str, dict[str, Metrics]]:
        """Predict and evaluate cases; those for which the network gives no finite numbers are left out."""
        found = {}
        with self._learner.evaluating() as network:
            predictor = Predictor(
                self._configuration,
                self._labels,
                [deepcopy(network)],  # the predictor may move its networks to another device
                (),
                self._learner.device,
                TILE_STEP,
                precision=self._recipe.precision,
                channels_last=self._recipe.channels_last,
                deterministic=self._recipe.deterministic,
            )
            for name in names:
                case = self._cases[name]
                reference = case.labels()
                assert reference is not None, f"case {name} was preprocessed without labels"
                try:
                    seen = with_previous_stage(case.image(), case.previous_stage(), self._labels)
                    prediction = decode(predictor.logits(seen), self._labels)
                except MemoryShortageError:
                    raise
                except StageError:
                    continue
                # Outside the non-zero mask is background.
                found[name] = case_metrics(prediction, np.maximum(reference, 0), self._labels)
        return found

    def facts(self) -> dict[str, Any]:
        """Return what a training needs to go on, as JSON values."""
        return {
            "schedule": None if self.schedule is None else asdict(self.schedule),
            "curve": [point.model_dump(mode="json") for point in self.curve],
            **({} if self.before is None else {"before": self.before.model_dump(mode="json")}),
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on from saved facts."""
        saved = facts["schedule"]
        self.schedule = saved and ValidationSchedule(**saved | {"cases": tuple(saved["cases"])})
        self.seconds = self.schedule.seconds if self.schedule else 0.0
        self.curve = [ValidationPoint.model_validate(point) for point in facts["curve"]]
        before = facts.get("before")
        self.before = None if before is None else ValidationPoint.model_validate(before)


def tile_count(shape: Sequence[int], patch: Sequence[int]) -> int:
    """Return how many tiles a prediction has; a patch with fewer axes than the image sees its slices."""
    seen = (1,) * (len(shape) - len(patch)) + tuple(patch)
    return prod(len(tile_starts(max(n, p), p, TILE_STEP)) for n, p in zip(shape, seen, strict=True))


def varied(cases: Sequence[TrainingCase], labels: LabelScheme) -> list[TrainingCase]:
    """Return at most eight cases: first those with classes still missing, then those of sizes still missing."""
    ranked = sorted(cases, key=lambda case: (prod(case.shape), case.id))
    held = [{class_.name for class_ in labels.classes if len(case.locations.get(class_.name, ()))} for case in ranked]
    missing = set().union(*held)
    chosen: list[int] = []

    def worth(rank: int) -> tuple[int, int]:
        distances = [abs(rank - other) for other in chosen]
        return len(held[rank] & missing), min(distances) if distances else -abs(rank - len(ranked) // 2)

    while len(chosen) < min(_MOST_CASES, len(ranked)):
        best = max((rank for rank in range(len(ranked)) if rank not in chosen), key=worth)
        chosen.append(best)
        missing -= held[best]
    return [ranked[rank] for rank in chosen]
