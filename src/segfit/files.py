"""Files appear whole or not at all; documents are JSON with a schema version."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from segfit.errors import InputError, Problem, reason_of, warning
from segfit.owner import Owner

__all__ = [
    "Document",
    "GrownRecord",
    "Record",
    "Warned",
    "content_hash",
    "file_system_time",
    "first_fault",
    "flush_to_disk",
    "hash_file",
    "missing_abilities",
    "new_folder",
    "parsed_json",
    "partial_folder",
    "partial_of",
    "path_of",
    "read_arrays",
    "read_json",
    "read_text",
    "remove_leftovers",
    "replace_folder",
    "require_regular",
    "require_there",
    "write_arrays",
    "write_bytes",
    "write_file",
    "write_json",
    "write_text",
]

_PARTIAL_PREFIX = ".partial-"
_LEFTOVER_S = 3600.0  # a partial file of another host untouched for so long has no living writer (assumption)
_LACKING = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # the file system cannot


def _warned(value: Any) -> Any:
    if isinstance(value, str):
        return warning("", value)
    return {"case": "", "fatal": False} | value if isinstance(value, dict) else value


Warned = Annotated[
    Problem, BeforeValidator(_warned), PlainSerializer(lambda item: item.facts, return_type=dict[str, str])
]
"""A warning in a document; in older ones it was a sentence."""


def write_file(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    """Write `path` through `fill(handle)`: beside it first, flushed to disk, then renamed over it.

    A crash or a full disk leaves the old file (or none) and at most a hidden partial file beside it, which is
    removed when the failure could be seen. An `OSError` names the file that was to be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial: Path | None = None
    try:
        partial = _own_name(path.parent)  # `path` may be as long as allowed
        with partial.open("xb") as handle:
            fill(handle)
            handle.flush()
            flush_to_disk(handle.fileno())
        partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # instead of the partial file, or of none
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write named arrays into a compressed file, whole or not at all; see `read_arrays`."""

    def fill(handle: BinaryIO) -> None:
        np.savez_compressed(handle, **arrays)

    write_file(path, fill)


def read_arrays(path: Path) -> dict[str, NDArray[Any]] | None:
    """Read what `write_arrays` wrote; None if the file is not there or damaged."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception:  # noqa: BLE001 - a damaged file has unpacking raise almost anything
        return None


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes atomically."""

    def fill(handle: BinaryIO) -> None:
        handle.write(content)

    write_file(path, fill)


def write_text(path: Path, text: str) -> None:
    r"""Write UTF-8 text atomically.

    Bytes of a file's name that are no text are written as ``\udcXX``, as JSON escapes them: so a path is read again.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value atomically, indented, NaN and infinities refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def path_of(value: Any, what: str) -> Path:
    """Return a path that a caller gave; `InputError` naming what it is of, for anything but text or a path."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str) or "\0" in os.fspath(value):
        raise InputError(f"the path of the {what} is text or a Path, got {value!r}", "give the place of one")
    return Path(value)


def require_there(path: Path, what: str) -> None:
    """Raise `InputError` if there is nothing at the path of a model or the like."""
    if not path.exists():
        raise InputError(f"{path} does not exist", f"correct the path of the {what}")


def require_regular(path: Path) -> None:
    """Raise `OSError` for a pipe, which might wait for ever, and for a device, which might not end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a pipe, socket or device, not a file", str(path))


def read_text(path: Path) -> str:
    """Return a file's UTF-8 text, with a byte order mark or without; `OSError` as `require_regular` too."""
    require_regular(path)
    return path.read_text(encoding="utf-8-sig")


