"""A way to see the data, and what it costs on this machine to train and to predict with it."""

from __future__ import annotations

from dataclasses import dataclass

from segfit.files import Record
from segfit.fingerprint.fingerprint import Unit
from segfit.specs import Acceleration, Configuration, TrainingSpec
from segfit.text import by_axis
from segfit.training.probe import StepCost, TileCost
from segfit.training.schedule import cooldown_start

__all__ = ["CASE_SECONDS", "SLACK", "Candidate", "ValidationCost", "Workload", "configuration_words"]

SLACK = 1.05
"""A step in training, with what is validated meanwhile, in a measured one."""
CASE_SECONDS = 0.003
"""Beside the networks: export and metrics of small cases are made while the next is predicted."""


@dataclass(frozen=True, slots=True)
class Workload:
    """How much there is to predict around the trainings."""

    num_folds: int
    validation_cases: int  # of the largest fold
    test_cases: int
    whole: bool = False  # all validation cases are predicted, however long that takes


@dataclass(frozen=True, slots=True)
class ValidationCost:
    """How much of a fold is predicted to validate it; see `RunSpec`."""

    cases: int | None
    mirror: bool
    seconds: float


class Candidate(Record):
    """A way to see the data, and what it costs here."""

    settings: tuple[str, ...] = ()  # asked of the planner beside the options, for a plan that has the configuration
    configuration: Configuration  # of that plan, or a reduced version of it
    recipe: TrainingSpec
    step: StepCost
    tile: TileCost
    case_seconds: float  # predicting one case with one network, without mirrored views
    views: int  # mirrored ones and the plain one
    unit: Unit = "mm"  # of the spacing
    acceleration: Acceleration = Acceleration()  # measured
    memory_gb: float | None = None  # what it was reduced to; None: the planned one fits

    @property
    def name(self) -> str:
        """Name of the configuration."""
        return self.configuration.name

    @property
    def words(self) -> str:
        """What it is, in a few words."""
        return configuration_words(self.configuration, self.unit)

    @property
    def keeps_state(self) -> bool:
        """Whether a training of it keeps the state from before its cool-down."""
        recipe = self.recipe
        return cooldown_start(recipe.falling, recipe.warmup_share, recipe.cooldown_share) is not None

    def validation(self, workload: Workload, seconds: float) -> ValidationCost:
        """Return how a fold is validated in at most so many seconds: without mirroring, or on a part of its cases.

        Where the whole fold has to be, it may take longer.
        """
        mirrored, plain = self.views * self.case_seconds + CASE_SECONDS, self.case_seconds + CASE_SECONDS
        cases = workload.validation_cases
        if cases * mirrored <= seconds:
            return ValidationCost(None, True, cases * mirrored)
        if workload.whole or cases * plain <= seconds:
            return ValidationCost(None, False, cases * plain)
        some = max(1, int(seconds / plain))
        return ValidationCost(some, False, some * plain)

    def testing(self, networks: int, workload: Workload) -> float:
        """Return the seconds of predicting the test images with `networks` networks."""
        return workload.test_cases * (networks * self.views * self.case_seconds + CASE_SECONDS)


def configuration_words(configuration: Configuration, unit: str) -> str:
    """Return what a configuration is, in a few words, with its spacing in `unit`."""
    return (
        f"{configuration.name}, {configuration.network.features[0]} features, batch {configuration.batch_size}, "
        f"patch {by_axis(configuration.patch_size)} at {by_axis(configuration.spacing_mm)} {unit}"
    )
