"""Everything that is wrong with a dataset, in one table, before anything is computed from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.dataset.layouts import inspect_dataset
from segfit.dataset.manifest import Case, Dataset
from segfit.dataset.placement import on_image_grid
from segfit.errors import DatasetError, InputError, Problem
from segfit.execution.pool import map_cases
from segfit.geometry import Grid
from segfit.images.formats import read_image, read_label, split_ending
from segfit.images.image import FileError, Image
from segfit.images.tiff import spacing_file
from segfit.labels import LabelScheme
from segfit.progress import SILENT, Progress

__all__ = ["MIN_CASES", "check_dataset", "require_usable"]

MIN_CASES = 5  # the reference needs them for its five folds; with fewer, fewer folds are made
_SHOWN_VALUES = 8  # label values written out in a message


def check_dataset(
    dataset: Dataset | Path | str,
    *,
    resample_labels: bool = False,
    workers: int | None = None,
    progress: Progress = SILENT,
) -> tuple[Problem, ...]:
    """Return every problem of a dataset, fatal ones and warnings: its structure first, then case by case.

    Each image and label file is read once, in parallel; what is wrong with test cases is a warning. A path is
    inspected first, so that a dataset which `open_dataset` refuses is reported together with what its files hold.
    """
    found, problems = inspect_dataset(dataset.root if isinstance(dataset, Dataset) else dataset)
    opened = dataset if isinstance(dataset, Dataset) else found
    if opened is None:
        return problems
    if resample_labels:
        opened = opened.resampling_labels()
    incomplete = frozenset(problem.case for problem in problems if problem.fatal)
    cases = (*opened.training, *opened.test)
    work = map_cases(
        lambda number: _check_case(cases[number], opened, complete=cases[number].id not in incomplete),
        range(len(cases)),
        description="Checking cases",
        name=lambda number: cases[number].id,
        workers=workers,
        progress=progress,
    )
    by_number = dict(work)
    findings = [by_number[number] for number in range(len(cases))]
    training, test = findings[: len(opened.training)], findings[len(opened.training) :]
    content = [item for finding in training for item in finding.problems]
    content += [
        replace(item, problem=f"test case: {item.problem}", fatal=False)
        for finding in test
        for item in finding.problems
    ]
    return (*problems, *_check_whole(opened, training), *content)


def require_usable(problems: Sequence[Problem]) -> None:
    """Raise `DatasetError` with the fatal problems if there are any."""
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        raise DatasetError(fatal)


@dataclass(frozen=True, slots=True)
class _Finding:
    """What one case showed."""

    problems: tuple[Problem, ...]
    ndim: int | None  # None: no image could be read
    label_values: frozenset[int] | None  # None: no label could be read


def _check_case(case: Case, dataset: Dataset, *, complete: bool) -> _Finding:
    """Read the files of a case; `complete` says that no file is known to be missing."""
    problems: list[Problem] = []
    grid: Grid | None = None
    channels = 0
    for path in case.images:
        try:
            image = read_image(path)
        except InputError as error:
            problems.append(_from_error(case, path, error))
            continue
        channels += image.array.shape[0]
        problems += _check_voxels(case, path, image.array)
        if grid is None:
            grid = image.grid
            problems += _check_spacing_file(case, path, grid)
        else:
            problems += _check_grid(case, path, grid, image.grid, case.images[0])
    readable = not any(problem.fatal for problem in problems)
    if complete and readable and channels != len(dataset.channel_names):
        files = ", ".join(path.name for path in case.images)
        problem = f"{files}: {channels} channels in all, dataset.json names {len(dataset.channel_names)}"
        problems.append(Problem(case.id, problem, 'correct "channel_names" or the files'))
    values: frozenset[int] | None = None
    if case.label is not None:
        try:
            label = read_label(case.label)
        except InputError as error:
            problems.append(_from_error(case, case.label, error))
        else:
            values = _label_values(label.array)
            problems += _check_values(case, case.label, values, dataset.labels)
            if grid is not None:
                problems += _check_label_grid(case, case.label, grid, label)
    return _Finding(tuple(problems), None if grid is None else grid.ndim, values)


def _from_error(case: Case, path: Path, error: InputError) -> Problem:
    if isinstance(error, FileError):
        return Problem(case.id, f"{error.path.name} {error.problem}", error.action)
    return Problem(case.id, str(error), f"correct {path.name}")


def _check_voxels(case: Case, path: Path, array: NDArray[Any]) -> list[Problem]:
    if array.dtype.kind == "f":
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            problem = f"{path.name} has {bad} NaN or infinite voxel" + "s" * (bad > 1)
            return [Problem(case.id, problem, "replace them by a value such as 0, or remove the case")]
    problems: list[Problem] = []
    for number, channel in enumerate(array):
        if channel.min() == channel.max():
            which = f" (channel {number} of the file)" if len(array) > 1 else ""
            problem = f"{path.name} is constant{which}: every voxel is {channel.flat[0]:g}"
            problems.append(Problem(case.id, problem, "look at the image; remove the case if it is empty", fatal=False))
    return problems


def _check_grid(case: Case, path: Path, expected: Grid, found: Grid, first: Path) -> list[Problem]:
    difference, moved = expected.mismatch(found), expected.snapped(found)
    action = "resample it to that image, or copy that image's header if the voxels already correspond"
    if difference:
        return [Problem(case.id, f"{path.name} does not fit {first.name}: {difference}", action)]
    if moved:
        problem = f"{path.name} lies {moved} and is taken as lying on {first.name}"
        return [Problem(case.id, problem, "nothing if the voxels correspond; resample it if not", fatal=False)]
    return []


def _check_label_grid(case: Case, path: Path, expected: Grid, label: Image) -> list[Problem]:
    """Compare a label map with its image; what does not fit may be resampled if that was asked for."""
    difference, first = expected.mismatch(label.grid), case.images[0]
    problems = _check_grid(case, path, expected, label.grid, first)
    if not difference:
        return problems
    if not case.resample_label:
        return [replace(item, action=f"{item.action}; or give --resample-labels") for item in problems]
    try:
        on_image_grid(case, label)
    except InputError as error:
        return [_from_error(case, path, error)]
    problem = f"{path.name} does not fit {first.name}: {difference}; its labels are resampled onto that image"
    return [Problem(case.id, problem, "look at some of them in the report", fatal=False)]


def _check_spacing_file(case: Case, path: Path, grid: Grid) -> list[Problem]:
    unknown = grid.spacing_mm == (1.0, 1.0, 1.0) and not spacing_file(path).exists()
    if not unknown or split_ending(path.name)[1].lower() not in (".tif", ".tiff"):
        return []
    problem = f"{path.name} has no spacing file {case.id}.json beside it, voxels are taken as 1 mm cubes"
    return [Problem(case.id, problem, 'write {"spacing": [z, y, x]} in mm if they are not', fatal=False)]


def _check_values(case: Case, path: Path, values: frozenset[int], labels: LabelScheme) -> list[Problem]:
    declared = set(labels.all_values) | ({labels.ignore_value} if labels.ignore_value is not None else set())
    unknown = sorted(values - declared)
    if unknown:
        shown = ", ".join(map(str, unknown[:_SHOWN_VALUES])) + (", ..." if len(unknown) > _SHOWN_VALUES else "")
        expected = ", ".join(map(str, sorted(declared)))
        problem = f"{path.name} holds the undeclared value{'s' * (len(unknown) > 1)} {shown}; declared are {expected}"
        return [Problem(case.id, problem, 'correct the label or declare the value in "labels"')]
    if not values & set(labels.foreground_values):
        problem = f"{path.name} is empty: no structure is labelled"
        return [Problem(case.id, problem, "nothing if that is right; label the case or remove it if not", fatal=False)]
    return []


def _label_values(array: NDArray[np.integer[Any]]) -> frozenset[int]:
    """Return the distinct values; a look-up table is much faster than sorting where the range is small."""
    low, high = int(array.min()), int(array.max())
    if high - low >= 2**16:
        return frozenset(int(value) for value in np.unique(array))
    present = np.zeros(high - low + 1, dtype=bool)
    present[array.ravel().astype(np.int32) - low] = True
    return frozenset(int(value) + low for value in np.flatnonzero(present))


def _check_whole(dataset: Dataset, findings: Sequence[_Finding]) -> list[Problem]:
    """Return what only shows when all cases are seen together."""
    problems: list[Problem] = []
    count = len(dataset.training)
    if 0 < count < MIN_CASES:
        problem = f"{count} training case{'s' * (count > 1)}, {MIN_CASES} or more are needed for five folds"
        problems.append(Problem("dataset", problem, "add cases; until then fewer folds are made", fatal=False))
    kinds = Counter(finding.ndim for finding in findings if finding.ndim is not None)
    if len(kinds) > 1:
        rare = kinds.most_common()[-1][0]
        cases = [case.id for case, finding in zip(dataset.training, findings, strict=True) if finding.ndim == rare]
        problem = f"{kinds[2]} cases are 2D and {kinds[3]} are 3D (first {rare}D case: {cases[0]})"
        problems.append(Problem("dataset", problem, "make a dataset of each kind"))
    seen = [finding.label_values for finding in findings if finding.label_values is not None]
    absent = [
        target.name
        for target in dataset.labels.targets
        if seen and not any(set(target.values) & values for values in seen)
    ]
    for name in absent:
        problem = f'the structure "{name}" occurs in no label file'
        problems.append(Problem("dataset", problem, 'correct its value in "labels" or remove it', fatal=False))
    return problems
