"""What no layout can want: ids of cases that cannot be names of files, and files that two cases or roles share."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from segfit.dataset.layouts.names import composed
from segfit.dataset.manifest import Case, Dataset
from segfit.errors import Problem

__all__ = ["fault_of_name", "name_problems", "same_letters", "shared_files"]

_LONGEST_NAME = 200  # bytes: file systems allow 255, and endings are added to the id of a case (assumption)


def fault_of_name(name: str) -> str:
    """Say why a case cannot have this id, which becomes the name of files; an empty string if it can."""
    if not name.strip():
        return "is empty"
    if name != Path(name).name or name.startswith("."):
        return "is a path or would be a hidden file"
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        return "has control characters or bytes that are no UTF-8 text"
    if len(name.encode()) > _LONGEST_NAME:
        return f"is longer than {_LONGEST_NAME} bytes"
    return ""


def same_letters(name: str) -> str:
    """Return what names have in common that differ in capitals or in how their accents are stored alone."""
    return composed(name).casefold()


def name_problems(dataset: Dataset) -> list[Problem]:
    """Return a problem for every id that cannot be the name of a file or is, on other systems, that of another case."""
    problems: list[Problem] = []
    first: dict[str, str] = {}
    for case in (*dataset.training, *dataset.test):
        fault = fault_of_name(case.id)
        if fault:
            shown = case.id if case.id.isprintable() else ascii(case.id)[1:-1]
            problems.append(Problem(shown[:_LONGEST_NAME], f"its name {fault}", "give the case another name"))
        other = first.setdefault(same_letters(case.id), case.id)
        if other != case.id:
            problem = f"differs from the case {other} in capitals or in how accents are stored alone"
            action = "rename one; on other file systems their results would overwrite each other"
            problems.append(Problem(case.id, problem, action, fatal=False))
    return problems


def shared_files(dataset: Dataset) -> list[Problem]:
    """Return what is wrong where one file is two channels, image and label at once, or the label of two cases."""
    problems: list[Problem] = []
    labelled: dict[Path, Case] = {}
    for case in (*dataset.training, *dataset.test):
        images = [_resolved(path) for path in case.images]
        labels = [_resolved(path) for path in case.label_files]
        twice = _repeated(images)
        if twice is not None:
            problems.append(Problem(case.id, f"{twice.name} is given for two channels", "correct one of them"))
        both = next((path for path in labels if path in images), None)
        if both is not None:
            problems.append(Problem(case.id, f"{both.name} is both its image and its label", "correct one of them"))
        for path in dict.fromkeys(labels):
            other = labelled.setdefault(path, case)
            if other is not case and both is None:
                problem = f"{path.name} is its label and that of the case {other.id}"
                problems.append(Problem(case.id, problem, "correct one of them, unless it fits both", fatal=False))
    return problems


def _repeated(paths: Sequence[Path]) -> Path | None:
    return next((path for number, path in enumerate(paths) if path in paths[:number]), None)


def _resolved(path: Path) -> Path:
    """Return the file that a link leads to, the path itself where that cannot be told."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a link that leads back to itself
        return path
