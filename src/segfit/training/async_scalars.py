"""Bringing the values of a step to the host, on a GPU a few steps late, so that it never waits for the host."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AsyncScalars", "StepFacts"]

_LAG = 2  # steps the host may be behind in reading


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What the host knows of a step when it is started."""

    step: int  # counted from 1
    seconds: float  # spent training until then
    share: float  # of the budget used until then
    learning_rate: float
    cases: tuple[str, ...] = ()  # ids of the cases it learns from


class AsyncScalars:
    """A queue of steps whose loss and gradient norm are on their way."""

    def __init__(self) -> None:
        self._pending: deque[tuple[StepFacts, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, facts: StepFacts, values: Tensor) -> list[tuple[StepFacts, float, float]]:
        """Take a step with its (loss, gradient norm) on the device; return the steps whose values are due by now."""
        if values.device.type != "cuda":
            self._pending.append((facts, values, None))
            return self._arrived(0)
        stream = torch.cuda.current_stream(values.device)
        self._pending.append((facts, values.to("cpu", non_blocking=True), stream.record_event()))
        return self._arrived(_LAG)

    def drain(self) -> list[tuple[StepFacts, float, float]]:
        """Return all steps that were not yet returned."""
        return self._arrived(0)

    def _arrived(self, keep: int) -> list[tuple[StepFacts, float, float]]:
        result = []
        while len(self._pending) > keep:
            facts, values, arrived = self._pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            loss, norm = values.tolist()
            result.append((facts, loss, norm))
        return result
