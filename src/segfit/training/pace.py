"""How long the steps of a training take, and what that means for its budget."""

from __future__ import annotations

from collections import deque
from statistics import median

from segfit.text import count, duration
from segfit.training.budget import TimeBudget

__all__ = ["Pace"]

_RECENT = 100  # steps that the time of a step is taken from
_SLOW = 1.5  # times the expected time of a step: worth reporting


class Pace:
    """The median time of the last steps, in seconds, beside the expected one (None: nothing was expected)."""

    def __init__(self, budget: TimeBudget, expected: float | None) -> None:
        self._budget = budget
        self._expected = expected
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._overrun_reported = False

    @property
    def step_seconds(self) -> float:
        """What a step takes; 0 when there was none."""
        return median(self._seconds) if self._seconds else 0.0

    def add(self, seconds: float) -> None:
        """Take what a step took."""
        self._seconds.append(seconds)

    def slowness(self) -> str:
        """Say what it costs that steps take much longer than expected, or nothing."""
        seconds, expected = self.step_seconds, self._expected
        if self._budget.seconds is None or expected is None or seconds <= _SLOW * expected:
            return ""
        steps, planned = self._budget.expected_steps(seconds), self._budget.expected_steps(expected)
        return (
            f"a step takes {duration(seconds)} instead of {duration(expected)}: the machine is busy; the time budget "
            f"allows about {steps:.0f} steps instead of {planned:.0f}"
        )

    def overrun(self, done: int, seconds: float) -> str:
        """Say once that the time is over before the fewest steps are done, or nothing."""
        budget = self._budget
        missing = budget.fewest_steps - done
        if self._overrun_reported or budget.seconds is None or seconds <= budget.seconds or missing <= 0:
            return ""
        self._overrun_reported = True
        return (
            f"the time is over after {count(done, 'step')} of at least {budget.fewest_steps}; the training goes on for "
            f"about {duration(missing * self.step_seconds)}"
        )

    def early_end(self, done: int, seconds: float) -> str:
        """Say that all steps that are worth doing are done before the time is over, or nothing."""
        left = (self._budget.seconds or 0.0) - seconds
        if done != self._budget.most_steps or left <= 0:
            return ""
        return f"the training ends {duration(left)} before its time: {count(done, 'step')} are nnU-Net's whole schedule"
