"""A result and what it was made from: it counts under its key, and as long as its files are what was written.

A document holds its record in itself, under ``record``, that of files beside it too. The files of a folder without a
document have ``record.json`` beside them. Both are written last.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from segfit.errors import InputError
from segfit.files import Document, Record, content_hash, hash_file, read_json, write_json

__all__ = [
    "RECORD",
    "RECORD_FILE",
    "Key",
    "ResultRecord",
    "Results",
    "Use",
    "damaged_files",
    "faults",
    "is_damaged",
    "is_sealed",
    "record_of",
    "remove_damaged",
    "seal",
    "store",
    "stored",
    "write",
]

RECORD = "record"
RECORD_FILE = "record.json"
_OTHER = "is not what was written"


class Key(Record):
    """What names a result: its stage, and hashes of what it is made from."""

    stage: str
    version: int
    made_of: dict[str, Any]

    @property
    def hash(self) -> str:
        """16 digits."""
        return self.content_hash()


class Use(Record):
    """What was used to make a result."""

    seconds: float
    cpu_seconds: float
    peak_memory_gb: float


class ResultRecord(Record):
    """Beside every result."""

    key: str
    stage: str
    made_of: dict[str, Any]
    files: dict[str, str] = {}  # SHA-256 by name, of those in the folder
    made: str  # date and time, UTC
    use: Use | None = None
    versions: dict[str, str]
    seal: str = ""  # hash of all this and of the document that it stands in

    @classmethod
    def of(
        cls, key: str, stage: str, made_of: Mapping[str, Any], *, files: Mapping[str, str], use: Use | None = None
    ) -> ResultRecord:
        """Return the record of what was made just now, without its seal."""
        return cls(
            key=key,
            stage=stage,
            made_of=dict(made_of),
            files=dict(files),
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            use=use,
            versions=_versions(),
        )

    def sealed(self, document: Any) -> ResultRecord:
        """Return the record with its seal; `document` without its record, empty in a folder."""
        return self.model_copy(
            update={"seal": content_hash([document, self.model_dump(mode="json", exclude={"seal"})])}
        )


_Document = TypeVar("_Document", bound=Document)
_Value = TypeVar("_Value")


def store(document: _Document, path: Path, key: Key, use: Use | None = None) -> _Document:
    """Write a document with its record, both or neither; return it as it will be read."""
    return write(document, path, ResultRecord.of(key.hash, key.stage, key.made_of, files={}, use=use))


def write(document: _Document, path: Path, record: ResultRecord) -> _Document:
    """Write a document with this record, both or neither; return it as it will be read."""
    raw = document.model_dump(mode="json")
    write_json(path, raw | {RECORD: record.sealed(raw).model_dump(mode="json")})
    return type(document).of_json(raw, path)


def stored(kind: type[_Document], path: Path) -> tuple[_Document, ResultRecord] | None:
    """Return a document and its record; None if they are damaged or of another version."""
    found = _read(path)
    if found is None or found[1] != found[1].sealed(found[0]):
        return None
    try:
        return kind.of_json(found[0], path), found[1]
    except InputError:
        return None


class Results:
    """Results as a session knows them: no file is read twice, unless it is another one, of another time or size."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, object], tuple[tuple[int, int, int], Any]] = {}

    def recall(self, kind: type[_Document], path: Path, key: Key | None = None) -> _Document | None:
        """Return a document if it counts, under this key if one is given; None if not there, another, or damaged."""
        found = self.read(path, partial(stored, kind), kind)
        return None if found is None or (key is not None and found[1].key != key.hash) else found[0]

    def store(self, document: _Document, path: Path, key: Key, use: Use | None = None) -> _Document:
        """Write a document with its record, both or neither; return it as it will be read."""
        record = ResultRecord.of(key.hash, key.stage, key.made_of, files={}, use=use)
        result = write(document, path, record)
        self._known[path, type(document)] = _looks(path), (result, record)
        return result

    def read(self, path: Path, read: Callable[[Path], _Value], what: object = None) -> _Value | None:
        """Return what `read` returns for a file, or did before; None if there is no file.

        `what` it is, where `read` itself does not tell.
        """
        try:
            looks = _looks(path)
        except OSError:
            return None
        known = self._known.get((path, what or read))
        if known is None or known[0] != looks:
            known = self._known[path, what or read] = looks, read(path)
        return cast("_Value", known[1])


def _looks(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def record_of(path: Path) -> ResultRecord | None:
    """Return the record of a document, or of a folder; None if there is none."""
    if path.is_dir():
        path = path / RECORD_FILE
    found = _read(path)
    return None if found is None else found[1]


def seal(folder: Path, key: Key, names: Sequence[str], use: Use | None = None) -> None:
    """Write the record of the files of a folder: from now on they are a result."""
    files = {name: _digest(folder / name) for name in sorted(names)}
    record = ResultRecord.of(key.hash, key.stage, key.made_of, files=files, use=use)
    write_json(folder / RECORD_FILE, {RECORD: record.sealed({}).model_dump(mode="json")})


def is_sealed(folder: Path, key: Key) -> bool:
    """Whether a folder holds the result of this key, every byte of it as it was written."""
    record = record_of(folder)
    return record is not None and record.key == key.hash and not damaged_files(folder, record)


def damaged_files(folder: Path, record: ResultRecord) -> dict[str, str]:
    """Return what is wrong with the files of a folder that are not what was written, by name."""
    return faults(folder, record.files) if record == record.sealed({}) else {RECORD_FILE: _OTHER}


def faults(folder: Path, files: Mapping[str, str]) -> dict[str, str]:
    """Return what is wrong with those files that do not have the SHA-256 given, by name."""
    found = {}
    for name, digest in files.items():
        try:
            now, fault = _hash(folder / name), _OTHER
        except OSError as error:
            now, fault = "", f"cannot be read ({error.strerror})"
        if now != digest:
            found[name] = fault
    return found


def remove_damaged(folder: Path, key: Key) -> None:
    """Remove a folder that was a result and is none any more; one whose result is still being made stays."""
    if is_damaged(folder, key):
        shutil.rmtree(folder)


def is_damaged(folder: Path, key: Key) -> bool:
    """Whether a folder was a result and is none any more, or another one."""
    return (folder / RECORD_FILE).exists() and not is_sealed(folder, key)


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files in a folder; empty where that cannot be read."""
    try:
        return _hash(path)
    except OSError:
        return ""


def _hash(path: Path) -> str:
    if path.is_dir():
        return content_hash({str(one.relative_to(path)): hash_file(one) for one in _files(path)})
    return hash_file(path)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _read(path: Path) -> tuple[Any, ResultRecord] | None:
    """Return the content of a file without its record, and the record; None if that cannot be had."""
    try:
        raw = read_json(path)
        return raw, ResultRecord.model_validate(raw.pop(RECORD))
    except (InputError, ValidationError, AttributeError, KeyError, TypeError):
        return None


@cache
def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("segfit", "torch", "numpy")}
    return packages | {"python": platform.python_version()}
