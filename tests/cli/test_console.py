from __future__ import annotations

import errno
import io
import re
import subprocess
import sys

import pytest

from segfit.cli.console import (
    BarProgress,
    LineProgress,
    console_progress,
    problem_table,
    say,
    score_table,
    table,
    wrapped,
)
from segfit.errors import Problem, warning


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_at_each_tenth() -> None:
    stream, clock = io.StringIO(), Clock()
    with LineProgress(stream, clock).task("preprocess", 40) as task:
        for i in range(40):
            clock.now += 1.5
            task.advance(note=f"case_{i}")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "preprocess: 10%, elapsed 6.0 s, left 54 s, case_3"
    assert lines[8].startswith("preprocess: 90%, elapsed 54 s, left 6.0 s")
    assert lines[9] == "preprocess: done in 60 s"


def test_fast_work_writes_a_line_every_five_seconds_at_most() -> None:
    stream, clock = io.StringIO(), Clock()
    with LineProgress(stream, clock).task("check", 100) as task:
        for _ in range(100):
            clock.now += 0.12
            task.advance()
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == [
        "check: 42%",
        "check: 84%",
        "check: done in 12 s",
    ]


def test_lines_every_thirty_seconds_of_slow_work() -> None:
    stream, clock = io.StringIO(), Clock()
    with LineProgress(stream, clock).task("train", 1000) as task:
        for _ in range(9):
            clock.now += 10
            task.advance(1)
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[1] for line in lines[:-1]] == [" elapsed 30 s", " elapsed 60 s", " elapsed 90 s"]


def test_resumed_work_is_not_taken_for_fast_work() -> None:
    stream, clock = io.StringIO(), Clock()
    with LineProgress(stream, clock).task("train", 1000) as task:
        task.advance(500)
        for _ in range(4):
            clock.now += 10
            task.advance(10)
    assert stream.getvalue().splitlines()[0] == "train: 51%, elapsed 10 s, left 8 min"


def test_an_unknown_amount_never_divides_by_zero() -> None:
    stream = io.StringIO()
    with LineProgress(stream, Clock()).task("nothing", 0) as task:
        task.advance()
    assert stream.getvalue() == "nothing: done in 0.0 s\n"


def test_a_failed_task_says_where_it_stopped() -> None:
    stream, clock = io.StringIO(), Clock()

    def work() -> None:
        with LineProgress(stream, clock).task("train", 10) as task:
            clock.now += 3
            task.advance(0.5)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert stream.getvalue() == "train: stopped at 5% after 3.0 s\n"


def test_notes_and_warnings_as_lines() -> None:
    stream = io.StringIO()
    progress = console_progress(stream)
    assert isinstance(progress, LineProgress)
    progress.note("12 cases found")
    progress.warn(warning("", "no test set"))
    assert stream.getvalue() == "12 cases found\nwarning: no test set\n"


