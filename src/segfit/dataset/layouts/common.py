"""What the layouts share: names of files, channels of a case, and what the label files say where nobody declared it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from segfit.dataset.annotation import LABEL_BYTES_PER_VOXEL, count_values
from segfit.dataset.label_plausibility import FEWEST_VALUES, label_doubt
from segfit.dataset.layouts.names import composed
from segfit.dataset.layouts.segments import has_layers, layered_classes, names_of_values
from segfit.dataset.manifest import Case, Dataset
from segfit.errors import InputError, Problem
from segfit.execution.execution import LOCAL
from segfit.files import read_json
from segfit.images.formats import (
    ENDINGS,
    FOLDER,
    described,
    find_format,
    full_name,
    is_image_folder,
    known_ending,
    num_voxels,
    read_image,
    read_label,
    segments_of,
)
from segfit.images.image import FileError, Segment, problem_of
from segfit.images.open_files import OpenFiles
from segfit.labels import LabelScheme
from segfit.text import count as counted

__all__ = [
    "CHANNEL_NUMBER",
    "MOST_CLASSES",
    "WHOLE",
    "channel_problems",
    "declaration_of",
    "declared_channels",
    "declared_dataset",
    "declared_labels",
    "endings_found",
    "found_channels",
    "found_labels",
    "grouped",
    "hidden_files",
    "is_count",
    "is_there",
    "json_problem",
    "label_ending",
    "visible_files",
]

CHANNEL_NUMBER = re.compile(r"(.+)_(\d{4})")
WHOLE = "dataset"  # the `case` of problems of the whole dataset
MOST_CLASSES = 1000  # more distinct values are an image or an instance map, not classes (assumption)
_COLOURS = ("R", "G", "B", "A")
_WHITE = 255  # what drawing programs write where others write 1
_LOOKED_AT = 3  # cases that tell what most are like


def visible_files(folder: Path) -> list[Path]:
    """Return the files of a folder by name, and the folders in it that are images (DICOM series, OME-Zarr).

    Hidden ones (``.DS_Store``, ``._case.nii.gz``) are nobody's images. A folder without slices beside DICOM series is
    taken for one too, and links to nothing are taken for files, so that whoever reads them says what they lack.
    """
    if not folder.is_dir():
        return []
    visible = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    unnamed = [path for path in visible if path.is_dir() and full_name(path).endswith(FOLDER)]
    series = any(is_image_folder(path) for path in unnamed)  # one tells
    return visible if series else [path for path in visible if path not in unnamed]


def is_there(path: Path) -> bool:
    """Whether a listed file or image folder exists; a name that no file can have is not there."""
    try:
        return path.exists()
    except OSError:
        return False


def hidden_files(folders: Iterable[Path]) -> list[Problem]:
    """Return one warning that names the hidden files of some folders, if there are any."""
    found = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.name[0] == "."]
    if not found:
        return []
    shown = ", ".join(f"{path.parent.name}/{path.name}" for path in found[:3]) + (", ..." if len(found) > 3 else "")
    problem = f"{counted(len(found), 'hidden file')}: {shown}"
    return [Problem(WHOLE, problem, "none needed, hidden files are ignored", False)]


def endings_found(paths: Sequence[Path]) -> str:
    """Say which endings some files have, or nothing for no file."""
    counts = Counter(described(known_ending(path)) or path.suffix or path.name for path in paths)
    return f" (found {', '.join(f'{n} {ending}' for ending, n in counts.most_common(3))})" if counts else ""


def is_count(value: object) -> bool:
    """Whether a value of a JSON file is a number of things."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def grouped(files: Iterable[tuple[Path, str, int]]) -> dict[str, dict[int, Path]]:
    """Return case -> channel number -> file of files with the names of their cases and their numbers.

    Accents of names are composed, but two files whose names are then the same stay two cases.
    """
    cases: dict[str, dict[int, Path]] = {}
    first: dict[str, Path] = {}
    for path, name, number in files:
        same = first.setdefault(composed(path.name), path) is not path
        cases.setdefault(name if same else composed(name), {})[number] = path
    return cases


def channel_problems(name: str, numbered: Mapping[int, Path], expected: int) -> list[Problem]:
    """Return what is missing or too much among the channel files of one case."""
    problems: list[Problem] = []
    missing = [number for number in range(expected) if number not in numbered]
    extra = [path.name for number, path in sorted(numbered.items()) if number >= expected]
    if missing:
        files = ", ".join(f"{name}_{number:04d}" for number in missing)
        problem = f"expected {counted(expected, 'channel file')}, missing {files}"
        problems.append(Problem(name, problem, "add the missing file or remove the case"))
    if extra:
        problem = f"expected {counted(expected, 'channel file')}, also found {', '.join(extra)}"
        problems.append(Problem(name, problem, "remove the file or declare its channel in dataset.json"))
    return problems


