"""Work on cases that ends its worker process, as the system does with one that takes too much memory."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from segfit.dataset import checks
from segfit.dataset.layouts import common
from segfit.dataset.manifest import Case
from segfit.nnunet import dataset_export

SICK = "b"


def _be_killed() -> None:
    ballast = bytearray(64 << 20)  # touched, so that it is held
    for _ in range(20):  # long enough to be seen
        ballast = bytearray(ballast)
    os.kill(os.getpid(), signal.SIGKILL)


def check_or_be_killed(item: tuple[int, Case, bool], **named: Any) -> object:
    if item[1].id == SICK:
        _be_killed()
    return checks._check_item(item, **named)


def check_or_run_out(item: tuple[int, Case, bool], **named: Any) -> object:
    if item[1].id == SICK:
        raise MemoryError
    return checks._check_item(item, **named)


def values_or_be_killed(path: Path) -> object:
    if path.name.startswith(SICK):
        _be_killed()
    return common._values_of(path)


def write_or_be_killed_once(item: tuple[str, Case], *, folder: Path, **named: Any) -> None:
    """Be killed in the middle of writing a file."""
    mark = folder.parents[1] / "was-killed"  # beside the partial folder that it is written in
    if item[1].id == SICK and not mark.exists():
        mark.touch()
        os.fsync = lambda _: _be_killed()
    dataset_export._write_case(item, folder=folder, **named)
