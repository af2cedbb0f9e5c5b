"""The errors a caller can meet.

    SegfitError                 anything segfit raises on purpose
    ├── InputError              bad input or options: the message says what to do (CLI exit code 2)
    │   └── DatasetError        one or more problems found in a dataset, as a table of `Problem`
    ├── StoppedError            the work was stopped as was asked for, and can be gone on with (CLI exit code 143)
    └── StageError              a stage could not finish although its input was good (CLI exit code 1)
        ├── CasesFailedError         cases of a stage failed, the others are done
        ├── MemoryShortageError      a network does not fit into the memory there is
        └── DivergedError            a training diverged, with a lower learning rate too

Every error has a `problem` (what was expected, what came, in which case or file) and, where something can be done, an
`action`; its text is both. Errors cross processes by pickle: `args` are what their classes take.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "CasesFailedError",
    "DatasetError",
    "DivergedError",
    "InputError",
    "MemoryShortageError",
    "Problem",
    "SegfitError",
    "StageError",
    "StoppedError",
    "nearest",
    "reason_of",
    "warning",
]

_ADVICE = re.compile(
    r"allow_pickle|weights.only|still be loaded|set_int_max|environ|unsafe|trust|MAX_IMAGE|LOAD_TRUNC", re.I
)
"""Of libraries, how to switch a guard off."""
_NUMBERS = re.compile(r"\d[\d\u202f]*(?:\W{1,2}\d[\d\u202f]*)*")
"""A number, or several with a sign or two between."""
_ESCAPES = re.compile(r"\x1b\[[\d;]*m")


class SegfitError(Exception):
    """Base class of all errors that segfit raises on purpose."""

    def __init__(self, problem: str, action: str = "") -> None:
        self.problem, self.action = problem, action
        super().__init__(problem, action)

    def __str__(self) -> str:
        return f"{self.problem}; {self.action}" if self.action else self.problem


class InputError(SegfitError):
    """The input or an option is unusable."""


class StageError(SegfitError):
    """A stage failed although its input was accepted."""


class CasesFailedError(StageError):
    """Cases of a stage failed, which did not stop the others.

    Parameters
    ----------
    stage : what was done
    failed : the cases, each with its reason
    total : cases that there were
    """

    def __init__(self, stage: str, failed: Sequence[object], total: int, action: str) -> None:
        others = ", the others are done" if len(failed) < total else ""
        reasons = "; ".join(map(str, failed))
        super().__init__(f"{stage}: {len(failed)} of {total} cases failed{others}: {reasons}", action)
        self.args = (stage, tuple(failed), total, action)


class StoppedError(SegfitError):
    """Work was stopped because somebody asked for it; the same call goes on with it."""


class MemoryShortageError(StageError):
    """A training step or a tile does not fit into the memory of its device."""


class DivergedError(StageError):
    """A training diverged, and again with a lower learning rate."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a dataset, or a warning about a result: where it is, what it is, and what to do."""

    case: str  # case id, file name, or "dataset" for a problem of the whole dataset; empty: of no case
    problem: str
    action: str = ""
    fatal: bool = True  # False: a warning, the dataset or result can be used as it is
    transient: bool = False  # True: it came from the machine, not from the files; checking again may help
    code: str = ""  # the kind of a warning, for programs
    file: str = ""  # the file that it is about, where it is one
    other: str = ""  # another case that it is about

    def __str__(self) -> str:
        text = f"{self.problem}; {self.action}" if self.action else self.problem
        return f"{self.case}: {text}" if self.case else text

    @property
    def kind(self) -> tuple[object, ...]:
        """What problems have in common that differ in their case and in numbers alone."""
        case = _NUMBERS.sub("#", self.case)
        named = re.compile(rf"(?<!\w){re.escape(case)}(?:_[\w#]+)?(?!\w)") if case else None
        texts = (_NUMBERS.sub("#", text) for text in (self.problem, self.action))
        return self.fatal, self.code, *(named.sub("*", text) if named else text for text in texts)

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader is told, by name; without what is empty."""
        named = ("code", "case", "other", "file", "problem", "action")
        return {name: value for name in named if (value := getattr(self, name))}


def warning(code: str, problem: str, action: str = "", *, case: str = "", file: Path | str = "") -> Problem:
    """Return a warning about a result."""
    return Problem(case, problem, action, fatal=False, code=code, file=str(file))


class DatasetError(InputError):
    """All problems of a dataset at once, so that they can be fixed in one go.

    `outcome` says what was done all the same.
    """

    def __init__(self, problems: Sequence[Problem], outcome: str = "fix them and run the command again") -> None:
        self.problems, self.outcome = tuple(problems), outcome
        super().__init__("\n".join(map(str, self.problems)))
        self.args = (self.problems, self.outcome)


def nearest(word: str, known: Sequence[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known word, or an empty string."""
    return _nearest(word, tuple(known))


@lru_cache(maxsize=256)  # a folder of strange files asks for the same ending a hundred thousand times
def _nearest(word: str, known: tuple[str, ...]) -> str:
    matches = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def reason_of(error: Exception) -> str:
    """Return why a library failed, in its words and one line, but for advice to switch off what protects the user."""
    if isinstance(error, LookupError):
        return f"a value that is not known: {error}"
    if isinstance(error, ArithmeticError):
        return f"impossible numbers: {error}"
    if isinstance(error, TypeError):
        return "values of an unexpected kind"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    parts = re.split(r"(?<=[.;])\s", " ".join(_ESCAPES.sub("", text).split()))
    return " ".join(part for part in parts if not _ADVICE.search(part)).rstrip(";") or type(error).__name__
