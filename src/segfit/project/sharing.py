"""Results that several commands make together: each is made once, by whoever comes first; the others wait for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from time import sleep
from typing import TYPE_CHECKING

from segfit.files import missing_abilities
from segfit.progress import Progress
from segfit.project.folder import ProjectFolder
from segfit.project.lease import Lease

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = ["Locks", "Task"]

_LOOK_S = 0.5  # between two looks at what others do


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

    A lock goes with its process, however that ends. Where the file system has no locks, leases take their place.
    """

    def __init__(self, folder: ProjectFolder, progress: Progress) -> None:
        self._folder, self._progress = folder, progress
        self._known: dict[str, FileLock | Lease] = {}

    def require(self) -> None:
        """Raise `StageError` if another command took over what this one holds, as it was silent for too long."""
        for lock in self._known.values():
            if isinstance(lock, Lease):
                lock.require()

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
            self._known[name].release()

    def share(self, tasks: Sequence[Task]) -> None:
        """Do every task that no other command is doing, and wait for those that others do."""
        left, told = list(tasks), set[str]()
        while left:
            left = [task for task in left if not task.is_done()]
            taken = next((task for task in left if self._taken(task.name)), None)
            if taken is None:
                for task in left:
                    if task.name not in told:
                        self._progress.note(f"waiting for another segfit in this project: {task.name}")
                        told.add(task.name)
                sleep(_LOOK_S if left else 0.0)
                continue
            try:
                if not taken.is_done():
                    taken.do()
                left.remove(taken)
            finally:
                self._known[taken.name].release()

    def held_by_others(self) -> list[str]:
        """Return the names of the locks that other commands hold."""
        names = sorted({path.name.split(".")[0] for path in self._folder.locks.glob("*.l*")})
        free = [name for name in names if self._taken(name)]
        for name in free:
            self._known[name].release()
        return [name for name in names if name not in free]

    def _taken(self, name: str) -> bool:
        """Take a lock, if nobody has it."""
        from filelock import FileLock, Timeout

        if name not in self._known:
            self._known[name] = (FileLock if self._has_locks else Lease)(self._folder.lock(name))
        lock = self._known[name]
        if isinstance(lock, Lease):
            return lock.take()
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        return True

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
                self._progress.warn(f"the file system of {self._folder.root} has no {ability}: {consequence}")
        return "locks" not in missing
