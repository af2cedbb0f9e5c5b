"""Everything that is wrong with a dataset, in one table, before anything is computed from it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.dataset.annotation import LABEL_BYTES_PER_VOXEL, count_values, merged_masks
from segfit.dataset.doubts import FEWEST_VALUES, label_doubt
from segfit.dataset.layouts import inspect_dataset
from segfit.dataset.manifest import Case, Dataset
from segfit.dataset.palettes import palette_problems
from segfit.dataset.placement import on_image_grid
from segfit.device import free_memory_gb
from segfit.errors import DatasetError, InputError, Problem
from segfit.execution.pool import map_cases
from segfit.execution.workers import LostCaseError
from segfit.geometry import Grid
from segfit.images import omezarr
from segfit.images.formats import find_format, num_voxels, read_image, read_label, remarks, split_ending
from segfit.images.image import Image, Remark, problem_of
from segfit.images.picture import colours, kind
from segfit.images.tiff import spacing_file
from segfit.labels import LabelScheme
from segfit.progress import SILENT, Progress

__all__ = ["MIN_CASES", "check_dataset", "check_files", "require_usable"]

MIN_CASES = 5  # the reference needs them for its five folds; with fewer, fewer folds are made
_IMAGE_BYTES_PER_VOXEL = 12  # of a channel of 32 bits, that reading and looking at an image takes (measured)
_LARGEST_INTENSITY = 1e15  # the squares of 10^8 such values, which deviations need, can still be summed in float32
_SPACING_TOLERANCE = 0.02  # between two places of a header; rounding in either is far below (assumption)
_SPACING_RATIO = 20.0  # to the usual spacing of a dataset: beyond, a unit was mistaken (assumption)
_SCALE_RATIO = 5.0  # the same where all axes are longer, or shorter, at once: cm for mm make 10 (assumption)
_LARGEST_VOXEL_MM = 100.0  # beyond, a unit was mistaken in all cases (assumption)
_MOST_SKEW = 1.0  # degrees that axes may be off from right angles (assumption; rounding is far below)
_SHOWN_VALUES = 8  # label values written out in a message
_SHOWN_FILES = 3  # files named in a message; a remark about more is told once
_VISIT = re.compile(r"(.+?)[_-](?:ses|session|visit|v|t|tp|time|timepoint|month|m|scan)[_-]?\d+", re.IGNORECASE)


def check_dataset(
    dataset: Dataset | Path | str, *, workers: int | None = None, progress: Progress = SILENT
) -> tuple[Problem, ...]:
    """Return every problem of a dataset, fatal ones and warnings: its structure first, then case by case.

    A path is inspected first, so that a dataset which `open_dataset` refuses is reported together with what its files
    hold. Otherwise as `check_files`.
    """
    found, problems = inspect_dataset(dataset.root if isinstance(dataset, Dataset) else dataset)
    opened = dataset if isinstance(dataset, Dataset) else found
    return problems if opened is None else check_files(opened, problems, workers=workers, progress=progress)


def check_files(
    dataset: Dataset, problems: Sequence[Problem] = (), *, workers: int | None = None, progress: Progress = SILENT
) -> tuple[Problem, ...]:
    """Return `problems`, those of the dataset's structure, and after them all that its files show.

    Each image and label file is read once, in parallel; what is wrong with test cases is a warning. A case that no
    worker survives is a problem of that case.
    """
    incomplete = {problem.case for problem in problems if problem.fatal}
    channels = len(dataset.channel_names)
    work = map_cases(
        partial(_check_item, labels=dataset.labels, channels=channels),
        [(number, case, case.id not in incomplete) for number, case in enumerate((*dataset.training, *dataset.test))],
        description="Checking cases",
        name=_item_name,
        size=lambda item: _predicted_bytes(item[1], channels),
        room=free_memory_gb() * 2**30,
        lost=_unread,
        workers=workers,
        progress=progress,
    )
    by_number = {number: finding for (number, *_), finding in work}
    findings = [by_number[number] for number in range(len(by_number))]
    training, test = findings[: len(dataset.training)], findings[len(dataset.training) :]
    content = [item for finding in training for item in finding.problems]
    content += [
        replace(item, problem=f"test case: {item.problem}", fatal=False)
        for finding in test
        for item in finding.problems
    ]
    whole = (*_check_whole(dataset, training), *_check_same(dataset, findings), *_told_once(dataset, findings))
    return (*problems, *whole, *content)


def require_usable(problems: Sequence[Problem]) -> None:
    """Raise `DatasetError` with the fatal problems if there are any."""
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        raise DatasetError(fatal)


_Item = tuple[int, Case, bool]
"""Number of a case, the case, and whether no file of it is known to be missing."""


@dataclass(frozen=True, slots=True)
class _Finding:
    """What one case showed."""

    problems: tuple[Problem, ...]
    spacing_mm: tuple[float, ...] | None  # None: no image could be read
    label_values: frozenset[int] | None  # as stored on disk; None: no label could be read
    digest: str | None  # of all voxels of all channels; None: not all could be read
    remarks: tuple[tuple[Path, Remark], ...] = ()  # files, and what they say beside their voxels
    colours: Mapping[int, str] | None = None  # in which label values are shown, where a palette says so
    bits: int | None = None  # of a value of a picture or TIFF; None for other files and kinds of numbers
    placed: bool = True  # whether the first image says how its axes lie

    @property
    def ndim(self) -> int | None:
        """Number of axes of the images."""
        return None if self.spacing_mm is None else len(self.spacing_mm)


def _item_name(item: _Item) -> str:
    return item[1].id


def _predicted_bytes(case: Case, channels: int) -> int:
    """Return the memory that checking a case takes, about: its channels are read file by file, then its label."""
    if not case.images:
        return sum(num_voxels(path) for path in case.label_files) * LABEL_BYTES_PER_VOXEL + 1
    image = ceil(channels / len(case.images)) * _IMAGE_BYTES_PER_VOXEL
    return num_voxels(case.images[0]) * (image + (LABEL_BYTES_PER_VOXEL if case.label_files else 0))


def _unread(item: _Item, error: LostCaseError) -> _Finding:
    problem = f"its files could not be read, even alone: worker {error.reason}"
    largest = max((*item[1].images, *item[1].label_files), key=num_voxels)
    size = f"; the largest is {largest.name} with {num_voxels(largest):.3g} voxels"
    action = "check again with more free memory, on a larger machine if need be, or remove the case"
    return _Finding((Problem(item[1].id, problem + size, action, transient=True),), None, None, None)


def _check_item(item: _Item, *, labels: LabelScheme, channels: int) -> _Finding:
    _, case, complete = item
    return _check_case(case, labels, channels, complete=complete)


def _check_case(case: Case, labels: LabelScheme, expected: int, *, complete: bool) -> _Finding:
    """Read the files of a case; `complete` says that no file is known to be missing."""
    problems: list[Problem] = []
    told: list[tuple[Path, Remark]] = []
    bits: int | None = None
    shown: Mapping[int, str] | None = None
    grid: Grid | None = None
    channels = 0
    digest = hashlib.sha256()
    for path in case.images:
        try:
            image = read_image(path)
        except InputError as error:
            problems.append(problem_of(case.id, error, f"correct {path.name}", (path,)))
            continue
        channels += image.array.shape[0]
        digest.update(repr(image.array.shape).encode())
        digest.update(np.ascontiguousarray(image.array).data)
        problems += _check_voxels(case, path, image.array)
        told += [(path, remark) for remark in remarks(path) if all(remark != said for _, said in told)]
        if grid is None:
            grid = image.grid
            unsigned = image.array.dtype.kind == "u" and find_format(path).name in ("picture", "JPEG", "TIFF")
            bits = 8 * image.array.dtype.itemsize if unsigned else None
            problems += _check_spacing_file(case, path, grid)
            told += [(path, remark) for remark in _header_remarks(grid)]
        else:
            problems += _check_grid(case, path, grid, image.grid, case.images[0])
    readable = not any(problem.fatal for problem in problems)
    if complete and readable and channels != expected:
        problems.append(_wrong_channels(case, channels, expected))
    values: frozenset[int] | None = None
    if case.label_files:
        last = case.label_files[-1]
        try:
            label = merged_masks(case) if case.masks else read_label(last)
        except InputError as error:
            problems.append(problem_of(case.id, error, f"correct {last.name}"))
        else:
            values = frozenset(count_values(label.array))
            if case.masks:
                values = frozenset(labels.stored_values[value] for value in values)
            problems += _check_values(case, last, values, labels, label)
            if find_format(last).name == "picture":
                shown = colours(last)
            if find_format(last).name in ("NIfTI", "OME-Zarr"):
                told += [(last, remark) for remark in remarks(last) if all(remark != said for _, said in told)]
            if grid is not None:
                problems += _check_label_grid(case, last, grid, label)
    whole = complete and readable and bool(case.images)
    spacing = None if grid is None else grid.spacing_mm
    return _Finding(
        tuple(problems),
        spacing,
        values,
        digest.hexdigest() if whole else None,
        tuple(told),
        shown,
        bits,
        placed=grid is None or grid.affine is not None,
    )


def _wrong_channels(case: Case, channels: int, expected: int) -> Problem:
    """Return the problem of a case whose files hold another number of channels than the dataset has."""
    files = ", ".join(path.name for path in case.images)
    action = "declare as many channels as the files hold, or correct the files"
    held = ""
    if find_format(case.images[0]).name in ("picture", "JPEG"):
        held = f" ({'; '.join(dict.fromkeys(kind(path) for path in case.images))})"
        forms = {1: "in grey", 3: "as RGB, without transparency", 4: "as RGB with transparency"}
        if len(case.images) == 1 and expected in forms:
            action = f"save it {forms[expected]}; if all are like this one, declare as many channels as they hold"
    number = f"{channels} channel" + "s" * (channels != 1)
    return Problem(case.id, f"{files}: {number} in all{held}, the dataset has {expected}", action)


def _check_voxels(case: Case, path: Path, array: NDArray[Any]) -> list[Problem]:
    if array.dtype.kind == "f":
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            problem = f"{path.name} has {bad} NaN or infinite voxel" + "s" * (bad > 1)
            return [Problem(case.id, problem, "replace them by a value such as 0, or remove the case")]
    extremes = [(float(channel.min()), float(channel.max())) for channel in array]
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    if max(-low, high) > _LARGEST_INTENSITY:
        problem = f"{path.name} holds values from {low:g} to {high:g}, too large to compute with in single precision"
        return [Problem(case.id, problem, "replace them (often a mark of missing values), or scale the image")]
    problems: list[Problem] = []
    for number, (low, high) in enumerate(extremes):
        if low == high:
            which = f" (channel {number} of the file)" if len(array) > 1 else ""
            problem = f"{path.name} is constant{which}: every voxel is {low:g}"
            action = "look at the image; remove the case if it is empty"
            if (number, len(array)) == (3, 4) and find_format(path).name == "picture":
                action = "save it without transparency, which says nothing here, and so all others"
            problems.append(Problem(case.id, problem, action, fatal=False))
    return problems


def _check_grid(case: Case, path: Path, expected: Grid, found: Grid, first: Path) -> list[Problem]:
    difference, moved = expected.mismatch(found), expected.snapped(found)
    if difference and expected.turn(found) is not None:
        problem = f"{path.name} stores its axes in another order or direction than {first.name} and is turned onto it"
        return [Problem(case.id, problem, "nothing if its header is right", fatal=False)]
    action = "resample it to that image, or copy that image's header if the voxels already correspond"
    if expected.affine is None and found.affine is None:
        action = _fit_without_place(path, expected, found)
    if difference:
        return [Problem(case.id, f"{path.name} does not fit {first.name}: {difference}", action)]
    apart = omezarr.translated(expected, found)
    if apart:
        problem = f"{path.name} says that it lies {apart} from {first.name}; voxels are taken to correspond one by one"
        return [Problem(case.id, problem, "nothing if they do; correct its translation or resample it if not", False)]
    if moved:
        problem = f"{path.name} lies {moved} and is taken as lying on {first.name}"
        return [Problem(case.id, problem, "nothing if the voxels correspond; resample it if not", fatal=False)]
    return []


def _fit_without_place(path: Path, expected: Grid, found: Grid) -> str:
    """Return what to do where two files that do not say where they lie differ in shape or spacing."""
    if expected.shape == found.shape:
        if path.suffix.lower() in (".tif", ".tiff"):
            return 'write the true {"spacing": [z, y, x]} in mm into a .json beside each of the two'
        return "give both files the same voxel size if the voxels correspond, resample it if not"
    if sorted(expected.shape) == sorted(found.shape):
        return "it seems to be turned or transposed: store its axes in the order of that image"
    return "make it on the voxels of that image, or bring both to one size"


def _check_label_grid(case: Case, path: Path, expected: Grid, label: Image) -> list[Problem]:
    """Compare a label map with its image; what does not fit may be resampled if that was asked for."""
    difference, first = expected.mismatch(label.grid), case.images[0]
    problems = _check_grid(case, path, expected, label.grid, first)
    if not any(problem.fatal for problem in problems):
        return problems
    if not case.resample_label:
        placed = expected.affine is not None and label.grid.affine is not None
        offer = "; or give --resample-labels" if placed else ""
        return [replace(item, action=f"{item.action}{offer}") for item in problems]
    try:
        on_image_grid(case, label, expected)
    except InputError as error:
        return [problem_of(case.id, error, f"correct {path.name}")]
    problem = f"{path.name} does not fit {first.name}: {difference}; its labels are resampled onto that image"
    return [Problem(case.id, problem, "look at some of them in the report", fatal=False)]


def _check_spacing_file(case: Case, path: Path, grid: Grid) -> list[Problem]:
    if grid.spacing_mm != (1.0, 1.0, 1.0) or grid.affine is not None:
        return []
    if split_ending(path)[1].lower() in (".nrrd", ".nhdr", ".mha", ".mhd"):
        problem = f"{path.name} does not place its voxels in space, they are taken as 1 mm cubes"
        return [Problem(case.id, problem, "write their true size and directions into its header", fatal=False)]
    unknown = not spacing_file(path).exists()
    if not unknown or split_ending(path)[1].lower() not in (".tif", ".tiff"):
        return []
    problem = f"{path.name} has no spacing file {case.id}.json beside it, voxels are taken as 1 mm cubes"
    return [Problem(case.id, problem, 'write {"spacing": [z, y, x]} in mm if they are not', fatal=False)]


def _header_remarks(grid: Grid) -> list[Remark]:
    """Return what the geometry of a header says in two ways, or says and is not followed here."""
    found: list[Remark] = []
    if grid.affine is not None:
        lengths = np.linalg.norm(grid.affine[:3, :3], axis=0)
        if not np.allclose(lengths[::-1], grid.spacing_mm, rtol=_SPACING_TOLERANCE, atol=0):
            sizes = [", ".join(f"{value:.4g}" for value in one) for one in (grid.spacing_mm, lengths[::-1])]
            problem = f"has voxels of ({sizes[0]}) mm, but its orientation matrix says ({sizes[1]}) mm"
            found.append(Remark(problem, "correct its header; the former is used"))
        axes = grid.affine[:3, :3] / lengths
        skew = np.degrees(np.arcsin(np.abs(axes.T @ axes - np.eye(3)).max().clip(max=1)))
        if skew > _MOST_SKEW:
            problem = f"has axes that are {skew:.2g} degrees off right angles, and is used as if they were not"
            found.append(Remark(problem, "resample it to a grid with right angles, or correct its header"))
    return found


def _check_values(case: Case, path: Path, values: frozenset[int], labels: LabelScheme, label: Image) -> list[Problem]:
    declared = set(labels.stored_values)
    unknown = sorted(values - declared)
    doubt = label_doubt(label.array) if len(values) >= FEWEST_VALUES and not case.masks else ""
    if unknown and doubt:
        action = "give a label map: one value per structure, saved without losses"
        if _holds_labels(case, declared):
            action = f"{case.images[0].name} looks like its label map: exchange the two"
        return [Problem(case.id, f"{path.name} is no label map: it {doubt}", action)]
    if doubt:
        problem = f"{path.name} {doubt}; all its values are taken as structures"
        return [Problem(case.id, problem, "look at it; give a label map if it is none", fatal=False)]
    if unknown:
        shown = ", ".join(map(str, unknown[:_SHOWN_VALUES])) + (", ..." if len(unknown) > _SHOWN_VALUES else "")
        expected = ", ".join(map(str, sorted(declared)))
        problem = f"{path.name} holds the undeclared value{'s' * (len(unknown) > 1)} {shown}; declared are {expected}"
        return [Problem(case.id, problem, 'correct the label or declare the value in "labels"')]
    if not values & {labels.stored_values[value] for value in labels.foreground_values}:
        problem = f"{path.name} is empty: no structure is labelled"
        return [Problem(case.id, problem, "nothing if that is right; label the case or remove it if not", fatal=False)]
    return []


def _holds_labels(case: Case, declared: set[int]) -> bool:
    """Return whether the image of a case holds nothing but declared label values, and some of them."""
    try:
        values = frozenset(count_values(read_label(case.images[0]).array)) if len(case.images) == 1 else frozenset()
    except InputError:
        return False
    return len(values) > 1 and values <= declared


def _told_once(dataset: Dataset, findings: Sequence[_Finding]) -> list[Problem]:
    """Return warnings about what files say beside their voxels: one each, or one for many of a folder that say it."""
    by_remark: dict[tuple[Remark, Path], list[tuple[str, str]]] = {}
    for case, finding in zip((*dataset.training, *dataset.test), findings, strict=True):
        for path, remark in finding.remarks:
            by_remark.setdefault((remark, path.parent), []).append((case.id, path.name))
    problems: list[Problem] = []
    for (remark, folder), files in by_remark.items():
        if len(files) <= _SHOWN_FILES:
            problems += [Problem(case, f"{name} {remark.problem}", remark.action, False) for case, name in files]
        else:
            shown = ", ".join(name for _, name in files[:_SHOWN_FILES])
            problem = f"each of {len(files)} files in {folder.name} ({shown}, ...) {remark.problem}"
            problems.append(Problem("dataset", problem, remark.action, fatal=False))
    return problems


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
    problems += _check_spacings(dataset, findings) + _check_places(dataset, findings) + _check_depths(dataset, findings)
    labelled = [(case, one) for case, one in zip(dataset.training, findings, strict=True) if one.colours]
    problems += palette_problems([(case.id, case.label_files[-1].name, one.colours or {}) for case, one in labelled])
    stored = dataset.labels.stored_values
    seen = [finding.label_values for finding in findings if finding.label_values is not None]
    absent = [
        target.name
        for target in dataset.labels.targets
        if seen and not any({stored[value] for value in target.values} & values for values in seen)
    ]
    if absent and len(absent) == len(dataset.labels.targets) and len(seen) == count:
        problem = f"no label file holds a structure: {', '.join(absent)} occur{'s' * (len(absent) == 1)} in none"
        return [*problems, Problem("dataset", problem, 'label some cases or correct the values in "labels"')]
    for name in absent:
        problem = f'the structure "{name}" occurs in no label file'
        problems.append(Problem("dataset", problem, 'correct its value in "labels" or remove it', fatal=False))
    return problems


def _check_spacings(dataset: Dataset, findings: Sequence[_Finding]) -> list[Problem]:
    """Return warnings about voxels larger than any, and about cases whose size no other case comes near to."""
    known = [(case.id, one.spacing_mm) for case, one in zip(dataset.training, findings, strict=True) if one.spacing_mm]
    if not known or len({len(spacing) for _, spacing in known}) > 1:
        return []
    usual = np.median(np.array([spacing for _, spacing in known]), axis=0)
    shown = ", ".join(f"{value:.4g}" for value in usual)
    action = "correct the voxel size in its header if the unit was mistaken"
    problems: list[Problem] = []
    if usual.max() > _LARGEST_VOXEL_MM:
        problem = f"voxels are usually ({shown}) mm in size, more than any imaging has"
        problems.append(Problem("dataset", problem, action.replace("its header", "the headers"), fatal=False))
    for name, spacing in known if len(known) > 2 else ():
        ratios = np.array(spacing) / usual
        scale = max(ratios.min(), 1 / ratios.max())  # by which all axes are longer, or shorter, at least
        if scale > _SCALE_RATIO or max(ratios.max(), 1 / ratios.min()) > _SPACING_RATIO:
            size = ", ".join(f"{value:.4g}" for value in spacing)
            problem = f"its voxels are ({size}) mm in size, those of the dataset usually ({shown}) mm"
            problems.append(Problem(name, problem, action, fatal=False))
    return problems


def _check_depths(dataset: Dataset, findings: Sequence[_Finding]) -> list[Problem]:
    """Return a warning for every case whose pictures have more or fewer bits per value than most."""
    known = [(case, one.bits) for case, one in zip(dataset.training, findings, strict=True) if one.bits]
    usual = Counter(bits for _, bits in known).most_common(1)[0][0] if known else 0
    action = "save all alike; values of other ranges mean other intensities to a network"
    return [
        Problem(case.id, f"{case.images[0].name} has {bits} bits per value, most have {usual}", action, fatal=False)
        for case, bits in known
        if bits != usual
    ]


def _check_places(dataset: Dataset, findings: Sequence[_Finding]) -> list[Problem]:
    """Return a warning if NIfTI volumes do not say how their axes lie; other formats cannot, or tell it themselves."""
    volumes = [(case, one.placed) for case, one in zip(dataset.training, findings, strict=True) if one.ndim == 3]
    lost = [case for case, placed in volumes if not placed and find_format(case.images[0]).name == "NIfTI"]
    if not lost:
        return []
    problem = (
        f"{len(lost)} of {len(volumes)} cases, first {lost[0].id}, do not say how their axes lie (no sform or qform); "
        "they are taken as running right, forward and up (RAS+), as they are stored"
    )
    return [Problem("dataset", problem, "write the true orientation into the headers (sform)", fatal=False)]


def _check_same(dataset: Dataset, findings: Sequence[_Finding]) -> list[Problem]:
    """Return warnings about images that are there twice, and about cases that look like visits of one patient."""
    problems: list[Problem] = []
    cases = (*dataset.training, *dataset.test)
    first: dict[str, int] = {}
    for number, finding in enumerate(findings):
        earlier = number if finding.digest is None else first.setdefault(finding.digest, number)
        if earlier != number:
            kinds = ["training" if n < len(dataset.training) else "test" for n in (number, earlier)]
            problem = f"the images of this {kinds[0]} case are those of {kinds[1]} case {cases[earlier].id}"
            action = "remove one; the same image on both sides of a split makes scores too good"
            problems.append(Problem(cases[number].id, problem, action, fatal=False))
    visits: dict[str, list[str]] = {}
    for case in dataset.training:
        match = _VISIT.fullmatch(case.id)
        if match and case.group is None:
            visits.setdefault(match[1], []).append(case.id)
    patients = [ids for ids in visits.values() if len(ids) > 1]
    if patients:
        more = f" and {len(patients) - 1} more patients" if len(patients) > 1 else ""
        problem = f"the cases {', '.join(patients[0])} look like visits of one patient{more}"
        action = 'if they are, give the patient in a column "group" of a table of cases, so that no split divides them'
        problems.append(Problem("dataset", problem, action, fatal=False))
    return problems
