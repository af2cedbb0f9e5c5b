"""A lock for hosts that have none: a file that its owner renews, and that others take over when he does not.

The leases of one name are numbered, ``NAME.<number>.lease``, and the highest number holds. Taking a lease is making the
file of the next number, which one command of several can do; nobody's lease is overwritten or moved. The owner writes
himself into it every few seconds. A lease is free when its owner wrote so, when he is a process of this host that has
ended, or when he has been silent for too long by the clock of the file system: those of the hosts may differ. An owner
who was silent and comes back finds a higher number, and stops.

Where a host has locks a lease goes with each of them, so that hosts that mount the folder without locks know of it. Its
owner writes that he has the lock too: who has that lock now takes the lease over at once.

Those of filelock (4.2) would not do: where names cannot be exchanged in one step, as on network mounts, they never take
over from another host.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock, Thread

from segfit.errors import StageError
from segfit.files import file_system_time
from segfit.owner import Owner

__all__ = ["Lease"]

_SILENT_S = 60.0  # an owner of another host who has not written for so long has lost his lease (assumption)
_SUSPENDED_S = 3600.0  # one of this host, whose process lives; its number may be that of another by now (assumption)
_RENEWED_S = 10.0  # between two renewals
_LOOKED_AT_S = 1.0  # between two looks whether it is still held
_FREE = b"free"
_WITH_LOCK = b" with lock"  # behind the name of an owner


class Lease:
    """A lock that expires. Who has it may take it again, and gives it back as often.

    Parameters
    ----------
    path : in whose folder the files of the lease lie, and with whose stem their names begin
    with_lock : whether who takes it has a lock that it goes with
    """

    def __init__(self, path: Path, *, with_lock: bool = False) -> None:
        self._folder, self._name = path.parent, path.stem
        self._with_lock = with_lock
        self._signature = Owner.own().name.encode() + (_WITH_LOCK if with_lock else b"")
        self._number = self._times = 0  # of the lease that is held, and how often it was taken; 0: none is
        self._is_lost = False
        self._looked_at = 0.0  # by the clock of the host: one that was suspended looks at once
        self._stop, self._writing = Event(), Lock()

    def take(self) -> bool:
        """Take it, if nobody else has it."""
        if self._number:
            self._times += 1
            return True
        newest = max(self._numbers(), default=0)
        if newest and not self._is_free(newest):
            return False
        mine = newest + 1
        try:
            with self._file(mine).open("xb") as handle:
                handle.write(self._signature)
        except FileExistsError:
            return False
        numbers = self._numbers()
        if max(numbers) != mine:  # the folder was listed from memory, as network mounts do
            self._file(mine).unlink()
            return False
        for number in numbers - {mine}:
            self._file(number).unlink(missing_ok=True)
        self._number, self._times, self._is_lost, self._looked_at = mine, 1, False, time.time()
        self._stop = Event()
        Thread(target=self._renew_until, args=(self._stop,), name=f"lease {self._name}", daemon=True).start()
        return True

    def release(self) -> None:
        """Give it back."""
        self._times -= 1
        if self._times:
            return
        self._stop.set()
        with self._writing, suppress(OSError):  # it was lost; or expires
            if self._with_lock and self._number == 1:  # none before, who could come back: nobody need see a higher one
                self._file(1).unlink()
            else:
                self._write(_FREE)
        self._number = 0

    def require(self) -> None:
        """Raise `StageError` if it is held no more: another command does the work now."""
        if self._number and abs(time.time() - self._looked_at) > _LOOKED_AT_S:
            self._renew(self._stop)
        if self._number and self._is_lost:
            raise StageError(
                f"another segfit took over {self._name} in {self._folder.parent}, as this one was silent for over "
                f"{_SILENT_S:.0f} s",
                "rerun the command",
            )

    def _renew_until(self, stop: Event) -> None:
        while not stop.wait(_RENEWED_S):
            self._renew(stop)

    def _renew(self, stop: Event) -> None:
        """Say that the owner lives, and see whether he still is the owner, unless it was given back."""
        with self._writing:
            if stop.is_set():
                return
            self._looked_at = time.time()
            try:
                self._write(self._signature)
                self._is_lost |= self._file(self._number + 1).exists()
            except FileNotFoundError:  # removed by who took over
                self._is_lost = True
            except OSError:
                pass  # a network that is away for a moment: lost only if another one takes over

    def _write(self, content: bytes) -> None:
        with self._file(self._number).open("r+b") as handle:
            handle.write(content)
            handle.truncate()

    def _is_free(self, number: int) -> bool:
        try:
            with self._file(number).open("rb") as handle:  # opening has network mounts ask what is there
                content, renewed = handle.read(), os.fstat(handle.fileno()).st_mtime
        except FileNotFoundError:  # just taken over
            return False
        owner = Owner.of_name(content.decode(errors="replace"))
        had_lock = self._with_lock and content.endswith(_WITH_LOCK)
        if content == _FREE or had_lock or (owner is not None and owner.is_dead()):
            return True
        silent = file_system_time(self._folder) - renewed
        return silent > (_SUSPENDED_S if owner is not None and owner.is_here else _SILENT_S)

    def _numbers(self) -> set[int]:
        parts = [path.name.removeprefix(f"{self._name}.").split(".") for path in self._folder.glob("*.lease")]
        return {int(part[0]) for part in parts if len(part) == 2 and part[0].isdecimal()}

    def _file(self, number: int) -> Path:
        return self._folder / f"{self._name}.{number}.lease"
