"""How long a training may take, and how much of that is used."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from time import perf_counter

from segfit.errors import InputError

__all__ = ["Clock", "TimeBudget"]


@dataclass(frozen=True, slots=True)
class TimeBudget:
    """How long to train: seconds of wall clock spent training, or optimiser steps; `InputError` if it is neither.

    A training by time goes on past its time until it has done `fewest_steps`, and ends before it with `most_steps`.
    """

    seconds: float | None
    steps: int | None
    fewest_steps: int = 0
    most_steps: int | None = None

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise InputError("a training needs a budget in seconds or in steps, exactly one of them")
        if self.total <= 0:
            raise InputError(f"the budget of a training must be above zero, got {self.total:g}")

    @property
    def total(self) -> float:
        """The budget in its unit."""
        total = self.steps if self.seconds is None else self.seconds
        assert total is not None
        return float(total)

    def used(self, step: int, seconds: float) -> float:
        """What of it is used, in its unit; of a time as large a share as of the most steps, or as of the fewest."""
        if self.seconds is None:
            return float(step)
        if self.most_steps is not None:
            seconds = max(seconds, self.seconds * step / self.most_steps)
        return min(seconds, self.seconds * step / self.fewest_steps) if self.fewest_steps else seconds

    def share(self, step: int, seconds: float) -> float:
        """What of it is used, 0 to 1."""
        return min(1.0, self.used(step, seconds) / self.total)

    def is_over(self, step: int, seconds: float, ahead: float = 0.0) -> bool:
        """Whether it is used up, or its time would be exceeded by the `ahead` seconds that come next."""
        if self.seconds is None:
            return self.used(step, seconds) >= self.total
        if self.most_steps is not None and step >= self.most_steps:
            return True
        return step >= self.fewest_steps and seconds + ahead > self.seconds

    def was_had(self, steps: int, seconds: float | None) -> bool:
        """Whether a finished training of so many steps, which was given so many seconds, has nothing left to do."""
        has_all_steps = self.most_steps is not None and steps >= self.most_steps
        return self.seconds is None or has_all_steps or (seconds or 0.0) >= self.seconds

    def expected_steps(self, step_seconds: float) -> float:
        """Return how many steps it will have if one takes so many seconds."""
        if self.seconds is None:
            return self.total
        return min(max(self.seconds / step_seconds, self.fewest_steps), self.most_steps or inf)


class Clock:
    """Seconds spent training, over all interruptions: those `before`, and those since `start`."""

    def __init__(self, before: float = 0.0) -> None:
        self._before = before
        self._started: float | None = None

    def start(self) -> None:
        """Count from now on."""
        self._started = perf_counter()

    def seconds(self) -> float:
        """Return the seconds so far."""
        return self._before + (0.0 if self._started is None else perf_counter() - self._started)
