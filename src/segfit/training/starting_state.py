"""The state that a training is gone on with: by itself when it is given more time, or by another one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from segfit.errors import StageError
from segfit.files import write_bytes
from segfit.training.budget import TimeBudget
from segfit.training.checkpoint import Checkpoints, State
from segfit.training.job import TrainingJob
from segfit.training.result import BEFORE_COOLDOWN, EVENTS, RESULT, STATE, TrainingResult
from segfit.training.schedule import cooldown_start

__all__ = ["state_before_cooldown", "state_to_start_from", "take_up_other_steps"]


def take_up_other_steps(job: TrainingJob, folder: Path, others: Iterable[Path]) -> int | None:
    """Let a training of counted steps go on with what another one of more or fewer steps did; return from which step.

    Both do the same until the learning rate of the one with fewer steps begins to fall, to the bit: so it can be where
    the rate is constant until then, and there is no warm-up, whose length is a share of the steps. The other training
    stays as it is.

    Parameters
    ----------
    folder : of the training; where it has begun, nothing is done
    others : folders of trainings, each with their identity as its name
    """
    recipe, steps = job.recipe, job.budget.steps
    start = cooldown_start(recipe.falling, recipe.warmup_share, recipe.cooldown_share)
    begun = any((folder / name).exists() for name in (STATE, BEFORE_COOLDOWN, RESULT))
    if steps is None or start is None or recipe.warmup_share or begun:
        return None
    found = [(state, other) for state, other in _alike(job, others) if state.step <= start * steps]
    if not found:
        return None
    state, other = max(found, key=lambda pair: pair[0].step)
    if (other / EVENTS).exists():
        write_bytes(folder / EVENTS, (other / EVENTS).read_bytes())  # those of later steps go when it is opened
    Checkpoints(folder / BEFORE_COOLDOWN, job.identity).save(state)
    return state.step


def _alike(job: TrainingJob, others: Iterable[Path]) -> Iterator[tuple[State, Path]]:
    """Yield the states from before the cool-down of trainings that differ in nothing but the number of steps."""
    for other in sorted(others):
        state = state_before_cooldown(other, other.name)
        budget = None if state is None else state.facts.get("budget")
        if state is None or budget is None or budget != int(budget):
            continue
        if replace(job, budget=TimeBudget(None, int(budget))).identity == other.name:
            yield state, other


def state_before_cooldown(folder: Path, identity: str) -> State | None:
    """Return the newest state from before the cool-down of a training, finished or not; None if none is whole."""
    running = Checkpoints(folder / STATE, identity).peek()
    if running is not None and not running.facts.get("cooling", True):
        return running
    return Checkpoints(folder / BEFORE_COOLDOWN, identity).peek()


def state_to_start_from(folder: Path) -> State:
    """Return the state from before the cool-down of a finished training, or that from its end if it has none.

    Raises `StageError` where there is no whole one.
    """
    identity = TrainingResult.load(folder / RESULT).identity
    kept = (Checkpoints(folder / name, identity).peek() for name in (BEFORE_COOLDOWN, STATE))
    state = next((item for item in kept if item is not None), None)
    if state is None:
        raise StageError(f"the training in {folder} has no intact state to continue from", "use another folder (--out)")
    return state
