"""One command at a time makes a result: by locks, or by leases where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from segfit.errors import InputError, StageError
from segfit.owner import Owner
from segfit.progress import SILENT, KeptWarnings
from segfit.project import lease, sharing
from segfit.project.folder import ProjectFolder
from segfit.project.lease import Lease
from segfit.project.sharing import Locks, Task


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lease, "_SILENT_S", 0.4)
    monkeypatch.setattr(lease, "_RENEWED_S", 0.05)
    monkeypatch.setattr(lease, "_LOOKED_AT_S", 0.0)
    return tmp_path / "training 3d, fold 0.lock"


def killed_owner(path: Path, host: str) -> None:
    """Leave the lease of a process that was killed."""
    code = f"""
import os, socket
from pathlib import Path
from segfit.project.lease import Lease

socket.gethostname = lambda: {host!r}
assert Lease(Path({str(path)!r})).take()
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert list(path.parent.glob("*.lease"))


def test_a_lease_is_held_by_one(path: Path) -> None:
    one, other = Lease(path), Lease(path)
    for holder, waiting in ((one, other), (other, one), (one, other)):
        assert holder.take()
        assert not waiting.take()
        assert holder.take()
        holder.release()
        assert not waiting.take()
        holder.require()
        holder.release()
    assert len(list(path.parent.iterdir())) == 1


def test_names_that_begin_alike_are_others(path: Path) -> None:
    assert Lease(path).take()
    assert Lease(path.with_name("training 3d, fold 01.lock")).take()
    assert Lease(path.with_name("training 3d.lock")).take()


def test_of_many_one_takes_it(path: Path) -> None:
    held: list[int] = []

    def work(_: int) -> int:
        mine, done = Lease(path), 0
        while done < 5:
            if mine.take():
                held.append(1)
                assert len(held) == 1
                time.sleep(0.001)
                held.pop()
                mine.release()
                done += 1
        return done

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 40


def test_the_lease_of_a_dead_process_of_this_host_is_free_at_once(path: Path) -> None:
    killed_owner(path, socket.gethostname())
    assert Lease(path).take()


def test_that_of_another_host_is_free_when_its_owner_has_been_silent(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_owner(path, "another")
    mine = Lease(path)
    assert not mine.take()
    time.sleep(0.5)
    assert mine.take()
    time.sleep(0.5)
    assert not Lease(path).take()  # it is renewed


def test_that_of_a_process_whose_number_another_one_has_is_free(path: Path) -> None:
    own = Owner.own()
    path.with_name(f"{path.stem}.7.lease").write_text(replace(own, started=own.started - 1).name)
    assert Lease(path).take()
    assert not Lease(path).take()


def test_a_half_written_lease_is_nobodys_after_a_while(path: Path) -> None:
    path.with_name(f"{path.stem}.7.lease").touch()
    assert not Lease(path).take()
    time.sleep(0.5)
    assert Lease(path).take()
    assert [file.name for file in path.parent.iterdir()] == [f"{path.stem}.8.lease"]


@pytest.mark.parametrize("ahead_s", [-7200, 7200])
def test_clocks_of_hosts_do_not_matter(path: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "another")
        owner = Lease(path)
        assert owner.take()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + ahead_s)
    assert not Lease(path).take()


def test_an_owner_who_was_suspended_does_not_go_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "another")
        patch.setattr(lease, "_RENEWED_S", 1e6)
        suspended = Lease(path)
        assert suspended.take()
    suspended.require()
    time.sleep(0.5)
    successor = Lease(path)
    assert successor.take()
    with pytest.raises(StageError):
        suspended.require()
    suspended.release()  # harms nobody
    successor.require()
    assert not Lease(path).take()


@pytest.mark.parametrize("has_locks", [True, False])
def test_who_joins_has_the_clock_of_the_first(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool
) -> None:
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    clock = iter([1000.0, 1010.5, 1020.0, 1030.25, 1040.0])
    monkeypatch.setattr(sharing, "file_system_time", lambda _: next(clock))
    one, two, three, four, five = (Locks(ProjectFolder(tmp_path), SILENT) for _ in range(5))
    first, second = one.joined("a"), two.joined("a")
    assert first.__enter__() == 0
    assert second.__enter__() == 10.5
    with three.joined("b") as seconds:
        assert seconds == 0  # at something else
    first.__exit__(None, None, None)
    with four.joined("a") as seconds:
        assert seconds == 30.25  # as the second goes on
    second.__exit__(None, None, None)
    with five.joined("a") as seconds:
        assert seconds == 0
    assert not list((tmp_path / ".locks").glob("work*"))


