"""Tasks for worker processes: they must be importable there, and cheap to import."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from segfit.errors import DatasetError, Problem


def named(case: str, task: Callable[..., Any]) -> Callable[..., Any]:
    """The task as one of a case."""
    call = partial(task)
    call.__name__ = case  # type: ignore[attr-defined]
    return call


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
    time.sleep(1.0 if held else 0.0)  # long enough to be seen: there is a look every tenth of a second
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


PATIENCE_S = 60.0


def wait_for(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Wait until something holds, however busy the machine is; fail if it never does."""
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("what was waited for did not happen")
        time.sleep(0.01)


def wait_for_file(path: Path) -> None:
    wait_for(path.exists)


def die_twice_beside_others(folder: Path, case: str) -> list[str]:
    """Return what else was in work beside case "sick" at its third attempt.

    It is killed at the first attempt once three others are in work, and at the second once one is. The others stay in
    work until a file "warned-1" or, for those that start after that, "warned-2" says that it waits for its next one.
    """

    def marks(kind: str) -> list[str]:
        return sorted(path.name.removeprefix(kind) for path in folder.glob(f"{kind}*"))

    if case == "sick":
        attempt = len(marks("tried-"))
        (folder / f"tried-{attempt}").touch()
        if attempt < 2:
            wait_for(lambda: len(marks("working-")) >= (3, 1)[attempt])
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)  # time for others to start that should not
        return marks("working-")
    warned = len(marks("warned-"))
    mark = folder / f"working-{case}"
    mark.touch()
    wait_for(lambda: len(marks("warned-")) > min(warned, 1))
    mark.unlink()
    return []


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


def hold_until(path: Path, number: int) -> int:
    """End when there is a file."""
    wait_for_file(path)
    return number


def count_beside(folder: Path, most: int, number: int) -> int:
    """Return how many of these were seen in work at once; the first ones wait until there are as many as expected."""

    def seen() -> int:
        return len(list(folder.glob("working-*")))

    mark = folder / f"working-{number}"
    mark.touch()
    if not (folder / "enough").exists():
        wait_for(lambda: seen() >= most or (folder / "enough").exists())
        time.sleep(0.2)  # time for others to start that should not
    found = seen()
    (folder / "enough").touch()
    mark.unlink()
    return found


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