class Broken(io.StringIO):
    """A stream that cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def test_a_log_that_cannot_be_written_ends_no_work() -> None:
    full = LineProgress(Broken(OSError(errno.ENOSPC, "No space left on device")))
    with full.task("training", 2) as task:
        task.advance(2)
    full.warn(warning("", "odd"))
    nobody_reads = LineProgress(Broken(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        nobody_reads.note("here")


def test_bars_on_a_terminal_may_be_nested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = console_progress(stream)
    assert isinstance(progress, BarProgress)
    with progress.task("folds [all]", 2) as outer:
        progress.note("a note with [brackets]")
        with progress.task("fold 0", 10) as inner:
            inner.advance(10, note="loss 0.12")
        outer.advance()
        progress.warn(warning("", "look here"))
        outer.advance()
    text = stream.getvalue()
    for part in ("folds [all]", "a note with [brackets]", "fold 0", "100%", "loss 0.12", "warning: look here"):
        assert part in text
    with progress.task("again", 1) as task:
        task.advance()
    assert "again" in stream.getvalue()


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        (140, ("training 3d_fullres, fold 0", "30%", "left", "loss -0.734")),
        (80, ("training 3d_fullres", "30%", "left", "loss -0")),
        (50, ("training 3d_fullres", "30%", "left")),
    ],
)
def test_bars_fit_narrow_terminals(monkeypatch: pytest.MonkeyPatch, columns: int, parts: tuple[str, ...]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    with console_progress(stream).task("training 3d_fullres, fold 0", 100) as task:
        task.advance(30, note="loss -0.734, Dice 0.812")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).splitlines()
    last = next(line for line in reversed(shown) if "%" in line)
    assert len(last) <= columns
    assert [part for part in parts if part not in last] == []


PROBLEMS = (
    Problem("dataset", "3 cases only", "add cases", fatal=False),
    Problem("case_[1]", "label value 7\nis not declared", "declare it"),
)


_STEERING = "a\x1b[31mred\x07\x9b2J\u202eb"


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_told_steers_the_terminal(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "dumb")  # no colours of our own
    problem = Problem(_STEERING, _STEERING, _STEERING)
    progress = console_progress(stream)
    with progress.task(_STEERING, 2) as task:
        task.advance(1, _STEERING)
        progress.note(_STEERING)
        progress.warn(problem)
    problem_table([problem], stream)
    score_table({_STEERING: {_STEERING: 1.0}}, stream)
    table((_STEERING,), [(_STEERING,)], stream)
    say(_STEERING, stream)
    written = stream.getvalue()
    assert written.count("\\u001b[31mred") >= 8
    assert not {"\x07", "\x9b", "\u202e"} & set(written)
    assert "\x1b[31m" not in written


def test_problems_as_plain_aligned_lines() -> None:
    stream = io.StringIO()
    problem_table(PROBLEMS, stream)
    assert stream.getvalue().splitlines() == [
        "         case      problem                        what to do",
        "error    case_[1]  label value 7 is not declared  declare it",
        "warning  dataset   3 cases only                   add cases",
    ]


def test_problems_as_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    problem_table(PROBLEMS, stream)
    text = stream.getvalue()
    assert "case_[1]" in text
    assert text.index("error") < text.index("warning")
    assert "─" in text or "━" in text


def test_sentences_are_wrapped_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    text = "see a/very-long-path/of-a-file or segfit --help"
    lines = wrapped(text, Terminal(), "  ").splitlines()
    assert lines == ["see", "  a/very-long-path/of-a-file", "  or segfit --help"]
    assert wrapped(text, io.StringIO()) == text


def test_score_table() -> None:
    stream = io.StringIO()
    rows = {"case_1": {"liver": 0.91234, "spleen": None}, "mean": {"liver": float("nan"), "spleen": 0.5}}
    score_table(rows, stream, first="case")
    assert stream.getvalue().splitlines() == [
        "case    liver  spleen",
        "case_1  0.912       –",
        "mean        –   0.500",
    ]


def test_many_classes_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    classes = [f"class {number}" for number in range(30)]
    score_table({case: dict.fromkeys(classes, 0.5) for case in ("cross-validation", "test")}, stream, first="Dice")
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()]
    assert lines[0] == ["Dice", "cross-validation", "test"]
    assert lines[2:] == [["class", str(number), "0.500", "0.500"] for number in range(30)]


def test_imports_nothing_heavy() -> None:
    code = "import sys, segfit.cli.console; print(sorted({'torch','rich','matplotlib','numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def _alike(number: int, fatal: bool = False) -> list[Problem]:
    text = "{0}_0000.nii.gz has shape ({1}, {1}, 20), its label {0}.nii.gz {1} x 20"
    names = [f"case_{i:03d}" for i in range(number)]
    return [Problem(name, text.format(name, i + 9), f"resample {i}", fatal) for i, name in enumerate(names)]


@pytest.mark.parametrize("terminal", [False, True])
def test_warnings_of_one_kind_are_counted(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "400")
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    progress = console_progress(stream)
    other = warning("other", "something else")
    for problem in (*_alike(300), other):
        progress.warn(problem)
    with progress.task("work", 1):
        for problem in _alike(20):
            progress.warn(problem)
    told = re.findall(r"^warning: .*?(?=^warning|^work|\Z)", stream.getvalue(), re.M | re.S)
    *first, last, held, later = [" ".join(line.split()) for line in told]  # a terminal wraps them
    assert first == [f"warning: {problem}" for problem in _alike(3)]
    assert last == f"warning: {other}"
    assert "297 more" in held
    assert "(case_003, case_004 and 295 more)" in held
    assert "20 more" in later
    assert len(told) == 6


def test_problems_of_one_kind_are_one_row() -> None:
    stream = io.StringIO()
    problem_table([*_alike(5), *_alike(2, fatal=True), *[Problem("dataset", "7 x")] * 4, *PROBLEMS], stream)
    rows = stream.getvalue().splitlines()[1:]
    starts = ["error    dataset, 4 times", "error    case_000", "error    case_001", "error    case_[1]"]
    assert [row[: len(start)] for row, start in zip(rows, starts, strict=False)] == starts
    assert [row.split()[0] for row in rows] == ["error"] * 4 + ["warning"] * 2 + ["--json"]
    assert any("case_000, case_001 and 3 more" in row and "5 times" in row for row in rows)
    assert rows[-1].endswith(str(5 + 2 + 4 + 2))


def test_names_without_numbers_are_of_one_kind() -> None:
    kinds = {Problem(name, f"{name}_0000.png lacks {name}.png", fatal=False).kind for name in ("anna", "bea", "a")}
    assert len(kinds) == 1
    assert Problem("a", "it is larger").kind != Problem("a", "it is smaller").kind
    assert Problem("a", "x").kind != Problem("a", "x", fatal=False).kind
