"""What the stages of a project used: seconds, memory, disk. One JSON object per line, appended."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from segfit.errors import StageError
from segfit.execution.memory import PeakWatch
from segfit.records import Use

__all__ = ["StageLog", "StageRecord", "told_of_files"]


class StageRecord(Use):
    """One execution of one stage, finished or stopped."""

    stage: str
    started: float  # seconds since 1970
    finished: bool


class StageLog:
    """What the stages of a project folder used."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def of(self, stage: str) -> Iterator[Callable[[], Use]]:
        """Account for a stage, also when it is interrupted; a killed one leaves no line. Yields what tells its use.

        OS errors become a `StageError`.
        """
        started, clock, processor = time.time(), time.perf_counter(), _processor_seconds()
        finished = False
        with told_of_files(stage), PeakWatch() as memory:

            def use() -> Use:
                return Use(
                    seconds=round(time.perf_counter() - clock, 3),
                    cpu_seconds=round(_processor_seconds() - processor, 3),
                    peak_memory_gb=round(memory.peak_bytes() / 2**30, 3),
                )

            try:
                yield use
                finished = True
            finally:
                record = StageRecord(stage=stage, started=round(started, 3), finished=finished, **use().model_dump())
                with self._path.open("a", encoding="utf-8") as handle:
                    handle.write(record.model_dump_json() + "\n")

    def records(self) -> list[StageRecord]:
        """Return all records; a line torn by a crash is left out."""
        if not self._path.exists():
            return []
        found = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(StageRecord.model_validate(json.loads(line)))
            except ValueError:
                continue
        return found


@contextmanager
def told_of_files(stage: str) -> Iterator[None]:
    """Turn OS errors into a `StageError` that says what could not go on."""
    try:
        yield
    except OSError as error:
        file = f": {error.filename}" if error.filename else ""
        raise StageError(
            f"stage {stage} failed ({error.strerror or error}{file})", "fix that and rerun the command to resume"
        ) from error


def _processor_seconds() -> float:
    """Return the processor time of this process and of those that it started and that ended."""
    return sum(os.times()[:4])
