"""An earlier run of a project that a new one goes on with: the same networks, so that what was trained counts.

With other folds or other ways to predict, and the same time, nothing is decided anew. With more time a training goes on
from before its cool-down: until then the learning rate is constant, so what was trained is what a longer training would
have begun with. Nothing is chosen, nothing races, and only the cool-down is done again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from segfit.planning.plan import Extension, Plan, RunSpec
from segfit.project.preparation import Preparation
from segfit.project.trainings import is_begun, training_of
from segfit.training.starting_state import state_before_cooldown
from segfit.words import duration

__all__ = ["Earlier", "earlier_run"]


@dataclass(frozen=True, slots=True)
class Earlier:
    """What an earlier run decided and trained."""

    plan: Plan
    run: RunSpec
    step: int | None = None  # the last one before the cool-down, of a training that goes on from there
    trained_seconds: float = 0.0  # until then

    def seconds(self, time_s: float) -> float:
        """Return how long a training takes in a run of so many seconds, of which the earlier run counts as used."""
        assert self.run.seconds_per_training is not None
        return time_s - (self.run.time_s or 0.0) + self.run.seconds_per_training

    @property
    def told(self) -> Extension | None:
        """What the plan says about it."""
        if self.step is None or self.run.time_s is None:
            return self.run.extends
        return Extension(time_s=self.run.time_s, step=self.step)

    @property
    def words(self) -> str:
        """What is going to happen, in one sentence."""
        if self.step is None:
            return "the networks are those that were decided on before"
        time = duration(self.run.time_s or 0.0)
        return f"going on from step {self.step} of the run of {time}; only its cool-down is done again"


def earlier_run(project: Preparation, *, time_s: float | None, steps: int | None) -> Earlier | None:
    """Return the run that one of so many seconds or steps goes on with; None if it is decided anew.

    That is one of the same length, or else the longest of the shorter ones that trained one network, to the end or not.
    Runs of other options than the time, the folds and those of prediction do not count.
    """
    plans = list(_plans(project))
    for plan, run in plans:
        if (run.time_s, run.steps) == (time_s, steps):
            return Earlier(plan, run)
    if time_s is None or project.options.preset != "auto":
        return None
    shorter = [(plan, run) for plan, run in plans if run.time_s is not None and run.time_s < time_s]
    found = [item for plan, run in shorter if (item := _before_cooldown(project, plan, run)) is not None]
    return max(found, key=lambda item: item.run.time_s or 0.0, default=None)


def _plans(project: Preparation) -> Iterator[tuple[Plan, RunSpec]]:
    """Yield the plans that this project has been run with, of the same course."""
    course = project.course()
    for path in sorted(project.folder.plans.glob("*/plan.json")):
        plan = project.results.recall(Plan, path)
        if plan is None or plan.run is None or plan.run.course != course:
            continue
        if plan.machine == project.hardware.machine or is_begun(project, plan):  # else its sizes are not for here
            yield plan, plan.run


def _before_cooldown(project: Preparation, plan: Plan, run: RunSpec) -> Earlier | None:
    """Return what a run of one training did before its cool-down; None if that was not kept."""
    folds = project.options.planning.folds
    if len(run.configurations) != 1 or len(run.folds) != 1 or folds not in (None, run.folds):
        return None
    training = training_of(project, plan, run.configurations[0], run.folds[0])
    state = state_before_cooldown(training.folder, training.identity)
    return None if state is None else Earlier(plan, run, state.step, state.facts["seconds"])
