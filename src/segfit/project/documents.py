"""Results of stages that are one document: made once, by one command of several, and written with their record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from segfit.files import Document, write_bytes
from segfit.project.sharing import Locks
from segfit.project.stage_log import StageLog, told_of_files
from segfit.records import Key, Results, Use

__all__ = ["Documents", "load"]

_Document = TypeVar("_Document", bound=Document)


class Documents:
    """Finds documents of a project, or has them made."""

    def __init__(self, results: Results, stage_log: StageLog, locks: Locks) -> None:
        self._results, self._stage_log, self._locks = results, stage_log, locks

    def get(
        self,
        kind: type[_Document],
        path: Path,
        key: Key,
        make: Callable[[], _Document],
    ) -> _Document:
        """Return the document at `path` if it has this key; else make it and write it."""
        return self.resolve(
            key.stage,
            lambda: self._results.recall(kind, path, key),
            lambda use: self._results.store(make(), path, key, use()),
        )

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
                with self._stage_log.of(stage) as use:
                    found = make(use)
        return found

    def publish(self, source: Path, target: Path) -> None:
        """Have a copy of a result at the top of the project."""
        content = self._results.read(source, Path.read_bytes) or source.read_bytes()
        if self._results.read(target, Path.read_bytes) != content:
            with told_of_files("results"):
                write_bytes(target, content)


def load(kind: type[_Document], path: Path) -> _Document | None:
    """Read a document if it is there."""
    return kind.load(path) if path.exists() else None
