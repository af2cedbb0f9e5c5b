"""What is trained: all that the weights depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segfit.errors import InputError
from segfit.labels import LabelScheme
from segfit.specs import Configuration, TrainingSpec
from segfit.training.budget import Budget
from segfit.training.identity import training_identity
from segfit.training.result import RESULT, TrainingResult
from segfit.training.sampler import TrainingCase

__all__ = ["TrainingJob"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """One training; `InputError` where there is nothing to train on.

    Parameters
    ----------
    cases_validation : for the validation during training only, which uses a few of them; may be empty
    weights : how often each training case is drawn, relative to the others; alike when absent
    budget : seconds count what was spent training, over all interruptions; the loop ends before the step that would
        exceed them. The learning rate falls with the used share of the budget.
    data : names the content of the cases (for example the keys of the preprocessed ones)
    start : folder of a finished training of the same network: weights, optimiser and the lowered rate of one that
        diverged are taken over as they were before its cool-down, or, if it had none, at its end (then it must be made
        with `keep_state`). Steps are counted on. The budget is that of this training alone, its cool-down included.
    start_identity : of that training, read from `start` when absent; what is finished then needs no `start`
    """

    configuration: Configuration
    recipe: TrainingSpec
    labels: LabelScheme
    cases_train: Sequence[TrainingCase]
    cases_validation: Sequence[TrainingCase]
    seed: int
    budget: Budget
    weights: Sequence[float] | None = None
    data: str = ""
    start: Path | None = None
    start_identity: str | None = None

    def __post_init__(self) -> None:
        if not self.cases_train:
            raise InputError(f"{self.configuration.name}: there is no case to train on")
        if self.weights is not None and not any(self.weights):
            raise InputError(
                f"{self.configuration.name}: all training cases have weight 0", "give at least one a weight above 0"
            )

    @property
    def identity(self) -> str:
        """Names the training, see `training_identity`."""
        start = self.start_identity
        if self.start is not None and start is None:
            start = TrainingResult.load(self.start / RESULT).identity
        return training_identity(
            configuration=self.configuration,
            recipe=self.recipe,
            labels=self.labels,
            cases_train=[case.id for case in self.cases_train],
            cases_validation=[case.id for case in self.cases_validation],
            seed=self.seed,
            steps=self.budget.steps,
            weights=self.weights,
            data=self.data,
            start=None if self.start is None else start,
        )