# ── what is declared ─────────────────────────────────────────────────────────────────────────────────────────────────


def json_problem(path: Path, error: InputError) -> Problem:
    """Return what `read_json` refused in a file of the dataset as one of its problems."""
    problem = error.problem.removeprefix(f"{path.parent}{os.sep}")
    return Problem(WHOLE, problem, error.action if "cannot be read" in problem else "correct it in an editor")


def declaration_of(root: Path) -> Mapping[str, Any]:
    """Return the content of ``dataset.json``; empty if there is none that is legible."""
    path = root / "dataset.json"
    try:
        raw = read_json(path) if path.is_file() else {}
    except InputError:
        return {}
    return raw if isinstance(raw, dict) else {}


def declared_labels(raw: Mapping[str, Any], problems: list[Problem]) -> LabelScheme | None:
    """Return what "labels" of a ``dataset.json`` means; None, with a problem, if it means nothing."""
    labels = raw.get("labels")
    action = 'declare {"background": 0, NAME: VALUE, ...}'
    if labels is None:
        problems.append(Problem(WHOLE, 'dataset.json has no "labels"', action))
        return None
    if isinstance(labels, dict) and labels and all(k.isdecimal() and isinstance(v, str) for k, v in labels.items()):
        action = f"keys and values are swapped; write {action.removeprefix('declare ')}"
        problems.append(Problem(WHOLE, "dataset.json maps label values to names", action))
        return None
    try:
        scheme = LabelScheme.from_declaration(labels, raw.get("regions_class_order"))
    except InputError as error:
        problems.append(Problem(WHOLE, f"in dataset.json, {error.problem}", error.action or "correct dataset.json"))
        return None
    for value, painted in scheme.lost_values():
        problem = (
            f'with this "regions_class_order" predictions turn label {value} into {painted}, which is in other regions'
        )
        problems.append(Problem(WHOLE, problem, _right_order(scheme), fatal=False))
    return scheme


def _right_order(scheme: LabelScheme) -> str:
    """Return what to write so that predictions lose no label."""
    right = scheme.lossless_regions()
    if right is None:
        return "make regions that lie inside each other, or apart"
    names, painted = right
    action = f'write "regions_class_order": {list(painted)}'
    if names != tuple(region.name for region in scheme.classes):
        action = f"declare the regions in the order {', '.join(names)}, and {action}"
    return action


def declared_channels(raw: Mapping[str, Any], problems: list[Problem]) -> tuple[str, ...] | None:
    """Return the channel names in file order, as nnU-Net takes them; numbers out of order are refused."""
    names = raw.get("channel_names", raw.get("modality"))
    action = 'declare "channel_names": {"0": NAME, "1": NAME, ...}'
    if names is None:
        problems.append(Problem(WHOLE, 'dataset.json has no "channel_names"', action))
        return None
    named = isinstance(names, dict) and all(isinstance(name, str) and name.strip() for name in names.values())
    if not named or not names:
        problem = f'"channel_names" in dataset.json must map numbers to names, got {names!r}'
        problems.append(Problem(WHOLE, problem, action))
        return None
    if list(names) != [str(number) for number in range(len(names))]:
        found = ", ".join(names)
        problems.append(Problem(WHOLE, f'"channel_names" must be numbered 0, 1, ... in order, got {found}', action))
        return None
    return tuple(names.values())


def declared_dataset(
    root: Path,
    layout: str,
    raw: Mapping[str, Any],
    labels: LabelScheme | None,
    channels: tuple[str, ...] | None,
    ending: str | None,
    training: tuple[Case, ...],
    test: tuple[Case, ...],
) -> Dataset | None:
    """Return the dataset of a folder whose ``dataset.json`` is `raw`; None where one of its parts means nothing.

    `ending` is that of the labels.
    """
    if labels is None or channels is None or ending is None:
        return None
    declared = raw.get("numTraining")
    return Dataset(
        name=root.name,
        root=root,
        layout=layout,
        channel_names=channels,
        labels=labels,
        file_ending=ending,
        num_training=declared if is_count(declared) else len(training),
        training=training,
        test=test,
    )


# ── what the files say where nothing is declared ─────────────────────────────────────────────────────────────────────


