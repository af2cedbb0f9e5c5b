"""Memory of this process, as the system counts it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from segfit.execution.cgroups import group_folders, group_text

__all__ = [
    "PeakWatch",
    "free_bytes",
    "free_memory_gb",
    "group_memory_left",
    "limit_growth",
    "process_bytes",
    "process_memory_left",
    "process_peak_bytes",
]


@contextmanager
def limit_growth(num_bytes: float) -> Iterator[None]:
    """Let allocations fail, on Linux, where this process would grow by more than `num_bytes`.

    Without it the system would promise any amount and kill the process when the promise falls due. Elsewhere nothing
    is limited.
    """
    data = _status_bytes("VmData")
    if not data:
        yield
        return
    import resource  # exists on Unix only

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [data + max(0, int(num_bytes)), *(n for n in (soft, hard) if n != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def free_memory_gb() -> float:
    """Return the RAM this process may still take, in GiB; 8 where the system does not tell."""
    free = free_bytes()
    return 8.0 if free is None else free / 2**30


def free_bytes() -> int | None:
    """Return the RAM this process may still take: what is free, within its own and its groups' limits.

    None where the system does not tell.
    """
    available = _status_bytes("MemAvailable", "/proc/meminfo") or None
    granted = (available, group_memory_left(), process_memory_left())
    return min((left for left in granted if left is not None), default=None)


def process_memory_left() -> int | None:
    """Return the bytes that the limits of this process (``ulimit``) still grant on Linux; None without a limit."""
    taken = {"RLIMIT_DATA": _status_bytes("VmData"), "RLIMIT_AS": _status_bytes("VmSize")}
    if not all(taken.values()):
        return None
    import resource  # exists on Unix only

    limits = {name: resource.getrlimit(getattr(resource, name))[0] for name in taken}
    left = [max(0, limit - taken[name]) for name, limit in limits.items() if limit != resource.RLIM_INFINITY]
    return min(left, default=None)


def group_memory_left(root: Path = Path("/")) -> int | None:
    """Return the bytes that Linux's control groups still grant this process; None without a limit.

    A limit of any group above counts too, so containers and batch systems are seen. Files that the system merely keeps
    in memory do not count as taken. `root` is where the system's ``proc`` and ``sys`` are.
    """
    left: list[int] = []
    for folder in group_folders("memory", root):
        for limit, used, kept in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, taken = group_text(folder / limit).strip(), group_text(folder / used).strip()
            if most.isdigit() and taken.isdigit():
                lines = [line.partition(" ") for line in group_text(folder / "memory.stat").splitlines()]
                cached = next((int(value) for name, _, value in lines if name == kept), 0)
                left.append(max(0, int(most) - max(0, int(taken) - cached)))
    return min(left, default=None)


class PeakWatch:
    """The peak of the memory of this process and of those it started, over a while.

    Exact where this process alone makes a new high of its life, sampled otherwise:
    ``with PeakWatch() as watch: ...; watch.peak_bytes()``. The system's own peak is left alone, so that those who watch
    this process from outside see the true one.
    """

    def __init__(self, interval_s: float = 0.1) -> None:
        self._before = process_peak_bytes()
        self._sampled = _family_bytes()
        self._interval = interval_s
        self._over = Event()
        self._thread = Thread(target=self._watch, name="segfit-memory", daemon=True)

    def __enter__(self) -> PeakWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def peak_bytes(self) -> int:
        """Return the peak so far."""
        highest = process_peak_bytes()
        self._sampled = max(self._sampled, _family_bytes())
        return max(highest, self._sampled) if highest > self._before else self._sampled

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            self._sampled = max(self._sampled, _family_bytes())


def process_peak_bytes() -> int:
    """Peak resident memory of this process, over its life."""
    return _status_bytes("VmHWM") or _life_peak_bytes()


def process_bytes(pid: int | None = None) -> int:
    """Resident memory of this process, or of another one, now; of another one 0 where the system does not tell."""
    if pid is not None:
        return _status_bytes("VmRSS", f"/proc/{pid}/status")
    return _status_bytes("VmRSS") or _life_peak_bytes()


def _family_bytes() -> int:
    """Resident memory of this process and of those it started; what they share is counted for each."""
    children: list[str] = []
    for path in Path("/proc/self/task").glob("*/children"):  # not every kernel tells
        with suppress(OSError):
            children += path.read_text().split()
    return process_bytes() + sum(process_bytes(int(child)) for child in children)


def _status_bytes(key: str, path: str = "/proc/self/status") -> int:
    """Return an entry of Linux's status of this process, or of another such file, 0 where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _life_peak_bytes() -> int:
    """Return the peak of the whole life of the process; Windows does not tell, 0."""
    if sys.platform == "win32":
        return 0
    import resource  # exists on Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
