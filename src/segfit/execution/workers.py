"""Supervised worker processes behind the `concurrent.futures.Executor` interface.

One thread stands beside each process: it hands over a task, watches, and takes the answer, so that everybody waits for
one thing only and never without end. A worker knows nothing of its parent's memory or script: it is a fresh
interpreter that imports what the task names. It ends with its parent, however that ends.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from multiprocessing import Pipe
from subprocess import PIPE, Popen, TimeoutExpired
from threading import Condition, Thread
from time import monotonic
from typing import Any, ParamSpec, TypeVar

from segfit.errors import Problem, StageError, warning
from segfit.execution.memory import process_bytes
from segfit.execution.worker_main import GRACE_S, Answer
from segfit.text import gigabytes

__all__ = ["LostCaseError", "WorkerPool"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_LOOK_S = 0.1  # between looks at a worker: how precisely its memory is known, how late a stop is noticed
_STALL_S = 600.0  # assumption: a file server may be away for minutes
# One thread per worker: more would get in each other's way, and change results in the last digit with their number.
_BLAS_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


class LostCaseError(StageError):
    """A case whose worker ended, hung or ran out of memory at every attempt.

    `reason` follows the word "worker", as in "killed by signal 9 (Killed) at 5.1 GB". One that had others beside it at
    every attempt, so that they may be the cause, was not alone.
    """

    def __init__(self, case: str, reason: str, was_alone: bool = True) -> None:
        super().__init__(f"case {case}: worker {reason}")
        self.case, self.reason, self.was_alone = case, reason, was_alone
        self.args = (case, reason, was_alone)


class _EndedError(Exception):
    """A worker did not answer; the text says why, as in "killed by signal 9"."""


@dataclass(slots=True, eq=False)
class _Task:
    case: str
    payload: bytes
    future: Future[Any]
    attempt: int = 0
    held: int = 0  # bytes, the most that its worker was seen to hold

    def lost_error(self, reason: str) -> LostCaseError:
        return LostCaseError(self.case, reason + (f" at {gigabytes(self.held / 2**30)}" if self.held else ""))


class _Worker:
    """A process and the connection to it."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            program = (
                f"import sys; sys.path[:] = {sys.path!r}\n"
                f"from segfit.execution.worker_main import main; main({theirs.fileno()})"
            )
            self.process = Popen(
                [sys.executable, "-c", program],
                stdin=PIPE,  # never written to: it closes when this process is gone
                pass_fds=(theirs.fileno(),),
                env=os.environ | dict.fromkeys(_BLAS_THREADS, "1"),
                process_group=0,  # Ctrl-C is for the parent, who stops its workers
            )

    def do(self, task: _Task, stall_s: float, stopped: Callable[[], bool]) -> Answer:
        """Return the answer to a task; raise `_EndedError` if there will be none."""
        pid, used, since = self.process.pid, -1.0, monotonic()
        try:
            self._connection.send_bytes(task.payload)
            while not self._connection.poll(_LOOK_S):
                if stopped():
                    raise _EndedError("stopped")
                if self.process.poll() is not None and not self._connection.poll():
                    raise EOFError
                task.held = max(task.held, process_bytes(pid))
                now = _processor_seconds(pid)
                if now > used:
                    used, since = now, monotonic()
                elif monotonic() - since > stall_s:
                    raise _EndedError(f"hung: no processor time used for {stall_s:g} s")
            return Answer(*pickle.loads(self._connection.recv_bytes()))
        except (EOFError, OSError):
            raise _EndedError(self._end()) from None

    def stop(self) -> None:
        """End the process: politely, so that it removes unfinished files, then by force."""
        self._connection.close()
        self.process.terminate()
        try:
            self.process.wait(GRACE_S)
        except TimeoutExpired:
            self.process.kill()
            self._end()
        assert self.process.stdin is not None
        self.process.stdin.close()

    def _end(self) -> str:
        """Return how the process ended."""
        try:
            code = self.process.wait(GRACE_S)
        except TimeoutExpired:
            return "stopped answering"
        return f"killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with code {code}"


