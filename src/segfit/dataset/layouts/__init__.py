"""From files to cases: one visible table of layouts for training, and files or folders to predict.

A new layout is a module with two functions, ``recognises(path, declared)`` and ``read(path, declared, problems)``, and
a line in `LAYOUTS`; `declared` is what ``dataset.json`` says, nothing where there is none that is legible.
What the image files hold is looked at by `segfit.dataset.checks`. Nothing is copied or renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from segfit.dataset.layouts import decathlon, nnunet, paired, table
from segfit.dataset.layouts.case_conflicts import name_problems, shared_files
from segfit.dataset.layouts.common import WHOLE, declaration_of
from segfit.dataset.layouts.input_files import cases_from_files, find_cases
from segfit.dataset.layouts.segments import with_segments
from segfit.dataset.manifest import Dataset
from segfit.errors import DatasetError, Problem
from segfit.files import path_of
from segfit.images.formats import described
from segfit.text import count, listing

__all__ = [
    "LAYOUTS",
    "Layout",
    "cases_from_files",
    "describe",
    "find_cases",
    "inspect_dataset",
    "leave_out",
    "open_dataset",
    "recognised",
]

_SHOWN = 8  # names written out in a description


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to lay out a dataset."""

    title: str
    recognises: Callable[[Path, Mapping[str, Any]], bool]
    read: Callable[
        [Path, Mapping[str, Any], list[Problem]], Dataset | None
    ]  # adds to the problems; None: nothing can be made of it


LAYOUTS: dict[str, Layout] = {  # asked in this order
    "table": Layout("table of cases", table.recognises, table.read),
    "decathlon": Layout("Decathlon / nnU-Net v1 folder", decathlon.recognises, decathlon.read),
    "paired": Layout("paired folders", paired.recognises, paired.read),
    "nnunet-v2": Layout("nnU-Net v2 folder", nnunet.recognises, nnunet.read),
}


def open_dataset(path: Path | str, *, skip_incomplete: bool = False) -> Dataset:
    """Understand a dataset; raise `DatasetError` with every fatal problem of its structure at once.

    `skip_incomplete` leaves cases with missing files out instead; what their files hold only a check can tell.
    """
    dataset, problems = inspect_dataset(path)
    if skip_incomplete and dataset is not None:
        dataset, problems = leave_out(dataset, problems)
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        raise DatasetError(fatal)
    assert dataset is not None
    return dataset


def recognised(root: Path, declared: Mapping[str, Any] | None = None) -> list[Layout]:
    """Return the layouts that a dataset may have; `declared` is what its ``dataset.json`` says, if that is known."""
    declared = declaration_of(root) if declared is None else declared
    return [item for item in LAYOUTS.values() if item.recognises(root, declared)]


def inspect_dataset(path: Path | str) -> tuple[Dataset | None, tuple[Problem, ...]]:
    """Understand a dataset as far as possible, without raising.

    Returns the dataset, or None if nothing can be made of it, and all problems of its structure. Incomplete cases are
    in the dataset with the files they have, so that a check can look into those too.
    """
    path = path_of(path, "dataset")
    root, problems = path.absolute(), list[Problem]()
    dataset: Dataset | None = None
    try:
        root = path.expanduser().absolute()
        declared = declaration_of(root)
        found = recognised(root, declared) or [LAYOUTS["nnunet-v2"]]
        facts_alone = found[0] is LAYOUTS["table"] and len(found) > 1 and not table.names_images(root)
        dataset = found[1 if facts_alone else 0].read(root, declared, problems)
        if facts_alone and dataset is not None:
            dataset = table.with_facts(dataset, problems)
    except (OSError, RuntimeError) as error:  # no permission, a name too long, a home folder of nobody
        where, reason = (error.filename, error.strerror) if isinstance(error, OSError) else (root, error)
        problems.append(Problem(WHOLE, f"{where} cannot be read ({reason})", "correct the path or its permissions"))
    if dataset is not None:
        dataset = with_segments(dataset, problems)
        problems += name_problems(dataset) + shared_files(dataset)
        dataset = dataset.named()
    if (dataset is None or not dataset.training) and not any(problem.fatal for problem in problems):
        problems.append(Problem(WHOLE, f"{root} has no training case", "add images with labels"))
    told = tuple(problems)
    return None if dataset is None else dataset.model_copy(update={"problems": told}), told


def leave_out(dataset: Dataset, problems: Sequence[Problem]) -> tuple[Dataset, tuple[Problem, ...]]:
    """Return the dataset without the cases that have fatal problems, and the problems, those now warnings.

    Problems of the whole dataset stay as they are; that no case is left is one more.
    """
    unusable = {problem.case for problem in problems if problem.fatal} - {WHOLE}
    told = tuple(
        replace(item, problem=f"left out: {item.problem}", fatal=False) if item.fatal and item.case != WHOLE else item
        for item in problems
    )
    kept = tuple(case for case in dataset.training if case.id not in unusable)
    if not unusable:
        return dataset, told
    if not kept:
        told += (Problem(WHOLE, "no usable case", "fix the cases listed in the warnings"),)
    return dataset.model_copy(update={"training": kept, "num_training": len(kept)}), told


def describe(dataset: Dataset) -> tuple[str, str]:
    """Say in two lines what was understood: layout and cases, then channels and classes."""
    cases = f"{count(len(dataset.training), 'training case')}, {count(len(dataset.test), 'test case')}"
    extra = []
    for what in ("group", "site"):
        number = len({getattr(case, what) for case in dataset.training} - {None})
        extra += [count(number, what)] if number else []
    if dataset.groups_from_names:
        example = next(case for case in dataset.training if case.group is not None)
        extra.append(f"groups by the names of cases, as {example.id} of {example.group} (--groups none: no groups)")
    if any(case.spacing_mm for case in dataset.training):
        extra.append("voxel sizes from the table")
    if any(case.masks for case in dataset.training):
        named = any(mask.label is not None for case in dataset.training for mask in case.masks)
        extra.append(
            f"{'segments taken by name' if named else 'one label file per class'}, later ones over earlier ones"
        )
    stored = dataset.labels.stored_values
    classes = [
        f"{class_.name} = {', '.join(str(stored[value]) for value in class_.values)}"
        for class_ in dataset.labels.classes
    ]
    if dataset.labels.ignore_value is not None:
        classes.append(f"ignore = {stored[dataset.labels.ignore_value]}")
    first = "; ".join((f"{LAYOUTS[dataset.layout].title}: {cases}", *extra))
    channels = f"{count(len(dataset.channel_names), 'channel')}: {listing(dataset.channel_names, _SHOWN)}"
    if dataset.image_ending != dataset.file_ending:
        channels += f" ({described(dataset.image_ending)})"
    return first, f"{channels}; labels ({dataset.file_ending}): {listing(classes, _SHOWN)}"
