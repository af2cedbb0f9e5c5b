"""How long work tells what it is doing. The library is silent by default; the CLI draws bars or prints lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["SILENT", "KeptWarnings", "Progress", "Task", "messages_only"]


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

    def warn(self, message: str) -> None:
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

    def warn(self, message: str) -> None:
        pass


SILENT: Progress = _Silent()


class _MessagesOnly(_Silent):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def note(self, message: str) -> None:
        self._progress.note(message)

    def warn(self, message: str) -> None:
        self._progress.warn(message)


def messages_only(progress: Progress) -> Progress:
    """Return a progress that passes notes and warnings on and opens no tasks: for work inside a task."""
    return _MessagesOnly(progress)


class KeptWarnings(_MessagesOnly):
    """Passes everything on to a progress and keeps the warnings, in `messages`."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress)
        self.messages: list[str] = []

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        """Open a task of the progress."""
        with self._progress.task(description, total) as task:
            yield task

    def warn(self, message: str) -> None:
        """Keep a warning and pass it on."""
        self.messages.append(message)
        super().warn(message)
