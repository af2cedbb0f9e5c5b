"""What notebooks show: bars while work lasts, and tables for plans, projects and metrics.

Bars are plain HTML, updated in place by IPython's own display: no widgets are needed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

from segfit.progress import LOGGED, Logged, Meter, Progress, Task
from segfit.text import duration, printable

__all__ = ["NotebookProgress", "html_table", "in_notebook", "suitable_progress"]

_PERIOD_S = 0.5  # between two updates of a bar


def in_notebook() -> bool:
    """Whether this is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def suitable_progress() -> Progress:
    """Return bars in a notebook, else what only logs notes and warnings."""
    return NotebookProgress() if in_notebook() else LOGGED


class NotebookProgress(Logged):
    """Bars in the output of a notebook's cell. Notes are printed and logged, warnings logged."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        """Open a task with a bar; it stays, with the time that was taken."""
        task = _BarTask(description, Meter(total, self._clock), self._clock)
        end = "stopped after"
        try:
            yield task
            end = "done in"
        finally:
            task.show(f"{end} {duration(task.meter.elapsed)}")

    def note(self, message: str) -> None:
        """Print and log a fact."""
        sys.stdout.write(printable(message) + "\n")
        super().note(message)


class _BarTask:
    def __init__(self, description: str, meter: Meter, clock: Callable[[], float]) -> None:
        from IPython.display import display

        self.meter = meter
        self._description, self._clock, self._last = description, clock, clock()
        self._display: Any = display(_Bar(description, meter.share, ""), display_id=True)

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Move the bar, at most twice a second."""
        self.meter.count(amount)
        if self._clock() - self._last >= _PERIOD_S:
            self._last = self._clock()
            times = f"{duration(self.meter.elapsed)}, {duration(self.meter.left)} left"
            self.show(f"{times}, {note}" if note else times)

    def show(self, text: str) -> None:
        """Draw the bar with a text behind it."""
        self._display.update(_Bar(self._description, self.meter.share, text))


class _Bar:
    """A bar as IPython displays it: HTML, or text where there is no HTML."""

    def __init__(self, description: str, share: float, text: str) -> None:
        self._description, self._share, self._text = description, share, text

    def __repr__(self) -> str:
        return f"{self._description}: {self._share:.0%} {self._text}".rstrip()

    def _repr_html_(self) -> str:
        bar = f'<progress value="{self._share:.3f}" max="1"></progress>'
        return f"<div>{escape(self._description)} {bar} {self._share:.0%} {escape(self._text)}</div>"


def html_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return an HTML table with a title above and notes below; every text is escaped."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
    return f"<div><p><b>{escape(title)}</b></p>{table}{below}</div>"
