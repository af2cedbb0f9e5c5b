"""The folder layout of nnU-Net v2: ``dataset.json``, ``imagesTr/CASE_0000.END``, ``labelsTr/CASE.END``.

Images may also be DICOM series, in folders ``imagesTr/CASE_0000``: "file_ending" is then "/" or absent, and the labels
have an ending of their own.

Layout and keys: nnU-Net's dataset format (folder names, ``dataset.json``, explicit file lists).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segfit.dataset.layouts.common import (
    CHANNEL_NUMBER,
    WHOLE,
    channel_problems,
    declared_channels,
    declared_dataset,
    declared_labels,
    endings_found,
    grouped,
    hidden_files,
    is_count,
    is_there,
    json_problem,
    visible_files,
)
from segfit.dataset.layouts.names import composed, likely_partners
from segfit.dataset.manifest import Case, Dataset, by_number
from segfit.errors import InputError, Problem, nearest
from segfit.files import read_json
from segfit.images.formats import ENDINGS, FOLDER, described, full_name, known_ending
from segfit.images.image import absence
from segfit.text import count

__all__ = ["compare_sizes", "read", "recognises"]

_EXPECTED = (
    "expected is a folder with dataset.json, imagesTr/CASE_0000.ENDING (one file per channel) and labelsTr/CASE.ENDING"
    ", a folder with images/CASE.ENDING and labels/CASE.ENDING, or a table cases.csv"
)
_OTHER_CHANNEL = re.compile(r"(.+)[. -](\d{4})")
_FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")


def recognises(path: Path, _: Mapping[str, Any]) -> bool:
    """Whether a folder has a ``dataset.json``; asked last, because other layouts have one too."""
    return (path / "dataset.json").exists()


def read(root: Path, declared: Mapping[str, Any], problems: list[Problem]) -> Dataset | None:
    """Understand the folder as far as possible; None if ``dataset.json`` is unusable."""
    raw = declared or _read_declaration(root, problems)  # which tells why there is nothing
    if raw is None:
        return None
    labels, channels = declared_labels(raw, problems), declared_channels(raw, problems)
    ending = _ending(root, raw, problems)
    label_ending = _label_ending(root, raw, ending)
    training: tuple[Case, ...] = ()
    test: tuple[Case, ...] = ()
    if ending is not None:
        if "dataset" in raw:
            training = _listed_cases(root, raw["dataset"], channels, ending, problems)
        else:
            training = _folder_cases(root, channels, ending, label_ending, problems)
        test = _test_cases(root, channels, ending, label_ending, problems)
        compare_sizes(raw, len(training), problems)
    if raw.get("overwrite_image_reader_writer") not in (None, "None"):
        reader = raw["overwrite_image_reader_writer"]
        problem = f"dataset.json asks for the image reader {reader}, which is ignored"
        problems.append(Problem(WHOLE, problem, "convert the images if that reader changes them", fatal=False))
    problems += hidden_files(root / name for name in _FOLDERS)
    known = None if ending is None else label_ending
    return declared_dataset(root, "nnunet-v2", raw, labels, channels, known, training, test)


# ── dataset.json ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_declaration(root: Path, problems: list[Problem]) -> Mapping[str, Any] | None:
    def fail(problem: str, action: str) -> None:
        problems.append(Problem(WHOLE, problem, action))

    if not root.exists():
        fail(f"the folder {root} does not exist", "correct the path")
    elif not root.is_dir():
        fail(f"{root} is a file", "give the folder of the dataset, or a table of cases (.csv, .json)")
    elif not (root / "dataset.json").exists():
        inside = sorted(path.parent.name for path in root.glob("*/dataset.json"))
        action = f"give one of the folders inside that has one: {', '.join(inside[:5])}" if inside else _EXPECTED
        fail(f"{root} holds no dataset.json", action)
    else:
        try:
            raw = read_json(root / "dataset.json")
        except InputError as error:
            problems.append(json_problem(root / "dataset.json", error))
            return None
        if isinstance(raw, dict):
            return raw
        fail('dataset.json must hold an object {"labels": ..., ...}', "correct it in an editor")
    return None


def _ending(root: Path, raw: Mapping[str, Any], problems: list[Problem]) -> str | None:
    """Return the ending of the images: the declared one, or `FOLDER` where they are DICOM series."""
    ending = raw.get("file_ending")
    if ending is None and any(full_name(path).endswith(FOLDER) for path in visible_files(root / "imagesTr")):
        return FOLDER
    known = ", ".join(ENDINGS) + " (DICOM series)"
    action = f'set "file_ending" to the ending of your images; known are {known}'
    if ending is None:
        problems.append(Problem(WHOLE, 'dataset.json has no "file_ending"', action))
        return None
    if not isinstance(ending, str) or ending.lower() not in ENDINGS:
        hint = nearest(ending.lower(), list(ENDINGS)) if isinstance(ending, str) else ""
        problems.append(Problem(WHOLE, f'the "file_ending" {ending!r} in dataset.json is not known{hint}', action))
        return None
    if ENDINGS[ending.lower()].write is None and ending != FOLDER:
        action = "convert the images to .png and export labels as .png from the annotation tool"
        problems.append(Problem(WHOLE, f"{ending} is lossy and changes label values", action))
    return ending


def _label_ending(root: Path, raw: Mapping[str, Any], ending: str | None) -> str:
    """Return the ending of the labels: that of the images; beside DICOM series, what most label files have."""
    if ending != FOLDER:
        return ending or ""
    listed = raw.get("dataset")
    if isinstance(listed, dict):
        names = [str(entry.get("label")) for entry in listed.values() if isinstance(entry, dict)]
    else:
        names = [path.name for path in visible_files(root / "labelsTr")]
    found = Counter(known_ending(name) for name in names if known_ending(name))
    return found.most_common(1)[0][0] if found else ENDINGS[FOLDER].label_ending


def compare_sizes(raw: Mapping[str, Any], count: int, problems: list[Problem]) -> None:
    """Warn if "numTraining" is not the number of training cases that were found."""
    declared = raw.get("numTraining")
    if is_count(declared):
        if declared != count and count:
            problem = f'dataset.json says "numTraining": {declared}, found {count} training cases'
            action = "correct the number (the batch size depends on it) or add the missing cases"
            problems.append(Problem(WHOLE, problem, action, fatal=False))
    else:
        came = "nothing" if declared is None else repr(declared)
        action = f'write "numTraining": {count} into dataset.json'
        problems.append(Problem(WHOLE, f'"numTraining" must be the number of cases, got {came}', action, fatal=False))


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _folder_cases(
    root: Path, channels: tuple[str, ...] | None, ending: str, label_ending: str, problems: list[Problem]
) -> tuple[Case, ...]:
    """Return the cases of imagesTr and labelsTr; every deviation becomes a problem."""
    images, labels = root / "imagesTr", root / "labelsTr"
    missing = [folder for folder in (images, labels) if not folder.is_dir()]
    for folder in missing:
        problems.append(Problem(WHOLE, f"the folder {folder.name} is missing", _EXPECTED))
    if images in missing:
        return ()
    files, nameless = _channel_files(images, ending)
    if not files and not nameless:
        problem = f"imagesTr holds no {described(ending, 'image')}{endings_found(visible_files(images))}"
        problems.append(Problem(WHOLE, problem, 'add images or correct "file_ending"'))
    problems += [_misnamed(path, ending) for path in nameless]
    for folder, wanted in ((images, ending), (labels, label_ending)) if files or nameless else ():
        problems += _other_endings(folder, wanted)
    expected = _expected_files(files, channels, ending)
    known: dict[str, Path] = {}
    for path in visible_files(labels):
        if known.setdefault(composed(path.name), path) is not path:
            problem = f"appears twice in {labels.name} (Unicode NFC and NFD)"
            problems.append(Problem(composed(path.name), problem, "remove one of the two"))
    used = {
        composed(f"{stem}{label_ending}") for stem in (*files, *(_case_meant(_stem(path, ending)) for path in nameless))
    }
    spare = {name[: -len(label_ending)]: name for name in known if name.endswith(label_ending) and name not in used}
    unlabelled = [name for name in files if composed(f"{name}{label_ending}") not in known]
    partners = likely_partners(unlabelled, spare)
    cases: list[Case] = []
    for name, numbered in sorted(files.items()):
        problems += channel_problems(name, numbered, expected)
        wanted = f"{name}{label_ending}"
        label = known.get(composed(wanted))
        if label is None and labels not in missing:
            action = f"add labelsTr/{wanted} or remove the case"
            partner = partners.get(name)
            if partner is not None:
                action = f"rename labelsTr/{known[spare[partner]].name} to {wanted}"
                used.add(spare[partner])
            elif inside := sorted(path for one in numbered.values() for path in one.glob("labels/*") if path.is_dir()):
                action = f"copy {inside[0].relative_to(root)} to labelsTr/{wanted}"
            problems.append(Problem(name, f"its label labelsTr/{wanted} is missing", action))
        cases.append(Case(id=name, channels=by_number(numbered, expected), label=label))
    for label_name in sorted(set(known) - used):
        if label_name.endswith(label_ending):
            name = label_name[: -len(label_ending)]
            problem = f"labelsTr/{label_name} has no image in imagesTr"
            problems.append(Problem(name, problem, "add the image; the label is ignored without it", fatal=False))
    return tuple(cases)


def _misnamed(path: Path, ending: str) -> Problem:
    """Say what is wrong with the name of an image file without a channel number."""
    stem = _stem(path, ending)
    if known_ending(stem):
        return Problem(path.name, "has its ending twice", f"rename it to {stem}")
    if match := _OTHER_CHANNEL.fullmatch(stem):
        right = path.name.replace(stem, f"{match[1]}_{match[2]}", 1)
        return Problem(path.name, "has its channel number behind another sign than _", f"rename it to {right}")
    right = path.name.replace(stem, f"{stem}_0000", 1)
    return Problem(path.name, "has no channel number in its name", f"rename it to {right} (first channel)")


def _case_meant(stem: str) -> str:
    """Return the case of an image whose name has no channel number, or has it behind another sign than _."""
    match = _OTHER_CHANNEL.fullmatch(stem)
    return match[1] if match else stem


def _stem(path: Path, ending: str) -> str:
    return full_name(path)[: -len(ending)]


def _other_endings(folder: Path, ending: str) -> list[Problem]:
    """Return a warning for every image file of a folder that has another ending than the dataset."""
    names = {path: full_name(path) for path in visible_files(folder)}
    wanted = f"does not end in {ending}" if ending != FOLDER else "is not a DICOM series"
    action = "convert it, or remove it if it is not needed"
    return [
        Problem(path.name, f"is in {folder.name} but {wanted}; it is ignored", action, False)
        for path, name in names.items()
        if not name.endswith(ending) and known_ending(name)
    ]


def _test_cases(
    root: Path, channels: tuple[str, ...] | None, ending: str, label_ending: str, problems: list[Problem]
) -> tuple[Case, ...]:
    """Return the complete cases of imagesTs; incomplete ones are left out with a warning."""
    files, _ = _channel_files(root / "imagesTs", ending)
    expected = _expected_files(files, channels, ending)
    cases: list[Case] = []
    for name, numbered in sorted(files.items()):
        wrong = channel_problems(name, numbered, expected)
        problems += [Problem(p.case, f"test case left out: {p.problem}", p.action, fatal=False) for p in wrong]
        label = root / "labelsTs" / f"{name}{label_ending}"
        if not wrong:
            cases.append(Case(id=name, channels=by_number(numbered), label=label if label.exists() else None))
    return tuple(cases)


def _channel_files(folder: Path, ending: str) -> tuple[dict[str, dict[int, Path]], list[Path]]:
    """Return case -> channel number -> file, and the files whose name has no channel number."""
    files = [path for path in visible_files(folder) if full_name(path).endswith(ending)]
    matches = {path: CHANNEL_NUMBER.fullmatch(_stem(path, ending)) for path in files}
    numbered = ((path, match[1], int(match[2])) for path, match in matches.items() if match)
    return grouped(numbered), [path for path, match in matches.items() if not match]


def _expected_files(files: Mapping[str, Mapping[int, Path]], channels: tuple[str, ...] | None, ending: str) -> int:
    """Return how many files a case has: one per channel, or what most cases have if one file can hold several."""
    if channels is not None and not ENDINGS[ending.lower()].multichannel:
        return len(channels)
    return Counter(max(numbered) + 1 for numbered in files.values()).most_common(1)[0][0] if files else 1


def _listed_cases(
    root: Path, listed: object, channels: tuple[str, ...] | None, ending: str, problems: list[Problem]
) -> tuple[Case, ...]:
    """Return the cases of the explicit file list in dataset.json, in its order."""
    form = 'write "dataset": {CASE: {"images": [PATH, ...], "label": PATH}, ...}'
    if not isinstance(listed, dict) or not listed:
        problems.append(Problem(WHOLE, 'the "dataset" list in dataset.json is empty or not an object', form))
        return ()
    cases: list[Case] = []
    for name, entry in listed.items():
        images = entry.get("images") if isinstance(entry, dict) else None
        label = entry.get("label") if isinstance(entry, dict) else None
        right = isinstance(images, list) and images and all(isinstance(p, str) for p in images)
        if not right or not isinstance(label, str):
            problems.append(Problem(name, "its entry in dataset.json is invalid", form))
            continue
        paths = [root / os.path.expandvars(text) for text in (*images, label)]  # type: ignore[misc]
        for path in paths:
            if not is_there(path):
                problem, action = absence(path, "add it or correct its path")
                problems.append(Problem(name, f"the listed file {path} {problem}", action))
        numbered = dict(enumerate(paths[:-1]))
        if channels is not None and not ENDINGS[ending.lower()].multichannel and len(numbered) != len(channels):
            problem = (
                f"lists {count(len(numbered), 'image file')}, dataset.json names {count(len(channels), 'channel')}"
            )
            problems.append(Problem(name, problem, "list one file per channel"))
        files = {str(number): path if is_there(path) else None for number, path in numbered.items()}
        cases.append(Case(id=name, channels=files, label=paths[-1] if is_there(paths[-1]) else None))
    return tuple(cases)
