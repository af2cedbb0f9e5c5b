"""Tasks for worker processes: they must be importable there, and cheap to import."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import NoReturn

from segfit.errors import DatasetError, Problem


def double(value: int) -> int:
    return 2 * value


def process(_: object = None) -> int:
    return os.getpid()


def environment(name: str) -> str | None:
    return os.environ.get(name)


def fail(value: int) -> NoReturn:
    raise ValueError(f"{value} is a bad number")


class StubbornError(Exception):
    """Packs and does not unpack."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def fail_stubbornly() -> NoReturn:
    raise StubbornError("un", "packable")


def give_unpicklable() -> object:
    return threading.Lock()


def refuse(problem: Problem) -> NoReturn:
    raise DatasetError([problem])


def die(number: int = signal.SIGKILL, megabytes: int = 0) -> NoReturn:
    held = bytes(range(256)) * (4096 * megabytes)
    time.sleep(0.5 if held else 0.0)  # long enough to be seen
    os.kill(os.getpid(), number)
    raise AssertionError("unreachable")


def leave(code: int) -> NoReturn:
    os._exit(code)


def die_once(folder: Path, value: int) -> int:
    """Be killed at the first attempt."""
    marker = folder / f"tried-{value}"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def note_and_die(folder: Path, case: str) -> NoReturn:
    """Count the attempts and be killed."""
    (folder / f"{case}-{time.monotonic_ns()}").touch()
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def overlap(folder: Path, case: str, seconds: float = 0.2) -> list[str]:
    """Return which cases were in work during this one."""
    mark = folder / f"working-{case}"
    mark.touch()
    seen: set[str] = set()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        seen |= {path.name.removeprefix("working-") for path in folder.glob("working-*")}
        time.sleep(0.01)
    mark.unlink()
    return sorted(seen)


def overlap_or_die(folder: Path, case: str) -> list[str]:
    """Be killed until nothing else is in work; case "sick" only."""
    found = overlap(folder, case)
    if case == "sick" and found != ["sick"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return found


def exhaust(megabytes: int) -> int:
    """Allocate more than this process may have."""
    resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    return len(bytearray((megabytes + 1) << 20))


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def compute(seconds: float) -> float:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return seconds


def tidy(folder: Path, seconds: float) -> None:
    """Leave nothing behind, however this ends."""
    folder.mkdir()
    unfinished = folder / "unfinished"
    unfinished.touch()
    try:
        time.sleep(seconds)
    finally:
        unfinished.unlink()


def hold_alive(folder: str, number: int) -> None:
    """Say who this is and do not end."""
    (Path(folder) / str(number)).write_text(str(os.getpid()))
    time.sleep(3600)


def hold_after_first(folder: str, number: int) -> None:
    """Do not end, but for the first."""
    if number:
        hold_alive(folder, number)


def die_if(folder: Path, case: str) -> str:
    """Be killed with the cases b and e."""
    if case in "be":
        note_and_die(folder, case)
    return case


def note_and_die_in(folder: Path) -> NoReturn:
    note_and_die(folder, "sick")
