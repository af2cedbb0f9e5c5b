"""Files that several readers look into, one after the other, and that are opened once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BufferedReader
from pathlib import Path
from typing import Self

from segfit.files import require_regular

__all__ = ["OpenFiles", "opened", "shared"]

_MOST_OPEN = 16  # files at a time, far below what systems allow: of a series of slices each is needed once


class OpenFiles:
    """Files that stay open until the end of a ``with`` block; for one thread.

    Parameters
    ----------
    on_open : is given every file when it is opened, such as to hash it; may leave it at any place
    """

    def __init__(self, on_open: Callable[[Path, BufferedReader], object] = lambda *_: None) -> None:
        self._on_open = on_open
        self._open: dict[Path, BufferedReader] = {}
        self._starts: dict[Path, bytes] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def at_start(self, path: Path) -> BufferedReader:
        """Return a file, at its start; it stays open while a few others are looked into."""
        handle = self._open.pop(path, None)
        if handle is None:
            if len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            handle = _open(path)
            self._open[path] = handle
            self._on_open(path, handle)
        self._open[path] = handle  # the last one used
        handle.seek(0)
        return handle

    def start(self, path: Path, length: int) -> bytes:
        """Return the first bytes of a file, of always the same `length`; remembered when others are looked into."""
        if path not in self._starts:
            self._starts[path] = self.at_start(path).read(length)
        return self._starts[path]


def _open(path: Path) -> BufferedReader:
    require_regular(path)
    return path.open("rb")


@contextmanager
def opened(path: Path, files: OpenFiles | None = None) -> Iterator[BufferedReader]:
    """Open a file for reading, unless it is among files that are open."""
    if files is not None:
        yield files.at_start(path)
        return
    with _open(path) as handle:
        yield handle


def shared(files: OpenFiles | None) -> AbstractContextManager[OpenFiles]:
    """Open files for a block, unless there are open ones, which stay so."""
    return OpenFiles() if files is None else nullcontext(files)
