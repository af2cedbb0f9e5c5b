"""The losses of a training as they come back from the device: in the log now and then, in the result at the end.

On a GPU they are read a few steps late, so that it never waits for the host.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from segfit.training.events import EventLog

__all__ = ["LossHistory", "StepFacts"]

_EVENT_SHARE = 1e-3  # at most one logged loss per this share of the budget
_LAG = 2  # steps the host may be behind a GPU in reading
_RECENT = 100  # steps that the final loss is taken from


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What the host knows of a step when it is started."""

    step: int  # counted from 1
    seconds: float  # spent training until then
    share: float  # of the budget used until then
    learning_rate: float
    cases: tuple[str, ...]  # ids of the cases it learns from
    data_wait: Callable[[], float] = float  # seconds that it stood still for want of samples, known when it is done


class LossHistory:
    """Takes the values of every step and writes their means into the log; counts steps without a finite gradient."""

    def __init__(self) -> None:
        self.skipped = 0  # steps without a finite gradient
        self.skipped_in_a_row = 0  # up to the last step that is known
        self.skipped_cases: Counter[str] = Counter()  # how many skipped steps each case was part of
        self.step = 0  # the last one that is known
        self.first: float | None = None  # finite loss: the untrained network's, since skipped steps change nothing
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._pending: deque[tuple[StepFacts, Tensor, torch.cuda.Event | None]] = deque()
        # Losses not yet logged, the last step they come from, and the share of the budget when others were logged.
        self._unlogged: list[float] = []
        self._last: StepFacts | None = None
        self._logged_share = -1.0  # the first step is logged
        self._logged_seconds = self._data_wait = 0.0  # until then; waited since

    @property
    def last(self) -> float | None:
        """The loss of the last step that is known."""
        return self._recent[-1] if self._recent else None

    @property
    def final(self) -> float | None:
        """The mean loss of the last steps."""
        return fmean(self._recent) if self._recent else None

    def recent(self, steps: int) -> list[float]:
        """Return the finite losses of the last steps, at most `steps` (up to 100), the newest last."""
        return list(self._recent)[-steps:]

    def push(self, facts: StepFacts, values: Tensor, events: EventLog) -> None:
        """Take a step with its (loss, gradient norm), which may still be on its way from the device."""
        if values.device.type != "cuda":
            self._pending.append((facts, values, None))
            self._take(0, events)
        else:
            stream = torch.cuda.current_stream(values.device)
            self._pending.append((facts, values.to("cpu", non_blocking=True), stream.record_event()))
            self._take(_LAG, events)

    def settle(self, events: EventLog) -> None:
        """Wait for the values of all steps and write what is not yet in the log."""
        self._take(0, events)
        self._flush(events)

    def facts(self) -> dict[str, Any]:
        """Return what a training needs to go on, as JSON values."""
        return {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_cases": dict(self.skipped_cases),
            "last_step": self.step,
            "first_loss": self.first,
            "losses": list(self._recent),
            "logged_share": self._logged_share,
            "logged_seconds": self._logged_seconds,
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on from saved facts."""
        self.skipped = facts["skipped"]
        self.skipped_in_a_row = facts["skipped_in_a_row"]
        self.skipped_cases = Counter(facts["skipped_cases"])
        self.step = facts["last_step"]
        self.first = facts["first_loss"]
        self._recent.extend(facts["losses"])
        self._logged_share = facts["logged_share"]
        self._logged_seconds = facts.get("logged_seconds", 0.0)

    def _take(self, lag: int, events: EventLog) -> None:
        """Take the values of all steps but the last `lag`."""
        while len(self._pending) > lag:
            facts, values, arrived = self._pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            loss, norm = values.tolist()
            self.step = facts.step
            self._data_wait += facts.data_wait()
            if isfinite(loss) and isfinite(norm):
                self.skipped_in_a_row = 0
                self.first = loss if self.first is None else self.first
                self._recent.append(loss)
                self._unlogged.append(loss)
                self._last = facts
                if abs(facts.share - self._logged_share) >= _EVENT_SHARE:  # it falls where there is more time
                    self._flush(events)
                continue
            self.skipped += 1
            self.skipped_in_a_row += 1
            cases = list(dict.fromkeys(facts.cases))
            self.skipped_cases.update(cases)
            events.write("skipped", step=facts.step, loss=_or_none(loss), gradient_norm=_or_none(norm), cases=cases)

    def _flush(self, events: EventLog) -> None:
        """Write the mean of the losses that are not yet in the log, and how long their steps waited for samples."""
        facts = self._last
        if self._unlogged and facts is not None:
            passed = facts.seconds - self._logged_seconds
            events.write(
                "step",
                step=facts.step,
                seconds=round(facts.seconds, 3),
                share=round(facts.share, 6),
                loss=fmean(self._unlogged),
                learning_rate=facts.learning_rate,
                data_wait=round(self._data_wait, 6),
                data_wait_share=round(min(1.0, self._data_wait / passed), 4) if passed > 0 else 0.0,
            )
            self._unlogged.clear()
            self._logged_share, self._logged_seconds, self._data_wait = facts.share, facts.seconds, 0.0


def _or_none(value: float) -> float | None:
    return value if isfinite(value) else None
