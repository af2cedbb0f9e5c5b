"""More time for a finished short run: its training goes on from before its cool-down.

Until the cool-down the learning rate is constant, so what was trained then is what a longer training would have begun
with. Nothing is chosen, nothing races: the network and the recipe stay, a step is measured, and only the cool-down is
done again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from segfit.errors import InputError
from segfit.planning.plan import Extension, Plan, RaceEntry
from segfit.project.preparation import Preparation
from segfit.specs import Configuration, TrainingSpec
from segfit.training.result import RESULT, TrainingResult
from segfit.training.starting_state import before_cooldown
from segfit.words import duration

__all__ = ["Beginning", "beginning"]


@dataclass(frozen=True, slots=True)
class Beginning:
    """The training of an earlier run, up to its cool-down."""

    configuration: Configuration
    recipe: TrainingSpec
    settings: tuple[str, ...]  # of the planner, as in `RunSpec`
    fold: int
    race: tuple[RaceEntry, ...]  # that the run began with
    start: str  # folder of the training, in that of the project
    identity: str  # of the training
    step: int  # the last one before the cool-down
    cooldown_seconds: float  # that are to be done again
    time_s: float  # of the run

    def seconds(self, time_s: float) -> float:
        """Return how long the training goes on in a run of so many seconds, of which the earlier run counts as used."""
        return time_s - self.time_s + self.cooldown_seconds

    @property
    def told(self) -> Extension:
        """What the plan says about it."""
        return Extension(time_s=self.time_s, step=self.step)

    @property
    def words(self) -> str:
        """What is going to happen, in one sentence."""
        return f"going on from step {self.step} of the run of {duration(self.time_s)}; only its cool-down is done again"


def beginning(project: Preparation, time_s: float) -> Beginning | None:
    """Return the longest of the earlier runs that a run of `time_s` seconds can go on with; None if there is none.

    It differs from this one in nothing but its shorter time, it trained one network, and it is finished.
    """
    found = [item for plan in _earlier(project, time_s) if (item := _begun(project, plan)) is not None]
    return max(found, key=lambda item: item.time_s, default=None)


def _earlier(project: Preparation, time_s: float) -> Iterator[Plan]:
    """Yield the plans of other runs of this project that took less time and are alike else."""
    course = project.course()
    for path in sorted(project.folder.earlier.glob("*/plan.json")):
        try:
            plan = Plan.load(path)
        except InputError:
            continue  # it is not asked for
        run = plan.run
        if run is not None and run.course == course and run.time_s is not None and run.time_s < time_s:
            yield plan


def _begun(project: Preparation, plan: Plan) -> Beginning | None:
    """Return what a run of one training did before its cool-down; None if that was not kept."""
    run = plan.run
    assert run is not None
    assert run.time_s is not None
    if len(run.configurations) != 1 or len(run.folds) != 1:
        return None
    (name,), (fold,) = run.configurations, run.folds
    folder = project.results_of(plan.basis).training(name, fold)
    if not (folder / RESULT).exists():
        return None
    try:
        result, state = TrainingResult.load(folder / RESULT), before_cooldown(folder)
    except InputError:
        return None  # damaged
    if state is None:
        return None
    return Beginning(
        configuration=plan.configurations[name],
        recipe=plan.training[name],
        settings=run.settings,
        fold=fold,
        race=run.race,
        start=project.put_aside(plan.basis).training(name, fold).relative_to(project.folder.root).as_posix(),
        identity=result.identity,
        step=state.step,
        cooldown_seconds=max(0.0, result.seconds - state.facts["seconds"]),
        time_s=run.time_s,
    )
