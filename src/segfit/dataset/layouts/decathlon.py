"""The layouts of the Medical Segmentation Decathlon and of nnU-Net v1: a ``dataset.json`` that lists its files.

``{"modality": {"0": NAME}, "labels": {"0": "background", "1": NAME}, "training": [{"image": PATH, "label": PATH}],
"test": [PATH]}``, with paths relative to the folder. The Decathlon keeps all channels in one 4D file; nnU-Net v1 lists
``CASE.nii.gz`` and has a file ``CASE_0000.nii.gz`` per channel instead. Keys: http://medicaldecathlon.com and
nnU-Net 1.7, documentation/dataset_conversion.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segfit.dataset.layouts.common import (
    CHANNEL_NUMBER,
    WHOLE,
    channel_problems,
    declared_channels,
    declared_dataset,
    hidden_files,
    is_there,
    label_ending,
    visible_files,
)
from segfit.dataset.layouts.nnunet import compare_sizes
from segfit.dataset.manifest import Case, Dataset, by_number
from segfit.errors import InputError, Problem
from segfit.images.formats import split_ending
from segfit.images.image import absence
from segfit.labels import LabelScheme

__all__ = ["read", "recognises"]

_ENTRY = '{"image": PATH, "label": PATH}'


def recognises(_: Path, declared: Mapping[str, Any]) -> bool:
    """Whether ``dataset.json`` lists the training files, and nothing of nnU-Net v2 is in it."""
    return "training" in declared and not {"file_ending", "dataset"} & set(declared)


def read(root: Path, raw: Mapping[str, Any], problems: list[Problem]) -> Dataset | None:
    """Understand the folder as far as possible; None if labels or modalities are unusable."""
    labels, channels = _labels(raw, problems), declared_channels(raw, problems)
    count = 0 if channels is None else len(channels)
    training = _training(root, raw.get("training"), count, problems)
    test = _test(root, raw.get("test"), count, problems)
    compare_sizes(raw, len(training), problems)
    problems += hidden_files(root / name for name in ("imagesTr", "labelsTr", "imagesTs"))
    ending = label_ending(training, problems)
    return declared_dataset(root, "decathlon", raw, labels, channels, ending, training, test)


def _labels(raw: Mapping[str, Any], problems: list[Problem]) -> LabelScheme | None:
    """Return the meaning of ``{"0": "background", "1": NAME, ...}``; whatever 0 is called, it is background."""
    names = raw.get("labels")
    action = 'declare {"0": "background", "1": NAME, ...}'
    if not isinstance(names, dict) or not all(k.isdecimal() and isinstance(v, str) for k, v in names.items()):
        problems.append(Problem(WHOLE, f'"labels" in dataset.json must map values to names, got {names!r}', action))
        return None
    if "0" not in names:
        problems.append(Problem(WHOLE, '"labels" in dataset.json has no "0", the background', action))
        return None
    declared = {"background": 0} | {name: int(value) for value, name in names.items() if int(value) != 0}
    if len(declared) < len(names):
        problems.append(Problem(WHOLE, 'two values have the same name in "labels" of dataset.json', action))
        return None
    try:
        return LabelScheme.from_declaration(declared)
    except InputError as error:
        problems.append(Problem(WHOLE, f"in dataset.json, {error}", "correct dataset.json"))
        return None


def _training(root: Path, listed: object, channels: int, problems: list[Problem]) -> tuple[Case, ...]:
    cases: dict[str, Case] = {}
    if not isinstance(listed, list) or not listed:
        problems.append(Problem(WHOLE, 'the "training" list in dataset.json is empty or not a list', f"list {_ENTRY}"))
        return ()
    for number, entry in enumerate(listed):
        paths = (entry.get("image"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        if not (isinstance(paths[0], str) and isinstance(paths[1], str)):
            problem = f'entry {number} of "training" in dataset.json is invalid: {entry!r}'
            problems.append(Problem(WHOLE, problem, f"write {_ENTRY}"))
            continue
        image, label = root / paths[0], root / paths[1]
        name, images, wrong = _images(image, channels)
        problems += wrong
        if name in cases:
            problems.append(Problem(name, "is listed twice in dataset.json", "remove one of the entries"))
            continue
        if not is_there(label):
            action = "add it or remove the case from the list"
            problems.append(Problem(name, f"its label {paths[1]} is missing", action))
        if images:
            cases[name] = Case(id=name, channels=images, label=label if is_there(label) else None)
    return tuple(cases.values())


def _test(root: Path, listed: object, channels: int, problems: list[Problem]) -> tuple[Case, ...]:
    """Return the test cases whose images are there; entries are paths, or objects with an image."""
    cases: list[Case] = []
    for entry in listed if isinstance(listed, list) else ():
        path = entry.get("image") if isinstance(entry, dict) else entry
        if not isinstance(path, str):
            continue
        name, images, wrong = _images(root / path, channels)
        problems += [Problem(p.case, f"test case left out: {p.problem}", p.action, fatal=False) for p in wrong]
        if not wrong:
            cases.append(Case(id=name, channels=images))
    return tuple(cases)


def _images(path: Path, channels: int) -> tuple[str, dict[str, Path | None], list[Problem]]:
    """Return case id and image files of a listed path: the file itself, or one file per channel in its place."""
    try:
        name, ending = split_ending(path)
    except InputError as error:
        return path.name, {}, [Problem(path.name, str(error).partition(": ")[2], "correct dataset.json")]
    if is_there(path):
        return name, by_number({0: path}), []
    numbered: dict[int, Path] = {}
    for other in visible_files(path.parent):
        match = CHANNEL_NUMBER.fullmatch(other.name.removesuffix(ending))
        if match and match[1] == name and other.name.endswith(ending):
            numbered[int(match[2])] = other
    if not numbered:
        problem, action = absence(path, "add it or remove the case from the list")
        return name, {}, [Problem(name, f"the listed file {path.parent.name}/{path.name} {problem}", action)]
    return name, by_number(numbered, channels), channel_problems(name, numbered, channels)
