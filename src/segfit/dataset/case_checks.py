"""What is wrong with one case: what its files hold, alone and beside each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from segfit.dataset.annotation import MergedMasks, count_values, merged_masks
from segfit.dataset.contents import FileHashes
from segfit.dataset.label_grid import on_image_grid, uncropped
from segfit.dataset.label_plausibility import FEWEST_VALUES, label_doubt
from segfit.dataset.likeness import Likeness, likeness
from segfit.dataset.manifest import Case
from segfit.dataset.object_numbers import as_classes, count_areas
from segfit.dataset.outliers import CaseSketch, sketch
from segfit.errors import InputError, Problem
from segfit.geometry import Grid, canonical_map
from segfit.images.formats import check, find_format, read_image, read_label
from segfit.images.image import Image, Remark, problem_of
from segfit.images.image_checks import grid_problems, header_remarks, voxel_problems
from segfit.images.open_files import OpenFiles
from segfit.labels import LabelScheme
from segfit.text import count

__all__ = ["UNDECLARED", "CaseVoxels", "Finding", "Look", "check_case"]

UNDECLARED = "undeclared-values"  # the code of problems with label values that mean nothing

_SAMPLED = {2: 128, 3: 32}  # voxels per axis, at most about twice as many, that images and labels are compared by
_FEWEST_LABELLED = 30  # voxels that two cases hardly have alike by chance (assumption)
_WHITE = 255  # in masks that were saved as black and white
_SHOWN_VALUES, _SHOWN_DECLARED = 8, 64  # label values written out in a message


@dataclass(frozen=True, slots=True)
class Finding:
    """What checking one case found."""

    problems: tuple[Problem, ...]
    spacing_mm: tuple[float, ...] | None  # None: no image could be read
    label_values: frozenset[int] | None  # as stored on disk, or made of objects; None: no label could be read
    digest: str | None  # of all voxels of all channels; None: not all could be read
    remarks: tuple[tuple[Path, Remark], ...] = ()  # files, and what they say beside their voxels
    colours: Mapping[int, str] | None = None  # in which label values are shown, where a palette says so
    bits: int | None = None  # of a value of a picture or TIFF; None for other files and kinds of numbers
    placed: bool = True  # whether the first image says how its axes lie
    sized: bool = True  # whether it, or a table, says how large its voxels are
    areas: int | None = None  # connected ones of its label values, where these may number objects: `count_areas`
    mask_voxels: Mapping[int, int] = field(default_factory=dict)  # as of `MergedMasks`
    lost_voxels: Mapping[tuple[int, int], int] = field(default_factory=dict)  # the same
    likeness: Likeness | None = None  # of the first image, where it has one
    label_digest: tuple[int, ...] | None = None  # of the voxels of the annotation; None: little is labelled
    sketch: CaseSketch | None = None  # None: no label could be read, or it does not fit

    @property
    def ndim(self) -> int | None:
        """Number of axes of the images."""
        return None if self.spacing_mm is None else len(self.spacing_mm)


@dataclass(frozen=True, slots=True, eq=False)
class CaseVoxels:
    """What the files of a case hold, read for its check."""

    case: Case
    images: tuple[Image, ...]
    label: Image  # as stored, or merged masks
    content: str  # hash of the files, see `FileHashes.case`


@dataclass(frozen=True, slots=True)
class Look:
    """What else is done with the voxels of each labelled case without fatal problems, while they are there.

    Parameters
    ----------
    work : may be done by other processes, so it leaves its results in files
    bytes_per_voxel : that it takes
    with_test : also for test cases that have labels
    """

    work: Callable[[CaseVoxels], None]
    bytes_per_voxel: int
    with_test: bool = False


@dataclass(slots=True)
class _Seen:
    """What is known of a case, file by file."""

    case: Case
    problems: list[Problem] = field(default_factory=list)
    remarks: list[tuple[Path, Remark]] = field(default_factory=list)
    grid: Grid | None = None
    channels: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    bits: int | None = None
    likeness: Likeness | None = None
    label_values: frozenset[int] | None = None
    colours: Mapping[int, str] | None = None
    areas: int | None = None
    masks: MergedMasks | None = None
    samples: list[tuple[Path, int, NDArray[Any]]] = field(default_factory=list)  # file, its channel, some voxels
    label_digest: tuple[int, ...] | None = None
    sketch: CaseSketch | None = None
    images: list[Image] = field(default_factory=list)
    label: Image | None = None

    @property
    def readable(self) -> bool:
        """Whether nothing is seriously wrong so far."""
        return not any(problem.fatal for problem in self.problems)

    def told(self, path: Path, image: Image, files: OpenFiles) -> None:
        """Note what a file says beside its voxels."""
        said = [remark for _, remark in self.remarks]
        self.remarks += [(path, remark) for remark in check(path, image, files) if remark not in said]


def check_case(
    case: Case,
    labels: LabelScheme,
    expected: int,
    *,
    complete: bool,
    hashes: FileHashes | None = None,
    looks: Sequence[Look] = (),
) -> Finding:
    """Read the files of a case, each once.

    Parameters
    ----------
    complete : no file is known to be missing
    hashes : told what the files contain
    looks : done with what was read; need `hashes`
    """
    seen = _Seen(case)
    with OpenFiles() if hashes is None else OpenFiles(hashes.take) as files:
        before = "" if hashes is None else hashes.looks(case, files)
        for path in case.images:
            image = _check_image(seen, path, files)
            if looks and case.label_files and image is not None:
                seen.images.append(image)
        whole = complete and seen.readable
        if whole and seen.channels != expected:
            seen.problems.append(_wrong_channels(case, seen.channels, expected, files))
        if case.label_files:
            _check_label(seen, labels, files)
        if hashes is not None:
            with suppress(InputError):  # told by the problems
                content = hashes.case(case, files)
                if hashes.looks(case, files) != before:
                    problem = "its files changed while they were read"
                    seen.problems.append(Problem(case.id, problem, "check again", transient=True))
                if whole and seen.readable and seen.label is not None:
                    for look in looks:
                        look.work(CaseVoxels(case, tuple(seen.images), seen.label, content))
    grid = seen.grid
    return Finding(
        tuple(seen.problems),
        None if grid is None else grid.spacing_mm,
        seen.label_values,
        seen.digest.hexdigest() if whole and case.images else None,
        tuple(seen.remarks),
        seen.colours,
        seen.bits,
        placed=grid is None or grid.affine is not None,
        sized=grid is None or grid.spacing_known,
        areas=seen.areas,
        mask_voxels={} if seen.masks is None else seen.masks.voxels,
        lost_voxels={} if seen.masks is None else seen.masks.lost,
        likeness=seen.likeness,
        label_digest=seen.label_digest,
        sketch=seen.sketch,
    )


def _check_image(seen: _Seen, path: Path, files: OpenFiles) -> Image | None:
    """Read an image file of a case, see whether it fits those before it, and return it if it could be read."""
    case = seen.case
    try:
        image = read_image(path, case.spacing_mm, files)
    except InputError as error:
        seen.problems.append(problem_of(case.id, error, f"correct {path.name}", (path,)))
        return None
    seen.channels += image.array.shape[0]
    seen.digest.update(repr(image.array.shape).encode())
    seen.digest.update(np.ascontiguousarray(image.array).data)
    if case.label_files:
        seen.samples += [(path, number, _sample(channel)) for number, channel in enumerate(image.array)]
    colours = find_format(path).channel_kind is not None
    seen.problems += [replace(item, case=case.id) for item in voxel_problems(image.array, path.name, colours=colours)]
    seen.told(path, image, files)
    if seen.grid is not None:
        seen.problems += _grid_problems(case, path, seen.grid, image.grid)
        return image
    seen.grid = image.grid
    seen.likeness = likeness(image.array) if seen.readable else None
    unsigned = image.array.dtype.kind == "u" and find_format(path).same_depth
    seen.bits = 8 * image.array.dtype.itemsize if unsigned else None
    seen.remarks += [(path, remark) for remark in header_remarks(image.grid)]
    return image


def _check_label(seen: _Seen, labels: LabelScheme, files: OpenFiles) -> None:
    """Read the annotation of a case and see whether it fits its images."""
    case, last = seen.case, seen.case.label_files[-1]
    try:
        seen.masks = merged_masks(case, files) if case.masks else None
        label = read_label(last, case.spacing_mm, files) if seen.masks is None else seen.masks.labels
    except InputError as error:
        seen.problems.append(problem_of(case.id, error, f"correct {last.name}"))
        return
    seen.label = label
    seen.label_values = _stored_values(case, label, labels)
    if not case.numbers_objects and (labels.is_unnamed or seen.label_values - {*labels.stored_values}):
        seen.areas = count_areas(label.array, seen.label_values)
    seen.problems += _check_values(case, last, seen.label_values, labels, label)
    format_ = find_format(last)
    seen.colours = None if format_.palette is None else format_.palette(last, files)
    if format_.checks_labels:
        seen.told(last, label, files)
    if seen.grid is not None:
        seen.problems += _check_label_grid(case, last, seen.grid, label)
    if seen.grid is not None and seen.readable and seen.grid.shape == label.grid.shape:
        channels = [sample for _, _, sample in seen.samples]
        seen.sketch = sketch(channels, _sample(label.array[0]), canonical_map(seen.grid))
    if len(seen.label_values) > 1:
        seen.label_digest = _digest(label.array[0])
        if seen.label_digest is not None:
            seen.problems += _check_swapped(seen, last, label, files)


def _check_swapped(seen: _Seen, path: Path, label: Image, files: OpenFiles) -> list[Problem]:
    """Return a problem if an image has the voxels of its own label map: one was saved in the place of the other."""
    own, case = _sample(label.array[0]), seen.case
    for image, channel, sample in seen.samples:
        if np.array_equal(sample, own):
            voxels = read_image(image, case.spacing_mm, files).array[channel]
            if np.array_equal(voxels, label.array[0]):
                problem = f"the image {image.name} and the label {path.name} hold the same voxels"
                return [Problem(case.id, problem, "put back the one that was replaced by the other")]
    return []


def _sample(array: NDArray[Any]) -> NDArray[Any]:
    """Return a few voxels, spread evenly."""
    most = _SAMPLED[array.ndim]
    return array[tuple(slice(None, None, max(1, n // most)) for n in array.shape)].copy()


def _digest(labels: NDArray[Any]) -> tuple[int, ...] | None:
    """Return numbers that only equal label maps share, whatever their types; None where little is labelled."""
    labelled, checksum = int(np.count_nonzero(labels)), 0
    if labelled < _FEWEST_LABELLED:
        return None
    for part in labels:
        checksum = crc32(np.ascontiguousarray(part, dtype=np.int32).data, checksum)
    return *labels.shape, checksum, labelled, int(labels.sum(dtype=np.int64))


def _stored_values(case: Case, label: Image, labels: LabelScheme) -> frozenset[int]:
    """Return the label values of a case, those that were not declared among them."""
    found = label.array
    if case.numbers_objects:
        found = as_classes(found, labels, boundary=case.label_use == "objects-as-boundary")
    elif not case.masks:
        return frozenset(count_values(found))
    stored = dict(enumerate(labels.stored_values))
    return frozenset(stored.get(value, int(label.array.min())) for value in count_values(found))


def _wrong_channels(case: Case, channels: int, expected: int, files: OpenFiles) -> Problem:
    """Return the problem of a case whose files hold another number of channels than the dataset has."""
    names = ", ".join(path.name for path in case.images)
    action = "declare as many channels as the files have, or correct the files"
    held = ""
    kind = find_format(case.images[0]).channel_kind
    if kind is not None:
        held = f" ({'; '.join(dict.fromkeys(kind(path, files) for path in case.images))})"
        forms = {1: "as greyscale", 3: "as RGB without alpha", 4: "as RGBA"}
        if len(case.images) == 1 and expected in forms:
            action = f"save it {forms[expected]}; if all are like this one, declare as many channels as they have"
    return Problem(case.id, f"{names}: {count(channels, 'channel')}{held}, the dataset has {expected}", action)


def _grid_problems(case: Case, path: Path, expected: Grid, found: Grid) -> list[Problem]:
    return [replace(item, case=case.id) for item in grid_problems(path, expected, found, case.images[0])]


def _check_label_grid(case: Case, path: Path, expected: Grid, label: Image) -> list[Problem]:
    """Compare a label map with its image; what does not fit may be resampled if that was asked for."""
    label = uncropped(label, expected)
    difference, first = expected.mismatch(label.grid), case.images[0]
    problems = _grid_problems(case, path, expected, label.grid)
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
    problem = f"{path.name} does not fit {first.name}: {difference}; its labels are resampled to that image"
    return [Problem(case.id, problem, "check some of them in the report", fatal=False)]


def _check_values(case: Case, path: Path, values: frozenset[int], labels: LabelScheme, label: Image) -> list[Problem]:
    stored = labels.stored_values
    declared = set(stored)
    unknown = sorted(values - declared)
    reason = label_doubt(label.array) if len(values) >= FEWEST_VALUES and not case.masks else ""
    if unknown and reason:
        action = "save a lossless label map: one value per class"
        if _holds_labels(case, declared):
            action = f"swap the two: {case.images[0].name} looks like the label map"
        return [Problem(case.id, f"{path.name} is not a label map ({reason})", action)]
    if reason:
        problem = f"{path.name} may not be a label map ({reason}); all its values are used as classes"
        return [Problem(case.id, problem, "check it; replace it if it is not a label map", fatal=False)]
    if unknown:
        shown, expected = _first(unknown, _SHOWN_VALUES), _first(sorted(declared), _SHOWN_DECLARED)
        problem = f"{path.name} has the undeclared value{'s' * (len(unknown) > 1)} {shown}; declared are {expected}"
        action = 'correct the label or declare the value in "labels"'
        meant = [stored[value] for value in labels.foreground_values]
        if unknown == [_WHITE] and values <= {0, _WHITE} and len(meant) == 1:
            problem = f"{path.name} holds 0 and {_WHITE} where 0 and {meant[0]} are declared"
            action = f'save it with {meant[0]} in place of {_WHITE}; or, if all masks have it, declare it in "labels"'
        return [Problem(case.id, problem, action, code=UNDECLARED)]
    if not values & {stored[value] for value in labels.foreground_values}:
        problem = f"{path.name} is empty: it labels no class"
        return [Problem(case.id, problem, "label the case or remove it unless that is right", fatal=False)]
    return []


def _first(values: Sequence[int], limit: int) -> str:
    return ", ".join(map(str, values[:limit])) + (", ..." if len(values) > limit else "")


def _holds_labels(case: Case, declared: set[int]) -> bool:
    """Return whether the image of a case holds nothing but declared label values, and some of them."""
    try:
        values = frozenset(count_values(read_label(case.images[0]).array)) if len(case.images) == 1 else frozenset()
    except InputError:
        return False
    return len(values) > 1 and values <= declared
