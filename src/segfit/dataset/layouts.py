"""From files to cases: the nnU-Net folder layout for training, and files or folders to predict.

Nothing is opened here but ``dataset.json``; what the image files hold is looked at by `segfit.dataset.checks`.
Layout and keys: the reference's dataset format (folder names, ``dataset.json``, explicit file lists).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segfit.dataset.manifest import Case, Dataset
from segfit.errors import DatasetError, InputError, Problem, nearest
from segfit.files import read_json
from segfit.images.formats import ENDINGS, is_image_folder, split_ending
from segfit.labels import LabelScheme

__all__ = ["cases_from_files", "find_cases", "inspect_dataset", "open_dataset"]

_LAYOUT = "nnunet-v2"
_EXPECTED = (
    "expected is a folder with dataset.json, imagesTr/CASE_0000.ENDING (one file per channel) and labelsTr/CASE.ENDING"
)
_CHANNEL_NUMBER = re.compile(r"(.+)_(\d{4})")
_WHOLE = "dataset"  # the `case` of problems of the whole dataset


def open_dataset(path: Path | str) -> Dataset:
    """Understand a dataset folder; raise `DatasetError` with every fatal problem of its structure at once."""
    dataset, problems = inspect_dataset(path)
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        raise DatasetError(fatal)
    assert dataset is not None
    return dataset


def inspect_dataset(path: Path | str) -> tuple[Dataset | None, tuple[Problem, ...]]:
    """Understand a dataset folder as far as possible, without raising.

    Returns the dataset, or None if ``dataset.json`` is unusable, and all problems of its structure. Incomplete cases
    are in the dataset with the files they have, so that a check can look into those too.
    """
    root = Path(path).expanduser().absolute()
    problems: list[Problem] = []
    raw = _read_declaration(root, problems)
    if raw is None:
        return None, tuple(problems)
    labels, channels, ending = _labels(raw, problems), _channels(raw, problems), _ending(raw, problems)
    training: tuple[Case, ...] = ()
    test: tuple[Case, ...] = ()
    if ending is not None:
        if "dataset" in raw:
            training = _listed_cases(root, raw["dataset"], channels, ending, problems)
        else:
            training = _folder_cases(root, channels, ending, problems)
        test = _test_cases(root, channels, ending, problems)
        _compare_sizes(raw, training, problems)
    if raw.get("overwrite_image_reader_writer") not in (None, "None"):
        reader = raw["overwrite_image_reader_writer"]
        action = "nothing, or convert the images if that reader did more than read"
        problems.append(
            Problem(_WHOLE, f"dataset.json asks for the image reader {reader}, not used here", action, False)
        )
    if labels is None or channels is None or ending is None:
        return None, tuple(problems)
    declared = raw.get("numTraining")
    dataset = Dataset(
        name=root.name,
        root=root,
        layout=_LAYOUT,
        channel_names=channels,
        labels=labels,
        file_ending=ending,
        num_training=declared if _is_count(declared) else len(training),
        training=training,
        test=test,
    )
    return dataset, tuple(problems)


def find_cases(folder: Path | str, ending: str, channels: int) -> tuple[Case, ...]:
    """Return the cases of a folder to predict, in order of their ids; nothing is required to have a label.

    Files are ``CASE_0000.ENDING``, one per channel; with one channel, or where one file holds all channels (colour
    pictures, 4D volumes), ``CASE.ENDING`` is accepted too. Raises `InputError` if there is nothing to predict, and
    `DatasetError` with all incomplete cases.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder that holds the images")
    visible = _visible_files(folder)
    files = [path for path in visible if path.name.endswith(ending)]
    if not files:
        raise InputError(f"{folder} holds no {ending} image{_endings_found(visible)}; the model reads {ending} files")
    return cases_from_files(files, channels)


