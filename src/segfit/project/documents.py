"""Results of stages that are one document: made once, by one command of several, and written with their record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from segfit.files import Document, write_bytes
from segfit.project.accounts import Accounts, told_of_files
from segfit.project.sharing import Locks
from segfit.records import Key, Use, recall, store

__all__ = ["Documents", "load", "publish"]

_Document = TypeVar("_Document", bound=Document)


class Documents:
    """Finds documents of a project, or has them made."""

    def __init__(self, accounts: Accounts, locks: Locks) -> None:
        self._accounts, self._locks = accounts, locks

    def get(
        self,
        kind: type[_Document],
        path: Path,
        key: Key,
        make: Callable[[], _Document],
    ) -> _Document:
        """Return the document at `path` if it has this key; else make it and write it."""
        return self.resolve(key.stage, lambda: recall(kind, path, key), lambda use: store(make(), path, key, use()))

    def resolve(
        self, stage: str, known: Callable[[], _Document | None], make: Callable[[Callable[[], Use]], _Document]
    ) -> _Document:
        """Return the document of a stage that is `known`, or `make` and write it, given what tells its use."""
        found = known()
        if found is not None:
            return found
        with self._locks.held(stage):
            found = known()  # others may have made it meanwhile
            if found is None:
                with self._accounts.of(stage) as use:
                    found = make(use)
        return found


def publish(source: Path, target: Path) -> None:
    """Have a copy of a result at the top of the project."""
    content = source.read_bytes()
    if not target.is_file() or target.read_bytes() != content:
        with told_of_files("results"):
            write_bytes(target, content)


def load(kind: type[_Document], path: Path) -> _Document | None:
    """Read a document if it is there."""
    return kind.load(path) if path.exists() else None
