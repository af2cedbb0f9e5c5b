"""What a case's files contain, as hashes: the identity of cached work."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from segfit.dataset.manifest import Case, Dataset
from segfit.errors import InputError
from segfit.files import content_hash, hash_file, read_json, write_json
from segfit.images.formats import files_of

__all__ = ["FileHashes"]

_DECLARATIONS = ("dataset.json", "cases.csv", "cases.json")

_Entry = tuple[int, int, str]  # size, modification time in ns, SHA-256


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
        self._known = self._load()
        self._changed = False

    def case(self, case: Case) -> str:
        """Return the hash of all that a case's files say: channels in order, label, voxel size given beside them.

        Raises `InputError` if a file is missing or cannot be read.
        """
        return content_hash(
            {
                **self._images(case),
                "label": [self.image(path) for path in case.label_files],
                "structures": [mask.value for mask in case.masks],  # the name in the hashes that there are
                **({"resample_label": True} if case.resample_label else {}),
            }
        )

    def images(self, case: Case) -> str:
        """Return the hash of what a case's images say."""
        return content_hash(self._images(case))

    def _images(self, case: Case) -> dict[str, Any]:
        return {
            "images": [self.image(path) for path in case.images],
            "spacing": [self.file(path) if path.is_file() else None for path in _beside(case)],
            **({"spacing_mm": case.spacing_mm} if case.spacing_mm else {}),
        }

    def dataset(self, dataset: Dataset) -> str:
        """Return the hash of a dataset: its cases, their files, and what is declared of them, wherever it lies.

        Raises `InputError` if a file is missing or cannot be read.
        """
        root = dataset.root
        declared = [root] if root.is_file() else [root / name for name in _DECLARATIONS]
        return content_hash(
            {
                "declared": {path.name: self.file(path) for path in declared if path.is_file()},
                "labels": dataset.labels.model_dump(mode="json"),
                "channels": list(dataset.channel_names),
                "cases": [
                    [kind, case.id, case.group, case.site, case.weight, self.case(case)]
                    for kind, cases in (("training", dataset.training), ("test", dataset.test))
                    for case in cases
                ],
            }
        )

    def image(self, path: Path) -> str:
        """Return the hash of an image: its file's, or of all files it consists of with their places."""
        files = files_of(path)
        if files == (path,):
            return self.file(path)
        return content_hash({os.path.relpath(file, path.parent): self.file(file) for file in files})

    def of(self, case: Case) -> FileHashes:
        """Return what is known of a case's files, small enough for another process; see `learn`."""
        part = FileHashes(root=self._root)
        paths = _beside(case)
        for image in (*case.images, *case.label_files):
            with suppress(InputError):  # told when the case is read
                paths += files_of(image)
        with self._lock:
            part._known = {key: self._known[key] for path in paths if (key := self._key(path)) in self._known}
        return part

    def learn(self, other: FileHashes) -> None:
        """Remember what `other` found out."""
        if other._changed:
            with self._lock:
                self._known.update(other._known)
                self._changed = True

    def __getstate__(self) -> tuple[Path | None, Path | None, dict[str, _Entry], bool]:
        return self._path, self._root, self._known, self._changed

    def __setstate__(self, state: tuple[Path | None, Path | None, dict[str, _Entry], bool]) -> None:
        self._lock = Lock()
        self._path, self._root, self._known, self._changed = state

    def file(self, path: Path) -> str:
        """Return the SHA-256 of one file, read only if it changed since it was last asked for.

        Raises `InputError` if it cannot be read.
        """
        key = self._key(path)
        try:
            status = path.stat()
            with self._lock:
                size, modified, digest = self._known.get(key, (-1, -1, ""))
            if (size, modified) != (status.st_size, status.st_mtime_ns):
                digest = hash_file(path)
                with self._lock:
                    self._known[key] = (status.st_size, status.st_mtime_ns, digest)
                    self._changed = True
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})", "restore it or remove the case") from None
        return digest

    def save(self) -> None:
        """Write what is new to the file, together with what other processes wrote meanwhile.

        Where that fails, as on a full disk, files will have to be read again and nothing else is lost.
        """
        if self._path is None or not self._changed:
            return
        with self._lock, suppress(OSError):
            files = {key: list(entry) for key, entry in (self._load() | self._known).items()}
            write_json(self._path, {"files": files, "seal": content_hash(files)})
            self._changed = False

    def _key(self, path: Path) -> str:
        whole = path.absolute()
        if self._root is not None and whole.is_relative_to(self._root):
            return str(whole.relative_to(self._root))
        return str(whole)

    def _load(self) -> dict[str, _Entry]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            raw = read_json(self._path)
            if raw["seal"] != content_hash(raw["files"]):
                return {}
            return {key: (int(size), int(time), str(digest)) for key, (size, time, digest) in raw["files"].items()}
        except (InputError, AttributeError, KeyError, TypeError, ValueError):
            return {}  # only a memory: what is not legible is measured again


def _beside(case: Case) -> list[Path]:
    """Return the files that may tell the spacing of a case's TIFF stacks."""
    return [case.images[0].with_name(f"{case.id}.json"), *(path.with_suffix(".json") for path in case.images)]
