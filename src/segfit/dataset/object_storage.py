"""Datasets and images in object storage (``s3://BUCKET/FOLDER``): brought into a local folder before they are read.

Readers, hashes and workers see files. A file that is there as the storage lists it, by size and ETag (or time), is not
fetched again. fsspec knows the protocols, and its libraries find credentials by themselves, as in the environment of
the process: none is taken, passed on or written here.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from time import monotonic
from typing import Any, BinaryIO

from segfit.errors import InputError, reason_of
from segfit.execution.execution import Execution
from segfit.files import Document, remove_leftovers, write_file
from segfit.text import gigabytes

__all__ = ["ORIGIN", "fetch", "url_of"]

ORIGIN = "origin.json"
"""In the folder of a copy: where it came from, and what was fetched."""
_URL = re.compile(r"([a-z][a-z0-9+]+):/+([^/].*)", re.DOTALL)  # of two slashes a path has made one
_SECRET = re.compile(r"[^/]*:[^/]*@.*|.*[?&](X-Amz-|sig=|Signature=).*", re.DOTALL)
_S3 = ("s3", "s3a")
_CONNECT_S = 10  # tried five times, instead of 60 s each
_TABLES = (".csv", ".json")  # name files beside them
_AT_ONCE = 16  # small files wait for answers more than for bytes
_BLOCK = 8 << 20  # bytes
_KEPT_S = 30.0  # between two writings of what was fetched
_MARKS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "updated", "created")


class _Origin(Document):
    """origin.json."""

    url: str
    files: dict[str, tuple[int, str, int]] = {}  # size and mark as they were listed, time in ns here


def url_of(place: Any) -> str | None:
    """Return the URL that a place is, as text or as the path that was made of it; None where it is a local one."""
    if not isinstance(place, str | os.PathLike) or not isinstance(text := os.fspath(place), str):
        return None
    found = _URL.fullmatch(text)
    if found is None:
        return None
    with suppress(OSError, ValueError):  # a name that no file can have
        if Path(text).exists():
            return None
    if _SECRET.fullmatch(found[2]):
        problem = (
            f"the {found[1]}:// URL holds credentials, which would be kept in files and seen in lists of processes"
        )
        raise InputError(problem, "leave them out, and set them in the environment")
    return f"{found[1]}://{'/' if found[1] == 'file' else ''}{found[2].rstrip('/')}"


def fetch(url: str, folder: Path, execution: Execution) -> Path:
    """Bring the copy in a folder up to date with what lies at a URL; return the file or folder that it is here.

    Of a table the files in its folder come too. What is gone there is removed here. If it is interrupted, the same call
    goes on. Raises `InputError` for a URL or credentials that do not do, and for what changes meanwhile.
    """
    storage, place = _opened(url)
    listed, base = _listed(storage, place, url)
    copy = folder / PurePosixPath(base).name
    origin = _known(folder, url)
    files = {path: entry for path, entry in origin.files.items() if _is_here(copy / path, entry)}
    for path in files.keys() - listed.keys():
        (copy / path).unlink()
        with suppress(OSError):  # it holds others
            (copy / path).parent.rmdir()
        del files[path]
    missing = [path for path, entry in listed.items() if path not in files or files[path][:2] != entry[:2]]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, deep=True)
        _require_room(url, folder, sum(listed[path][0] for path in missing))
    _fetch_all(storage, missing, listed, copy, origin.model_copy(update={"files": files}), execution)
    return copy if base == place else copy / PurePosixPath(place).name


def _fetch_all(
    storage: Any,
    missing: list[str],
    listed: Mapping[str, tuple[int, str, str]],
    copy: Path,
    origin: _Origin,
    execution: Execution,
) -> None:
    """Fetch files, and keep a record of those that are here, from time to time and however it ends."""
    files, kept = dict(origin.files), monotonic()

    def keep() -> None:
        origin.model_copy(update={"files": files}).save(copy.parent / ORIGIN)

    if not missing:
        keep()
        return
    work = partial(_fetch_one, storage, listed, copy)
    try:
        for path, time_ns in replace(execution, workers=_AT_ONCE).map(work, missing, description="fetching"):
            files[path] = (*listed[path][:2], time_ns)
            if monotonic() - kept > _KEPT_S:
                keep()
                kept = monotonic()
    finally:
        with suppress(OSError):  # a full disk, which is told already
            keep()


def _fetch_one(storage: Any, listed: Mapping[str, tuple[int, str, str]], copy: Path, path: str) -> int:
    """Fetch a file; return its time here."""
    size, _, key = listed[path]
    url = storage.unstrip_protocol(key)
    gone, failed = f"{url} changed or went while it was fetched", f"{url} cannot be fetched"
    again = "run the command again when nobody writes there"

    def fill(handle: BinaryIO) -> None:
        with _told(gone, failed, again):
            remote = storage.open(key, "rb", block_size=_BLOCK, cache_type="none")
        with remote:
            while True:
                with _told(gone, failed, again):
                    block = remote.read(_BLOCK)
                if not block:
                    break
                handle.write(block)
        if handle.tell() != size:
            raise InputError(gone, again)

    write_file(copy / path, fill)
    return (copy / path).stat().st_mtime_ns


def _opened(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the place in it."""
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {"config_kwargs": {"connect_timeout": _CONNECT_S}} if protocol in _S3 else {}
    try:
        storage, place = url_to_fs(url, **options)
    except ImportError:
        action = "pip install 'segfit[s3]'" if protocol in _S3 else "install what fsspec needs for it"
        raise InputError(f"{protocol}:// needs a package that is not installed", action) from None
    except Exception as error:  # noqa: BLE001 - a file system may raise anything where it begins
        raise InputError(
            f"{url} cannot be read ({reason_of(error)})", "give a folder, or a URL as s3://BUCKET/FOLDER"
        ) from None
    return storage, str(place)


