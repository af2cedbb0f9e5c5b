"""What the user sees while segfit works: bars on a terminal, plain lines in a log, and tables.

rich is imported when something is drawn on a terminal, not before.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from segfit.errors import Problem
from segfit.progress import Meter, Progress, Task
from segfit.text import dice, duration, listing, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from segfit.execution.execution import Execution

__all__ = [
    "BarProgress",
    "LineProgress",
    "console_execution",
    "console_progress",
    "problem_table",
    "say",
    "score_table",
    "table",
    "text_width",
    "wrapped",
]

_SILENCE_S = 30.0  # a log gets a line at least this often while work advances
_SHARE = 0.1  # and one at each tenth of the work,
_QUIET_S = 5.0  # but not sooner than this after the last one
_ROOMY, _NARROW = 100, 60  # columns of a terminal from which on bars show everything, and below which the least
_BETWEEN = 3  # characters between the columns of a drawn table
_ALIKE = 3  # problems of one kind that are told one by one; of more the first is told, and how many there are


def console_execution(workers: int | None = None) -> Execution:
    """Return how a verb has work on cases done: reported on the terminal."""
    from segfit.execution.execution import Execution

    return Execution(workers=workers, progress=console_progress())


def console_progress(stream: TextIO | None = None) -> Progress:
    """Return bars with time left if `stream` (default stderr) is a terminal, plain lines otherwise."""
    stream = sys.stderr if stream is None else stream
    return BarProgress(stream) if stream.isatty() else LineProgress(stream)


def say(text: str, stream: TextIO | None = None) -> None:
    """Write a line, or several, without what steers a terminal; `stream` is stdout by default.

    Everything that a verb tells goes through here or through what this module draws: names in files may hold anything.
    """
    (sys.stdout if stream is None else stream).write(f"{printable(text)}\n")


class LineProgress:
    """Plain lines with the time left: at each tenth of the work if five seconds went by, else after thirty."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._warnings = _Warnings(self._write)

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        """Open a task; its end, good or bad, is a line of its own."""
        task = _LineTask(description, total, self._write, self._clock)
        try:
            with self._warnings.around_task():
                yield task
        except BaseException:
            self._write(f"{description}: stopped at {task.meter.share:.0%} after {duration(task.meter.elapsed)}")
            raise
        self._write(f"{description}: done in {duration(task.meter.elapsed)}")

    def note(self, message: str) -> None:
        """Write a line."""
        self._write(message)

    def warn(self, warning: Problem) -> None:
        """Write a line that starts with "warning"; those that are like many before are counted."""
        self._warnings.take(warning)

    def _write(self, line: str) -> None:
        try:
            say(line, self._stream)
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError:
            pass  # a log on a full disk, or a terminal that was closed, is no reason to end days of work


