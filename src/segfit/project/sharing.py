"""Results that several commands make together: each is made once, by whoever comes first; the others wait for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from secrets import token_hex
from time import monotonic, sleep
from typing import TYPE_CHECKING

from segfit.errors import InputError, warning
from segfit.files import file_system_time, missing_abilities
from segfit.progress import Progress
from segfit.project.folder import ProjectFolder
from segfit.project.lease import Lease

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = ["Locks", "Task"]

_LOOK_S = 0.5  # between two looks at what others do, at least
_REST = 10  # times as long as the looks took: many commands that wait must not keep a file server busy
_LONGEST_S = 30.0
_ENTRANCE = "entrance"  # lock of who begins some work, or keeps others from it
_WORK = "work "  # begins the names of the locks of those who are at work


@dataclass(frozen=True, slots=True)
class Task:
    """Something that leaves a result.

    Parameters
    ----------
    name : what it is, for people; one name in a project
    is_done : whether the result counts
    do : makes it, or goes on making it
    """

    name: str
    is_done: Callable[[], bool]
    do: Callable[[], object]


class Locks:
    """The locks of a project, one for each result.

    A lock goes with its process, however that ends. A lease goes with each lock, and takes its place on hosts where the
    file system has none: those with locks and those without keep out of each other's way.
    """

    def __init__(self, folder: ProjectFolder, progress: Progress) -> None:
        self._folder, self._progress = folder, progress
        self._known: dict[str, tuple[Lease, FileLock | None]] = {}

    def require(self) -> None:
        """Raise `StageError` if another command took over what this one holds, as it was silent for too long."""
        for lease, _ in list(self._known.values()):  # work in threads reports too
            lease.require()

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Hold the lock of a result; waits while another command has it."""
        if not self._taken(name):
            self._progress.note(f"waiting for another segfit in this project: {name}")
            while not self._taken(name):
                sleep(_LOOK_S)
        try:
            yield
        finally:
            self._release(name)

    def share(self, tasks: Sequence[Task]) -> None:
        """Do every task that no other command is doing, and wait for those that others do."""
        left, told = list(tasks), set[str]()
        while left:
            begun = monotonic()
            others = [task for task in left if not self._done_now(task)]
            if len(others) == len(left):
                for task in others:
                    if task.name not in told:
                        self._progress.note(f"waiting for another segfit in this project: {task.name}")
                        told.add(task.name)
                sleep(min(max(_LOOK_S, _REST * (monotonic() - begun)), _LONGEST_S))
            left = others

    def _done_now(self, task: Task) -> bool:
        """Do a task unless it is done, or another command is doing it; return False in this case."""
        if task.is_done():
            return True
        if not self._taken(task.name):
            return False
        try:
            if not task.is_done():
                task.do()
        finally:
            self._release(task.name)
        return True

    @contextmanager
    def joined(self, work: str) -> Iterator[float]:
        """Be one of the commands at some work; yields the seconds since the first of those that still are began it.

        When that was stands in the name of a lock that each of them has for itself.
        """
        with ExitStack() as stack:
            with self.held(_ENTRANCE):
                now_ms, begins = int(1000 * file_system_time(self._folder.locks)), f"{_WORK}{work} since "
                others = [int(name.removeprefix(begins).split()[0]) for name in self._held_by_others(begins)]
                begun_ms = min([now_ms, *others])
                name = f"{begins}{begun_ms} {token_hex(4)}"
                stack.callback(self._forget, name)
                stack.enter_context(self.held(name))
            yield (now_ms - begun_ms) / 1000

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep others from beginning any work; raise `InputError` if one is at work."""
        with self.held(_ENTRANCE), self.held("options"):
            if self._held_by_others():
                raise InputError(f"another segfit is at work in {self._folder.root}", "try again when it has ended")
            yield

    def _held_by_others(self, begins: str = "") -> list[str]:
        """Return the names of the locks that other commands hold; the entrance is held meanwhile."""
        names = {path.name.split(".")[0] for path in self._folder.locks.glob("*.l*")}
        free = {name for name in names if name.startswith(begins) and self._taken(name)}
        for name in free:
            self._release(name)
            if name.startswith(_WORK):  # of a command that was killed
                self._forget(name)
        return sorted(name for name in names - free if name.startswith(begins))

    def _forget(self, name: str) -> None:
        """Remove a lock that nobody will take any more."""
        del self._known[name]
        for path in self._folder.locks.glob(f"{name}.*"):
            with suppress(OSError):  # somebody looks at it
                path.unlink()

    def _taken(self, name: str) -> bool:
        """Take a lock, if nobody has it."""
        from filelock import FileLock, Timeout

        if name not in self._known:
            path = self._folder.lock(name)
            self._known[name] = Lease(path, with_lock=self._has_locks), FileLock(path) if self._has_locks else None
        lease, lock = self._known[name]
        if lock is None:
            return lease.take()
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        taken = False
        try:
            taken = lease.take()
        finally:
            if not taken:
                lock.release()
        return taken

    def _release(self, name: str) -> None:
        """Give back a lock that was taken."""
        lease, lock = self._known[name]
        lease.release()
        if lock is not None:
            lock.release()

    @cached_property
    def _has_locks(self) -> bool:
        """Whether the file system has locks; says what it does not have."""
        self._folder.locks.mkdir(parents=True, exist_ok=True)
        missing = missing_abilities(self._folder.locks)
        for ability, consequence in (
            ("locks", "that a command on another host was killed is known after a minute only"),
            ("chmod", "who may read the project is as it is mounted"),
            ("fsync", "what was written last may be lost with the power, and is made again then"),
        ):
            if ability in missing:
                problem = f"the file system of {self._folder.root} has no {ability}: {consequence}"
                self._progress.warn(warning("file_system", problem))
        return "locks" not in missing
