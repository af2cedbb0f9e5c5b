"""The log of a training: one JSON object per line, appended and flushed, in the order of the steps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TextIO

from segfit.files import write_text

__all__ = ["EventLog", "last_event", "read_events"]

_BLOCK = 2**16  # bytes that are read at once from the end of a log


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a log; a missing log is empty, a line torn by a crash ends it."""
    events: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


def last_event(path: Path, key: str) -> dict[str, Any] | None:
    """Return the last event of a log that has a key, None if none has; no more than the end of the log is read."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        start, rest = file.seek(0, os.SEEK_END), b""
        while start > 0:
            end, start = start, max(0, start - _BLOCK)
            file.seek(start)
            rest, *lines = (file.read(end - start) + rest).split(b"\n")
            for line in reversed(lines if start else [rest, *lines]):
                with suppress(json.JSONDecodeError, UnicodeDecodeError):  # the last one may be torn
                    event = json.loads(line)
                    if key in event:
                        return dict(event)
    return None


class EventLog:
    """Appends events to a file.

    Opening for `step` drops every event of a later step: a training that goes on from a saved state repeats the steps
    after it, and the log stays monotone. `share` tells for step and seconds which share of the budget was used then, if
    it is another budget than before. `follower` is told each event once it is in the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        step: int,
        share: Callable[[int, float], float] | None = None,
        follower: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._path = path
        self._follower = follower
        self._handle = self._opened(step, share)

    def _opened(self, step: int, share: Callable[[int, float], float] | None = None) -> TextIO:
        kept = [event for event in read_events(self._path) if event.get("step", 0) <= step] if step else []
        for event in kept:
            if share is not None and event.keys() >= {"share", "seconds"}:
                event["share"] = share(event["step"], event["seconds"])
        write_text(self._path, "".join(_line(event) for event in kept))
        return self._path.open("a", encoding="utf-8")

    def go_back(self, step: int) -> None:
        """Drop the events of later steps."""
        self._handle.close()
        self._handle = self._opened(step)

    def write(self, kind: str, *, step: int, **facts: Any) -> None:
        """Append one event; the facts are JSON values without NaN."""
        event = {"kind": kind, "step": step, **facts}
        self._handle.write(_line(event))
        self._handle.flush()
        if self._follower is not None:
            self._follower(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event, allow_nan=False, ensure_ascii=False) + "\n"
