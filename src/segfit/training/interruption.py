"""Ctrl-C and SIGTERM wait for the end of the running step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

__all__ = ["Interruption"]


class Interruption:
    """A context in which SIGINT and SIGTERM are only noted, and raised when the loop asks; a second one does not wait.

    Handlers can be set in the main thread only; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._previous: dict[int, Any] = {}

    def raise_if_asked(self) -> None:
        """Raise `KeyboardInterrupt` or, for SIGTERM, `SystemExit` if there was such a signal."""
        if self._asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self._asked:
            raise SystemExit(128 + self._asked)  # the exit code of a process ended by this signal

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _ask(self, number: int, _: FrameType | None) -> None:
        again, self._asked = self._asked, number
        if again:
            self.raise_if_asked()
