"""How many threads a step gets: now and then the next steps are done with other numbers, and the fastest one stays.

What is fastest depends on what else the machine does, which changes while a training runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch

__all__ = ["ThreadChoice", "kept_threads", "thread_numbers"]

_FIRST = 10  # steps before the first comparison: the very first ones are slow
_EVERY = 200  # steps between two comparisons
_EACH = 4  # steps with every number
_GAIN = 0.1  # of the time, for which the number is changed


def thread_numbers(available: int) -> tuple[int, ...]:
    """Return the numbers worth comparing where so many threads may run: all of them and half."""
    return tuple(dict.fromkeys((available, max(1, available // 2))))


@contextmanager
def kept_threads(number: int | None = None) -> Iterator[None]:
    """Work with so many of torch's threads (None: as many as before) and leave their number afterwards as it was."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number or before)
        yield
    finally:
        torch.set_num_threads(before)


class ThreadChoice:
    """The number of threads of the next step, from the seconds that steps took."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers
        self._chosen = numbers[0]
        self._steps = -_FIRST
        self._times: dict[int, list[float]] = {number: [] for number in numbers}

    @property
    def number(self) -> int:
        """Threads of the next step."""
        return self._numbers[self._steps % len(self._numbers)] if self._compares else self._chosen

    @property
    def _compares(self) -> bool:
        return len(self._numbers) > 1 and self._steps >= 0 and self._steps % _EVERY < _EACH * len(self._numbers)

    def add(self, seconds: float) -> None:
        """Take what the step took that was done with `number` threads."""
        if self._compares:
            self._times[self.number].append(seconds)
        self._steps += 1
        if not self._compares and all(self._times.values()):
            costs = {number: median(times) for number, times in self._times.items()}
            best = min(costs, key=costs.__getitem__)
            if costs[best] <= (1 - _GAIN) * costs[self._chosen]:
                self._chosen = best
            self._times = {number: [] for number in self._numbers}
