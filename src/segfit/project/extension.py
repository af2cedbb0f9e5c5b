"""An earlier run of a project that a new one goes on with: the same networks, so that what was trained counts.

With other folds or other ways to predict, and the same time, nothing is decided anew. With more time a training goes on
from before its cool-down: until then the learning rate is constant, so what was trained is what a longer training would
have begun with. Nothing is chosen, nothing races, and only the cool-down is done again; so do several folds, each from
its own. Where that cannot be, as the rate fell from the first step on or the data are others, it is said why; a run
that time is added to is refused then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from segfit.errors import InputError
from segfit.options import CASCADE
from segfit.planning.plan import Extension, Plan, RunSpec
from segfit.project.preparation import Preparation
from segfit.project.trainings import is_begun, training_of
from segfit.text import duration
from segfit.training.result import WEIGHTS
from segfit.training.schedule import cooldown_start
from segfit.training.starting_state import state_before_cooldown

__all__ = ["Earlier", "earlier_run", "require_extended"]


@dataclass(frozen=True, slots=True)
class Earlier:
    """What an earlier run decided and trained."""

    plan: Plan
    run: RunSpec
    step: int | None = None  # the last one before the cool-down, of the first training that goes on from there
    trained_seconds: float = 0.0  # until then, mean of all trainings

    def seconds(self, time_s: float) -> float:
        """Return how long a training takes in a run of so many seconds, of which the earlier run counts as used."""
        assert self.run.seconds_per_training is not None
        more = time_s - (self.run.time_s or 0.0)
        return more / (len(self.run.configurations) * len(self.run.folds)) + self.run.seconds_per_training

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

    That is one of the same length, or else the longest of the shorter ones whose trainings, ended or not, can go on.
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
    """Return what the trainings of a run did before their cool-down; None if one of them would begin anew.

    The second stage of a cascade would: it is trained on what the first one predicts.
    """
    if project.options.planning.folds not in (None, run.folds) or CASCADE in run.configurations:
        return None
    steps, seconds = list[int](), 0.0
    wanted = [training_of(project, plan, name, fold) for name in run.configurations for fold in run.folds]
    for training in wanted:
        state = state_before_cooldown(training.folder, training.identity)
        if state is not None:
            steps.append(state.step)
            seconds += state.facts["seconds"]
        elif (training.folder / WEIGHTS).exists():
            return None
    return Earlier(plan, run, steps[0], seconds / len(wanted)) if steps else None


def require_extended(project: Preparation, time_s: float) -> None:
    """Tell why a run of so many seconds does not go on with an earlier one; `InputError` if time was added to that."""
    reason = _left_behind(project, time_s)
    if not reason:
        return
    if project.time_before is None:
        project.progress.note(f"it is trained anew, not gone on with: {reason}")
        return
    raise InputError(
        f"the run of {duration(project.time_before)} cannot go on: {reason}",
        f"have it trained anew, with --time {time_s:g}s",
    )


def _left_behind(project: Preparation, time_s: float) -> str:
    """Return why what earlier, shorter runs trained counts for nothing in one of so many seconds; empty if it does.

    It is empty too where nothing was trained, and where trainings go on by themselves.
    """
    if not any(project.folder.runs.glob("*/*/*")):
        return ""
    shorter = [(plan, run) for plan, run in _plans(project) if run.time_s is not None and run.time_s < time_s]
    if not shorter:
        others = (project.results.recall(Plan, path) for path in project.folder.plans.glob("*/plan.json"))
        known = any(plan.run is not None and plan.run.time_s is not None for plan in others if plan is not None)
        return "the data are others, or an option that the training depends on is" if known else ""
    plan, run = max(shorter, key=lambda pair: pair[1].time_s or 0.0)
    trainings = [training_of(project, plan, name, fold) for name in run.configurations for fold in run.folds]
    begun = [item for item in trainings if item.folder.exists()]
    if all(state_before_cooldown(item.folder, item.identity) is not None for item in begun):
        return ""
    if CASCADE in run.configurations:
        return "the second stage of a cascade is trained on what the first one predicts"
    recipes = [item.job.recipe for item in begun]
    if any(cooldown_start(one.falling, one.warmup_share, one.cooldown_share) is None for one in recipes):
        return "its learning rate fell from the first step on, for the time that there was"
    return "no state from before its cool-down is left"
