"""The state that a training is gone on with: by itself when it is given more time, or by another one."""

from __future__ import annotations

from pathlib import Path

from segfit.errors import StageError
from segfit.training.checkpoint import Checkpoints, State
from segfit.training.result import BEFORE_COOLDOWN, RESULT, STATE, TrainingResult

__all__ = ["state_before_cooldown", "state_to_start_from"]


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
