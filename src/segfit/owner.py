"""Who writes a file: the host and the process, as a name, and whether that process still lives."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

__all__ = ["Owner"]

_NAME = re.compile(r"([0-9a-f]{8})-([1-9][0-9]*)(?:\.([0-9]+))?(?![0-9])")


@dataclass(frozen=True, slots=True)
class Owner:
    """A process.

    Parameters
    ----------
    host : hash of its host, of the start of that, and of the container that counts processes there
    pid : its number, which others may have had before
    started : when it began, in ticks of its host's clock; 0 where that is not told
    """

    host: str
    pid: int
    started: int = 0

    @classmethod
    def own(cls) -> Self:
        """Return this process."""
        return cls(_own_host(), os.getpid(), _start_in(_told_of(os.getpid())))

    @classmethod
    def of_name(cls, text: str) -> Self | None:
        """Return the process that a text begins with; None if it begins with none."""
        found = _NAME.match(text)
        return None if found is None else cls(found[1], int(found[2]), int(found[3] or 0))

    @property
    def name(self) -> str:
        """For the names of files."""
        return f"{self.host}-{self.pid}.{self.started}"

    @property
    def is_here(self) -> bool:
        """Whether it is or was a process of this host."""
        return self.host == _own_host()

    def is_dead(self) -> bool:
        """Whether it has certainly ended, be it that its parent does not know; not known of those of other hosts."""
        if not self.is_here or os.name != "posix":  # elsewhere asking would end it
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:  # of another user
            pass
        told = _told_of(self.pid)
        return told[:1] == [b"Z"] or (0 not in (self.started, now := _start_in(told)) and now != self.started)


def _own_host() -> str:
    told = [socket.gethostname()]
    with suppress(OSError):  # Linux alone has them
        told.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        told.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(told).encode(errors="surrogateescape")).hexdigest()[:8]


def _told_of(pid: int) -> list[bytes]:
    """Return what the system tells of a process, its state first; [] where it tells nothing."""
    with suppress(OSError):  # Linux alone tells it
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return []


def _start_in(told: list[bytes]) -> int:
    return int(told[19]) if len(told) > 19 else 0