def cases_from_files(paths: Iterable[Path | str], channels: int) -> tuple[Case, ...]:
    """Group image files into cases by their names, in order of the ids; rules and errors as in `find_cases`.

    A number behind the last underscore counts as a channel only if it is below `channels`, so that ``scan_2021.png``
    keeps its name where one channel is expected.
    """
    groups: dict[tuple[Path, str], _Group] = {}
    problems: list[Problem] = []
    for path in map(Path, paths):
        stem, ending = split_ending(path)
        match = _CHANNEL_NUMBER.fullmatch(stem)
        numbered = match is not None and int(match[2]) < channels
        name, number = (match[1], int(match[2])) if match and numbered else (stem, 0)
        holds_all = not numbered or ENDINGS[ending.lower()].multichannel
        group = groups.setdefault((path.parent, name), _Group(holds_all and channels > 1))
        if number in group.files:
            other = group.files[number].name
            problems.append(Problem(name, f"{path.name} and {other} are the same channel", "remove one of them"))
        group.files.setdefault(number, path)
    seen: dict[str, Path] = {}
    for (folder, name), group in sorted(groups.items(), key=lambda item: item[0][1]):
        problems += _channel_problems(name, group.files, 1 if group.complete else channels)
        if name in seen:
            problems.append(Problem(name, f"is both in {seen[name]} and {folder}", "give every case a name of its own"))
        seen[name] = folder
    if problems:
        raise DatasetError(problems)
    return tuple(
        Case(id=name, images=tuple(path for _, path in sorted(group.files.items())))
        for (_, name), group in sorted(groups.items(), key=lambda item: item[0][1])
    )