def test_nobody_begins_while_one_cleans_and_nobody_cleans_while_one_is_at_work(tmp_path: Path) -> None:
    one, other = (Locks(ProjectFolder(tmp_path), SILENT) for _ in range(2))
    killed = tmp_path / ".locks" / "work a since 5 x.lock"
    killed.parent.mkdir()
    killed.touch()
    with one.joined("a") as seconds:
        assert seconds == 0
        assert not killed.exists()
        with pytest.raises(InputError), other.alone():
            pytest.fail("somebody is at work")
    with ThreadPoolExecutor(1) as pool, other.alone():
        waiting = pool.submit(begin_and_end, one)
        time.sleep(0.2)
        assert not waiting.done()
    assert waiting.result() == 0


def begin_and_end(locks: Locks) -> float:
    with locks.joined("a") as seconds:
        return seconds


def test_where_there_are_no_locks_leases_are_used_and_that_is_said_once(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    told = [KeptWarnings(SILENT), KeptWarnings(SILENT)]
    one, other = (Locks(ProjectFolder(tmp_path), kept) for kept in told)
    done: list[str] = []
    with one.held("a"):
        with pytest.raises(InputError), other.alone():
            pytest.fail("somebody is at work")
        other.share([Task("b", lambda: bool(done), lambda: done.append("b"))])
        one.require()
    with other.alone():
        pass
    assert done == ["b"]
    assert [[item.code for item in kept.warnings] for kept in told] == [["file_system"]] * 2
    assert not list((tmp_path / ".locks").glob("*.lock"))


@pytest.mark.parametrize("first_has_locks", [True, False])
def test_a_host_with_locks_and_one_without_keep_out_of_each_others_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_has_locks: bool
) -> None:
    first, second = (Locks(ProjectFolder(tmp_path), SILENT) for _ in range(2))
    for locks, has_locks in ((first, first_has_locks), (second, not first_has_locks)):
        with monkeypatch.context() as patch:
            if not has_locks:
                patch.setattr(fcntl, "flock", no_locks)
            with locks.held("probe"):
                pass
    done: list[str] = []
    with first.joined("a") as seconds, ThreadPoolExecutor(1) as pool:
        assert seconds == 0
        with pytest.raises(InputError), second.alone():
            pytest.fail("somebody is at work")
        with first.held("b"):
            waiting = pool.submit(second.share, [Task("b", lambda: bool(done), lambda: done.append("second"))])
            time.sleep(0.6)  # the other looks twice
            assert not waiting.done()
            done.append("first")
        waiting.result()
        first.require()
    assert done == ["first"]
    with second.alone():
        pass


def test_who_has_a_lock_takes_over_the_lease_of_who_had_it_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    killed = Owner("0" * 8, 5).name + " with lock"
    path.with_name("a.7.lease").write_text(killed)
    assert not Lease(path).take()
    assert Lease(path, with_lock=True).take()
    assert not Lease(path).take()
    assert [file.name for file in path.parent.iterdir()] == ["a.8.lease"]


def test_a_lease_with_a_lock_leaves_nothing_unless_others_had_it(tmp_path: Path) -> None:
    mine, other = Lease(tmp_path / "a.lock", with_lock=True), Lease(tmp_path / "a.lock")
    assert mine.take()
    assert not other.take()
    mine.release()
    assert not list(tmp_path.iterdir())
    for holder in (other, mine):
        assert holder.take()
        holder.release()
    assert [file.name for file in tmp_path.iterdir()] == ["a.2.lease"]


def test_who_has_a_lock_leaves_the_lease_of_who_has_none(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    path.with_name("a.7.lease").write_text(Owner("0" * 8, 5).name)
    assert not Lease(path, with_lock=True).take()


def test_who_lost_a_lease_stops_at_the_next_step_of_the_work(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    locks = Locks(ProjectFolder(tmp_path), SILENT)
    with locks.held("a"):
        [file] = (tmp_path / ".locks").iterdir()
        locks.require()
        file.rename(file.with_name("a.2.lease"))
        with pytest.raises(StageError):
            locks.require()


def test_a_long_list_is_looked_through_a_few_times(tmp_path: Path) -> None:
    looks, results = list[int](), set[int]()

    def task(number: int) -> Task:
        def is_done() -> bool:
            looks.append(number)
            return number in results

        return Task(f"task {number}", is_done, lambda: results.add(number))

    Locks(ProjectFolder(tmp_path), SILENT).share([task(number) for number in range(50)])
    assert results == set(range(50))
    assert len(looks) <= 3 * 50  # and not in proportion to its square
