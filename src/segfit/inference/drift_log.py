"""The drift log: one line of JSON for each predicted case, which several processes may append to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import AwareDatetime, ValidationError

from segfit.errors import InputError
from segfit.evaluation.measurement import Measurement
from segfit.evaluation.quality import ClassQuality
from segfit.files import Record, read_text
from segfit.fingerprint.training_images import Fact

if TYPE_CHECKING:
    from segfit.inference.model import Prediction

__all__ = ["LoggedCase", "append_case", "log_line", "read_log", "require_log"]


class LoggedCase(Record):
    """What is kept of a predicted case: no voxel of it, and of its files nothing but the name of the case."""

    schema_version: int = 1
    date: AwareDatetime
    case: str
    model: str  # `ModelManifest.identity`
    segfit: str
    facts: tuple[Fact, ...] = ()
    warnings: tuple[str, ...] = ()  # codes
    measurements: tuple[Measurement, ...] = ()
    quality: tuple[ClassQuality, ...] = ()


def log_line(case: str, model: str, prediction: Prediction) -> LoggedCase:
    """Return what is kept of a prediction."""
    return LoggedCase(
        date=datetime.now(UTC),
        case=case,
        model=model,
        segfit=metadata.version("segfit"),
        facts=prediction.facts,
        warnings=tuple(dict.fromkeys(item.code for item in prediction.warnings if item.code)),
        measurements=tuple(prediction.measurements),
        quality=prediction.quality,
    )


def require_log(path: Path) -> None:
    """Raise `InputError` if a log cannot be written to, or if the file is something else; nothing is made."""
    if path.exists():
        if not path.is_file():
            raise InputError(f"{path} is no file", "give the file of a drift log, or a new name")
        if path.stat().st_size:
            _checked(path)
    elif not path.absolute().parent.is_dir():
        raise InputError(f"the folder of {path} does not exist", "make it, or give another place for the log")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise InputError(f"{path} cannot be written", "change its permissions, or give another place for the log")


def append_case(path: Path, case: LoggedCase) -> None:
    """Append a line whole, whoever else appends; a line that was cut off by a crash stays a line of its own."""
    with path.open("ab+", buffering=0) as handle, _locked(handle.fileno()):
        end = handle.seek(0, os.SEEK_END)
        whole = True
        if end:
            handle.seek(end - 1)
            whole = handle.read(1) == b"\n"
        line = case.model_dump_json().encode() + b"\n"
        handle.write(line if whole else b"\n" + line)


@contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    """Keep other processes out until the block ends, where there are such locks; closing the file lets them in."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield


def read_log(path: Path) -> tuple[list[LoggedCase], int]:
    """Return the cases of a log by date, and how many lines are damaged.

    A case that was predicted again by the same model from the same image counts once, as of the last time.
    """
    cases, damaged = _checked(path)
    last = {(case.case, case.model, case.facts): case for case in sorted(cases, key=lambda case: case.date)}
    return sorted(last.values(), key=lambda case: case.date), damaged


def _checked(path: Path) -> tuple[list[LoggedCase], int]:
    try:
        lines = [line for line in read_text(path).splitlines() if line.strip()]
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", "give the file that segfit predict --log wrote") from None
    except UnicodeDecodeError:
        lines = ["no text"]
    cases, damaged = list[LoggedCase](), 0
    for line in lines:
        try:
            cases.append(LoggedCase.model_validate_json(line))
        except ValidationError:
            damaged += 1
    if damaged and not cases:
        raise InputError(f"{path} is no drift log", "give a file that segfit predict --log wrote, or a new one")
    return cases, damaged
