"""The state of a finished training that another one starts from."""

from __future__ import annotations

from pathlib import Path

from segfit.errors import StageError
from segfit.training.checkpoint import Checkpoints, State
from segfit.training.result import BEFORE_COOLDOWN, RESULT, STATE, TrainingResult

__all__ = ["before_cooldown", "state_to_start_from"]


def before_cooldown(folder: Path) -> State | None:
    """Return the state that a finished training kept from before its cool-down; None if there is none that is whole."""
    return _kept(folder, BEFORE_COOLDOWN)


def state_to_start_from(folder: Path) -> State:
    """Return the state from before the cool-down, or that from the end of a training that has none.

    Raises `StageError` where there is no whole one.
    """
    state = before_cooldown(folder) or _kept(folder, STATE)
    if state is None:
        raise StageError(f"the training in {folder} has no intact state to continue from", "use another folder (--out)")
    return state


def _kept(folder: Path, name: str) -> State | None:
    state, _ = Checkpoints(folder / name, TrainingResult.load(folder / RESULT).identity).load()
    return state
