"""How work on many cases is done: `Execution.map` is the one way in, whatever does the work."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from segfit.errors import CasesFailedError, InputError
from segfit.execution.memory import free_memory_gb
from segfit.execution.pool import open_pool
from segfit.execution.processors import available_workers
from segfit.execution.workers import LostCaseError
from segfit.notebook import suitable_progress
from segfit.progress import Progress

__all__ = ["LOCAL", "Engine", "Execution"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_LOOK_S = 60.0  # no wait is longer

Engine = Callable[[int, Sequence[int], Progress], AbstractContextManager[Executor]]
"""Opens an executor of so many workers for items that take so many bytes each, which warns by the progress.

Functions, items and results are small and picklable; they may run wherever the same files have the same paths. The
name of a function is that of its case. Where a worker is lost, the future of its case fails with `LostCaseError`.
"""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How work on cases is done.

    Parameters
    ----------
    workers : cases in work at once; None: as many as this process may use processors
    memory_gb : memory that the cases in work may take together; None: what is free when the work begins
    progress : where it is reported; by default bars in a notebook, elsewhere messages go to the logger "segfit"
    engine : called with the number of workers, the bytes that each item takes and the progress, opens the
        `concurrent.futures.Executor` that does the work; by default threads and processes of this machine
    """

    workers: int | None = None
    memory_gb: float | None = None
    progress: Progress = field(default_factory=suitable_progress)
    engine: Engine = open_pool

    def __post_init__(self) -> None:
        if self.workers is not None and not (type(self.workers) is int and self.workers >= 1):
            raise InputError(f"work needs one worker or more, got {self.workers!r}", "set workers to 1 or more")

    @property
    def memory_bytes(self) -> float:
        """Bytes that the cases in work may take together, from now on."""
        return (free_memory_gb() if self.memory_gb is None else self.memory_gb) * 2**30

    def map(
        self,
        work: Callable[[_Item], _Result],
        items: Iterable[_Item],
        *,
        description: str,
        name: Callable[[_Item], str] = str,
        size: Callable[[_Item], int] | None = None,
        largest_first: bool = False,
        lost: Callable[[_Item, LostCaseError], _Result] | None = None,
    ) -> Iterator[tuple[_Item, _Result]]:
        """Yield ``(item, work(item))`` as the items finish, in any order.

        Few items are in flight at a time, and no more than memory allows, but always one. The first exception is raised
        after the running items ended; items not yet started are dropped. Cases lost with their worker (see
        `WorkerPool`) do not stop the others: one `StageError` names them at the end, unless `lost` gives their results.

        Parameters
        ----------
        size : bytes that an item's work is predicted to take. It says that the engine may do it: `work`, the items and
            the results must be small and picklable. Without it, or if one is 0, threads of this process do it
        largest_first : begin with the items of the largest size, so that no worker is left alone with one at the end
        lost : makes the result of an item that was lost with its worker
        """
        waiting = [(item, 0 if size is None else size(item)) for item in items]
        if largest_first:
            waiting.sort(key=lambda pair: pair[1], reverse=True)
        total, failed = len(waiting), list[LostCaseError]()
        with (
            self._opened([taken for _, taken in waiting]) as executor,
            self.progress.task(description, total) as task,
            closing(self._finished(executor, work, name, waiting)) as finished,
        ):
            for item, future in finished:
                error = future.exception()
                if isinstance(error, MemoryError):
                    error = LostCaseError(name(item), "ran out of memory")
                task.advance(1, name(item))
                if not isinstance(error, LostCaseError):
                    yield item, future.result()
                elif lost is not None:
                    yield item, lost(item, error)
                else:
                    failed.append(error)
        if failed:
            raise CasesFailedError(description, failed, total, "free memory or fix these files, then rerun")

    @contextmanager
    def kept_open(self, sizes: Sequence[int]) -> Iterator[Execution]:
        """Open the executor that suits items of these sizes, and yield an execution that does them in parts with it."""
        with self._opened(sizes) as executor:
            yield replace(self, engine=lambda *_: nullcontext(executor))

    def _opened(self, sizes: Sequence[int]) -> AbstractContextManager[Executor]:
        workers = min(self.workers or available_workers(), max(1, len(sizes)))
        if not sizes or not all(sizes):
            return ThreadPoolExecutor(workers, thread_name_prefix="segfit")
        return self.engine(workers, sizes, self.progress)

    def _finished(
        self,
        executor: Executor,
        work: Callable[[_Item], _Result],
        name: Callable[[_Item], str],
        items: Sequence[tuple[_Item, int]],
    ) -> Generator[tuple[_Item, Future[_Result]], None, None]:
        """Have items with their sizes done, and yield each with its future when that is finished.

        One whose thread ran out of memory is tried again alone, as `WorkerPool` does it for processes.
        """

        def submitted(item: _Item) -> Future[_Result]:
            call = partial(work, item)
            call.__name__ = name(item)  # type: ignore[attr-defined]  # by which an engine may call it
            return executor.submit(call)

        most = 2 * (self.workers or available_workers())  # so that nobody waits for the next item
        memory = self.memory_bytes
        waiting, again = list(reversed(items)), list[_Item]()
        running: dict[Future[_Result], tuple[_Item, int]] = {}
        try:
            while waiting or running:
                in_work = sum(taken for _, taken in running.values())
                while waiting and len(running) < most and (not running or in_work + waiting[-1][1] <= memory):
                    item, taken = waiting.pop()
                    running[submitted(item)] = item, taken
                    in_work += taken
                for future in wait(running, _LOOK_S, FIRST_COMPLETED).done:
                    item, _ = running.pop(future)
                    if isinstance(future.exception(), MemoryError):
                        again.append(item)
                    else:
                        yield item, future
            for item in again:
                future = submitted(item)
                running[future] = item, 0
                while not future.done():
                    wait(running, _LOOK_S)
                del running[future]
                yield item, future
        finally:
            for future in running:
                future.cancel()


LOCAL = Execution()
"""On this machine, with all that it grants."""