def found_labels(cases: Sequence[Case], problems: list[Problem]) -> LabelScheme | None:
    """Return a scheme with a class for every value V in the label files of some cases: as they name it, or "label V".

    Of more than `MOST_CLASSES` values those next to 0 have one.

    Every file is read; those that cannot be read say nothing here, the check tells.
    """
    labelled = {case.label: case for case in cases if case.label is not None}
    values, faults = {0}, dict[str, Problem]()
    segments: dict[Path, tuple[Segment, ...]] = {}
    binary: dict[int, list[str]] = {1: [], _WHITE: []}  # the files that hold one of these beside 0 and nothing else
    for path, (found, fault, named) in LOCAL.map(
        _values_of,
        labelled,
        description="Reading labels",
        name=lambda path: path.name,
        size=lambda path: num_voxels(path) * LABEL_BYTES_PER_VOXEL,
        lost=lambda *_: (frozenset(), None, ()),
    ):
        values |= found
        segments[path] = named
        for value in found - {0} if len(found - {0}) == 1 else ():
            binary.get(value, []).append(path.name)
        if fault is not None:
            faults[labelled[path].id] = problem_of(labelled[path].id, fault, f"correct {path.name}")
    segments = {path: segments[path] for path in labelled}  # in the order of the cases
    if any(map(has_layers, segments.values())):
        names, wrong = layered_classes(segments, labelled)
        problems += [*wrong, *(faults[name] for name in sorted(faults))]
        return _scheme(names, problems)
    if values == {0}:
        if labelled and not faults:
            problems.append(Problem(WHOLE, "no label file has a value other than 0", "label at least one class"))
        problems += [faults[name] for name in sorted(faults)]
        if faults and _images_are_labels(list(labelled.values())):
            problem = "the images look like label maps and the labels like images"
            problems.append(Problem(WHOLE, problem, "swap the folders, or the columns of the table"))
        return None
    if values == {0, 1, _WHITE} and binary[1] and binary[_WHITE]:
        one, white = (f"{len(files)} of the label files ({min(files)})" for files in binary.values())
        problem = f"{one} have the values 0 and 1, {white} 0 and {_WHITE}; they are used as two classes"
        problems.append(Problem(WHOLE, problem, "use one value if they mean the same class", fatal=False))
    kept = sorted(values - {0}, key=abs)[:MOST_CLASSES]  # the check tells if that is not all
    names, wrong = names_of_values(kept, segments, labelled)
    problems += wrong
    return _scheme(names, problems)


def _scheme(names: Mapping[str, int], problems: list[Problem]) -> LabelScheme | None:
    declare = 'name the classes: write {"labels": {"background": 0, NAME: VALUE, ...}} into dataset.json beside them'
    try:
        return LabelScheme.from_declaration({"background": 0, **names})
    except InputError as error:
        problems.append(Problem(WHOLE, f"in the label files, {error}", declare))
        return None


def _values_of(path: Path) -> tuple[frozenset[int], InputError | None, tuple[Segment, ...]]:
    """Return the values of a label file, or what is wrong with it: unreadable, or no label map; and what it names."""
    try:
        with OpenFiles() as files:
            named = segments_of(path, files)
            if has_layers(named):
                return frozenset(), None, named
            label = read_label(path, None, files)
    except InputError as error:
        return frozenset(), error, ()
    values = frozenset(count_values(label.array))
    reason = label_doubt(label.array) if len(values) >= FEWEST_VALUES else ""
    if not reason:
        return values, None, named
    action = "save a lossless label map: one value per class"
    return frozenset(), FileError(path, f"is not a label map ({reason})", action), ()


def _images_are_labels(cases: Sequence[Case]) -> bool:
    """Return whether the first images hold as few different values as label maps do, and more than one."""
    for case in cases[:_LOOKED_AT]:
        try:
            found = frozenset(count_values(read_label(case.images[0]).array)) if len(case.images) == 1 else frozenset()
        except InputError:
            return False
        if not 1 < len(found) < FEWEST_VALUES:
            return False
    return bool(cases)


def found_channels(cases: Sequence[Case]) -> tuple[str, ...]:
    """Return channel names from the first case that can be read: "image", or R, G, B of colour pictures.

    Of pictures the first three are asked, so that a grey one among colours does not speak for all.
    """
    counts: list[tuple[int, bool]] = []
    for case in cases:
        try:
            count = sum(read_image(path).array.shape[0] for path in case.images)
            picture = len(case.images) == 1 and find_format(case.images[0]).channel_kind is not None
        except InputError:
            continue
        counts.append((count, picture))
        if not picture or len(counts) == _LOOKED_AT:
            break
    if not counts:
        return ("image",)
    (count, picture), _ = Counter(counts).most_common(1)[0]
    if count == 1:
        return ("image",)
    if picture and count <= len(_COLOURS):
        return _COLOURS[:count]
    return tuple(f"channel {number}" for number in range(count))


def label_ending(cases: Sequence[Case], problems: list[Problem]) -> str | None:
    """Return the ending that most label files have; None, with a problem, if there is none or it is lossy."""
    counts = Counter(known_ending(path) for case in cases for path in case.label_files)
    if not counts:
        return None
    ending = counts.most_common(1)[0][0]
    format_ = ENDINGS[ending.lower()]
    if format_.write is None:
        problem = f"labels cannot be {format_.name}, {format_.unfit}"
        problems.append(Problem(WHOLE, problem, format_.remedy))
    return ending