class WorkerPool(Executor):
    """An executor of worker processes that knows which case a process died with, and retries it.

    A case whose worker was killed, hung or ran out of memory is retried with half the workers, then alone; then its
    future fails with `LostCaseError`. An exception in a task is raised by its future, with the worker's traceback as a
    note. Functions, arguments and results cross by pickle; functions must be importable, so not from a script.

    Parameters
    ----------
    workers : processes at most; they start when they are needed
    stall_s : a worker that used no processor time for so long has hung and is stopped; where the system does not tell
        processor time (outside Linux), a task may take so long at all
    warn : called for every case that is retried
    """

    def __init__(
        self, workers: int, *, stall_s: float = _STALL_S, warn: Callable[[Problem], None] = lambda _: None
    ) -> None:
        if workers < 1:
            raise ValueError(f"a pool needs one worker or more, got {workers}")
        self.workers = workers
        self._limits = (self.workers, *sorted({max(1, self.workers // 2), 1}, reverse=True))  # per attempt
        self._stall_s = stall_s
        self._warn = warn
        self._changed = Condition()
        self._queue: deque[_Task] = deque()
        self._running: list[_Task] = []
        self._supervisors: list[Thread] = []
        self._closed = self._stopped = False

    def submit(
        self, fn: Callable[_Arguments, _Result], /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> Future[_Result]:
        """Have a case done, whose name is that of its function; raise what pickle raises if it cannot be sent."""
        task = _Task(getattr(fn, "__name__", "task"), pickle.dumps((fn, args, kwargs)), Future())
        with self._changed:
            if self._closed:
                raise RuntimeError("the pool was shut down")
            self._queue.append(task)
            if len(self._supervisors) < min(self.workers, len(self._queue) + len(self._running)):
                thread = Thread(target=self._supervise, name="segfit-worker", daemon=True)
                self._supervisors.append(thread)
                thread.start()
            self._changed.notify_all()
        return task.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; by default wait until those submitted are done and all processes have ended."""
        with self._changed:
            self._closed = True
            if cancel_futures:
                self._cancel_waiting()
            self._changed.notify_all()
        for thread in self._supervisors if wait else ():
            while thread.is_alive():
                thread.join(_LOOK_S)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Shut down; what has not begun is dropped after an error, and all after Ctrl-C or when nobody listens."""
        if kind is not None and not issubclass(kind, Exception):
            self.stop()
        self.shutdown(cancel_futures=kind is not None)

    def stop(self) -> None:
        """End all processes now; tasks in work fail."""
        with self._changed:
            self._closed = self._stopped = True
            self._cancel_waiting()
            self._changed.notify_all()
        self.shutdown()

    def _cancel_waiting(self) -> None:
        for task in self._queue:
            if not task.future.cancel():  # one that is to be tried again
                task.future.set_exception(task.lost_error("stopped"))
        self._queue.clear()

    def _supervise(self) -> None:
        """Run one process and the tasks it takes, and start another when it ends."""
        worker: _Worker | None = None
        while (task := self._next()) is not None:
            try:
                worker = worker or _Worker()
                answer = worker.do(task, self._stall_s, lambda: self._stopped)
                if answer.out_of_memory:
                    raise _EndedError("ran out of memory")
            except (_EndedError, OSError) as error:  # OSError: no process could be started
                if worker is not None:
                    worker.stop()
                worker = None
                self._lost(task, str(error))
            except Exception as error:  # noqa: BLE001 - a result that does not unpack is its case's failure
                self._settle(task, Answer(error=error))
            else:
                self._settle(task, answer)
            del task  # or it would keep its result while there is nothing to do
        if worker is not None:
            worker.stop()

    def _next(self) -> _Task | None:
        """Wait for a task that may start now; None when there will be no more."""
        with self._changed:
            while not self._stopped and (self._queue or not self._closed):
                if self._queue and len(self._running) < self._limit(self._queue[0]):
                    task = self._queue.popleft()
                    if task.attempt or task.future.set_running_or_notify_cancel():
                        self._running.append(task)
                        return task
                else:
                    self._changed.wait(_LOOK_S if self._queue else 1.0)
            return None

    def _limit(self, task: _Task) -> int:
        """Return how many tasks may be in work when this one is, itself included."""
        return min(self._limits[one.attempt] for one in (*self._running, task))

    def _lost(self, task: _Task, reason: str) -> None:
        error = task.lost_error(reason)
        with self._changed:
            again = not self._stopped and task.attempt + 1 < len(self._limits)
            if again:
                self._running.remove(task)
                task.attempt += 1
                task.held = 0
                self._queue.appendleft(task)
                self._changed.notify_all()
        if again:
            most = self._limits[task.attempt]
            how = "alone" if most == 1 else f"with {most} cases at a time"
            self._warn(warning("case_retried", f"worker {error.reason}", f"retrying it {how}", case=error.case))
        else:
            self._settle(task, Answer(error=error))

    def _settle(self, task: _Task, answer: Answer) -> None:
        with self._changed:
            self._running.remove(task)
            self._changed.notify_all()
        if answer.error is None:
            task.future.set_result(answer.value)
        else:
            if answer.traceback:
                answer.error.add_note(f"case {task.case}, in its worker:\n{answer.traceback}")
            task.future.set_exception(answer.error)


def _processor_seconds(pid: int) -> float:
    """Return the processor time a process has used; 0 where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:  # noqa: PTH123 - ten a second
            fields = handle.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
