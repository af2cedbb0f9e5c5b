"""What a case's files contain, as hashes: the identity of cached work."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from threading import Lock
from typing import Any

from segfit.dataset.manifest import Case, Dataset
from segfit.errors import InputError
from segfit.files import content_hash, read_json, write_json
from segfit.images.formats import files_beside, files_of, find_format
from segfit.images.open_files import OpenFiles, opened

__all__ = ["FileHashes"]

_DECLARATIONS = ("dataset.json", "cases.csv", "cases.json")

_Entry = tuple[int, int, str]  # size, modification time in ns, SHA-256
_Parts = tuple[str, tuple[str, ...]]  # what tells that an image has not changed, the files that it consists of


class FileHashes:
    """SHA-256 of files, remembered by path, size and modification time; safe to use from several threads.

    Parameters
    ----------
    path : JSON file to remember in; None remembers for the life of the object
    root : folder below which files are remembered by their place in it, so that it may be moved
    """

    def __init__(self, path: Path | None = None, root: Path | None = None) -> None:
        self._path, self._root = path, root
        self._lock = Lock()
        self._known, self._parts = dict[str, _Entry](), dict[str, _Parts]()  # compared with the files
        self._old_known, self._old_parts = self._load()  # to be compared
        self._changed = self._trusting = False

    def case(self, case: Case, files: OpenFiles | None = None) -> str:
        """Return the hash of all that a case's files say: channels in order, label, voxel size given beside them.

        Raises `InputError` if a file is missing or cannot be read. `files` are those that are open.
        """
        segments = [(mask.layer, mask.label) for mask in case.masks]
        return content_hash(
            {
                **self._images(case, files),
                "label": [self.image(path, files) for path in case.label_files],
                "structures": [mask.value for mask in case.masks],  # the name in the hashes that there are
                **({"segments": segments} if any(label is not None for _, label in segments) else {}),
                **self._told("label_spacing", _further(case, case.label_files), files),
                **({"resample_label": True} if case.resample_label else {}),
                **({"label_use": case.label_use} if case.numbers_objects else {}),
            }
        )

    def require(self, case: Case, content: str) -> None:
        """Raise `InputError` unless the files of a case still have this hash: what was read from them is theirs."""
        if self.case(case) != content:
            raise InputError(f"case {case.id}: its files changed while they were read", "rerun the command")

    def images(self, case: Case) -> str:
        """Return the hash of what a case's images say."""
        return content_hash(self._images(case, None))

    def _images(self, case: Case, files: OpenFiles | None) -> dict[str, Any]:
        missing = [number for number, path in enumerate(case.channels.values()) if path is None]
        return {
            "images": [self.image(path, files) for path in case.images],
            **({"missing": missing} if missing else {}),
            "spacing": [self.file(path, files) if path.is_file() else None for path in _beside(case)],
            **self._told("further_spacing", _further(case, case.images), files),
            **({"spacing_mm": case.spacing_mm} if case.spacing_mm else {}),
        }

    def _told(self, name: str, paths: Sequence[Path], files: OpenFiles | None) -> dict[str, Any]:
        """Return the hashes of files that may be there, under a name; nothing where none is."""
        found = [self.file(path, files) if path.is_file() else None for path in paths]
        return {name: found} if any(found) else {}

    def dataset(self, dataset: Dataset) -> str:
        """Return the hash of a dataset: its cases, their files, and what is declared of them, wherever it lies.

        Of a case whose files cannot all be read it counts that they cannot.
        """

        def content(case: Case) -> str | None:
            with suppress(InputError):
                return self.case(case)
            return None

        root = dataset.root
        declared = [root] if root.is_file() else [root / name for name in _DECLARATIONS]
        return content_hash(
            {
                "declared": {path.name: self.file(path) for path in declared if path.is_file()},
                "labels": dataset.labels.model_dump(mode="json"),
                "channels": list(dataset.channel_names),
                "cases": [
                    [kind, case.id, case.group, case.site, case.weight, content(case)]
                    for kind, cases in (("training", dataset.training), ("test", dataset.test))
                    for case in cases
                ],
            }
        )

    def image(self, path: Path, files: OpenFiles | None = None) -> str:
        """Return the hash of an image: its file's, or of all files it consists of with their places."""
        parts = self._parts_of(path, files)
        if parts == (path,):
            return self.file(path, files)
        return content_hash({os.path.relpath(part, path.parent): self.file(part, files) for part in parts})

    def _parts_of(self, path: Path, files: OpenFiles | None = None) -> tuple[Path, ...]:
        """Return the files that an image consists of; they are looked for only if it changed."""
        if find_format(path).files is None:
            return (path,)
        key = self._key(path)
        with self._lock:
            known = self._parts.get(key, self._old_parts.get(key))
        looks = known[0] if known is not None and self._trusting else _looks(path)
        changed = known is None or known[0] != looks
        if known is None or changed:
            known = looks, tuple(os.path.relpath(part, path.parent) for part in files_of(path, files))
        with self._lock:
            self._parts[key] = known
            self._changed |= changed
        return tuple(path.parent / part for part in known[1])

    def looks(self, case: Case, files: OpenFiles) -> str:
        """Return what tells, without opening a file further, whether the files of a case changed meanwhile."""
        paths = _all_files(case)
        for path in (*case.images, *case.label_files):
            if not path.is_dir():  # of a folder, all that is inside counts
                with suppress(InputError):  # told by who reads it
                    paths += self._parts_of(path, files)
        return content_hash([_looks(path) for path in paths])

    def of(self, case: Case) -> FileHashes:
        """Return what is known of a case's files, small enough for another process; see `learn`."""
        part = FileHashes(root=self._root)
        paths = _all_files(case)
        with self._lock:
            for key in map(self._key, paths):
                if (known := self._parts.get(key, self._old_parts.get(key))) is not None:
                    part._old_parts[key] = known
            parts = [path.parent / name for path in paths for name in part._old_parts.get(self._key(path), ("", ()))[1]]
            for key in map(self._key, (*paths, *parts)):
                if (entry := self._known.get(key, self._old_known.get(key))) is not None:
                    part._old_known[key] = entry
        return part

    def as_read(self) -> FileHashes:
        """Return what is known, for hashes of files as they were when they were read, though they changed since.

        Read or looked at, that is, since `look_again` was called.
        """
        part = FileHashes(root=self._root)
        with self._lock:
            part._known, part._parts, part._trusting = dict(self._known), dict(self._parts), True
        return part

    def learn(self, other: FileHashes) -> None:
        """Remember what `other` found out."""
        with self._lock:
            self._known.update(other._known)
            self._parts.update(other._parts)
            self._changed |= other._changed

    def look_again(self) -> None:
        """Have what is known compared with the files again before it counts, also for `as_read`."""
        with self._lock:
            self._old_known |= self._known
            self._old_parts |= self._parts
            self._known, self._parts = {}, {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=Lock())

    def file(self, path: Path, files: OpenFiles | None = None) -> str:
        """Return the SHA-256 of one file, read only if it changed since it was last asked for.

        Raises `InputError` if it cannot be read.
        """
        try:
            digest = self._digest(path, None if self._trusting else path.stat())
            if digest is None:
                with opened(path, files) as handle:
                    digest = self.take(path, handle)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})", "restore it or remove the case") from None
        return digest

    def take(self, path: Path, handle: BufferedReader) -> str:
        """Return the SHA-256 of an open file, read only if it is another one than the last time."""
        status = os.fstat(handle.fileno())
        digest = self._digest(path, status)
        if digest is None:
            handle.seek(0)
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            with self._lock:
                self._known[self._key(path)] = (status.st_size, status.st_mtime_ns, digest)
                self._changed = True
        return digest

    def _digest(self, path: Path, status: os.stat_result | None) -> str | None:
        """Return the SHA-256 that is known of a file, of this size and time if they are given."""
        key = self._key(path)
        with self._lock:
            known = self._known.get(key, self._old_known.get(key))
            if known is None or (status is not None and known[:2] != (status.st_size, status.st_mtime_ns)):
                return None
            self._known[key] = known
        return known[2]

    def save(self) -> None:
        """Write what is new to the file, together with what other processes wrote meanwhile.

        Where that fails, as on a full disk, files will have to be read again and nothing else is lost.
        """
        if self._path is None or not self._changed:
            return
        with self._lock, suppress(OSError):
            known, parts = self._load()
            raw = {
                "files": known | self._old_known | self._known,
                "parts": parts | self._old_parts | self._parts,
            }
            write_json(self._path, {**raw, "seal": content_hash(raw)})
            self._changed = False

    def _key(self, path: Path) -> str:
        whole = path.absolute()
        if self._root is not None and whole.is_relative_to(self._root):
            return str(whole.relative_to(self._root))
        return str(whole)

    def _load(self) -> tuple[dict[str, _Entry], dict[str, _Parts]]:
        if self._path is None or not self._path.exists():
            return {}, {}
        try:
            raw = read_json(self._path)
            if raw.pop("seal") != content_hash(raw):
                return {}, {}
            known = {key: (int(size), int(time), str(digest)) for key, (size, time, digest) in raw["files"].items()}
            return known, {key: (str(looks), tuple(parts)) for key, (looks, parts) in raw["parts"].items()}
        except (InputError, AttributeError, KeyError, TypeError, ValueError):
            return {}, {}  # only a memory: what is not legible is measured again


def _looks(path: Path) -> str:
    """Return what tells, without opening a file, that an image consists of the same files as before."""
    inside = sorted(path.rglob("*")) if path.is_dir() else [path]
    return content_hash([(file.relative_to(path.parent).as_posix(), *_size_and_time(file)) for file in inside])


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:  # gone, or a link to nothing
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _beside(case: Case) -> list[Path]:
    """Return the files that may tell the spacing of a case's TIFF stacks."""
    first = [path.with_name(f"{case.id}.json") for path in case.images[:1]]
    return [*first, *(path.with_suffix(".json") for path in case.images)]


def _further(case: Case, paths: Sequence[Path]) -> list[Path]:
    """Return the files that may bear on what is read from some of a case, beside those that count for all cases."""
    known = _beside(case)
    return [beside for path in paths for beside in files_beside(path) if beside not in known]


def _all_files(case: Case) -> list[Path]:
    """Return all files of a case and beside it, those that are parts of others left out."""
    own = (*case.images, *case.label_files)
    return [*_beside(case), *_further(case, own), *own]
