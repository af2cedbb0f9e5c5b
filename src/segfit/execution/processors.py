"""How many processors this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

from segfit.execution.cgroups import group_folders, group_text

__all__ = ["affinity", "available_workers", "processor_quota"]


def available_workers() -> int:
    """Return how many processors this process may use: its affinity, within its cgroup's limit; never below 1."""
    quota = processor_quota()
    return max(1, affinity() if quota is None else min(affinity(), math.ceil(quota)))


def affinity() -> int:
    """Return how many processors this process may run on, however little of their time it is granted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_quota(root: Path = Path("/")) -> float | None:
    """Return the processors that Linux's control groups grant this process, for example 1.5; None without a limit.

    A limit of any group above counts too, so containers and batch systems are seen. `root` is where the system's
    ``proc`` and ``sys`` are.
    """
    limits = (read(folder) for folder in group_folders("cpu", root) for read in (_quota_v2, _quota_v1))
    return min((limit for limit in limits if limit is not None), default=None)


def _quota_v2(folder: Path) -> float | None:
    """Read ``cpu.max``: "max 100000" or "150000 100000"."""
    quota, _, period = group_text(folder / "cpu.max").partition(" ")
    return float(quota) / float(period) if quota.isdigit() and period.strip().isdigit() else None


def _quota_v1(folder: Path) -> float | None:
    """Read ``cpu.cfs_quota_us``, -1 for none, and its period."""
    quota, period = group_text(folder / "cpu.cfs_quota_us").strip(), group_text(folder / "cpu.cfs_period_us").strip()
    return float(quota) / float(period) if quota.isdigit() and period.isdigit() else None
