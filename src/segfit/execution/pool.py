"""The engine that is used unless another is given: threads for small work, supervised processes for large work.

Case work is numpy, zlib and blosc, which release the interpreter lock, so threads do small work well and start at once.
Processes are as fast, keep matrix products of several cases out of each other's way, and one that the system kills for
its memory costs its case another try instead of the run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

from segfit.execution.workers import WorkerPool
from segfit.progress import Progress

__all__ = ["open_pool"]

_PROCESSES_FROM = 4 << 30  # bytes in all: ten seconds of preprocessing, where starting processes takes half a second


def open_pool(workers: int, sizes: Sequence[int], progress: Progress) -> Executor:
    """Open the pool that suits items of these sizes; threads too where processes cannot be started."""
    if sum(sizes) < _PROCESSES_FROM or not sys.executable or sys.platform == "win32":
        return ThreadPoolExecutor(workers, thread_name_prefix="segfit")
    return WorkerPool(workers, warn=progress.warn)
