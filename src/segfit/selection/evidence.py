"""What a trained model is judged by: metrics, trainings, plan and data, and what follows from them in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from segfit.evaluation.cohorts import Behind
from segfit.evaluation.summary import Summary
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.planning.plan import Plan, RunSpec
from segfit.selection.select import Selection
from segfit.training.result import TrainingResult

__all__ = ["LOST_LOSS", "Evidence"]

LOST_LOSS = 10.0
"""Final loss. Guessing among 100 labels costs ln(100) = 4.6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a verdict is made from.

    Parameters
    ----------
    validation : cross-validated metrics of what is handed over
    trainings : results of all trainings of the run
    num_folds : all folds there are, trained or not
    test : metrics of the test cases, if they have labels
    behind : validation cases of one kind that clearly fall behind the others
    """

    validation: Summary
    selection: Selection
    trainings: Sequence[TrainingResult]
    plan: Plan
    fingerprint: Fingerprint
    num_folds: int
    test: Summary | None = None
    behind: tuple[Behind, ...] = ()

    @property
    def run(self) -> RunSpec:
        """What was to be trained."""
        assert self.plan.run is not None
        return self.plan.run

    @property
    def chosen(self) -> list[TrainingResult]:
        """The trainings of the networks that are handed over."""
        return [item for item in self.trainings if item.configuration in self.selection.winner]

    @property
    def steps(self) -> int | None:
        """The steps of the shortest of them."""
        return min((item.steps for item in self.chosen), default=None)

    @property
    def gain(self) -> float:
        """Mean Dice gained in the last quarter of the trainings; 0 where the curves do not tell."""
        gains = []
        for result in self.chosen:
            curve = [(point.share, point.mean) for point in result.curve if point.mean is not None]
            before = [mean for share, mean in curve if share <= 0.75]
            if before and curve[-1][0] > 0.75:
                gains.append(curve[-1][1] - before[-1])
        return fmean(gains) if gains else 0.0

    @property
    def skipped(self) -> int:
        """Steps of the trainings of the chosen networks that had no finite gradient."""
        return sum(item.skipped_steps for item in self.chosen)

    @property
    def diverged(self) -> bool:
        """Whether one of them got lost, for good or on its way."""
        return any((item.final_loss or 0.0) > LOST_LOSS or item.diverged for item in self.chosen)

    @property
    def set_values(self) -> list[str]:
        """The values of the recipe that the user set, as options."""
        options = (option for decision in self.plan.decisions for option in decision.options)
        return sorted({option for option in options if option.startswith(("training.", "augmentation."))})

    def held_by(self) -> dict[str, int]:
        """Return the number of training cases that hold each class."""
        return {
            class_.name: sum(any(case.label_voxels.get(v) for v in class_.values) for case in self.fingerprint.cases)
            for class_ in self.validation.classes
        }

    def seconds_for(self, steps: int) -> float:
        """Return what a run with so many steps per training takes, from the steps and stages of this one."""
        training = sum(steps * item.seconds / item.own_steps for item in self.trainings if item.own_steps)
        forecast = self.run.forecast
        return training + sum(item.seconds for stage, item in forecast.items() if stage != "train")
