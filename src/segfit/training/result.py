"""What a finished training says about itself, and the files of a training.

In the folder of a training:

    state/                 what is needed to go on, see `segfit.training.checkpoint`
    before-cooldown/       the state before the learning rate fell: given more time, the training goes on from there
    events.jsonl           the log, see `segfit.training.events`
    weights.safetensors    the final weights
    training.json          the result, written last: the training is finished when it is there
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from segfit.files import Document, Record, hash_file
from segfit.records import Key, Results, record_of
from segfit.text import count, dice
from segfit.training.budget import TimeBudget

__all__ = [
    "BEFORE_COOLDOWN",
    "EVENTS",
    "RESULT",
    "STATE",
    "WEIGHTS",
    "TrainingResult",
    "ValidationPoint",
    "before_and_after",
    "finished_result",
    "remove_foreign_result",
    "result_key",
    "weights_are_whole",
]

STATE = "state"
BEFORE_COOLDOWN = "before-cooldown"
EVENTS = "events.jsonl"
WEIGHTS = "weights.safetensors"
RESULT = "training.json"


class ValidationPoint(Record):
    """One validation during training: Dice on a few whole cases, None where undefined."""

    step: int
    seconds: float
    share: float  # share of the budget that was used
    dice: dict[str, float | None]  # by name of the class, mean over the cases
    mean: float | None  # mean of the defined ones


class TrainingResult(Document):
    """``training.json``: written last, so a training is finished when it is there."""

    identity: str  # hash of everything that determines the training
    configuration: str
    device: str
    steps: int  # those of the training that it started from count
    first_step: int = 0  # how many those are
    seconds: float  # spent training, summed over interruptions
    budget_seconds: float | None = None  # that it was given; None: steps
    seconds_per_step: float  # median of the last steps, without validation and saving
    skipped_steps: int  # steps whose gradient was not finite
    skipped_cases: dict[str, int] = {}  # how many of them each case was part of; at most 20, the most frequent first
    diverged: int = 0  # how often it was taken back to an earlier state
    learning_rate_factor: float = 1.0  # at the end, of the recipe's rates; below 1 after it diverged
    final_loss: float | None  # mean of the last steps
    before: ValidationPoint | None = None  # of the model that it started from, without a step; None: not measured
    curve: tuple[ValidationPoint, ...] = ()
    validation_cases: tuple[str, ...] = ()  # that the curve was measured on
    peak_memory_gb: float  # device memory, or memory of the process on a CPU
    weights: str = ""  # SHA-256 of their file

    @property
    def own_steps(self) -> int:
        """Steps of this training alone."""
        return self.steps - self.first_step

    @property
    def dice(self) -> float | None:
        """Mean Dice of `validation_cases` at the end."""
        return self.curve[-1].mean if self.curve else None


def before_and_after(result: TrainingResult, names: Sequence[str]) -> str:
    """Return what classes reached before and after a training, in words; empty if it was not measured."""
    if result.before is None or not result.curve:
        return ""
    before, after = result.before.dice, result.curve[-1].dice
    each = [f"{name} {dice(before[name])} before, {dice(after[name])} after" for name in names]
    cases = count(len(result.validation_cases), "case")
    return f"Dice of what the model knew, in {cases} of the validation: {'; '.join(each)}" if each else ""


def finished_result(
    folder: Path, identity: str, budget: TimeBudget | None = None, results: Results | None = None
) -> TrainingResult | None:
    """Return the result of a finished training of this identity that has nothing left to do in a budget.

    None for that of another training, of less time, or with damaged weights. It only looks: others may be at work.
    `results` are those of the session that asks.
    """
    results = results or Results()
    result = results.recall(TrainingResult, folder / RESULT, result_key(identity))
    if result is None or not (budget is None or budget.was_had(result.own_steps, result.budget_seconds)):
        return None
    return result if weights_are_whole(folder, result, results) else None


def remove_foreign_result(folder: Path, identity: str) -> None:
    """Remove the result of another training; one that cannot be read just now stays."""
    record = record_of(folder / RESULT)
    if record is not None and record.key != result_key(identity).hash:
        (folder / RESULT).unlink()
        (folder / WEIGHTS).unlink(missing_ok=True)


def result_key(identity: str) -> Key:
    """Return what the result of a training counts under."""
    return Key(stage="train", version=1, made_of={"identity": identity})


def weights_are_whole(folder: Path, result: TrainingResult, results: Results | None = None) -> bool:
    """Whether the weights beside a result are those that were written with it."""
    try:
        return (results or Results()).read(folder / WEIGHTS, hash_file) == result.weights
    except OSError:
        return False