@dataclass(slots=True)
class _Group:
    """Channel files of one case while they are collected."""

    holds_all: bool = False  # whether a single file may hold all channels
    files: dict[int, Path] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether the single file there is may hold all channels."""
        return self.holds_all and set(self.files) == {0}


# ── dataset.json ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_declaration(root: Path, problems: list[Problem]) -> Mapping[str, Any] | None:
    def fail(problem: str, action: str) -> None:
        problems.append(Problem(_WHOLE, problem, action))

    if not root.exists():
        fail(f"the folder {root} does not exist", "correct the path")
    elif not root.is_dir():
        fail(f"{root} is a file", "give the folder that holds dataset.json")
    elif not (root / "dataset.json").is_file():
        inside = sorted(path.parent.name for path in root.glob("*/dataset.json"))
        action = f"give one of the folders inside that has one: {', '.join(inside[:5])}" if inside else _EXPECTED
        fail(f"{root} holds no dataset.json", action)
    else:
        try:
            raw = read_json(root / "dataset.json")
        except InputError as error:
            fail(str(error).partition("; ")[0], "correct it in an editor")
            return None
        if isinstance(raw, dict):
            return raw
        fail('dataset.json must hold an object {"labels": ..., ...}', "correct it in an editor")
    return None


def _labels(raw: Mapping[str, Any], problems: list[Problem]) -> LabelScheme | None:
    labels = raw.get("labels")
    action = 'declare {"background": 0, NAME: VALUE, ...}'
    if labels is None:
        problems.append(Problem(_WHOLE, 'dataset.json has no "labels"', action))
        return None
    if isinstance(labels, dict) and labels and all(k.isdigit() and isinstance(v, str) for k, v in labels.items()):
        problems.append(Problem(_WHOLE, "dataset.json maps label values to names", f"turn it round: {action}"))
        return None
    try:
        return LabelScheme.from_declaration(labels, raw.get("regions_class_order"))
    except InputError as error:
        problems.append(Problem(_WHOLE, f"in dataset.json, {error}", "correct dataset.json"))
        return None


def _channels(raw: Mapping[str, Any], problems: list[Problem]) -> tuple[str, ...] | None:
    """Return the channel names in file order, as the reference takes them; numbers out of order are refused."""
    names = raw.get("channel_names", raw.get("modality"))
    action = 'declare "channel_names": {"0": NAME, "1": NAME, ...}'
    if names is None:
        problems.append(Problem(_WHOLE, 'dataset.json has no "channel_names"', action))
        return None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        problems.append(
            Problem(_WHOLE, f'"channel_names" in dataset.json must map numbers to names, got {names!r}', action)
        )
        return None
    if list(names) != [str(number) for number in range(len(names))]:
        found = ", ".join(names)
        problems.append(Problem(_WHOLE, f'"channel_names" must be numbered 0, 1, ... in order, got {found}', action))
        return None
    return tuple(names.values())


def _ending(raw: Mapping[str, Any], problems: list[Problem]) -> str | None:
    ending = raw.get("file_ending")
    known = ", ".join(ENDINGS)
    action = f'set "file_ending" to the ending of your images; known are {known}'
    if ending is None:
        problems.append(Problem(_WHOLE, 'dataset.json has no "file_ending"', action))
        return None
    if not isinstance(ending, str) or ending.lower() not in ENDINGS:
        hint = nearest(ending.lower(), list(ENDINGS)) if isinstance(ending, str) else ""
        problems.append(Problem(_WHOLE, f'the "file_ending" {ending!r} in dataset.json is not known{hint}', action))
        return None
    if ENDINGS[ending.lower()].write is None:
        problems.append(
            Problem(_WHOLE, f"{ending} changes label values when it is saved", "convert images and labels to .png")
        )
    return ending


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _compare_sizes(raw: Mapping[str, Any], training: Sequence[Case], problems: list[Problem]) -> None:
    declared = raw.get("numTraining")
    if _is_count(declared):
        if declared != len(training) and training:
            problem = f'dataset.json says "numTraining": {declared}, found {len(training)} training cases'
            action = "correct the number (the largest batch size depends on it) or add the missing cases"
            problems.append(Problem(_WHOLE, problem, action, fatal=False))
    else:
        came = "nothing" if declared is None else repr(declared)
        action = f'write "numTraining": {len(training)} into dataset.json'
        problems.append(Problem(_WHOLE, f'"numTraining" must be the number of cases, got {came}', action, fatal=False))


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _visible_files(folder: Path) -> list[Path]:
    """Return the files and image folders of a folder by name.

    Hidden ones (``.DS_Store``, ``._case.nii.gz``) are nobody's images.
    """
    if not folder.is_dir():
        return []
    visible = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in visible if path.is_file() or is_image_folder(path))


def _endings_found(paths: Sequence[Path]) -> str:
    """Say which endings a folder has, or nothing for an empty one."""
    counts: Counter[str] = Counter()
    for path in paths:
        try:
            counts[split_ending(path)[1]] += 1
        except InputError:
            counts[path.suffix or path.name] += 1
    return f" (found {', '.join(f'{n} {ending}' for ending, n in counts.most_common(3))})" if counts else ""


def _folder_cases(
    root: Path, channels: tuple[str, ...] | None, ending: str, problems: list[Problem]
) -> tuple[Case, ...]:
    """Return the cases of imagesTr and labelsTr; every deviation becomes a problem."""
    images, labels = root / "imagesTr", root / "labelsTr"
    missing = [folder for folder in (images, labels) if not folder.is_dir()]
    for folder in missing:
        problems.append(Problem(_WHOLE, f"the folder {folder.name} is missing", _EXPECTED))
    if images in missing:
        return ()
    files, nameless = _channel_files(images, ending)
    if not files and not nameless:
        found = _endings_found(_visible_files(images))
        problems.append(
            Problem(_WHOLE, f"imagesTr holds no {ending} image{found}", 'add images or correct "file_ending"')
        )
    for path in nameless:
        stem = path.name[: -len(ending)]
        problems.append(
            Problem(path.name, "has no channel number in its name", f"rename it to {stem}_0000{ending} (first channel)")
        )
    expected = _expected_files(files, channels, ending)
    known = {path.name for path in _visible_files(labels)}
    cases: list[Case] = []
    for name, numbered in sorted(files.items()):
        problems += _channel_problems(name, numbered, expected)
        label = labels / f"{name}{ending}"
        if label.name not in known and labels not in missing:
            numbered_label = f"{name}_0000{ending}"
            action = f"add labelsTr/{label.name} or remove the case"
            if numbered_label in known:
                action = f"rename labelsTr/{numbered_label} to {label.name}"
            problems.append(Problem(name, f"its label labelsTr/{label.name} is missing", action))
        cases.append(_case(name, numbered, label if label.name in known else None))
    used = {f"{name}{suffix}{ending}" for name in files for suffix in ("", "_0000")}
    for label_name in sorted(known - used):
        if label_name.endswith(ending) and not any(label_name == path.name for path in nameless):
            name = label_name[: -len(ending)]
            problem = f"labelsTr/{label_name} has no image in imagesTr"
            problems.append(Problem(name, problem, "add the image; without it the label is not used", fatal=False))
    return tuple(cases)


def _test_cases(root: Path, channels: tuple[str, ...] | None, ending: str, problems: list[Problem]) -> tuple[Case, ...]:
    """Return the complete cases of imagesTs; incomplete ones are left out with a warning."""
    files, _ = _channel_files(root / "imagesTs", ending)
    expected = _expected_files(files, channels, ending)
    cases: list[Case] = []
    for name, numbered in sorted(files.items()):
        wrong = _channel_problems(name, numbered, expected)
        problems += [
            Problem(item.case, f"test case left out: {item.problem}", item.action, fatal=False) for item in wrong
        ]
        label = root / "labelsTs" / f"{name}{ending}"
        if not wrong:
            cases.append(_case(name, numbered, label if label.is_file() else None))
    return tuple(cases)


def _channel_files(folder: Path, ending: str) -> tuple[dict[str, dict[int, Path]], list[Path]]:
    """Return case -> channel number -> file, and the files whose name has no channel number."""
    cases: dict[str, dict[int, Path]] = {}
    nameless: list[Path] = []
    for path in _visible_files(folder):
        if not path.name.endswith(ending):
            continue
        match = _CHANNEL_NUMBER.fullmatch(path.name[: -len(ending)])
        if match:
            cases.setdefault(match[1], {})[int(match[2])] = path
        else:
            nameless.append(path)
    return cases, nameless


def _expected_files(files: Mapping[str, Mapping[int, Path]], channels: tuple[str, ...] | None, ending: str) -> int:
    """Return how many files a case has: one per channel, or what most cases have if one file can hold several."""
    if channels is not None and not ENDINGS[ending.lower()].multichannel:
        return len(channels)
    return Counter(max(numbered) + 1 for numbered in files.values()).most_common(1)[0][0] if files else 1


def _channel_problems(name: str, numbered: Mapping[int, Path], expected: int) -> list[Problem]:
    """Return what is missing or too much among the channel files of one case."""
    problems: list[Problem] = []
    missing = [number for number in range(expected) if number not in numbered]
    extra = [path.name for number, path in sorted(numbered.items()) if number >= expected]
    if missing:
        files = ", ".join(f"{name}_{number:04d}" for number in missing)
        count = f"{expected} channel file" + "s" * (expected > 1)
        problems.append(Problem(name, f"expected {count}, missing {files}", "add the missing file or remove the case"))
    if extra:
        action = "remove the file or declare its channel in dataset.json"
        count = f"{expected} channel file" + "s" * (expected > 1)
        problems.append(Problem(name, f"expected {count}, found also {', '.join(extra)}", action))
    return problems


def _case(name: str, numbered: Mapping[int, Path], label: Path | None) -> Case:
    return Case(id=name, images=tuple(path for _, path in sorted(numbered.items())), label=label)


def _listed_cases(
    root: Path, listed: object, channels: tuple[str, ...] | None, ending: str, problems: list[Problem]
) -> tuple[Case, ...]:
    """Return the cases of the explicit file list in dataset.json, in its order."""
    form = 'write "dataset": {CASE: {"images": [PATH, ...], "label": PATH}, ...}'
    if not isinstance(listed, dict) or not listed:
        problems.append(Problem(_WHOLE, 'the "dataset" list in dataset.json is empty or not an object', form))
        return ()
    cases: list[Case] = []
    for name, entry in listed.items():
        images = entry.get("images") if isinstance(entry, dict) else None
        label = entry.get("label") if isinstance(entry, dict) else None
        right = isinstance(images, list) and images and all(isinstance(p, str) for p in images)
        if not right or not isinstance(label, str) or name != Path(name).name:
            problems.append(Problem(name, "its entry in dataset.json is not understood", form))
            continue
        paths = [_resolve(root, text) for text in (*images, label)]  # type: ignore[misc]
        for path in paths:
            if not path.is_file():
                problems.append(Problem(name, f"the listed file {path} is missing", "add it or correct its path"))
        numbered = dict(enumerate(paths[:-1]))
        if channels is not None and not ENDINGS[ending.lower()].multichannel and len(numbered) != len(channels):
            problem = f"lists {len(numbered)} image files, dataset.json names {len(channels)} channels"
            problems.append(Problem(name, problem, "list one file per channel"))
        present = {number: path for number, path in numbered.items() if path.is_file()}
        cases.append(_case(name, present, paths[-1] if paths[-1].is_file() else None))
    return tuple(cases)


def _resolve(root: Path, text: str) -> Path:
    """Return a listed path: variables expanded as the format allows, relative to the dataset's folder."""
    return root / os.path.expandvars(text)
