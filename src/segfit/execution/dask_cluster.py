"""Cases done by the workers of a dask cluster: one that runs, one on this machine, or one that a YAML file describes.

Memory and GPU are resources that each worker declares and each case takes; the scheduler sees names, not arrays. Only
workers that have this version of segfit and see the files are given cases.
"""

from __future__ import annotations

import os
from asyncio import CancelledError  # which is that of dask
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from secrets import token_hex
from tempfile import NamedTemporaryFile
from threading import Event, RLock, Thread
from time import monotonic
from typing import Any, NamedTuple

from segfit.errors import InputError, SegfitError, StageError, reason_of, warning
from segfit.execution.dask_where import connected
from segfit.execution.engines import ClusterExecutor
from segfit.execution.memory import free_memory_gb
from segfit.execution.workers import LostCaseError
from segfit.progress import Progress

__all__ = ["DaskExecutor", "open_cases"]

_LOOK_S = 1.0  # between looks at which workers there are
_MOST_SENT = 3  # times that a case is sent: dask counts anew each time how many workers ended with it
_UNSETTLED = 3  # looks after workers came or went at which cases are sought that nobody has
_USABLE = 0.8  # of the memory limit of a worker: beyond, dask has it begin nothing new
_MEMORY, _GPU = "segfit_memory", "segfit_gpu"  # resources of a worker


@contextmanager
def open_cases(cluster: str | None, workers: int | None, progress: Progress) -> Iterator[DaskExecutor]:
    """Connect to a cluster, or make one; as many workers as it has are used, whatever `workers` says."""
    del workers
    with connected(cluster) as (client, patience_s):
        executor = DaskExecutor(client, progress, patience_s)
        try:
            executor.wait_for_workers()
            yield executor
        finally:
            executor.shutdown(cancel_futures=True)


class _Worker(NamedTuple):
    """What a worker declares."""

    memory: float
    gpu: float
    threads: int


class _Sent(NamedTuple):
    """A case that was sent, its future in dask, and how often it was sent."""

    work: Callable[[], Any]
    distant: Any
    times: int


