"""All cases of a dataset through the store: preprocessed in parallel, verified."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from math import inf, prod
from pathlib import Path

from segfit.dataset.annotation import read_labels
from segfit.dataset.contents import FileHashes
from segfit.dataset.manifest import Case
from segfit.errors import DatasetError, InputError, Problem, StageError, warning
from segfit.execution.execution import LOCAL, Execution
from segfit.files import content_hash, file_system_time, remove_leftovers
from segfit.fingerprint.fingerprint import CaseFingerprint, Fingerprint
from segfit.geometry import Grid
from segfit.images.formats import read_case, read_grid
from segfit.images.image import problem_of
from segfit.labels import LabelScheme
from segfit.preprocessing.pipeline import TooLargeError, network_axes, preprocess
from segfit.preprocessing.store import CaseStore, DamagedCase, compressed, legible_name
from segfit.progress import SILENT
from segfit.resampling import new_shape
from segfit.specs import PreprocessingSpec
from segfit.text import count

__all__ = [
    "are_verified",
    "largest_grid",
    "most_voxels",
    "preprocess_dataset",
    "preprocessing_in_parts",
    "verify_store",
]

_VERIFIED_S = 86400.0  # for so long a case counts as verified: hundreds of tasks need not all read it (assumption)
_WORKING_COPIES = 6  # arrays of a case's size that preprocessing holds at its peak


def preprocess_dataset(
    cases: Sequence[Case],
    spec: PreprocessingSpec,
    scheme: LabelScheme,
    store: CaseStore,
    *,
    measured: Fingerprint | None = None,
    execution: Execution = LOCAL,
) -> dict[str, str]:
    """Preprocess every case that is not in the store yet, and return the key of each case by its id.

    Cases that are there are verified byte for byte, at most once a day; damaged ones are made anew, and those of an
    earlier version, which is noted. As many cases are in work at once as fit into free memory. A case without label
    file is stored without labels. Raises `StageError` if a case cannot be stored; what was finished before stays. Cases
    that cannot be used or do not fit into memory do not stop the others: one `DatasetError` or `StageError` names them
    at the end. Headers of cases that were `measured` are not read to know how large they are.
    """
    store.root.mkdir(parents=True, exist_ok=True)
    remove_leftovers(store.root)
    keys: dict[str, str] = {}
    too_large: list[str] = []
    unusable: list[Problem] = []
    outdated = 0
    known = _known_cases(spec, measured)
    try:
        for (case, _), done in execution.map(
            partial(_preprocess_case, store.root, spec, scheme, execution.memory_bytes, _verified_since(store)),
            [(case, store.hashes.of(case)) for case in cases],
            description="preprocess",
            name=lambda item: item[0].id,
            size=lambda item: _predicted_bytes(item[0], spec, known.get(item[0].id)),
            largest_first=True,
        ):
            if done.unusable is not None:
                unusable.append(done.unusable)
                continue
            if done.too_large:
                too_large.append(done.too_large)
                continue
            keys[case.id] = done.key
            store.hashes.learn(done.hashes)
            outdated += done.was_outdated
            if done.was_damaged:
                problem = "its preprocessed arrays were damaged on disk and were made anew"
                execution.progress.warn(warning("damaged_case", problem, case=case.id))
    finally:
        store.hashes.save()
    if outdated:
        execution.progress.note(f"{count(outdated, 'case')} stored by an earlier version of segfit: preprocessed anew")
    if unusable:
        others = len(cases) - len(unusable) - len(too_large)
        outcome = f"{others or 'none'} of {count(len(cases), 'case')} done"
        raise DatasetError(sorted(unusable, key=lambda item: item.case), outcome)
    if too_large:
        raise StageError(
            f"preprocess: {len(too_large)} of {count(len(cases), 'case')} cannot fit into memory, the others are done: "
            f"case {'. Case '.join(sorted(too_large))}"
        )
    return {case.id: keys[case.id] for case in cases}


def are_verified(keys: Sequence[str], store: CaseStore, *, execution: Execution = LOCAL) -> bool:
    """Return whether all these cases are in the store and were verified lately; no file of them is read through."""
    if not store.root.is_dir():
        return False
    since = _verified_since(store)
    look = partial(CaseStore.was_verified, store, since=since)
    quiet = replace(execution, progress=SILENT)
    return all(is_good for _, is_good in quiet.map(look, keys, description="look"))


def _verified_since(store: CaseStore) -> float:
    """Return since when cases must have been verified, by the clock of the file system."""
    return file_system_time(store.root) - _VERIFIED_S


def preprocessing_in_parts(
    cases: Sequence[Case], spec: PreprocessingSpec, *, measured: Fingerprint | None = None, execution: Execution = LOCAL
) -> AbstractContextManager[Execution]:
    """Open what suits preprocessing all these cases, for whoever preprocesses them in parts."""
    known = _known_cases(spec, measured)
    return execution.kept_open([_predicted_bytes(case, spec, known.get(case.id)) for case in cases])


@dataclass(frozen=True, slots=True, eq=False)
class _Done:
    key: str
    hashes: FileHashes  # of the case's files
    was_damaged: bool = False
    was_outdated: bool = False
    too_large: str = ""  # why it was not made
    unusable: Problem | None = None  # the same


def _preprocess_case(
    root: Path, spec: PreprocessingSpec, scheme: LabelScheme, room: float, since: float, item: tuple[Case, FileHashes]
) -> _Done:
    """See that a case is in the store at `root`."""
    case, hashes = item
    store, content = CaseStore(root, hashes), hashes.case(case)
    made_of = store.made_of(case, spec, scheme)
    key = content_hash(made_of)
    was_there = (root / key).exists()
    if was_there and (store.was_verified(key, since) or store.verify(key)):
        return _Done(key, hashes)
    was_outdated = was_there and store.is_outdated(key)
    if was_there:
        store.discard(key)
    try:
        image = [read_case(case.images, case.spacing_mm)]
        label = [read_labels(case, scheme, image[0].grid) if case.label_files else None]
    except InputError as error:
        return _Done(key, hashes, unusable=problem_of(case.id, error, images=case.images))
    hashes.require(case, content)
    annotation = None if label[0] is None else compressed(label[0].array[0], label[0].grid.ndim)
    try:
        done = preprocess(  # which owns image and label, and lets go of them as soon as it can
            image.pop(),
            label.pop(),
            spec,
            scheme,
            case.id,
            source_files=(*case.images, *case.label_files),
            overwrite=True,
            room=room,
        )
    except TooLargeError as error:
        return _Done(key, hashes, too_large=str(error))
    except InputError as error:
        return _Done(key, hashes, unusable=problem_of(case.id, error))
    slicewise = spec.image_ndim == 3 and spec.spacing_mm[0] is None
    store.add(key, done, made_of=made_of, annotation=annotation, slicewise=slicewise)
    return _Done(key, hashes, was_damaged=was_there and not was_outdated, was_outdated=was_outdated)


def _known_cases(spec: PreprocessingSpec, measured: Fingerprint | None) -> dict[str, CaseFingerprint]:
    """Return what was measured of cases along the axes in which they are preprocessed, by case id."""
    if measured is None or measured.orientation != spec.orientation:
        return {}
    return {case.case: case for case in measured.cases}


def _predicted_bytes(case: Case, spec: PreprocessingSpec, known: CaseFingerprint | None = None) -> int:
    """Return the memory that preprocessing a case takes, about; its header is read where its shape is not `known`."""
    return max(1, largest_grid(case, spec, known) * len(spec.normalization) * 4 * _WORKING_COPIES)


def largest_grid(case: Case, spec: PreprocessingSpec, known: CaseFingerprint | None = None) -> int:
    """Return the voxels of a case as it is or as it is preprocessed, whichever are more.

    0 where that cannot be told: whoever reads the case names it.
    """
    if known is None:
        try:
            grid = read_grid(case.images[0], case.spacing_mm)
        except InputError:
            return 0
        return most_voxels(grid, spec)
    if len(known.shape) != spec.image_ndim:
        return 0
    shape = tuple(known.shape[axis] for axis in spec.transpose)
    spacing = tuple(known.spacing_mm[axis] for axis in spec.transpose)
    return max(prod(known.shape), prod(new_shape(shape, spacing, spec.spacing_mm)))


def most_voxels(grid: Grid, spec: PreprocessingSpec) -> int:
    """Return the voxels of an image as it is or preprocessed, whichever are more; 0 if it is of another kind."""
    if grid.ndim != spec.image_ndim:
        return 0
    axes = network_axes(grid, spec)
    shape = axes.permute(grid.shape)
    return max(prod(shape), prod(new_shape(shape, axes.permute(grid.spacing_mm), spec.spacing_mm)))


def verify_store(store: CaseStore, *, execution: Execution = LOCAL) -> tuple[DamagedCase, ...]:
    """Read every case of a store against its checksums and return the damaged ones, by name.

    Those of an earlier version, which are made anew when they are needed, are passed over.
    """
    results = replace(execution, memory_gb=inf).map(  # hardly any of what is read is held at a time
        partial(_damage, store.root),
        [key for key in store.keys() if not store.is_outdated(key)],  # noqa: SIM118 - not a mapping
        description="verify",
        size=lambda key: _stored_bytes(store.root / key),
        lost=lambda key, error: DamagedCase(
            legible_name(store.root / key),
            store.root / key,
            f"it could not be read, even alone: worker {error.reason}",
        ),
    )
    return tuple(sorted((damaged for _, damaged in results if damaged is not None), key=lambda one: one.name))


def _damage(root: Path, key: str) -> DamagedCase | None:
    return CaseStore(root, FileHashes()).damage(key)


def _stored_bytes(folder: Path) -> int:
    """Return the bytes that are read to verify a case, of which hardly any are held at a time; 1 if they are gone."""
    try:
        return 1 + sum(path.stat().st_size for path in folder.iterdir())
    except OSError:
        return 1
