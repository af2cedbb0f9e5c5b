from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, as_completed
from pathlib import Path

import pool_tasks
import pytest

from segfit.errors import DatasetError, Problem, StageError
from segfit.execution.workers import LostCaseError, WorkerPool

_PATIENCE_S = 120.0  # for what takes a second on an idle machine


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _wait_until_gone(pids: list[int]) -> None:
    pool_tasks.wait_for(lambda: not any(map(_alive, pids)), _PATIENCE_S)


def test_tasks_are_done_in_other_processes_that_end() -> None:
    with WorkerPool(2) as pool:
        assert isinstance(pool, Executor)
        assert list(pool.map(pool_tasks.double, range(20))) == list(range(0, 40, 2))
        pids = {future.result() for future in as_completed(pool.submit(pool_tasks.process) for _ in range(10))}
        assert os.getpid() not in pids
        assert len(pids) <= 2
    _wait_until_gone(list(pids))
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(pool_tasks.double, 1)


def test_processes_start_when_they_are_needed() -> None:
    with WorkerPool(64) as pool:
        assert len({pool.submit(pool_tasks.process).result() for _ in range(5)}) <= 2


def test_matrix_products_of_a_worker_take_one_thread() -> None:
    with WorkerPool(1) as pool:
        assert pool.submit(pool_tasks.environment, "OPENBLAS_NUM_THREADS").result(_PATIENCE_S) == "1"
        assert pool.submit(pool_tasks.environment, "OMP_NUM_THREADS").result(_PATIENCE_S) == "1"


def test_exception_brings_its_traceback() -> None:
    with WorkerPool(1) as pool:
        future = pool.submit(pool_tasks.named("c7", pool_tasks.fail), 5)
        with pytest.raises(ValueError, match="5 is a bad number") as caught:
            future.result(_PATIENCE_S)
        assert caught.value.args == ("5 is a bad number",)
        (note,) = caught.value.__notes__
        assert note.startswith("case c7, in its worker:\nTraceback")
        assert 'pool_tasks.py", line' in note
        assert 'raise ValueError(f"{value} is a bad number")' in note
        assert pool.submit(pool_tasks.double, 4).result(_PATIENCE_S) == 8


def test_what_cannot_be_sent_is_told() -> None:
    with WorkerPool(1) as pool:
        with pytest.raises(StageError, match=r"StubbornError \(unpackable\) cannot be sent between processes"):
            pool.submit(pool_tasks.fail_stubbornly).result(_PATIENCE_S)
        with pytest.raises(StageError, match="a task's lock cannot be sent between processes"):
            pool.submit(pool_tasks.give_unpicklable).result(_PATIENCE_S)
        with pytest.raises(AttributeError, match="local object"):
            pool.submit(lambda: 1)
        assert pool.submit(pool_tasks.double, 4).result(_PATIENCE_S) == 8


def test_problems_of_a_dataset_cross_processes() -> None:
    problem = Problem("c1", "is odd", "mend it")
    with WorkerPool(1) as pool, pytest.raises(DatasetError) as caught:
        pool.submit(pool_tasks.refuse, problem).result(_PATIENCE_S)
    assert caught.value.problems == (problem,)


@pytest.mark.parametrize(
    ("task", "arguments", "told"),
    [
        (pool_tasks.die, (signal.SIGKILL, 200), r"killed by signal 9 \(Killed\) at 0\.[2-4]\d GB"),
        (pool_tasks.die, (signal.SIGSEGV,), r"killed by signal 11 \(Segmentation fault\)"),
        (pool_tasks.leave, (137,), "ended with code 137"),
        (pool_tasks.exhaust, (400,), "ran out of memory"),
    ],
)
def test_lost_worker_is_explained_and_the_others_finish(task: object, arguments: tuple[int, ...], told: str) -> None:
    warnings: list[Problem] = []
    with WorkerPool(2, warn=warnings.append) as pool:
        sick = pool.submit(pool_tasks.named("sick", task), *arguments)  # type: ignore[arg-type]
        others = [pool.submit(pool_tasks.double, value) for value in range(6)]
        assert [other.result(_PATIENCE_S) for other in others] == [0, 2, 4, 6, 8, 10]
        with pytest.raises(LostCaseError, match=f"^case sick: worker {told}"):
            sick.result(_PATIENCE_S)
    assert [(item.code, item.case, item.action) for item in warnings] == [("case_retried", "sick", "retrying it alone")]


@pytest.mark.parametrize(("workers", "attempts"), [(1, 2), (2, 2), (3, 2), (4, 3), (9, 3)])
def test_attempts_are_counted(tmp_path: Path, workers: int, attempts: int) -> None:
    with WorkerPool(workers) as pool, pytest.raises(LostCaseError):
        pool.submit(pool_tasks.named("sick", pool_tasks.note_and_die), tmp_path, "sick").result(_PATIENCE_S)
    assert len(list(tmp_path.iterdir())) == attempts


def test_a_pool_has_a_worker() -> None:
    for workers in (0, -1):
        with pytest.raises(ValueError, match=f"a pool needs one worker or more, got {workers}"):
            WorkerPool(workers)