class DaskExecutor(ClusterExecutor):
    """An executor of the workers that a client of dask sees.

    A case whose worker ended is done by another; one that had several workers end fails with `LostCaseError`. Without
    any worker for `patience_s` all fail. A thread looks who comes and goes.
    """

    def __init__(self, client: Any, progress: Progress, patience_s: float) -> None:
        self._client, self._progress, self._patience_s = client, progress, patience_s
        self._where = client.scheduler.address
        self._workers: dict[str, _Worker] = {}
        self._refused: set[str] = set()
        self._must_see: list[str] = []
        self._sent: dict[Future[Any], _Sent] = {}
        self._changed = RLock()
        self._largest = 0.0
        self._over = Event()
        self._watcher = Thread(target=self._watch, name="segfit-dask", daemon=True)

    @property
    def slots(self) -> int:
        """Threads of all workers."""
        return max(1, sum(worker.threads for worker in list(self._workers.values())))

    @property
    def memory_bytes(self) -> float:
        """Memory of the largest worker, or what that was while there is none."""
        return max((worker.memory for worker in list(self._workers.values())), default=self._largest)

    def wait_for_workers(self) -> None:
        """Wait for the first worker; raise `InputError` if none comes, or if one of them cannot be used."""
        begun, is_told = monotonic(), False
        while not self._workers:
            problems = self._introduce(self._present())
            if problems:
                raise InputError(problems[0], "start all workers in this environment, where files have the same paths")
            if monotonic() - begun > self._patience_s:
                raise InputError(f"the cluster at {self._where} has no worker", "start some: dask worker ADDRESS")
            if not self._workers and not is_told:
                self._progress.note(f"waiting for the first worker of the cluster at {self._where}")
                is_told = True
            self._over.wait(0.0 if self._workers else _LOOK_S)
        self._watcher.start()

    def require_shared(self, inputs: Sequence[Path], outputs: Sequence[Path]) -> None:
        """Raise `InputError` if a worker does not see inputs, or a file that appears where outputs will."""
        places = [_existing(path.absolute()) for path in outputs]
        seen = [str(path) for one in inputs for path in _samples(one.absolute())] + [str(path) for path in places]
        with ExitStack() as stack:
            marks = list[str]()
            for place in places:
                with suppress(OSError):  # who writes there tells it
                    marks.append(stack.enter_context(NamedTemporaryFile(prefix=".segfit-", dir=place)).name)
            for address, missing in self._asked(_unseen, [*seen, *marks]).items():
                if missing and isinstance(missing, list):
                    path = next((str(Path(item).parent) for item in marks if item in missing), missing[0])
                    problem = f"the worker {address} does not see {path} as it is here"
                    raise InputError(problem, "start workers where the same files have the same paths")
        self._must_see += seen

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have a worker do it, one whose free memory it fits into."""
        if self._wants_gpu(fn) and self._workers and not self._has_gpus():
            raise InputError(f"no worker of the cluster at {self._where} has a GPU", "give --device cpu, or auto")
        future: Future[Any] = Future()
        with self._changed:
            self._send(future, partial(fn, *args, **kwargs) if args or kwargs else fn)
        future.add_done_callback(self._forget)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more; what was sent is dropped with `cancel_futures`, though a worker ends what it has in work."""
        self._over.set()
        if self._watcher.is_alive():
            self._watcher.join()
        if cancel_futures:
            for future in list(self._sent):
                future.cancel()
        elif wait:
            futures.wait(list(self._sent))

    def _send(self, future: Future[Any], work: Callable[[], Any], times: int = 1) -> None:
        resources: dict[str, float] = {_MEMORY: min(getattr(work, "num_bytes", 0), self.memory_bytes)}
        if self._wants_gpu(work) or (getattr(work, "device", None) == "auto" and self._has_gpus()):
            resources[_GPU] = 1
        try:
            distant = self._client.submit(work, key=f"segfit-{token_hex(8)}", pure=False, resources=resources)
        except Exception as error:  # whatever a client that was closed raises
            raise self._lost() from error
        self._sent[future] = _Sent(work, distant, times)
        distant.add_done_callback(partial(self._arrived, future))

    def _arrived(self, future: Future[Any], distant: Any) -> None:
        """Take the result of a case, or why there is none, from dask."""
        from distributed.scheduler import KilledWorker

        with self._changed:
            sent = self._sent.get(future)
            if sent is None or sent.distant is not distant:  # cancelled, or sent again
                return
        value, error = None, None
        try:
            error = distant.exception() if distant.status == "error" else None
            value = distant.result() if distant.status == "finished" else None
        except (Exception, CancelledError) as fault:  # noqa: BLE001 - it cannot be fetched or unpacked
            error = fault
        if isinstance(error, KilledWorker):
            last = error.last_worker.address
            error = _lost_case(
                sent, f"each of the {error.allowed_failures + 1} times that it had this case, last {last}"
            )
        elif distant.status not in ("error", "finished") or isinstance(error, CancelledError):
            if self._client.status == "running":  # the result went with its worker, or the connection is there again
                self._send_again(future, sent)
                return
            error = self._lost()
        self._settle(future, value, error)

    def _send_again(self, future: Future[Any], sent: _Sent) -> None:
        """Send a case again, but one that was sent often may be what its workers ended with."""
        with self._changed:
            if self._sent.get(future) is not sent:
                return
            try:
                if sent.times >= _MOST_SENT:
                    raise _lost_case(sent, f"or was gone, each of the {sent.times} times that this case was sent")
                self._send(future, sent.work, sent.times + 1)
            except SegfitError as error:
                self._settle(future, None, error)
        with suppress(Exception):  # of a client that was closed
            sent.distant.cancel()

    def _settle(self, future: Future[Any], value: Any, error: BaseException | None) -> None:
        with self._changed:
            if self._sent.pop(future, None) is None or not future.set_running_or_notify_cancel():
                return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def _forget(self, future: Future[Any]) -> None:
        with self._changed:
            sent = self._sent.pop(future, None)
        if sent is not None and future.cancelled():
            with suppress(Exception):  # of a client that was closed
                sent.distant.cancel()

    def _lost(self) -> StageError:
        action = "when it is there again, the same command goes on"
        return StageError(f"the connection to the scheduler at {self._where} was lost", action)

    def _watch(self) -> None:
        """Introduce workers that come, forget those that went, and send again what nobody was there for."""
        since, unsettled = monotonic(), 0
        while not self._over.wait(_LOOK_S):
            if self._client.status in ("closed", "closing"):
                self._fail(self._lost())
                continue
            try:
                there = self._present()
                new, gone = there - self._workers.keys() - self._refused, self._workers.keys() - there
                for address in gone:
                    del self._workers[address]
                for problem in self._introduce(new) if new else ():
                    self._progress.warn(warning("worker_refused", f"{problem}; it is given no cases"))
                unsettled = _UNSETTLED if new or gone else max(0, unsettled - 1)
                is_stuck = unsettled > 0 and self._send_stuck()
                unsettled = _UNSETTLED if is_stuck else unsettled
            except Exception:  # noqa: BLE001 - what is lost with a worker or the scheduler is told by the cases
                continue
            since = monotonic() if self._workers and not is_stuck else since
            if monotonic() - since > self._patience_s:
                problem = f"the cluster at {self._where} has had no worker for its cases for {self._patience_s:g} s"
                self._fail(StageError(problem, "start workers and run the same command again"))

    def _fail(self, error: SegfitError) -> None:
        for future, sent in list(self._sent.items()):
            self._settle(future, None, error)
            with suppress(Exception):  # of a client that was closed
                sent.distant.cancel()

    def _send_stuck(self) -> bool:
        """Send again what no worker has; return whether there is a case that no worker can have.

        The scheduler knows what a worker declares when it has come already, and looks at nothing anew for that.
        """
        held = {key for keys in self._client.processing().values() for key in keys}
        with self._changed:
            for future, sent in list(self._sent.items()):
                if sent.distant.status == "pending" and sent.distant.key not in held:
                    if not self._workers or (self._wants_gpu(sent.work) and not self._has_gpus()):
                        return True
                    self._send_again(future, sent)
        return False

    def _has_gpus(self) -> bool:
        return any(worker.gpu for worker in list(self._workers.values()))

    def _wants_gpu(self, work: Callable[[], Any]) -> bool:
        return (getattr(work, "device", None) or "").startswith("cuda")

    def _present(self) -> set[str]:
        return set(self._client.scheduler_info(n_workers=-1)["workers"])

    def _asked(self, function: Callable[..., Any], *args: Any, of: Collection[str] | None = None) -> dict[str, Any]:
        """Call a function on workers, by default on those that are given cases; return results or errors by address."""
        asked = list(self._workers if of is None else of)
        answers: dict[str, Any] = self._client.run(function, *args, workers=asked, on_error="return") if asked else {}
        return answers

    def _introduce(self, addresses: Collection[str]) -> list[str]:
        """Have workers declare what they have; return what is wrong with those that cannot be used."""
        own, problems = metadata.version("segfit"), dict[str, str]()
        for address, version in self._asked(metadata.version, "segfit", of=addresses).items():
            if isinstance(version, metadata.PackageNotFoundError):
                problems[address] = f"has no segfit, here is {own}"
            elif version != own and isinstance(version, str):  # else it has gone
                problems[address] = f"has segfit {version}, here is {own}"
        for address, missing in self._asked(_unseen, self._must_see, of=set(addresses) - problems.keys()).items():
            if missing and isinstance(missing, list):
                problems[address] = f"does not see {missing[0]}"
        for address, declared in self._asked(_declare, of=set(addresses) - problems.keys()).items():
            if isinstance(declared, tuple):
                self._workers[address] = _Worker(*declared)
            elif not isinstance(declared, OSError):
                problems[address] = f"cannot be asked ({reason_of(declared)})"
        self._largest, self._refused = self.memory_bytes, self._refused | problems.keys()
        return [f"the worker {address} {problem}" for address, problem in problems.items()]


