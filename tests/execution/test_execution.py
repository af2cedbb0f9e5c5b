from __future__ import annotations

import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pool_tasks
import pytest

from segfit.errors import InputError, StageError
from segfit.execution import execution as execution_module
from segfit.execution import pool as pool_module
from segfit.execution.execution import LOCAL, Execution
from segfit.execution.workers import LostCaseError, WorkerPool
from segfit.progress import SILENT, Progress

_PATIENCE_S = 120.0  # for what takes a second on an idle machine


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every sized work done by processes."""
    monkeypatch.setattr(pool_module, "_PROCESSES_FROM", 1)


def _one(_: int) -> int:
    return 1


def test_small_work_is_done_by_threads_and_large_work_by_processes() -> None:
    small = dict(LOCAL.map(pool_tasks.process, range(3), description="x", size=lambda _: 1 << 30))
    assert set(small.values()) == {os.getpid()}
    large = dict(LOCAL.map(pool_tasks.process, range(4), description="x", size=lambda _: 1 << 30))
    assert os.getpid() not in large.values()
    assert large.keys() == {0, 1, 2, 3}


@pytest.mark.usefixtures("processes")
def test_what_has_no_size_stays_in_this_process() -> None:
    own = dict(LOCAL.map(lambda _: os.getpid(), range(3), description="x"))
    mixed = dict(LOCAL.map(lambda _: os.getpid(), range(3), description="x", size=lambda item: item << 40))
    assert {*own.values(), *mixed.values()} == {os.getpid()}


@pytest.mark.parametrize("size", [None, _one])
@pytest.mark.usefixtures("processes")
def test_every_item_comes_once_with_its_result(size: object) -> None:
    found = list(Execution(workers=3).map(pool_tasks.double, range(50), description="x", size=size))  # type: ignore[arg-type]
    assert sorted(found) == [(value, 2 * value) for value in range(50)]
    assert list(LOCAL.map(pool_tasks.double, [], description="x", size=size)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(("room", "first"), [(0.0, 1), (2.0, 2), (3.5, 3), (100.0, 6)])
def test_items_in_work_fit_into_the_room(room: float, first: int) -> None:
    """`first` is what the items at the head of the queue take together, as many as there is room for."""
    changed, taken, most = threading.Condition(), 0, 0

    def work(size: int) -> None:
        nonlocal taken, most
        with changed:
            taken += size
            most = max(most, taken)
            changed.notify_all()
            assert changed.wait_for(lambda: most >= first, _PATIENCE_S)
        time.sleep(0.02)  # time for others to start that should not
        with changed:
            taken -= size

    sizes = [1, 1, 1, 3, 2, 1, 1, 1, 1]
    done = list(Execution(workers=4, memory_gb=room / 2**30).map(work, sizes, description="x", size=lambda size: size))
    assert len(done) == len(sizes)
    assert first <= most <= max(room, 3)  # one item is always in work


def test_the_largest_come_first_if_asked_for() -> None:
    sizes = [3, 1, 4, 1, 5]
    for largest_first, order in ((True, [5, 4, 3, 1, 1]), (False, sizes)):
        begun: list[int] = []
        one = Execution(workers=1)
        done = one.map(begun.append, sizes, description="x", size=lambda n: n, largest_first=largest_first)
        assert len(list(done)) == 5
        assert begun == order


@pytest.mark.usefixtures("processes")
def test_lost_cases_are_named_at_the_end_and_the_others_are_done(tmp_path: Path) -> None:
    work = partial(pool_tasks.die_if, tmp_path)
    results = LOCAL.map(work, "abcdef", description="measure", name=lambda case: f"case-{case}", size=_one)
    assert sorted(itertools.islice(results, 4)) == [("a", "a"), ("c", "c"), ("d", "d"), ("f", "f")]
    with pytest.raises(StageError) as caught:
        next(results)
    message = str(caught.value)
    assert message.startswith("measure: 2 of 6 cases failed, the others are done: case case-")
    for case in ("case-b", "case-e"):
        assert f"case {case}: worker killed by signal 9 (Killed)" in message


@pytest.mark.usefixtures("processes")
def test_lost_cases_come_to_what_the_caller_says(tmp_path: Path) -> None:
    work = partial(pool_tasks.die_if, tmp_path)
    results = dict(
        LOCAL.map(work, "abe", description="x", name=lambda case: f"case-{case}", size=_one,
                  lost=lambda case, error: f"{case}: {error.case} {error.reason}")
    )  # fmt: skip
    assert results.pop("a") == "a"
    assert results.keys() == {"b", "e"}
    for case, told in results.items():
        assert told.startswith(f"{case}: case-{case} killed by signal 9 (Killed)")


def test_lost_cases_cross_processes() -> None:
    lost = pickle.loads(pickle.dumps(LostCaseError("a", "killed by signal 9 (Killed) at 5.1 GB")))
    assert str(lost) == "case a: worker killed by signal 9 (Killed) at 5.1 GB"
    assert (lost.case, lost.reason) == ("a", "killed by signal 9 (Killed) at 5.1 GB")


def test_one_pool_may_do_work_in_parts() -> None:
    with Execution(workers=2).kept_open([2 << 30, 2 << 30, 1]) as large:  # what any of the parts would not be
        first, second = (dict(large.map(pool_tasks.process, [n], description="x", size=_one)) for n in range(2))
    assert first[0] == second[1] != os.getpid()  # a process that is there is used again
    for sizes in ([4 << 29, 4 << 28], [8 << 30, 0], []):
        with LOCAL.kept_open(sizes) as small:
            assert dict(small.map(pool_tasks.process, [0], description="x", size=_one)) == {0: os.getpid()}


def test_a_pool_that_nobody_wants_any_more_ends_its_processes(tmp_path: Path) -> None:
    def interrupted() -> None:
        with pool_module.open_pool(2, [4 << 30, 4 << 30], SILENT) as pool:
            pool.submit(pool_tasks.hold_alive, str(tmp_path), 1)
            pool_tasks.wait_for(lambda: any(path.read_text() for path in tmp_path.iterdir()), _PATIENCE_S)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "1").read_text()), 0)


@pytest.mark.parametrize("size", [None, _one])
@pytest.mark.usefixtures("processes")
def test_first_exception_ends_the_work(size: object) -> None:
    with pytest.raises(ValueError, match="is a bad number"):
        list(LOCAL.map(pool_tasks.fail, range(9), description="x", size=size))  # type: ignore[arg-type]


def test_an_executor_from_outside_is_used_and_left_open(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as threads, WorkerPool(1) as workers:
        for executor in (threads, workers):
            outside = Execution(engine=lambda *_, executor=executor: nullcontext(executor))
            assert dict(outside.map(pool_tasks.double, [3], description="x", size=_one)) == {3: 6}
            assert executor.submit(pool_tasks.double, 4).result() == 8
        with pytest.raises(StageError, match="case sick: worker killed by signal 9"):
            list(outside.map(pool_tasks.note_and_die_in, [tmp_path], description="x", name=lambda _: "sick",
                             size=lambda _: 1))  # fmt: skip


def test_what_an_error_leaves_is_taken_back_from_an_executor_that_stays_open() -> None:
    begun: list[int] = []

    def work(value: int) -> None:
        begun.append(value)
        time.sleep(0.1)  # the next are submitted meanwhile
        raise ValueError(value)

    with ThreadPoolExecutor(1) as threads:
        outside = Execution(workers=4, engine=lambda *_: nullcontext(threads))
        with pytest.raises(ValueError, match="0"):
            list(outside.map(work, range(8), description="x", size=_one))
    assert begun in ([0], [0, 1])  # the second may have begun when the first had failed


def test_an_engine_is_told_what_there_is_to_do_and_asked_only_for_work_that_may_leave() -> None:
    asked: list[tuple[int, list[int]]] = []

    def engine(workers: int, sizes: Sequence[int], progress: Progress) -> ThreadPoolExecutor:
        assert progress is SILENT
        asked.append((workers, list(sizes)))
        return ThreadPoolExecutor(workers)

    execution = Execution(workers=3, progress=SILENT, engine=engine)
    for items in ([5, 7], [1, 2, 3, 4], [1, 0], []):
        done = list(execution.map(pool_tasks.double, items, description="x", size=lambda n: n))
        assert sorted(done) == sorted((value, 2 * value) for value in items)
    assert sorted(execution.map(pool_tasks.double, [1], description="x")) == [(1, 2)]
    assert asked == [(2, [5, 7]), (3, [1, 2, 3, 4])]


def test_there_is_no_work_without_workers() -> None:
    with pytest.raises(InputError) as caught:
        Execution(workers=0)
    assert caught.value.problem.endswith("got 0")


def test_memory_is_measured_unless_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution_module, "free_memory_gb", lambda: 3.0)
    assert (LOCAL.memory_bytes, Execution(memory_gb=0.5).memory_bytes) == (3 << 30, 1 << 29)


def test_a_thread_that_runs_out_of_memory_tries_again_alone() -> None:
    seen: list[int] = []

    def work(number: int) -> int:
        seen.append(number)
        if number == 0 or (number == 1 and seen.count(1) == 1):
            raise MemoryError
        return -number

    execution = Execution(workers=2, progress=SILENT)
    lost = dict(execution.map(work, range(4), description="x", lost=lambda _, error: error))
    error = lost.pop(0)
    assert isinstance(error, LostCaseError)
    assert (error.case, error.reason) == ("0", "ran out of memory")
    assert lost == {1: -1, 2: -2, 3: -3}
    assert sorted(seen) == [0, 0, 1, 1, 2, 3]
    with pytest.raises(StageError) as caught:
        list(execution.map(work, [0, 5], description="x"))
    assert caught.value.problem.startswith("x: 1 of 2 cases failed, the others are done: case 0")


@pytest.mark.usefixtures("processes")
def test_who_stops_listening_leaves_no_process(tmp_path: Path) -> None:
    results = Execution(workers=2).map(
        partial(pool_tasks.hold_after_first, str(tmp_path)), range(4), description="x", size=_one
    )
    next(results)
    started = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < _PATIENCE_S  # the others would take an hour


_SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have told its background jobs to ignore it
sys.path.insert(0, {folder!r})
from functools import partial
import pool_tasks
from segfit.execution.execution import Execution
try:
    list(Execution().map(partial(pool_tasks.hold_alive, {marks!r}), range(2), description="x", size=lambda _: 4 << 30))
except KeyboardInterrupt:
    print("interrupted")
"""


def test_interrupt_ends_the_workers_promptly(tmp_path: Path) -> None:
    program = _SCRIPT.format(folder=str(Path(__file__).parent), marks=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as parent:
        pool_tasks.wait_for(lambda: sum(bool(path.read_text()) for path in tmp_path.iterdir()) == 2, _PATIENCE_S)
        parent.send_signal(signal.SIGINT)
        output, errors = parent.communicate(timeout=_PATIENCE_S)
    assert (output, errors) == (b"interrupted\n", b"")
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
