"""Where the files of a model lie: a folder, or one zip of it, which is read in place.

Nothing is unpacked, so no name in a zip leads anywhere, and what an entry may take is bounded before it is read.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segfit.errors import InputError, reason_of
from segfit.files import hash_file, parsed_json, read_json

__all__ = ["BundleFiles", "opened_zip", "pack", "require_no_bomb"]

_PLAIN = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_MOST_PACKED = 100  # times smaller than its content; weights are hardly smaller at all, JSON is ten times (assumption)
_ALWAYS_FINE = 2**20  # bytes that an entry may have however small it is packed
_LARGEST_JSON = 2**27
_AGAIN = "copy the model again"
_DAMAGE = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    zlib.error,
)


@dataclass(frozen=True, slots=True)
class BundleFiles:
    """The files of a model, by their plain names."""

    path: Path
    root: str = ""  # the folder inside the zip
    is_zip: bool = False

    @classmethod
    def of(cls, path: Path, manifest: str) -> BundleFiles | None:
        """Return the files of a folder or a zip with a manifest; None for others. `InputError` for a zip of faults."""
        if path.is_dir():
            return cls(path) if (path / manifest).is_file() else None
        if not path.is_file() or path.suffix.lower() != ".zip":
            return None
        with opened_zip(path) as archive:
            names = [entry.filename for entry in archive.infolist()]
            found = [name for name in names if name == manifest or name.endswith(f"/{manifest}")]
            if not found:
                return None
            root = min(found, key=len).removesuffix(manifest)
            for entry in archive.infolist():
                _require_harmless(entry, root, path)
            if len(set(names)) < len(names):
                raise InputError(f"{path} holds two files of one name", _AGAIN)
        return cls(path, root, is_zip=True)

    def has(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        if not self.is_zip:
            return (self.path / name).is_file()
        with opened_zip(self.path) as archive:
            return self.root + name in archive.namelist()

    def read(self, name: str) -> bytes:
        """Return the content of a file; `InputError` if it cannot be read."""
        if not self.is_zip:
            return (self.path / name).read_bytes()
        with opened_zip(self.path) as archive:
            return archive.read(self.root + name)

    def json(self, name: str) -> Any:
        """Return the value of a JSON file; raises as `segfit.files.read_json`."""
        if not self.is_zip:
            return read_json(self.path / name)
        with opened_zip(self.path) as archive:
            if archive.getinfo(self.root + name).file_size > _LARGEST_JSON:
                raise InputError(f"{self.path / name} is too large for what it is", _AGAIN)
        try:
            return parsed_json(self.read(name).decode("utf-8-sig"), self.path / name)
        except UnicodeDecodeError:
            raise InputError(f"{self.path / name} is not valid JSON (it is no UTF-8 text)", _AGAIN) from None

    def hash(self, name: str) -> str:
        """Return the SHA-256 of a file as hex."""
        if not self.is_zip:
            return hash_file(self.path / name)
        with opened_zip(self.path) as archive, archive.open(self.root + name) as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()  # type: ignore[arg-type]


@contextmanager
def opened_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip; whatever is raised where it is damaged becomes an `InputError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _DAMAGE as error:
        raise InputError(f"{path} cannot be read ({reason_of(error)})", _AGAIN) from None


def _require_harmless(entry: zipfile.ZipInfo, root: str, path: Path) -> None:
    """Raise `InputError` for an entry that no model has, or that is far larger than it is packed."""
    name = entry.filename.removeprefix(root)
    if entry.is_dir() and root.startswith(entry.filename):
        return
    plain = entry.filename.startswith(root) and name not in ("", ".", "..") and not set(name) & set("/\\\0:")
    if not plain or root.count("/") > 1 or root.startswith(("/", ".")):
        raise InputError(f"{path} holds {entry.filename!r}, which no model has", "give the zip that segfit wrote")
    if entry.compress_type not in _PLAIN or entry.flag_bits & 1:
        raise InputError(f"{path} holds {name}, packed or locked as no model is", "give the zip that segfit wrote")
    require_no_bomb(entry, path)


def require_no_bomb(entry: zipfile.ZipInfo, path: Path) -> None:
    """Raise `InputError` for an entry that is far larger than it is packed."""
    if entry.file_size > _MOST_PACKED * entry.compress_size + _ALWAYS_FINE:
        raise InputError(f"{path} holds {entry.filename}, which is far larger than it is packed", _AGAIN)


def pack(folder: Path, path: Path) -> None:
    """Write the files of a folder as a zip; numbers, which do not get smaller, are stored as they are."""
    with zipfile.ZipFile(path, "x") as archive:
        for file in sorted(folder.iterdir()):
            how = zipfile.ZIP_STORED if file.suffix == ".safetensors" else zipfile.ZIP_DEFLATED
            archive.write(file, file.name, compress_type=how)