def _lost_case(sent: _Sent, reason: str) -> LostCaseError:
    return LostCaseError(getattr(sent.work, "__name__", ""), f"ended {reason}", was_alone=False)


async def _declare(dask_worker: Any) -> tuple[float, float, int]:
    """Have a worker declare its memory and GPU, if it has not yet; return both and the number of its threads.

    ``MEMORY`` and ``GPU``, by which users name them, go before what is found.
    """
    known, limit = dask_worker.state.total_resources, dask_worker.memory_manager.memory_limit
    found = {
        _MEMORY: known.get("MEMORY") or (_USABLE * limit if limit else free_memory_gb() * 2**30),
        _GPU: min(1.0, known["GPU"]) if "GPU" in known else float(_has_gpu()),
    }
    new = {name: amount for name, amount in found.items() if name not in known}
    if new:
        await dask_worker.set_resources(**new)
    return known[_MEMORY], known[_GPU], dask_worker.state.nthreads


def _has_gpu() -> bool:
    """Whether this process sees a GPU of NVIDIA, found without loading torch for it."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    return chosen not in ("", "-1") and any(Path("/dev").glob("nvidia[0-9]*"))


def _unseen(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not os.path.exists(path)]  # noqa: PTH110 - texts came, texts go back


def _existing(path: Path) -> Path:
    return path if path.is_dir() else _existing(path.parent)


def _samples(path: Path) -> list[Path]:
    """Return a path and, of a folder, something in it: an empty one may be where another is not mounted."""
    return [path, *islice(path.iterdir(), 1)] if path.is_dir() else [path]
