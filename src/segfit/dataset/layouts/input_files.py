"""Files and folders to predict: cases from file names alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from segfit.dataset.layouts.common import CHANNEL_NUMBER, channel_problems, endings_found, visible_files
from segfit.dataset.layouts.names import composed
from segfit.dataset.layouts.table import spacings_of
from segfit.dataset.manifest import Case, by_number
from segfit.errors import DatasetError, InputError, Problem, warning
from segfit.images.formats import ENDINGS, described, is_image_folder, known_ending, split_ending
from segfit.progress import LOGGED, Progress
from segfit.text import count, listing

__all__ = ["cases_from_files", "find_cases"]

_SHOWN = 4  # names written out in a message


def find_cases(folder: Path | str, ending: str, channels: int, *, progress: Progress = LOGGED) -> tuple[Case, ...]:
    """Return the cases of a folder to predict, in order of their ids; nothing is required to have a label.

    Files are ``CASE_0000.ENDING``, one per channel; with one channel, or where one file holds all channels (colour
    pictures, 4D volumes), ``CASE.ENDING`` is accepted too. Other endings of the same format (``.nii`` for ``.nii.gz``)
    are as good, unless the same name is there with both. Where no file is of the format, the folders inside that are
    images (DICOM series, OME-Zarr) are taken, then the files if all images are of one other format; a folder that is
    itself an image is the only case. Images that are not taken and another format are told to `progress`. Voxel sizes
    of files that do not say theirs come from a table ``cases.csv`` beside them or in the folder above. Raises
    `InputError` if there is nothing to predict, and `DatasetError` with all incomplete cases or the faults of the
    table.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", "give the folder that holds the images")
    if is_image_folder(folder, nested=False):
        return cases_from_files([folder], channels)
    visible = visible_files(folder)
    files = _of_format(visible, ending) or [path for path in visible if path.is_dir()]
    if not files:
        files = _of_one_format(visible)
        if files:
            found, wanted = described(known_ending(files[0]), "files"), described(ending, "files")
            problem = f"{folder} holds {found}, the model was made from {wanted}; their values must mean the same"
            progress.warn(warning("other_format", problem, file=folder))
    if not files:
        raise InputError(
            f"{folder} has no {described(ending, 'image')}{endings_found(visible)}",
            f"the model reads {described(ending, 'files')} from a folder, or files of one other format; "
            "list others one by one",
        )
    others = [path.name for path in visible if known_ending(path) and path not in files]
    if others:
        problem = (
            f"{folder}: {listing(others, _SHOWN)} will not be predicted: other images there are {described(ending)}"
        )
        progress.warn(warning("not_predicted", problem, "give them one by one if they are meant", file=folder))
    return cases_from_files(files, channels)


def _of_format(paths: Sequence[Path], ending: str) -> list[Path]:
    """Return the files of the format of an ending; of two of one name the one that has the very ending."""
    known = {path: known_ending(path) for path in paths}
    exact = {split_ending(path)[0] for path in paths if known[path] == ending}
    alike = [path for path in paths if known[path] and ENDINGS[known[path].lower()] is ENDINGS.get(ending.lower())]
    return [path for path in alike if known[path] == ending or split_ending(path)[0] not in exact]


def _of_one_format(paths: Sequence[Path]) -> list[Path]:
    """Return the images if all are of one format, else none; see `_of_format`."""
    endings = Counter(ending for path in paths if (ending := known_ending(path)))
    formats = {ENDINGS[ending.lower()].name for ending in endings}
    return _of_format(paths, endings.most_common(1)[0][0]) if len(formats) == 1 else []


def cases_from_files(paths: Iterable[Path | str], channels: int) -> tuple[Case, ...]:
    """Group image files into cases by their names, in order of the ids; rules and errors as in `find_cases`.

    A number behind the last underscore counts as a channel only if it is below `channels`, so that ``scan_2021.png``
    keeps its name where one channel is expected.
    """
    groups: dict[tuple[Path, str], _Group] = {}
    problems: list[Problem] = []
    for path in map(Path, paths):
        path = path if path.name.strip(".") else path.resolve()  # "." and ".." have names too
        stem, ending = split_ending(path)
        match = CHANNEL_NUMBER.fullmatch(stem)
        numbered = match is not None and int(match[2]) < channels
        name, number = (match[1], int(match[2])) if match and numbered else (stem, 0)
        holds_all = not numbered or ENDINGS[ending.lower()].multichannel
        group = groups.setdefault((path.parent, name), _Group(holds_all and channels > 1))
        if number in group.files:
            other = group.files[number].name
            problems.append(Problem(name, f"{path.name} and {other} are the same channel", "remove one of them"))
        group.files.setdefault(number, path)
    problems += _surplus_channels(groups, channels)
    seen: dict[str, Path] = {}
    for (folder, name), group in sorted(groups.items(), key=lambda item: item[0][1]):
        problems += channel_problems(name, group.files, 1 if group.complete else channels)
        if name in seen:
            problems.append(Problem(name, f"is both in {seen[name]} and {folder}", "give every case its own name"))
        seen[name] = folder
    if problems:
        raise DatasetError(problems)
    spacings = {folder: spacings_of(folder) for folder in {folder for folder, _ in groups}}
    return tuple(
        Case(
            id=name,
            channels=by_number(group.files),
            spacing_mm=spacings[folder].get(composed(name)),
        )
        for (folder, name), group in sorted(groups.items(), key=lambda item: item[0][1])
    )


def _surplus_channels(groups: Mapping[tuple[Path, str], _Group], channels: int) -> list[Problem]:
    """Return a problem for every file that was taken for a case and is numbered as one channel more of another."""
    problems: list[Problem] = []
    for (folder, name), group in groups.items():
        match = CHANNEL_NUMBER.fullmatch(name)
        first = groups.get((folder, match[1])) if match else None
        if match and first and 0 in first.files and split_ending(first.files[0])[0] != match[1]:
            problem = f"{group.files[0].name} is one more channel of it, but the model takes {channels}"
            action = f"give images of {count(channels, 'channel')}, or remove the number from its name"
            problems.append(Problem(match[1], problem, action))
    return problems


@dataclass(slots=True)
class _Group:
    """Channel files of one case while they are collected."""

    holds_all: bool = False  # whether a single file may hold all channels
    files: dict[int, Path] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether the single file there is may hold all channels."""
        return self.holds_all and set(self.files) == {0}
