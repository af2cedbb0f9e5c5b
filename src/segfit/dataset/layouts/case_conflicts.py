"""Conflicts between cases, whatever the layout: ids that cannot be file names or differ in case only, shared files."""

from __future__ import annotations

from pathlib import Path

from segfit.dataset.layouts.names import LONGEST_NAME, fault_of_name, same_letters
from segfit.dataset.manifest import Case, Dataset
from segfit.errors import Problem

__all__ = ["name_problems", "shared_files"]


def name_problems(dataset: Dataset) -> list[Problem]:
    """Return a problem for every id that cannot be the name of a file or is, on other systems, that of another case."""
    problems: list[Problem] = []
    first: dict[str, str] = {}
    for case in (*dataset.training, *dataset.test):
        fault = fault_of_name(case.id)
        if fault:
            shown = case.id if case.id.isprintable() else ascii(case.id)[1:-1]
            problems.append(Problem(shown[:LONGEST_NAME], f"its name {fault}", "give the case another name"))
        other = first.setdefault(same_letters(case.id), case.id)
        if other != case.id:
            problem = f"differs from the case {other} only in case or Unicode normalisation"
            action = "rename one; on some file systems their results overwrite each other"
            problems.append(Problem(case.id, problem, action, fatal=False))
    return problems


def shared_files(dataset: Dataset) -> list[Problem]:
    """Return what is wrong where one file is two channels, image and label at once, or the label of two cases."""
    problems: list[Problem] = []
    labelled: dict[Path, Case] = {}
    folders: dict[Path, Path] = {}
    for case in (*dataset.training, *dataset.test):
        images = [_resolved(path, folders) for path in case.channels.values() if path is not None]
        labels = [_resolved(path, folders) for path in case.label_files]
        twice = next((path for number, path in enumerate(images) if path in images[:number]), None)
        if twice is not None:
            problems.append(Problem(case.id, f"{twice.name} is listed for two channels", "correct one of them"))
        both = next((path for path in labels if path in images), None)
        if both is not None:
            problems.append(Problem(case.id, f"{both.name} is both its image and its label", "correct one of them"))
        for path in dict.fromkeys(labels):
            other = labelled.setdefault(path, case)
            if other is not case and both is None:
                problem = f"{path.name} is also the label of the case {other.id}"
                problems.append(Problem(case.id, problem, "correct one of them unless that is right", fatal=False))
    return problems


def _resolved(path: Path, folders: dict[Path, Path]) -> Path:
    """Return the file that a link leads to, the path itself where that cannot be told; folders are looked at once."""
    try:
        if path.is_symlink() or path.name == "..":
            return path.resolve()
        if path.parent not in folders:
            folders[path.parent] = path.parent.resolve()
        return folders[path.parent] / path.name
    except (OSError, RuntimeError):  # a link that leads back to itself
        return path
