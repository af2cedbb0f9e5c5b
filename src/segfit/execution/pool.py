"""Work over many cases through the `concurrent.futures.Executor` interface: `map_cases` is the one way in.

Case work is numpy, zlib and blosc, which release the interpreter lock, so threads do small work well and start at once.
Large work is done by supervised processes: they are as fast, keep matrix products of several cases out of each other's
way, and one that the system kills for its memory costs its case another try instead of the run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from segfit.errors import StageError
from segfit.execution.processors import available_workers
from segfit.execution.workers import LostCaseError, WorkerPool
from segfit.progress import SILENT, Progress

__all__ = ["case_pool", "map_cases"]

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
    lost: Callable[[_Item, LostCaseError], _Result] | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
    progress: Progress = SILENT,
) -> Iterator[tuple[_Item, _Result]]:
    """Yield ``(item, work(item))`` as the items finish, in any order.

    Few items are in flight at a time, so memory does not grow with their number. The first exception is raised after
    the running items ended; items not yet started are dropped. Cases lost with their worker (see `WorkerPool`) do not
    stop the others: one `StageError` names them at the end, unless `lost` gives their results.

    Parameters
    ----------
    size : bytes that an item's work is predicted to take. It says that `work` may be done by processes: `work`, the
        items and the results must be small and picklable. Processes do it if the sizes sum up to 4 GiB and none is 0,
        which says that an item's work cannot leave this process
    largest_first : begin with the items of the largest size, so that no worker is left alone with one at the end
    room : bytes that the items in work may take together; one item is always in work. Needs `size`
    lost : makes the result of an item that was lost with its worker
    executor : does the work in place of a pool of its own, see `case_pool`; it is left open
    """
    waiting = [(item, 0 if size is None else size(item)) for item in items]
    if largest_first:
        waiting.sort(key=lambda pair: pair[1], reverse=True)
    workers = min(workers or available_workers(), max(1, len(waiting)))
    most = 2 * workers  # so that nobody waits for the next item
    room = float("inf") if room is None else room
    running: dict[Future[_Result], tuple[_Item, int]] = {}
    failed: list[LostCaseError] = []
    total = len(waiting)
    own = case_pool([taken for _, taken in waiting], workers, progress) if executor is None else nullcontext(executor)
    waiting.reverse()
    with own as pool, progress.task(description, total) as task:
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
                    if lost is None:
                        failed.append(error)
                        task.advance(1, name(item))
                        continue
                    result = lost(item, error)
                task.advance(1, name(item))
                yield item, result
    if failed:
        others = ", the others are done" if len(failed) < total else ""
        raise StageError(
            f"{description}: {len(failed)} of {total} cases failed{others}: {'; '.join(map(str, failed))}",
            "free memory or fix these files, then rerun",
        )


@contextmanager
def case_pool(sizes: Sequence[int], workers: int | None = None, progress: Progress = SILENT) -> Iterator[Executor]:
    """Open the executor that suits items of these sizes, which are those of `map_cases`.

    Processes do large work, threads small work, and all work where processes cannot be started.
    """
    workers = min(workers or available_workers(), max(1, len(sizes)))
    if sum(sizes) < _PROCESSES_FROM or not all(sizes) or not sys.executable or sys.platform == "win32":
        pool: Executor = ThreadPoolExecutor(workers, thread_name_prefix="segfit")
    else:
        pool = WorkerPool(workers, warn=progress.warn)
    try:
        yield pool
    except BaseException as error:
        if isinstance(pool, WorkerPool) and not isinstance(error, Exception):  # Ctrl-C, or nobody wants the rest
            pool.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
