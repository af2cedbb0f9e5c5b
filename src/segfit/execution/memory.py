"""Memory of this process, as the system counts it."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["process_bytes", "process_peak_bytes", "reset_process_peak"]


def reset_process_peak() -> None:
    """Let Linux count the peak anew; elsewhere the peak of the whole life of the process stays."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def process_peak_bytes() -> int:
    """Peak resident memory of this process."""
    return _status_bytes("VmHWM") or _life_peak_bytes()


def process_bytes() -> int:
    """Resident memory of this process now."""
    return _status_bytes("VmRSS") or _life_peak_bytes()


def _status_bytes(key: str) -> int:
    """Return an entry of Linux's process status, 0 where there is none."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
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
