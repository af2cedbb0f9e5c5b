"""Work over many cases through the `concurrent.futures.Executor` interface: `map_cases` is the one way in.

Case work is numpy, zlib and blosc, which release the interpreter lock, so threads do small work well and start at once.
Large work is done by supervised processes: they are as fast, keep matrix products of several cases out of each other's
way, and one that the system kills for its memory costs its case another try instead of the run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from segfit.errors import StageError
from segfit.execution.processors import available_workers
from segfit.execution.workers import LostCaseError, WorkerPool
from segfit.progress import SILENT, Progress

__all__ = ["map_cases"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_PROCESSES_FROM = 4 << 30  # bytes in all: ten seconds of preprocessing, where starting processes takes half a second
_LOOK_S = 60.0  # no wait is longer


def map_cases(
    work: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    description: str,
    name: Callable[[_Item], str] = str,
    size: Callable[[_Item], int] | None = None,
    largest_first: bool = False,
    room: float | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
    progress: Progress = SILENT,
) -> Iterator[tuple[_Item, _Result]]:
    """Yield ``(item, work(item))`` as the items finish, in any order.

    Few items are in flight at a time, so memory does not grow with their number. The first exception is raised after
    the running items ended; items not yet started are dropped. Cases lost with their worker (see `WorkerPool`) do not
    stop the others: they are named in one `StageError` at the end.

    Parameters
    ----------
    size : bytes that an item's work is predicted to take. It says that `work` may be done by processes: `work`, the
        items and the results must be small and picklable. Processes do it if the sizes sum up to 4 GiB and none is 0,
        which says that an item's work cannot leave this process
    largest_first : begin with the items of the largest size, so that no worker is left alone with one at the end
    room : bytes that the items in work may take together; one item is always in work. Needs `size`
    """
    waiting = [(item, 0 if size is None else size(item)) for item in items]
    if largest_first:
        waiting.sort(key=lambda pair: pair[1], reverse=True)
    workers = min(workers or available_workers(), max(1, len(waiting)))
    own = _local_pool(workers, [taken for _, taken in waiting], progress) if executor is None else None
    pool = executor or own
    assert pool is not None
    most = workers if room is not None else 2 * workers
    room = float("inf") if room is None else room
    running: dict[Future[_Result], tuple[_Item, int]] = {}
    lost: list[str] = []
    total = len(waiting)
    waiting.reverse()
    abandoned = True
    try:
        with progress.task(description, total) as task:
            while waiting or running:
                in_work = sum(taken for _, taken in running.values())
                while waiting and len(running) < most and (not running or in_work + waiting[-1][1] <= room):
                    item, taken = waiting.pop()
                    future = (
                        pool.submit_case(name(item), work, item)
                        if isinstance(pool, WorkerPool)
                        else pool.submit(work, item)
                    )
                    running[future] = item, taken
                    in_work += taken
                for future in wait(running, _LOOK_S, FIRST_COMPLETED).done:
                    item, _ = running.pop(future)
                    try:
                        result = future.result()
                    except LostCaseError as error:
                        lost.append(str(error))
                        task.advance(1, name(item))
                        continue
                    task.advance(1, name(item))
                    yield item, result
        abandoned = False
    except Exception:
        abandoned = False
        raise
    finally:
        if isinstance(own, WorkerPool) and abandoned:  # Ctrl-C, or nobody wants the rest
            own.stop()
        if own is not None:
            own.shutdown(wait=True, cancel_futures=True)
    if lost:
        raise StageError(
            f"{description}: {len(lost)} of {total} cases failed, the others are done: {'; '.join(lost)}. Give these "
            "cases more memory or mend their files, then start again"
        )


def _local_pool(workers: int, sizes: Sequence[int], progress: Progress) -> Executor:
    """Return processes for large work and threads for small work, and where processes cannot be started."""
    if sum(sizes) >= _PROCESSES_FROM and all(sizes) and sys.executable and sys.platform != "win32":
        return WorkerPool(workers, warn=progress.warn)
    return ThreadPoolExecutor(workers, thread_name_prefix="segfit")
