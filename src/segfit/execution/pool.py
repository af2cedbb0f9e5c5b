"""Work over many cases through the `concurrent.futures.Executor` interface.

Case work here is numpy, zlib and blosc, which release the interpreter lock, so threads are the local executor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from typing import TypeVar

from segfit.progress import SILENT, Progress

__all__ = ["available_workers", "map_cases"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def available_workers() -> int:
    """Return how many processors this process may use (its affinity, not the machine's size)."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def map_cases(
    work: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    description: str,
    name: Callable[[_Item], str] = str,
    workers: int | None = None,
    executor: Executor | None = None,
    progress: Progress = SILENT,
) -> Iterator[tuple[_Item, _Result]]:
    """Yield ``(item, work(item))`` as the items finish, in any order.

    At most twice as many items as workers are in flight, so memory does not grow with the number of cases. The first
    exception is raised after the running items ended; items not yet started are dropped.
    """
    waiting = list(items)
    workers = min(workers or available_workers(), max(1, len(waiting)))
    own = ThreadPoolExecutor(workers, thread_name_prefix="segfit") if executor is None else None
    pool = executor or own
    assert pool is not None
    try:
        with progress.task(description, len(waiting)) as task:
            running: dict[Future[_Result], _Item] = {}
            waiting.reverse()
            while waiting or running:
                while waiting and len(running) < 2 * workers:
                    item = waiting.pop()
                    running[pool.submit(work, item)] = item
                future = next(as_completed(running))
                item = running.pop(future)
                result = future.result()
                task.advance(1, name(item))
                yield item, result
    finally:
        if own is not None:
            own.shutdown(wait=True, cancel_futures=True)