class _LineTask:
    def __init__(
        self, description: str, total: float, write: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self.meter = Meter(total, clock)
        self._description, self._write, self._clock = description, write, clock
        self._last_time = clock()
        self._last_share = 0.0

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Count, and write a line if one is due; the last one is left to the end of the task."""
        meter = self.meter
        meter.count(amount)
        now, share = self._clock(), meter.share
        # The tiny number keeps 0.1 + 0.2 from missing a tenth.
        tenth = int(share / _SHARE + 1e-9) > int(self._last_share / _SHARE + 1e-9)
        waited = now - self._last_time
        if share >= 1 or waited < (_QUIET_S if tenth else _SILENCE_S):
            return
        self._last_time, self._last_share = now, share
        detail = f", {note}" if note else ""
        times = f"elapsed {duration(meter.elapsed)}, left {duration(meter.left)}"
        self._write(f"{self._description}: {share:.0%}, {times}{detail}")


class BarProgress:
    """Bars on a terminal. Tasks may be nested; all bars are drawn by one live display that ends with the last task."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._bars: Bars | None = None
        self._open = 0
        self._warnings = _Warnings(self._warn)

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        """Open a task with a bar; a finished bar stays on the screen."""
        if self._bars is None:
            self._bars = _make_bars(self._console)
            self._bars.start()
        bars = self._bars
        self._open += 1
        try:
            with self._warnings.around_task():
                yield _BarTask(bars, bars.add_task(printable(description), total=total, note=""))
        finally:
            self._open -= 1
            if self._open == 0:
                bars.stop()
                self._bars = None

    def note(self, message: str) -> None:
        """Print a line above the bars."""
        self._console.print(printable(message))

    def warn(self, warning: Problem) -> None:
        """Print a yellow line above the bars; those that are like many before are counted."""
        self._warnings.take(warning)

    def _warn(self, line: str) -> None:
        self._console.print(printable(line), style="yellow")


class _BarTask:
    def __init__(self, bars: Bars, identifier: TaskID) -> None:
        self._bars, self._identifier = bars, identifier

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Move the bar."""
        if note:
            self._bars.update(self._identifier, advance=amount, note=printable(note))
        else:
            self._bars.advance(self._identifier, amount)


class _Warnings:
    """Tells warnings: the first ones of a kind at once, the others in a line when a task begins or all have ended."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._known: Counter[tuple[object, ...]] = Counter()
        self._held: dict[tuple[object, ...], list[Problem]] = {}
        self._open = 0

    def take(self, warning: Problem) -> None:
        kind = warning.kind
        self._known[kind] += 1
        if self._known[kind] > _ALIKE:
            self._held.setdefault(kind, []).append(warning)
        else:
            self._tell(f"warning: {' '.join(str(warning).splitlines())}")

    @contextmanager
    def around_task(self) -> Iterator[None]:
        if not self._open:
            self._tell_held()
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._tell_held()

    def _tell_held(self) -> None:
        held, self._held = self._held, {}
        for same in held.values():
            first = " ".join(str(same[0]).splitlines())
            self._tell(f"warning: {len(same)} more like those before ({_cases(same)}), such as: {first}")


def _cases(problems: Sequence[Problem]) -> str:
    """Return the first cases of problems; of those of no case how many there are."""
    names = list(dict.fromkeys(problem.case or problem.file for problem in problems))
    times = f", {len(problems)} times" if len(names) < len(problems) else ""
    return f"{listing(names, _ALIKE)}{times}"


def _make_bars(console: Console) -> Bars:
    """Return bars that fit their terminal: what is least needed goes first, and long texts end in an ellipsis."""
    from rich.progress import (
        BarColumn,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars
    from rich.table import Column

    def text(template: str, style: str = "", ratio: int | None = None) -> TextColumn:
        place = Column(no_wrap=True, overflow="ellipsis", ratio=ratio)
        return TextColumn(template, markup=False, style=style or "none", table_column=place)

    roomy, narrow = console.width >= _ROOMY, console.width < _NARROW
    columns: list[ProgressColumn] = [text("{task.description}", ratio=3)]
    if not narrow:
        columns.append(BarColumn(bar_width=None if roomy else 10, table_column=Column(ratio=3 if roomy else None)))
    columns.append(TaskProgressColumn())
    if roomy:
        columns.append(TimeElapsedColumn())
    columns.append(TimeRemainingColumn())
    columns.append(TextColumn("left", markup=False))
    if not narrow:
        columns.append(text("{task.fields[note]}", "dim", ratio=2))
    return Bars(*columns, console=console, expand=True)


def text_width(widest: int) -> int:
    """Return the characters of a line: those of the terminal, also behind a pager, and at most `widest`."""
    columns = shutil.get_terminal_size((0, 0)).columns
    if not columns:
        with suppress(OSError, ValueError):
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
    return min(widest, columns or widest)


def wrapped(text: str, stream: TextIO, indent: str = "") -> str:
    """Return text in lines that end between words, as wide as the terminal that `stream` is; else as it is.

    Paths and words of commands stay whole. `indent` stands before all lines but the first.
    """
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def problem_table(problems: Sequence[Problem], stream: TextIO | None = None) -> None:
    """Print problems: case, what is wrong, what to do; `stream` is stderr by default.

    Fatal ones come first, those of the whole dataset before its cases, and those of a case stand together. Many of one
    kind are one row: how many, their first cases, and the first problem.
    """
    stream = sys.stderr if stream is None else stream
    place = {case: number for number, case in enumerate(dict.fromkeys(problem.case for problem in problems))}
    ordered = sorted(problems, key=lambda item: (not item.fatal, item.case != "dataset", place[item.case]))
    kinds: dict[object, list[Problem]] = {}
    for item in ordered:
        kinds.setdefault(item.kind, []).append(item)
    many = {kind: same for kind, same in kinds.items() if len(same) > _ALIKE}
    rows = []
    for item in ordered:
        told = item.case, item.problem
        if item.kind in many:
            same, many[item.kind] = many[item.kind], []
            if not same:
                continue
            told = _cases(same), f"{len(same)} times, first: {item.problem}"
        rows.append(("error" if item.fatal else "warning", *told, item.action))
    table(("", "case", "problem", "what to do"), rows, stream)
    if len(rows) < len(problems):
        say(f"--json lists all {len(problems)}", stream)


def score_table(
    rows: Mapping[str, Mapping[str, float | None]], stream: TextIO | None = None, *, first: str = ""
) -> None:
    """Print Dice: one row per key, one column per inner key, three decimals, a dash for None and NaN.

    `first` is the heading of the keys; `stream` is stdout by default. On a terminal that is too narrow rows and columns
    change places where that helps.
    """
    stream = sys.stdout if stream is None else stream
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    lines = [(first, *names), *((key, *(dice(values.get(name)) for name in names)) for key, values in rows.items())]
    turned = list(zip(*lines, strict=True))
    if stream.isatty() and _drawn_width(turned) < _drawn_width(lines) > shutil.get_terminal_size().columns:
        lines = turned
    table(lines[0], lines[1:], stream, numbers=True)


def _drawn_width(lines: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + _BETWEEN for column in zip(*lines, strict=True))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO, *, numbers: bool = False) -> None:
    """Print a table: drawn and wrapped on a terminal, plain aligned lines otherwise.

    With `numbers` all columns but the first are aligned to the right.
    """
    if stream.isatty():
        _draw_table(columns, rows, stream, numbers=numbers)
        return
    lines = [[printable(" ".join(cell.split())) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.rjust(width) if numbers and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        say("  ".join(cells).rstrip(), stream)


def _draw_table(columns: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO, *, numbers: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for i, name in enumerate(columns):
        drawn.add_column(Text(printable(name)), justify="right" if numbers and i else "left", overflow="fold")
    styles = {"error": "bold red", "warning": "yellow"}
    for row in rows:
        row = [printable(cell) for cell in row]
        first = Text(row[0], style="" if numbers else styles.get(row[0], ""))
        drawn.add_row(first, *(Text(cell) for cell in row[1:]))
    Console(file=stream).print(drawn)
