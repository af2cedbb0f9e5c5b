"""A file that stops whatever is at work in a project when it appears or is touched."""

from __future__ import annotations

import os
from pathlib import Path

from segfit.errors import StoppedError

__all__ = ["StopFile"]


class StopFile:
    """What one session knows of it: the file as it was when its work began asks for nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._stamp()

    def ask(self) -> None:
        """Ask every command and session at work in the project to stop, this one included."""
        self._path.touch()
        stamp = self._path.stat().st_mtime_ns
        if stamp == self._known:  # within one tick of the clock
            os.utime(self._path, ns=(stamp + 1, stamp + 1))

    def begin(self) -> None:
        """Take the file as it is for asking for nothing."""
        self._known = self._stamp()

    def require_none(self) -> None:
        """Raise `StoppedError` if somebody has asked since the work began."""
        if self._stamp() not in (None, self._known):
            self.begin()
            raise StoppedError(f"stopped, since {self._path} asked for it", "the same command goes on where it was")

    def _stamp(self) -> int | None:
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return None
