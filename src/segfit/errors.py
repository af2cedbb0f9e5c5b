"""The errors a caller can meet.

    SegfitError                 anything segfit raises on purpose
    ├── InputError              bad input or options: the message says what to do (CLI exit code 2)
    │   └── DatasetError        one or more problems found in a dataset, as a table of `Problem`
    └── StageError              a stage could not finish although its input was good (CLI exit code 1)
        ├── MemoryShortageError      a network does not fit into the memory there is
        └── DivergedError            a training diverged, with a lower learning rate too

Every message is one or two sentences: what was expected, what came, in which case or file, what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

__all__ = [
    "DatasetError",
    "DivergedError",
    "InputError",
    "MemoryShortageError",
    "Problem",
    "SegfitError",
    "StageError",
    "nearest",
]


class SegfitError(Exception):
    """Base class of all errors that segfit raises on purpose."""


class InputError(SegfitError):
    """The input or an option is unusable; the message says what to do about it."""


class StageError(SegfitError):
    """A stage failed although its input was accepted."""


class MemoryShortageError(StageError):
    """A training step or a tile does not fit into the memory of its device."""


class DivergedError(StageError):
    """A training diverged, and again with a lower learning rate."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a dataset: where it is, what it is, and what to do."""

    case: str  # case id, file name, or "dataset" for a problem of the whole dataset
    problem: str
    action: str
    fatal: bool = True  # False: a warning, the dataset can be used as it is
    transient: bool = False  # True: it came of the machine, not of the files; looking again may help


class DatasetError(InputError):
    """All problems of a dataset at once, so that they can be mended in one go.

    `outcome` says what was done all the same.
    """

    def __init__(self, problems: Sequence[Problem], outcome: str = "nothing was changed") -> None:
        self.problems, self.outcome = tuple(problems), outcome
        lines = [f"{item.case}: {item.problem}; {item.action}" for item in self.problems]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[DatasetError], tuple[tuple[Problem, ...], str]]:
        return DatasetError, (self.problems, self.outcome)  # so that it crosses processes


def nearest(word: str, known: Sequence[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known word, or an empty string."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