def test_case_is_tried_with_half_the_workers_then_alone(tmp_path: Path) -> None:
    warnings: list[Problem] = []

    def warn(warning: Problem) -> None:
        warnings.append(warning)
        (tmp_path / f"warned-{len(warnings)}").touch()

    cases = ["a", "sick", *"bcdefghi"]
    with WorkerPool(4, warn=warn) as pool:
        futures = {
            case: pool.submit(pool_tasks.named(case, pool_tasks.die_twice_beside_others), tmp_path, case)
            for case in cases
        }
        beside = {case: future.result(_PATIENCE_S) for case, future in futures.items()}
    assert not any(beside.values())
    assert [item.action for item in warnings] == [
        "retrying it with 2 cases at a time",
        "retrying it alone",
    ]


def test_one_kill_costs_no_case(tmp_path: Path) -> None:
    with WorkerPool(3) as pool:
        futures = [
            pool.submit(pool_tasks.named(str(value), pool_tasks.die_once), tmp_path, value) for value in range(5)
        ]
        assert [future.result(_PATIENCE_S) for future in futures] == [0, 1, 2, 3, 4]


def test_hung_worker_is_ended_and_a_busy_one_is_not() -> None:
    with WorkerPool(2, stall_s=1.0) as pool:
        busy = pool.submit(pool_tasks.named("busy", pool_tasks.compute), 2.5)
        with pytest.raises(LostCaseError, match="case hung: worker hung: no processor time used for 1 s"):
            pool.submit(pool_tasks.named("hung", pool_tasks.sleep), 3600.0).result(_PATIENCE_S)
        assert busy.result(_PATIENCE_S) == 2.5


def test_stop_ends_tasks_at_once_and_lets_them_tidy_up(tmp_path: Path) -> None:
    pool = WorkerPool(2)
    pid = pool.submit(pool_tasks.process).result(_PATIENCE_S)
    long = [pool.submit(pool_tasks.named(f"c{n}", pool_tasks.tidy), tmp_path / str(n), 3600.0) for n in range(2)]
    waiting = pool.submit(pool_tasks.double, 1)
    for number in range(2):
        pool_tasks.wait_for_file(tmp_path / f"{number}/unfinished")
    started = time.monotonic()
    pool.stop()
    assert time.monotonic() - started < _PATIENCE_S  # the tasks would take an hour
    assert waiting.cancelled()
    for number, future in enumerate(long):
        with pytest.raises(LostCaseError, match=f"case c{number}: worker stopped"):
            future.result(0)
    assert not list(tmp_path.glob("*/unfinished"))
    _wait_until_gone([pid])


def test_waiting_tasks_can_be_cancelled(tmp_path: Path) -> None:
    pool = WorkerPool(1)
    first = pool.submit(pool_tasks.wait_for_file, tmp_path / "go on")
    pool_tasks.wait_for(first.running)
    second = pool.submit(pool_tasks.double, 1)
    pool.shutdown(wait=False, cancel_futures=True)
    assert second.cancelled()
    assert not first.done()
    (tmp_path / "go on").touch()
    pool.shutdown()
    assert first.result(0) is None


_SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have told its background jobs to ignore it
sys.path.insert(0, {folder!r})
import pool_tasks
from segfit.execution.workers import WorkerPool
pool = WorkerPool(2)
for future in [pool.submit(pool_tasks.hold_alive, {marks!r}, n) for n in range(2)]:
    future.result()
"""


def _script(marks: Path) -> subprocess.Popen[bytes]:
    program = _SCRIPT.format(folder=str(Path(__file__).parent), marks=str(marks))
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)


def _pids(marks: Path) -> list[int]:
    def told() -> list[str]:
        return [text for path in marks.iterdir() if (text := path.read_text())]

    pool_tasks.wait_for(lambda: len(told()) == 2, _PATIENCE_S)
    return list(map(int, told()))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    with _script(tmp_path) as parent:
        pids = _pids(tmp_path)
        parent.send_signal(number)
        parent.wait(_PATIENCE_S)
    _wait_until_gone(pids)


def test_script_without_guard_works_and_is_not_run_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "print('once')\n"
        "import pool_tasks\nfrom segfit.execution.workers import WorkerPool\n"
        "def own(): return 1\n"
        "pool = WorkerPool(2)\n"
        "print(list(pool.map(pool_tasks.double, [1, 2, 3])))\n"
        "try:\n    pool.submit(own).result()\nexcept Exception as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=_PATIENCE_S, check=True)
    once, results, refused = done.stdout.splitlines()
    assert (once, results) == ("once", "[2, 4, 6]")
    assert "the function must be defined in a module that can be imported, not in a script" in refused
    assert done.stderr == ""


def _held() -> tuple[int, int]:
    """Return how many threads and open files this process has."""
    return len(list(Path("/proc/self/task").iterdir())), len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
def test_two_hundred_pools_start_and_stop() -> None:
    with WorkerPool(1) as pool:  # what only the first one opens
        pool.submit(pool_tasks.process).result(_PATIENCE_S)
    before = _held()
    pids = []
    for cycle in range(200):
        with WorkerPool(1) as pool:
            pids.append(pool.submit(pool_tasks.process).result(_PATIENCE_S))
            assert pool.submit(pool_tasks.double, cycle).result(_PATIENCE_S) == 2 * cycle
    assert len(set(pids)) == 200
    _wait_until_gone(pids)
    # The system may list a thread for a moment after it ended, here and in the count before.
    pool_tasks.wait_for(lambda: all(now <= earlier for now, earlier in zip(_held(), before, strict=True)), _PATIENCE_S)
