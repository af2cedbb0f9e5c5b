"""Looking after a project folder: reading every result against its record, and removing what nothing needs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from segfit.bundle.bundle import open_bundle
from segfit.errors import InputError
from segfit.files import read_json
from segfit.project.findings import find
from segfit.project.folder import SO_FAR, ProjectFolder
from segfit.project.preparation import Preparation
from segfit.project.trainings import is_begun
from segfit.project.validation import PROBABILITIES
from segfit.records import RECORD, RECORD_FILE, damaged_files, record_of
from segfit.training.result import RESULT, WEIGHTS, TrainingResult, weights_are_whole

__all__ = ["Damage", "Unneeded", "damage_of", "remove", "unneeded"]


@dataclass(frozen=True, slots=True)
class Damage:
    """A result that is not what was written."""

    path: Path
    problem: str


@dataclass(frozen=True, slots=True)
class Unneeded:
    """Something in a project folder that no result of the present options needs."""

    path: Path
    what: str
    num_bytes: int


def damage_of(folder: ProjectFolder) -> list[Damage]:
    """Read every result of a project but its preprocessed cases, of all options; return those that are damaged."""
    found = []
    for path in sorted(folder.root.rglob("*.json")):
        if any(path.is_relative_to(other) for other in (folder.cases, folder.cache, folder.dataset)):
            continue
        if path.name == RECORD_FILE:
            found += _damage_of_folder(path.parent)
        elif (problem := _damage_of_document(path)) is not None:
            found.append(Damage(path, problem))
    if folder.model.exists():
        try:
            open_bundle(folder.model)
        except InputError as error:
            found.append(Damage(folder.model, str(error)))
    return found


def _damage_of_folder(folder: Path) -> list[Damage]:
    record = record_of(folder)
    if record is None:
        return [Damage(folder / RECORD_FILE, "it cannot be read")]
    return [Damage(folder / name, f"it {fault}") for name, fault in damaged_files(folder, record).items()]


def _damage_of_document(path: Path) -> str | None:
    """Return what is wrong with a document that has a record; None also for others."""
    try:
        raw = read_json(path)
    except InputError as error:
        return str(error)
    if not isinstance(raw, dict) or RECORD not in raw:
        return None
    record = record_of(path)
    if record is None or record != record.sealed({key: raw[key] for key in raw if key != RECORD}):
        return "it is not what was written"
    if path.name == RESULT and not weights_are_whole(path.parent, TrainingResult.load(path)):
        return f"{WEIGHTS} beside it is not what was written"
    return None


def unneeded(project: Preparation) -> list[Unneeded]:
    """Return what no result of the present options needs: plans, trainings and cases of other options or other data.

    Raises `InputError` while another command is at work in the project, and where nothing was trained with the present
    options yet: they may go on with what is there.
    """
    with project.locks.alone():
        return _unneeded(project)


def remove(project: Preparation, items: Sequence[Unneeded]) -> None:
    """Remove what is unneeded and still is; raise `InputError` while another command is at work in the project."""
    with project.locks.alone():
        still = {item.path for item in _unneeded(project)}
        for item in items:
            if item.path in still:
                shutil.rmtree(item.path, ignore_errors=True)


def _unneeded(project: Preparation) -> list[Unneeded]:
    project.check()  # first: it decides which cases count
    folder, found = project.folder, find(project)
    if found.plan is None or found.plan.run is None or not is_begun(project, found.plan):
        raise InputError(
            f"nothing was trained in {folder.root} with its present options yet",
            f"run it first (segfit run {quote(str(folder.root))}), or ask for the options whose results are to stay",
        )
    kept = {project.plan_folder.root, *(item.folder for item in found.trainings)}
    if found.plan.run.start is not None:
        kept.add((folder.root / found.plan.run.start).parents[2])  # the plan whose race the training started from
    items = [(path, "plan of other options") for path in _folders(folder.plans, "*") if path not in kept]
    items += [
        (path, f"training {path.parent.parent.name}, {path.parent.name} of other options")
        for path in _folders(folder.runs, "*/fold-*/*")
        if path not in kept
    ]
    start = project.start
    items += [
        (path, "model of other options")
        for path in _folders(folder.starts, "*")
        if start is None or path.name != start.identity
    ]
    items += [
        (path, "handed over before the training ended")
        for item in found.trainings
        for path in _folders(item.folder, f"{SO_FAR}*")
    ]
    if found.selected is not None:
        needed = {item.folder for item in found.selected.validations}
        own = [path for item in found.trainings for path in _folders(item.folder, "validation-*")]
        items += [(path, "validation of an earlier state") for path in own if path not in needed]
        items += [
            (path, "predictions of an earlier selection")
            for path in _folders(project.plan_folder.root, "validated-*")
            if path != found.selected.own
        ]
        items += [(path / PROBABILITIES, "left by a selection") for path in needed if (path / PROBABILITIES).is_dir()]
    cases = {key for item in found.plan.configurations.values() for key in project.case_keys(item).values()}
    old = sorted(set(project.store.keys()) - cases)
    items += [(folder.cases / key, "preprocessed case of other options") for key in old]
    return [Unneeded(path, what, _size(path)) for path, what in items]


def _folders(root: Path, pattern: str) -> list[Path]:
    return sorted(path for path in root.glob(pattern) if path.is_dir())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
