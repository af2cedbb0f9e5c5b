"""Divergence of a training: detected by its losses, answered once by going back to a good state, then by an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf
from statistics import fmean, median
from typing import Any

from segfit.errors import DivergedError
from segfit.specs import TrainingSpec
from segfit.text import listing
from segfit.training.checkpoint import State
from segfit.training.loss_history import LossHistory

__all__ = ["Guard"]

_WINDOW = 20  # steps that are looked at
_LAST = 5  # steps that are looked at when the training ends, and those that show that a kept state was good
_FAR = 2.0  # above the loss of the untrained network: no training that learns stays there for a window (assumption)
_NOT_WORSE = 0.5  # than the best kept state, of a state that is kept (assumption)
_KEPT_EVERY = 0.02  # share of the budget between two kept states
_SLOWER = 0.25
_MODEST_RATE = 0.01  # with which trainings do not diverge, whatever the optimiser


class Guard:
    """Judges the losses of a training and keeps a copy of its last good state in RAM.

    The copy is not saved with the training: one that was interrupted goes back at most to where it went on.
    """

    def __init__(self, recipe: TrainingSpec) -> None:
        self.times = 0  # the training diverged
        self.factor = 1.0  # of the learning rate
        self._recipe = recipe
        self._good: State | None = None
        self._next: State | None = None  # good as far as is known: the losses of the steps after it will show it
        self._kept_share = -inf
        self._best = inf  # mean loss of a kept state

    def is_healthy(self, losses: LossHistory) -> bool:
        """Whether a state with these losses may be kept or saved: a single bad one forbids it for a while."""
        windows = [losses.recent(steps) for steps in (_LAST, _WINDOW)]
        return losses.skipped_in_a_row < _WINDOW / 2 and not any(w and _is_far(fmean(w), losses) for w in windows)

    def trouble(self, losses: LossHistory, *, at_end: bool = False) -> str:
        """Return why the training has diverged, or nothing. A few outlying losses are not a divergence."""
        skipped = losses.skipped_in_a_row
        if skipped >= _WINDOW or (at_end and (skipped >= _WINDOW / 2 or losses.final is None)):
            return f"{skipped} training steps in a row (up to step {losses.step}) had no finite gradient"
        recent = losses.recent(_LAST if at_end else _WINDOW)
        if (at_end or len(recent) == _WINDOW) and _is_far(median(recent), losses):
            return f"up to step {losses.step} the loss was {median(recent):.3g}, {losses.first:.3g} at the beginning"
        return ""

    def keep(self, share: float, losses: LossHistory, state: Callable[[], State]) -> None:
        """Keep a copy of the state when `share` of the budget is used, if it is time and the state is good.

        It replaces the last one a few steps later: the first state alone counts at once.
        """
        if self.times:
            return
        if not self.is_healthy(losses):
            self._next = None
            return
        if self._next is not None:
            if losses.step >= self._next.step + _LAST:
                self._good, self._next = self._next, None
            return
        mean = fmean(losses.recent(_WINDOW) or [inf])
        if share - self._kept_share < _KEPT_EVERY or mean > self._best + _NOT_WORSE:
            return
        now = state()
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in now.tensors.items()}
        copied = replace(now, tensors=tensors)
        self._good, self._next = (copied, None) if self._good is None else (self._good, copied)
        self._kept_share, self._best = share, min(self._best, mean)

    def go_back(self, why: str, losses: LossHistory) -> State:
        """Return the state to go on from with a lower learning rate; raise `DivergedError` the second time."""
        if self._good is None:
            raise self._error(why, losses)
        good, self._good, self._next = self._good, None, None
        self.times += 1
        self.factor *= _SLOWER
        return good

    def _error(self, why: str, losses: LossHistory) -> DivergedError:
        rate = self._recipe.learning_rate * self.factor
        advice = f"try --set training.learning_rate={min(rate * _SLOWER, _MODEST_RATE):.2g}"
        if self._recipe.precision != "fp32":
            advice += " or --set training.precision=fp32"
        if losses.skipped_in_a_row:
            advice += f", and look at the images of {listing(list(losses.skipped_cases), 4)}"
        return DivergedError(f"the training diverged again with a learning rate of {rate:.2g}: {why}", advice)

    def facts(self) -> dict[str, Any]:
        """Return what a training needs to go on, as JSON values."""
        return {"diverged": self.times, "learning_rate_factor": self.factor}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on from saved facts."""
        self.times, self.factor = facts["diverged"], facts["learning_rate_factor"]


def _is_far(loss: float, losses: LossHistory) -> bool:
    """Whether no training that learns has such a loss."""
    return losses.first is not None and loss > losses.first + _FAR
