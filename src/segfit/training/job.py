"""What is trained: all that the weights depend on, and the name that it gives a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segfit.errors import InputError
from segfit.files import content_hash
from segfit.labels import LabelScheme
from segfit.specs import Acceleration, Configuration, TrainingSpec
from segfit.training.budget import TimeBudget
from segfit.training.initial import InitialWeights
from segfit.training.result import RESULT, TrainingResult

__all__ = ["TrainingJob"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """One training.

    Parameters
    ----------
    cases_train, cases_validation : ids, in their order; the latter for the validation during training only, which uses
        a few of them, and may be empty
    weights : how often each training case is drawn, relative to the others; alike when absent
    budget : seconds count what was spent training, over all interruptions; the loop ends before the step that would
        exceed them. The learning rate falls with the used share of the budget.
    data : names the content of the cases (for example the keys of the preprocessed ones)
    start : folder of a finished training of the same network: weights, optimiser and the lowered rate of one that
        diverged are taken over as they were before its cool-down, or, if it had none, at its end (then it must be made
        with `keep_state`). Steps are counted on. The budget is that of this training alone, its cool-down included.
    start_identity : of that training, read from `start` when absent; what is finished then needs no `start`
    acceleration : how its steps are run, if the device can; not in its identity
    initial : of a model, that the network takes over before the first step
    so_far : names the state of another training that this one is, and nothing more
    """

    configuration: Configuration
    recipe: TrainingSpec
    labels: LabelScheme
    cases_train: Sequence[str]
    cases_validation: Sequence[str]
    seed: int
    budget: TimeBudget
    weights: Sequence[float] | None = None
    data: str = ""
    start: Path | None = None
    start_identity: str | None = None
    initial: InitialWeights | None = None
    so_far: str | None = None
    acceleration: Acceleration | None = None

    def require_cases(self) -> None:
        """Raise `InputError` where there is nothing to train on."""
        if not self.cases_train:
            raise InputError(f"{self.configuration.name}: there is no case to train on")
        if self.weights is not None and not any(self.weights):
            raise InputError(
                f"{self.configuration.name}: all training cases have weight 0", "give at least one a weight above 0"
            )

    @property
    def identity(self) -> str:
        """16 hex digits that name the training; one by time goes on when it is given more, and keeps its name."""
        start = self.start_identity
        if self.start is not None and start is None:
            start = TrainingResult.load(self.start / RESULT).identity
        return content_hash(
            {
                "configuration": self.configuration.model_dump(mode="json", by_alias=True),
                "recipe": self.recipe.model_dump(mode="json"),
                "labels": self.labels.model_dump(mode="json"),
                "train": list(self.cases_train),
                "validation": list(self.cases_validation),
                "steps": self.budget.steps,
                "seed": self.seed,
                "data": self.data if self.weights is None else [self.data, list(self.weights)],
                "start": start,
                **({} if self.initial is None else {"initial": self.initial.identity}),
                **({} if self.so_far is None else {"so_far": self.so_far}),
            }
        )
