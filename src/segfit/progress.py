"""How long work tells what it is doing: by default to the logger "segfit", in notebooks and on the CLI with bars."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Protocol

from segfit.errors import Problem
from segfit.text import printable

__all__ = [
    "LOGGED",
    "SILENT",
    "Checked",
    "KeptWarnings",
    "Logged",
    "Meter",
    "Progress",
    "Task",
    "messages_only",
    "tasks_only",
]


class Task(Protocol):
    """One piece of long work with a known amount to do."""

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Say that `amount` more is done; `note` is a short current fact (loss, case id)."""
        ...


class Progress(Protocol):
    """Where stages report to."""

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        """Open a task of `total` units (cases, tiles, or seconds of a budget)."""
        ...

    def note(self, message: str) -> None:
        """Tell a fact worth a line."""
        ...

    def warn(self, warning: Problem) -> None:
        """Tell something the user should look at."""
        ...


class _SilentTask:
    def advance(self, amount: float = 1.0, note: str = "") -> None:
        pass


class _Silent:
    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        yield _SilentTask()

    def note(self, message: str) -> None:
        pass

    def warn(self, warning: Problem) -> None:
        pass


SILENT: Progress = _Silent()
"""For work inside other work, which passes on what is to be told."""


class Logged(_Silent):
    """Sends notes (level INFO) and warnings (level WARNING) to the logger "segfit"; tasks are not shown."""

    def note(self, message: str) -> None:
        """Log a fact."""
        logging.getLogger("segfit").info(printable(message))

    def warn(self, warning: Problem) -> None:
        """Log a warning; its fields are those of the log record."""
        logging.getLogger("segfit").warning(printable(str(warning)), extra=asdict(warning))


LOGGED: Progress = Logged()
"""What the library uses when a caller gives no progress."""


class Meter:
    """Counts the work of a task and estimates the seconds left."""

    def __init__(self, total: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done = total, 0.0
        self._clock, self._start = clock, clock()
        self._first: tuple[float, float] | None = None  # time and amount of the first report: work may be resumed

    def count(self, amount: float) -> None:
        """Count finished work."""
        self.done += amount
        if self._first is None:
            self._first = (self._clock(), self.done)

    @property
    def share(self) -> float:
        """How much is done, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total > 0 else 1.0

    @property
    def elapsed(self) -> float:
        """Seconds since the task was opened."""
        return self._clock() - self._start

    @property
    def left(self) -> float | None:
        """Seconds left at the pace since the first report, or since the beginning if that is all; None: unknown."""
        since, before = self._first or (self._start, 0.0)
        if self.done <= before:
            since, before = self._start, 0.0
        return (self._clock() - since) * (self.total - self.done) / (self.done - before) if self.done > before else None


class _MessagesOnly(_Silent):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def note(self, message: str) -> None:
        self._progress.note(message)

    def warn(self, warning: Problem) -> None:
        self._progress.warn(warning)


def messages_only(progress: Progress) -> Progress:
    """Return a progress that passes notes and warnings on and opens no tasks: for work inside a task."""
    return _MessagesOnly(progress)


class _TasksOnly(_Silent):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        with self._progress.task(description, total) as task:
            yield task


def tasks_only(progress: Progress) -> Progress:
    """Return a progress that opens tasks and passes no messages on: for work whose warnings are told later."""
    return _TasksOnly(progress)


class _Whole(_MessagesOnly):
    """Passes everything on to a progress."""

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        """Open a task of the progress."""
        with self._progress.task(description, total) as task:
            yield task


class Checked(_Whole):
    """Passes everything on to a progress, and checks at every step whether the work may go on.

    Parameters
    ----------
    check : raises an error where it may not
    """

    def __init__(self, progress: Progress, check: Callable[[], None]) -> None:
        super().__init__(progress)
        self._check = check

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        """Open a task of the progress."""
        with super().task(description, total) as task:
            yield _CheckedTask(task, self._check)


class _CheckedTask:
    def __init__(self, task: Task, check: Callable[[], None]) -> None:
        self._task, self._check = task, check

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        self._task.advance(amount, note)
        self._check()


class KeptWarnings(_Whole):
    """Passes everything on to a progress and keeps the warnings, in `warnings`."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress)
        self.warnings: list[Problem] = []

    def warn(self, warning: Problem) -> None:
        """Keep a warning and pass it on."""
        self.warnings.append(warning)
        super().warn(warning)
