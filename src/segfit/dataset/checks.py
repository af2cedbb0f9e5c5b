"""Everything that is wrong with a dataset, in one table, before anything is computed from it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path

import numpy as np

from segfit.dataset.annotation import LABEL_BYTES_PER_VOXEL
from segfit.dataset.case_checks import UNDECLARED, Finding, Look, check_case
from segfit.dataset.contents import FileHashes
from segfit.dataset.layouts import inspect_dataset, leave_out
from segfit.dataset.layouts.common import MOST_CLASSES
from segfit.dataset.likeness import copies
from segfit.dataset.manifest import Case, Dataset
from segfit.dataset.object_numbers import FEWEST_OBJECTS, object_numbers
from segfit.dataset.outliers import exchanged_classes, odd_scales
from segfit.dataset.palettes import palette_problems
from segfit.errors import DatasetError, Problem
from segfit.execution.execution import LOCAL, Execution
from segfit.execution.workers import LostCaseError
from segfit.images.formats import find_format, num_voxels
from segfit.images.image import Remark
from segfit.labels import LabelScheme
from segfit.options import DatasetOptions
from segfit.text import count, listing, numbers

__all__ = ["COPY", "MIN_CASES", "OBJECTS", "OVERLAP", "check_dataset", "checked_dataset", "require_usable"]

OBJECTS = "object-numbers"  # the code of labels that number objects
OVERLAP = "overlapping-masks"  # the code of masks of classes that overlap

COPY = "copy"  # the code of warnings about a training case whose image is that of another
MIN_CASES = 5  # nnU-Net needs them for its five folds; with fewer, fewer folds are made
_IMAGE_BYTES_PER_VOXEL = 12  # of a channel of 32 bits, that reading and looking at an image takes (measured)
_SPACING_RATIO = 20.0  # to the usual spacing of a dataset: beyond, a unit was mistaken (assumption)
_SCALE_RATIO = 5.0  # the same where all axes are longer, or shorter, at once: cm for mm make 10 (assumption)
_LARGEST_VOXEL_MM = 100.0  # beyond, a unit was mistaken in all cases (assumption)
_SHOWN_CLASSES = 8  # named in a message; more that occur nowhere are told at once
_SHOWN_FILES = 3  # files named in a message; a remark about more is told once
_FEWEST_CASES = 3  # to tell what their labels have in common
_MOST_LOST = 0.1  # share of the voxels of a class that other masks may cover unasked (assumption)
_VISIT = re.compile(r"(.+?)[_-](?:ses|session|visit|v|t|tp|time|timepoint|month|m|scan)[_-]?\d+", re.IGNORECASE)


def check_dataset(
    dataset: Dataset | Path | str,
    *,
    hashes: FileHashes | None = None,
    looks: Sequence[Look] = (),
    execution: Execution = LOCAL,
) -> tuple[Problem, ...]:
    """Return every problem of a dataset, fatal ones and warnings: its structure first, then case by case.

    A path is inspected first, so that a dataset which `open_dataset` refuses is reported together with what its files
    hold. Each image and label file is read once, in parallel; what is wrong with test cases is a warning. A case that
    no worker survives is a problem of that case.

    Parameters
    ----------
    hashes : what is known of the contents of files, and what is found out about them
    looks : what else is done with each case, see `Look`; needs `hashes`
    """
    if not isinstance(dataset, Dataset):
        inspected, problems = inspect_dataset(dataset)
        if inspected is None:
            return problems
        dataset = inspected
    problems = dataset.problems
    incomplete = {problem.case for problem in problems if problem.fatal}
    channels = len(dataset.channel_names)
    work = execution.map(
        partial(_check_item, labels=dataset.labels, channels=channels, looks=looks, training=len(dataset.training)),
        [
            (number, case, case.id not in incomplete, None if hashes is None else hashes.of(case))
            for number, case in enumerate((*dataset.training, *dataset.test))
        ],
        description="Checking cases",
        name=_item_name,
        size=lambda item: _predicted_bytes(item[1], channels, looks),
        lost=_unread,
    )
    findings: list[Finding] = []
    for _, (finding, found) in sorted(work, key=lambda done: done[0][0]):  # in order of their numbers
        findings.append(finding)
        if hashes is not None and found is not None:
            hashes.learn(found)
    training, test = findings[: len(dataset.training)], findings[len(dataset.training) :]
    used = _check_values(dataset, training)
    explained = any(item.fatal for item in used)
    content = [item for finding in training for item in finding.problems if not (explained and item.code == UNDECLARED)]
    content += [
        replace(item, problem=f"test case: {item.problem}", fatal=False)
        for finding in test
        for item in finding.problems
    ]
    whole = (
        *used,
        *_check_overlaps(dataset, training),
        *(() if used else _check_strays(dataset, training)),
        *_check_whole(dataset, training, explained=explained),
        *_check_same(dataset, findings),
        *_told_once(dataset, findings),
    )
    return (*problems, *whole, *content)


def checked_dataset(
    path: Path | str, options: DatasetOptions, *, execution: Execution = LOCAL
) -> tuple[Dataset | None, tuple[Problem, ...]]:
    """Understand a dataset and check it as a run does; return it with every problem.

    None where nothing can be made of it. Cases with fatal problems, which then are warnings, are left out and labels
    taken as the options say.
    """
    dataset, problems = inspect_dataset(path)
    if dataset is None:
        return None, problems
    dataset = dataset.taken(options)
    execution.require_shared([dataset.root])
    problems = check_dataset(dataset, execution=execution)
    if options.skip_incomplete:
        dataset, problems = leave_out(dataset, problems)
    return dataset, problems


def require_usable(problems: Sequence[Problem]) -> None:
    """Raise `DatasetError` with the fatal problems if there are any."""
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        raise DatasetError(fatal)


_Item = tuple[int, Case, bool, FileHashes | None]
"""Number of a case, the case, whether no file of it is known to be missing, and what is known of its files."""


def _item_name(item: _Item) -> str:
    return item[1].id


def _predicted_bytes(case: Case, channels: int, looks: Sequence[Look]) -> int:
    """Return the memory that checking a case takes, about: its channels are read file by file, then its label."""
    if not case.images:
        return sum(num_voxels(path) for path in case.label_files) * LABEL_BYTES_PER_VOXEL + 1
    image = ceil(channels / len(case.images)) * _IMAGE_BYTES_PER_VOXEL
    looked = max((look.bytes_per_voxel for look in looks), default=0)
    label = LABEL_BYTES_PER_VOXEL + looked if case.label_files else 0
    return num_voxels(case.images[0]) * (image + label)


def _unread(item: _Item, error: LostCaseError) -> tuple[Finding, None]:
    problem = f"reading failed: worker {error.reason}, also when run alone"
    largest = max((*item[1].images, *item[1].label_files), key=num_voxels)
    size = f"; the largest is {largest.name} with {num_voxels(largest):.3g} voxels"
    action = "check again with more free memory or on a larger machine, or remove the case"
    return Finding((Problem(item[1].id, problem + size, action, transient=True),), None, None, None), None


def _check_item(
    item: _Item, *, labels: LabelScheme, channels: int, looks: Sequence[Look], training: int
) -> tuple[Finding, FileHashes | None]:
    number, case, complete, hashes = item
    looks = [look for look in looks if number < training or look.with_test]
    return check_case(case, labels, channels, complete=complete, hashes=hashes, looks=looks), hashes


def _told_once(dataset: Dataset, findings: Sequence[Finding]) -> list[Problem]:
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


def _check_whole(dataset: Dataset, findings: Sequence[Finding], *, explained: bool) -> list[Problem]:
    """Return what only shows when all cases are seen together; `explained`: it is known why classes are missing."""
    problems: list[Problem] = []
    amount = len(dataset.training)
    if 0 < amount < MIN_CASES:
        problem = f"{count(amount, 'training case')}, five folds need {MIN_CASES} or more"
        problems.append(Problem("dataset", problem, "add cases; until then fewer folds are made", fatal=False))
    kinds = Counter(finding.ndim for finding in findings if finding.ndim is not None)
    if len(kinds) > 1:
        rare = kinds.most_common()[-1][0]
        cases = [case.id for case, finding in zip(dataset.training, findings, strict=True) if finding.ndim == rare]
        shares = [f"{count(kinds[2], 'case')} {'is' if kinds[2] == 1 else 'are'} 2D", f"{kinds[3]} 3D"]
        problem = f"{' and '.join(shares)} (first {rare}D case: {cases[0]})"
        problems.append(Problem("dataset", problem, "make one dataset of each"))
    problems += _check_spacings(dataset, findings) + _check_places(dataset, findings) + _check_depths(dataset, findings)
    problems += _check_outliers(dataset, findings)
    labelled = [(case, one) for case, one in zip(dataset.training, findings, strict=True) if one.colours]
    problems += palette_problems([(case.id, case.label_files[-1].name, one.colours or {}) for case, one in labelled])
    stored = dataset.labels.stored_values
    seen = [finding.label_values for finding in findings if finding.label_values is not None and not explained]
    used = frozenset[int]().union(*seen)
    absent = [c.name for c in dataset.labels.classes if seen and not any(stored[value] in used for value in c.values)]
    if absent and len(absent) == len(dataset.labels.classes) and len(seen) == amount:
        names = f"{', '.join(absent[:_SHOWN_CLASSES])}{', ...' * (len(absent) > _SHOWN_CLASSES)}"
        problem = f"no label file has any class: {names} occur{'s' * (len(absent) == 1)} nowhere"
        return [*problems, Problem("dataset", problem, 'label some cases or correct the values in "labels"')]
    if len(absent) > _SHOWN_CLASSES:
        problem = f"{len(absent)} classes occur in no label file: {listing(absent, _SHOWN_CLASSES)}"
        return [*problems, Problem("dataset", problem, 'correct their values in "labels" or remove them', fatal=False)]
    for name in absent:
        problem = f'the class "{name}" occurs in no label file'
        problems.append(Problem("dataset", problem, 'correct its value in "labels" or remove it', fatal=False))
    return problems


def _check_values(dataset: Dataset, findings: Sequence[Finding]) -> list[Problem]:
    """Return what is wrong with what label values are taken for: numbers of objects, too many, or of no class."""
    labelled = [
        (case, finding)
        for case, finding in zip(dataset.training, findings, strict=True)
        if finding.label_values is not None and not case.numbers_objects
    ]
    scheme, ways = dataset.labels, "--labels objects-as-foreground (one class) or objects-as-boundary (two, with rims)"
    declared = {*scheme.stored_values}
    strange = any(finding.label_values - declared for _, finding in labelled if finding.label_values is not None)
    owners = Counter(mask.value for case, _ in labelled for mask in case.masks)
    several = [case for case, _ in labelled if len(case.masks) > 1]
    if len(labelled) >= _FEWEST_CASES and several and len(owners) >= FEWEST_OBJECTS and set(owners.values()) == {1}:
        problem = (
            f"every mask has a name of its own ({several[0].id} has {len(several[0].masks)}, such as"
            f" {several[0].masks[0].path.name}), as masks of single objects have"
        )
        action = f"if they are, give {ways}; predictions do not number objects yet"
        return [Problem("dataset", problem, f"{action}; else give masks of a class the same name", code=OBJECTS)]
    if not (strange or scheme.is_unnamed):
        return []
    ignored = {scheme.stored_values[scheme.ignore_value]} if scheme.ignore_value is not None else set()
    values = {case.id: (found.label_values - ignored, found.areas) for case, found in labelled if found.label_values}
    objects = object_numbers(values)
    if objects is not None:
        (few, fewest), (many, most) = objects.fewest, objects.most
        verb = "number" if objects.certain else "may number"
        problem = f"the label files {verb} objects: {fewest} in {few}, {most} in {many}, each one connected area"
        action = f"give {ways}; predictions do not number objects yet"
        if scheme.is_unnamed:
            action += (
                '; if the values are classes, write {"labels": {"background": 0, NAME: VALUE, ...}} into dataset.json'
            )
        elif not objects.certain:
            action += "; if the values are classes, correct or declare them"
        return [Problem("dataset", problem, action, fatal=objects.certain or strange, code=OBJECTS)]
    used = set().union(*(found for found, _ in values.values())) - {0}
    if scheme.is_unnamed and len(used) > MOST_CLASSES:
        problem = f"the label files have {len(used)} different values, too many to be classes"
        return [Problem("dataset", problem, f"use semantic label maps; if the values number objects, give {ways}")]
    meant = {scheme.stored_values[value] for value in scheme.foreground_values} - ignored
    if len(used) == len(meant) and not used & declared:
        found, wanted = (listing([str(value) for value in sorted(one)], len(one)) for one in (used, meant))
        problem = f"the label files hold {found} where {wanted} {'is' if len(meant) == 1 else 'are'} declared"
        action = f'write {found} into "labels" in place of {wanted}, or save the files with {wanted}'
        return [Problem("dataset", problem, action)]
    return []


def _check_overlaps(dataset: Dataset, findings: Sequence[Finding]) -> list[Problem]:
    """Return how much of its masks each class loses to another whose masks lie over it, unless that is wanted."""
    scheme = dataset.labels
    names = {class_.values[0]: class_.name for class_ in scheme.labels if len(class_.values) == 1}
    total, lost = Counter[int](), Counter[tuple[int, int]]()
    worst: dict[tuple[int, int], tuple[float, str]] = {}
    for case, finding in zip(dataset.training, findings, strict=True):
        if case.label_use != "classes":
            continue
        total.update(finding.mask_voxels)
        for pair, number in finding.lost_voxels.items():
            lost[pair] += number
            worst[pair] = max(worst.get(pair, (0.0, "")), (number / finding.mask_voxels[pair[0]], case.id))
    problems: list[Problem] = []
    for (below, above), number in lost.most_common():
        share, (most, case_id) = number / total[below], worst[below, above]
        problem = (
            f'masks of "{names[above]}" cover {count(number, "voxel")} of "{names[below]}"'
            f' ({share:.2%} of all, {most:.0%} in {case_id}), which count as "{names[above]}" alone'
        )
        action = "correct the masks, or the order of the classes, if that is wrong"
        if share > _MOST_LOST:
            action = f"{action}; if it is right, give --labels exclusive (from {_MOST_LOST:.0%} on)"
        problems.append(Problem("dataset", problem, action, fatal=share > _MOST_LOST, code=OVERLAP))
    return problems


def _check_outliers(dataset: Dataset, findings: Sequence[Finding]) -> list[Problem]:
    """Return warnings about cases whose values spread unlike those of all others, or with two classes exchanged."""
    cases, sketches = dataset.training, [one.sketch for one in findings]
    problems: list[Problem] = []
    for number, channel, factor in odd_scales(sketches):
        name = dataset.channel_names[channel] if channel < len(dataset.channel_names) else str(channel)
        times = f"{factor:.3g} times as widely as" if factor > 1 else f"{1 / factor:.3g} times less widely than"
        problem = f"the values of {name} spread {times} is usual in the other cases"
        action = "check the unit of its values (rescaling, bits)"
        problems.append(Problem(cases[number].id, problem, action, fatal=False, code="odd_scale"))
    scheme = dataset.labels
    single = [class_ for class_ in scheme.labels if len(class_.values) == 1]
    names = {scheme.stored_values[class_.values[0]]: f'"{class_.name}"' for class_ in single}
    for number, one, two in exchanged_classes(sketches):
        pair = [names.get(value, f"value {value}") for value in (one, two)]
        problem = f"{pair[0]} lies, and looks, as {pair[1]} does in the other cases, and the other way round"
        action = "exchange the two classes in its label if they are mixed up"
        problems.append(Problem(cases[number].id, problem, action, fatal=False, code="exchanged_classes"))
    return problems


def _check_spacings(dataset: Dataset, findings: Sequence[Finding]) -> list[Problem]:
    """Return warnings about voxels larger than any, and about cases whose size no other case comes near to."""
    known = [(case.id, one.spacing_mm) for case, one in zip(dataset.training, findings, strict=True) if one.spacing_mm]
    if not known or len({len(spacing) for _, spacing in known}) > 1:
        return []
    usual = np.median(np.array([spacing for _, spacing in known]), axis=0)
    shown = numbers(usual)
    action = "correct the voxel size in its header if the unit was mistaken"
    problems: list[Problem] = []
    if any(case.spacing_mm for case in dataset.training):
        action = action.replace("in its header", "in its table or header")
        told = 'add it to the table ("pixel_mm"), or remove the column if sizes do not matter'
        lacking = [case.id for case, one in zip(dataset.training, findings, strict=True) if not one.sized]
        problem = "has no voxel size in the table or its files; other cases have one"
        problems += [Problem(name, problem, told) for name in lacking]
    if usual.max() > _LARGEST_VOXEL_MM:
        problem = f"the median voxel size is {shown} mm, which is implausibly large"
        problems.append(
            Problem("dataset", problem, action.replace("its ", "the ").replace("header", "headers"), fatal=False)
        )
    for name, spacing in known if len(known) > 2 else ():
        ratios = np.array(spacing) / usual
        scale = max(ratios.min(), 1 / ratios.max())  # by which all axes are longer, or shorter, at least
        if scale > _SCALE_RATIO or max(ratios.max(), 1 / ratios.min()) > _SPACING_RATIO:
            problem = f"its voxel size is {numbers(spacing)} mm, the median of the dataset {shown} mm"
            problems.append(Problem(name, problem, action, fatal=False))
    return problems


def _check_depths(dataset: Dataset, findings: Sequence[Finding]) -> list[Problem]:
    """Return a warning for every case whose pictures have more or fewer bits per value than most."""
    known = [(case, one.bits) for case, one in zip(dataset.training, findings, strict=True) if one.bits]
    usual = Counter(bits for _, bits in known).most_common(1)[0][0] if known else 0
    action = "save all with the same bit depth; networks see values as intensities"
    return [
        Problem(case.id, f"{case.images[0].name} has {bits} bits per value, most have {usual}", action, fatal=False)
        for case, bits in known
        if bits != usual
    ]


def _check_places(dataset: Dataset, findings: Sequence[Finding]) -> list[Problem]:
    """Return a warning if volumes do not say how their axes lie, of formats where they usually do."""
    volumes = [(case, one.placed) for case, one in zip(dataset.training, findings, strict=True) if one.ndim == 3]
    lost = [case for case, placed in volumes if not placed and find_format(case.images[0]).oriented]
    if not lost:
        return []
    problem = f"{len(lost)} of {len(volumes)} cases (first {lost[0].id}) have no sform or qform; RAS+ is assumed"
    return [Problem("dataset", problem, "write the true orientation into the headers (sform)", fatal=False)]


def _check_copies(dataset: Dataset, findings: Sequence[Finding]) -> list[Problem]:
    """Return a warning for every case whose image is that of an earlier one, voxel by voxel or as a copy of it."""
    cases, first, same = (*dataset.training, *dataset.test), dict[str, int](), dict[int, tuple[int, bool]]()
    for number, finding in enumerate(findings):
        earlier = number if finding.digest is None else first.setdefault(finding.digest, number)
        if earlier != number:
            same[number] = earlier, True
    likenesses = [None if number in same else finding.likeness for number, finding in enumerate(findings)]
    for earlier, number in copies(likenesses):
        same.setdefault(number, (earlier, False))
    problems: list[Problem] = []
    for number, (earlier, exact) in sorted(same.items()):
        case, other = cases[number], cases[earlier]
        kinds = ["training" if n < len(dataset.training) else "test" for n in (number, earlier)]
        problem = f"the images of this {kinds[0]} case are those of {kinds[1]} case {other.id}"
        action = "remove one; the same image on both sides of a split makes the Dice too high"
        if not exact:
            problem += ", turned, mirrored, cropped or with other intensities"
            action = action.replace("remove one;", "compare the two and remove one if it is a copy;")
        code = COPY if kinds == ["training", "training"] else "copy_in_test"
        problems.append(Problem(case.id, problem, action, fatal=False, code=code, other=other.id))
    return problems


def _check_labels_alike(dataset: Dataset, findings: Sequence[Finding], copied: set[str]) -> list[Problem]:
    """Return a warning for every case whose annotation is that of an earlier one with another image."""
    first: dict[tuple[int, ...], str] = {}
    problems: list[Problem] = []
    for case, finding in zip((*dataset.training, *dataset.test), findings, strict=True):
        other = case.id if finding.label_digest is None else first.setdefault(finding.label_digest, case.id)
        if other != case.id and case.id not in copied:
            problem = f"its label holds the same voxels as that of case {other}, whose image is another"
            action = "put the right label in its place, unless both are labelled alike on purpose"
            problems.append(Problem(case.id, problem, action, fatal=False, code="same_label", other=other))
    return problems


def _check_strays(dataset: Dataset, findings: Sequence[Finding]) -> list[Problem]:
    """Return a warning if values that no file names occur in one case alone: each becomes a class of its own."""
    held = {
        case.id: finding.label_values - {0}
        for case, finding in zip(dataset.training, findings, strict=True)
        if finding.label_values is not None
    }
    if not dataset.labels.is_unnamed or len(held) < MIN_CASES:
        return []
    times = Counter(value for values in held.values() for value in values)
    alone = {name: [value for value in values if times[value] == 1] for name, values in held.items()}
    strays = sorted(value for values in alone.values() for value in values)
    if not strays or len(strays) == len(times) or max(map(len, held.values())) == 1:  # masks are told elsewhere
        return []
    where = listing([name for name, values in alone.items() if values])
    values = listing([str(value) for value in strays])
    problem = f"no class is named, and {values} occur{'s' * (len(strays) == 1)} in a single case each ({where})"
    action = 'correct them if they are mistakes; else name the classes: {"labels": {"background": 0, NAME: VALUE, ...}}'
    return [Problem("dataset", problem, f"{action} in dataset.json", fatal=False, code="stray_values")]


def _check_same(dataset: Dataset, findings: Sequence[Finding]) -> list[Problem]:
    """Return warnings about images that are there twice, and about cases that look like visits of one patient."""
    problems = _check_copies(dataset, findings)
    problems += _check_labels_alike(dataset, findings, {problem.case for problem in problems})
    visits: dict[str, list[str]] = {}
    for case in dataset.training:
        match = _VISIT.fullmatch(case.id)
        if match and case.group is None:
            visits.setdefault(match[1], []).append(case.id)
    patients = [ids for ids in visits.values() if len(ids) > 1]
    if patients:
        more = f" and {len(patients) - 1} more patients" if len(patients) > 1 else ""
        problem = f"the cases {', '.join(patients[0])} look like visits of one patient{more}"
        action = (
            'if they are, name the patient in the column "group" of a table of cases, so that no split divides them'
        )
        problems.append(Problem("dataset", problem, action, fatal=False))
    return problems
