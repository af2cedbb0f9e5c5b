"""How work on many cases is done: `Execution.map` is the one way in, whatever does the work."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Self, TypeVar

from segfit.errors import CasesFailedError, InputError
from segfit.execution.engines import POOL, CaseWork, ClusterExecutor, open_executor
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

What it is handed are `CaseWork`, small and picklable as their results are; they may run wherever the same files have
the same paths. Where a worker is lost, the future of its case fails with `LostCaseError`.
"""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How work on cases is done.

    Parameters
    ----------
    workers : cases in work at once; None: as many as this process may use processors
    memory_gb : memory that the cases in work may take together; None: what is free when the work begins
    progress : where it is reported; by default bars in a notebook, elsewhere messages go to the logger "segfit"
    engine : a `concurrent.futures.Executor` that is open, or what opens one for each piece of work, called with the
        number of workers, the bytes that each item takes and the progress; by default threads and processes of this
        machine. See `Execution.by` for executors with a name
    """

    workers: int | None = None
    memory_gb: float | None = None
    progress: Progress = field(default_factory=suitable_progress)
    engine: Engine | Executor = open_pool

    def __post_init__(self) -> None:
        if self.workers is not None and not (type(self.workers) is int and self.workers >= 1):
            raise InputError(f"work needs one worker or more, got {self.workers!r}", "set workers to 1 or more")

    @classmethod
    @contextmanager
    def by(
        cls, executor: str, cluster: str | None = None, *, workers: int | None = None, progress: Progress | None = None
    ) -> Iterator[Self]:
        """Open an executor by its name, and yield the execution that has all work on cases done by it.

        Parameters
        ----------
        executor : pool, dask, or PACKAGE:NAME, which another package has as an entry point of `segfit.executors`
        cluster : where or how: of dask ``tcp://HOST:PORT``, ``local:N``, or a YAML file of which a cluster is made
        """
        progress = suitable_progress() if progress is None else progress
        if executor == POOL:
            if cluster is not None:
                problem = f"the executor {POOL} is this machine and has no cluster"
                raise InputError(problem, "leave out --cluster, or give --executor dask")
            yield cls(workers=workers, progress=progress)
            return
        with open_executor(executor, cluster, workers, progress) as opened:
            yield cls(workers=workers, progress=progress, engine=opened)

    @property
    def memory_bytes(self) -> float:
        """Bytes that the cases in work may take together from now on, on a cluster that any case may take."""
        if self.memory_gb is None and isinstance(self.engine, ClusterExecutor):
            return self.engine.memory_bytes
        return (free_memory_gb() if self.memory_gb is None else self.memory_gb) * 2**30

    @property
    def is_here(self) -> bool:
        """Whether this process and those that it starts do the work."""
        return self.engine is open_pool

    def require_shared(self, inputs: Sequence[Path], outputs: Sequence[Path] = ()) -> None:
        """Raise `InputError` if workers elsewhere do not see these files and folders; of outputs those to be made."""
        if isinstance(self.engine, ClusterExecutor):
            self.engine.require_shared(inputs, outputs)

    def map(
        self,
        work: Callable[[_Item], _Result],
        items: Iterable[_Item],
        *,
        description: str,
        name: Callable[[_Item], str] = str,
        size: Callable[[_Item], int] | None = None,
        largest_first: bool = False,
        device: str | None = None,
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
        device : where the networks of the work run, if it has any
        lost : makes the result of an item that was lost with its worker
        """
        waiting = [(item, 0 if size is None else size(item)) for item in items]
        if largest_first:
            waiting.sort(key=lambda pair: pair[1], reverse=True)
        total, failed = len(waiting), list[LostCaseError]()
        with (
            self._opened([taken for _, taken in waiting]) as executor,
            self.progress.task(description, total) as task,
            closing(
                self._finished(executor, [CaseWork(work, item, name(item), taken, device) for item, taken in waiting])
            ) as finished,
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
            yield replace(self, engine=executor)

    def _opened(self, sizes: Sequence[int]) -> AbstractContextManager[Executor]:
        workers = min(self.workers or available_workers(), max(1, len(sizes)))
        if not sizes or not all(sizes):
            return ThreadPoolExecutor(workers, thread_name_prefix="segfit")
        return (
            nullcontext(self.engine)
            if isinstance(self.engine, Executor)
            else self.engine(workers, sizes, self.progress)
        )

    def _finished(
        self, executor: Executor, works: Sequence[CaseWork[_Item, _Result]]
    ) -> Generator[tuple[_Item, Future[_Result]], None, None]:
        """Have works done, and yield the item of each with its future when that is finished.

        One whose thread ran out of memory, or that other cases may have been lost with, is tried again alone, as
        `WorkerPool` does it for processes.
        """
        memory = inf if isinstance(executor, ClusterExecutor) else self.memory_bytes
        waiting, again = list(reversed(works)), list[CaseWork[_Item, _Result]]()
        running: dict[Future[_Result], CaseWork[_Item, _Result]] = {}
        try:
            while waiting or running:
                most, in_work = self._most(executor), sum(one.num_bytes for one in running.values())
                while waiting and len(running) < most and (not running or in_work + waiting[-1].num_bytes <= memory):
                    work = waiting.pop()
                    running[executor.submit(work)] = work
                    in_work += work.num_bytes
                for future in wait(running, _LOOK_S, FIRST_COMPLETED).done:
                    work, error = running.pop(future), future.exception()
                    if isinstance(error, MemoryError) or (isinstance(error, LostCaseError) and not error.was_alone):
                        again.append(work)
                    else:
                        yield work.item, future
            for work in again:
                future = executor.submit(work)
                running[future] = work
                while not future.done():
                    wait(running, _LOOK_S)
                del running[future]
                yield work.item, future
        finally:
            for future in running:
                future.cancel()

    def _most(self, executor: Executor) -> int:
        """Return how many works may be handed over now: enough that nobody waits for the next."""
        if isinstance(executor, ClusterExecutor):
            return min(2 * executor.slots, self.workers or 2 * executor.slots)
        return 2 * (self.workers or available_workers())


LOCAL = Execution()
"""On this machine, with all that it grants."""