def _listed(storage: Any, place: str, url: str) -> tuple[dict[str, tuple[int, str, str]], str]:
    """Return size, mark and key of all files by their places in the copy, and the folder that they are in there."""
    absent = f"{url} does not exist: no such bucket, folder or file"
    with _told(absent, f"{url} cannot be read", "correct the URL"):
        storage.invalidate_cache()
        found = storage.find(place, detail=True)
        base = str(PurePosixPath(place).parent) if place in found else place
        if base != place and place.lower().endswith(_TABLES):
            found = storage.find(base, detail=True)
    listed: dict[str, tuple[int, str, str]] = {}
    for key, info in found.items():
        path = key.removeprefix(base).lstrip("/")
        if info.get("type") != "file" or not path or key.endswith("/"):  # what consoles make for an empty folder
            continue
        if set(PurePosixPath(path).parts) & {"..", "."} or "//" in path or "\\" in path or "\0" in path:
            raise InputError(f"{url} has the key {key!r}, which no file can have as its name", "rename it there")
        mark = next((str(info[name]) for name in _MARKS if info.get(name)), "")
        listed[path] = (int(info["size"]), mark, key)
    if not listed:
        raise InputError(absent, "correct the URL")
    return listed, base


def _known(folder: Path, url: str) -> _Origin:
    """Return what is known of the copy in a folder; raise `InputError` if it is one of something else."""
    try:
        origin = _Origin.load(folder / ORIGIN)
    except InputError:  # none, or damaged: all is fetched again
        return _Origin(url=url)
    if origin.url != url:
        raise InputError(f"{folder} holds a copy of {origin.url}, not of {url}", "choose another folder with --out")
    return origin


def _is_here(path: Path, entry: tuple[int, str, int]) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (entry[0], entry[2])


def _require_room(url: str, folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        problem = (
            f"{gigabytes(wanted / 2**30)} of {url} are to be fetched, and {folder} has {gigabytes(free / 2**30)} left"
        )
        raise InputError(problem, "free space, or choose another folder with --out")


@contextmanager
def _told(absent: str, failed: str, action: str) -> Iterator[None]:
    """Tell in one sentence what a storage refuses; how its libraries say so is theirs."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(absent, action) from None
    except PermissionError as error:
        action = "set credentials that may read it in the environment"
        raise InputError(f"{failed}: access is denied ({reason_of(error)})", action) from None
    except Exception as error:  # noqa: BLE001 - botocore's, aiohttp's and whatever other libraries raise
        if "Credentials" in type(error).__name__:
            action = "set them in the environment (for s3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
            raise InputError(f"{failed}: no credentials were found", action) from None
        again = "run the command again when it answers: what was fetched is kept"
        raise InputError(f"{failed} ({reason_of(error)})", again) from None