def read_json(path: Path) -> Any:
    """Read a JSON file in UTF-8, with a byte order mark or without.

    Raises `InputError` if it is missing, cannot be read or is not JSON, and if an object has a key twice: all but the
    last would be lost without a word.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", "restore it or its permissions") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not valid JSON (it is no UTF-8 text)", "save it as UTF-8") from None
    return parsed_json(text, path)


def parsed_json(text: str, path: Path) -> Any:
    """Return the value of a file's text; raises as `read_json`."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise InputError(f"{path} is not valid JSON (too deeply nested)", "restore it") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({reason_of(error)})", "restore it") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f'an object has the key "{twice}" twice')
    return found


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` once it is filled; after an error it is gone.

    A crash leaves what was there or nothing, and at most a hidden folder beside it. An `OSError` names the folder that
    was to be written.
    """
    with partial_of(path) as partial:
        new = partial / "new"
        new.mkdir()
        yield new
        if path.exists() or path.is_symlink():  # one that leads nowhere, too
            path.rename(partial / "before")
        new.rename(path)


@contextmanager
def partial_of(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path`, which is gone afterwards, to make it in; an `OSError` there names `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_folder(path.parent)
    try:
        yield partial
    except OSError as error:
        if error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(partial):
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Put a copy of a folder in the place of another one."""
    with new_folder(target) as new:
        for path in sorted(source.rglob("*")):
            place = path.relative_to(source)
            if not any(part.startswith(_PARTIAL_PREFIX) for part in place.parts):  # not by copytree: it needs chmod
                (new / place).mkdir() if path.is_dir() else shutil.copyfile(path, new / place)


def partial_folder(parent: Path) -> Path:
    """Make a hidden folder for what is moved out of it when it is whole; should this process die, others remove it."""
    partial = _own_name(parent)
    partial.mkdir()
    return partial


def _own_name(parent: Path) -> Path:
    """Return a new name for a partial file or folder; not by `tempfile`, whose files do not heed the umask."""
    return parent / f"{_own_prefix()}{secrets.token_hex(8)}"


def _own_prefix() -> str:
    return f"{_PARTIAL_PREFIX}{Owner.own().name}-"


def remove_leftovers(folder: Path, *, deep: bool = False) -> None:
    """Remove partial files and folders that dead processes left directly inside `folder`, with `deep` anywhere in it.

    Those of living processes stay. Whether one of another host lives is not known: it has an hour.
    """
    for path in list(folder.glob(f"{'**/' if deep else ''}{_PARTIAL_PREFIX}*")):
        owner = Owner.of_name(path.name.removeprefix(_PARTIAL_PREFIX))
        with suppress(OSError):  # gone meanwhile
            if owner is not None and owner.is_here:
                abandoned = owner.is_dead()
            else:
                abandoned = file_system_time(folder) - _last_written(path) > _LEFTOVER_S
            if abandoned:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _last_written(path: Path) -> float:
    """Return when a file, or anything in a folder, was written last."""
    return max(item.stat().st_mtime for item in (path, *path.rglob("*")))


def file_system_time(folder: Path) -> float:
    """Return what the clock of a folder's file system says, in seconds since 1970.

    That of a network mount may be another one than this machine's.
    """
    with _told_of(folder), tempfile.TemporaryFile(dir=folder) as handle:
        handle.write(b" ")
        handle.flush()
        return os.fstat(handle.fileno()).st_mtime


def flush_to_disk(descriptor: int) -> bool:
    """Have a file or folder survive a loss of power; return False where the file system cannot."""
    return _is_able(lambda: os.fsync(descriptor))


def missing_abilities(folder: Path) -> list[str]:
    """Return which of "locks", "chmod" and "fsync" the file system of a folder does not have."""
    with _told_of(folder), tempfile.NamedTemporaryFile(prefix=_own_prefix(), dir=folder) as handle:
        found = {
            "locks": _has_locks(handle.fileno()),
            "chmod": _has_permissions(Path(handle.name)),
            "fsync": flush_to_disk(handle.fileno()),
        }
    return [name for name, is_there in found.items() if not is_there]


@contextmanager
def _told_of(folder: Path) -> Iterator[None]:
    """Name the folder in an `OSError` instead of a file in it that is nobody's, or of none."""
    try:
        yield
    except OSError as error:
        error.filename = str(folder)
        raise


def _has_permissions(path: Path) -> bool:
    try:
        return _is_able(lambda: path.chmod(0o600))
    except PermissionError:  # it is our own
        return False


def _has_locks(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows has others
        return True
    return _is_able(lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB))


def _is_able(do: Callable[[], object]) -> bool:
    """Do something; return False where the file system cannot."""
    try:
        do()
    except OSError as error:
        if error.errno not in _LACKING:
            raise
        return False
    return True


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def content_hash(value: Any) -> str:
    """Return a 16-digit hex hash of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def first_fault(error: ValidationError) -> str:
    """Return where the first fault of a value is and what it is: ``members.0.tile_step: Input should be ...``."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: ".lstrip(": ") + first["msg"].removeprefix("Value error, ")


class Record(BaseModel):
    """Base of all frozen, validated values: unknown fields and NaN are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def content_hash(self) -> str:
        """Return a 16-digit hash of the value's content."""
        return content_hash(self.model_dump(mode="json"))


class GrownRecord(Record):
    """A record that got fields after the first of its values were stored.

    Those of `LATER` are left out of a dump where they have their default, which says what was done before there were
    any: hashes and identities of stored values stay.
    """

    LATER: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = dump(self)
        fields = type(self).model_fields
        grown = {name for name in self.LATER if getattr(self, name) != fields[name].default}
        return {name: value for name, value in content.items() if name not in self.LATER or name in grown}


class Document(Record):
    """A record that lives in a file of its own, with a schema version.

    `schema_version` is written into the file; a file from a newer version is refused with one clear sentence, one from
    an older version is brought to the present form by `migrate`. A file may also hold, under ``record``, what the
    document was made from (`segfit.records`).
    """

    SCHEMA: ClassVar[int] = 1
    SHARED: ClassVar[bool] = False  # it leaves the project: fields of other versions and programs are ignored
    schema_version: int = 1

    @classmethod
    def migrate(cls, content: dict[str, Any], version: int) -> dict[str, Any]:  # noqa: ARG003 - for older schemas
        """Return the content of a file of schema `version` as the present schema has it."""
        return content

    def save(self, path: Path) -> None:
        """Write the document atomically as JSON."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and validate a document; raise `InputError` naming the file and the first fault."""
        raw = read_json(path)
        if isinstance(raw, dict):
            raw.pop("record", None)
        return cls.of_json(raw, path)

    @classmethod
    def of_json(cls, raw: Any, path: Path) -> Self:
        """Validate what was read from a file."""
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        action = "copy it again from where it came" if cls.SHARED else "delete it to have it made anew"
        if version is None:
            raise InputError(f"{path} is not a segfit {cls.__name__.lower()} file: it has no schema_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise InputError(f"{path} is damaged: schema_version: expected 1 to {cls.SCHEMA}, got {version!r}", action)
        if version > cls.SCHEMA:
            raise InputError(
                f"{path} was written by a newer segfit (schema {version}, this one reads {cls.SCHEMA})", "update segfit"
            )
        try:
            return cls.model_validate(cls.migrate(raw, version), extra="ignore" if cls.SHARED else None)
        except ValidationError as error:
            raise InputError(f"{path} is damaged: {first_fault(error)}", action) from None
