"""Kills, full disks, damage and competition: no case is lost or wrong."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from store_tasks import (
    SCHEME,
    SPEC,
    cases_of,
    check_whole,
    damage_or_be_killed,
    fill,
    fill_at,
    fill_with_small_files,
    preprocess_or_be_killed_once,
)

from segfit.dataset.phantom import make_phantom
from segfit.errors import StageError
from segfit.execution import pool as pool_module
from segfit.execution.execution import Execution
from segfit.execution.workers import WorkerPool
from segfit.preprocessing import dataset as dataset_module
from segfit.preprocessing.dataset import are_verified, preprocess_dataset, preprocessing_in_parts, verify_store
from segfit.preprocessing.store import CaseStore

_PATIENCE_S = 600.0  # for what takes ten seconds on an idle machine


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantom(tmp_path_factory.mktemp("faults") / "phantom", cases=8, test_cases=0, shape=(16, 32, 32))


@pytest.fixture(scope="module")
def expected(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> CaseStore:
    """A store filled without any fault."""
    root = tmp_path_factory.mktemp("faults") / "expected"
    fill(dataset, root)
    return CaseStore(root)


def _assert_complete(root: Path, expected: CaseStore) -> None:
    """Check that nothing is missing, damaged, different or left over."""
    store = CaseStore(root)
    assert store.keys() == expected.keys()
    check_whole(store, store.keys())
    for key in expected.keys():  # noqa: SIM118 - a list
        ours, theirs = store.open(key), expected.open(key)
        assert ours.id == theirs.id
        # Workers multiply matrices with one thread, which rounds differently.
        np.testing.assert_allclose(ours.image(), theirs.image(), atol=1e-5)
        np.testing.assert_array_equal(ours.labels(), theirs.labels())


def _names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def _run(program: str) -> subprocess.Popen[bytes]:
    lines = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import Path\n{program}"
    return subprocess.Popen([sys.executable, "-c", lines], stdout=subprocess.PIPE)


def test_thirty_kills_lose_nothing(dataset: Path, expected: CaseStore, tmp_path: Path) -> None:
    root = tmp_path / "store"
    call = f"store_tasks.kill_at_random_moments(Path({str(dataset)!r}), Path({str(root)!r}), 30)"
    with _run(f"import store_tasks\n{call}") as process:
        output, _ = process.communicate(timeout=_PATIENCE_S)
    assert process.returncode == 0
    assert int(output) >= 30
    fill(dataset, root)
    _assert_complete(root, expected)
    for leftover in _names(root) - set(expected.keys()) - {"hashes.json"}:
        os.utime(root / leftover, (0, 0))
    fill(dataset, root)
    assert _names(root) == {*expected.keys(), "hashes.json"}


def test_kill_of_the_parent_of_processes_loses_nothing(dataset: Path, expected: CaseStore, tmp_path: Path) -> None:
    root = tmp_path / "store"
    program = (
        "import store_tasks; from segfit.execution import pool; pool._PROCESSES_FROM = 1\n"
        f"store_tasks.fill(Path({str(dataset)!r}), Path({str(root)!r}))"
    )
    for cases in (1, 4):
        with _run(program) as process:
            end = time.monotonic() + _PATIENCE_S
            while len(CaseStore(root).keys()) < cases:
                assert time.monotonic() < end
                time.sleep(0.005)
            process.kill()
            # The workers hold the other end of standard output.
            assert process.stdout is not None
            process.stdout.read()
        check_whole(CaseStore(root), CaseStore(root).keys())
    fill(dataset, root)
    _assert_complete(root, expected)


def test_killed_worker_costs_no_case(
    dataset: Path, expected: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_PROCESSES_FROM", 1)
    monkeypatch.setattr(dataset_module, "_preprocess_case", preprocess_or_be_killed_once)
    root = tmp_path / "store"
    fill(dataset, root)
    assert (tmp_path / "was-killed").exists()
    assert len(list(root.glob(".partial-*"))) == 1  # what the killed one was writing
    _assert_complete(root, expected)
    fill(dataset, root)
    assert not list(root.glob(".partial-*"))


def test_two_processes_fill_one_empty_store(dataset: Path, expected: CaseStore, tmp_path: Path) -> None:
    root = tmp_path / "store"
    with WorkerPool(2) as pool:
        moment = time.time() + 2.0
        both = [pool.submit(fill_at, dataset, root, moment) for _ in range(2)]
        first, second = (future.result(_PATIENCE_S) for future in both)
    assert first == second
    _assert_complete(root, expected)
    assert _names(root) == {*expected.keys(), "hashes.json"}


def test_processes_verify_what_threads_verify(dataset: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = tmp_path / "store"
    keys = fill(dataset, root)
    hurt = root / keys["phantom_tr_003"] / "image.b2nd"
    hurt.write_bytes(hurt.read_bytes()[:-1] + b"x")
    by_threads = verify_store(CaseStore(root))
    assert [(case.name, case.problem) for case in by_threads] == [
        ("phantom_tr_003", "image.b2nd is not what was written")
    ]
    verified = request.getfixturevalue("done_by_processes")
    assert verify_store(CaseStore(root)) == by_threads
    assert sorted(verified) == sorted(keys.values())


@pytest.mark.usefixtures("done_by_processes")
def test_a_case_that_no_worker_survives_is_not_verified(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    keys = fill(dataset, root)
    (root / keys["phantom_tr_005"] / "sick").touch()
    monkeypatch.setattr(dataset_module, "_damage", damage_or_be_killed)
    (damaged,) = verify_store(CaseStore(root))
    assert (damaged.name, damaged.folder) == ("phantom_tr_005", root / keys["phantom_tr_005"])
    assert damaged.problem.startswith("it could not be read, even alone: worker killed by signal 9 (Killed)")


def test_parts_of_large_work_are_done_by_processes_too(
    dataset: Path, expected: CaseStore, tmp_path: Path, done_by_processes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, root = cases_of(dataset), tmp_path / "store"
    monkeypatch.setattr(pool_module, "_PROCESSES_FROM", sum(dataset_module._predicted_bytes(c, SPEC) for c in cases))
    with preprocessing_in_parts(cases, SPEC, execution=Execution(workers=2)) as parts:
        for part in (cases[:1], cases[1:]):
            preprocess_dataset(part, SPEC, SCHEME, CaseStore(root), execution=parts)
    assert sorted(done_by_processes) == [case.id for case in cases]
    _assert_complete(root, expected)
    preprocess_dataset(cases[1:], SPEC, SCHEME, CaseStore(root))
    assert len(done_by_processes) == len(cases)  # a part alone is small


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "segfit-test", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system; the limit of file size below tests the same")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_is_one_message_and_no_partial_file(dataset: Path, expected: CaseStore, small_disk: Path) -> None:
    root = small_disk / "store"
    with pytest.raises(StageError) as raised:
        fill(dataset, root, workers=2)  # with a writer for each case, none might have room enough
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.ENOSPC
    stored = CaseStore(root).keys()
    assert 0 < len(stored) < 8
    check_whole(CaseStore(root), stored)
    assert _names(root) <= {*expected.keys(), "hashes.json"}
    subprocess.run(["mount", "-o", "remount,size=32m", small_disk], check=True)
    fill(dataset, root)
    _assert_complete(root, expected)


def test_limit_of_file_size_is_one_message_and_no_partial_file(dataset: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    with WorkerPool(1) as pool:
        assert pool.submit(fill_with_small_files, dataset, root, 8000).result(_PATIENCE_S) == errno.EFBIG
    assert _names(root) <= {"hashes.json"}


def test_any_flipped_bit_is_found_and_the_case_made_anew(dataset: Path, expected: CaseStore, tmp_path: Path) -> None:
    root = tmp_path / "store"
    keys = fill(dataset, root)
    names = {key: case for case, key in keys.items()}
    generator = random.Random(1)
    files = sorted(path for key in keys.values() for path in (root / key).iterdir())
    assert len(files) == 8 * 5
    for path in files:
        content = bytearray(path.read_bytes())
        position, bit = generator.randrange(len(content)), generator.randrange(8)
        content[position] ^= 1 << bit
        path.write_bytes(content)
        (damaged,) = verify_store(CaseStore(root))
        assert (damaged.folder, path.name in damaged.problem) == (path.parent, True), (position, bit)
        if path.name != "case.json":
            assert damaged.name == names[path.parent.name]
        content[position] ^= 1 << bit
        path.write_bytes(content)
    assert verify_store(CaseStore(root)) == ()
    for path in files:
        content = bytearray(path.read_bytes())
        content[generator.randrange(len(content))] ^= 1
        path.write_bytes(content)
    assert len(verify_store(CaseStore(root))) == 8
    preprocess_dataset(cases_of(dataset), SPEC, SCHEME, CaseStore(root))
    _assert_complete(root, expected)


def _take_the_place(case: Path, other: Path) -> None:
    shutil.rmtree(case)
    shutil.copytree(other, case)


def _link(case: Path, other: Path) -> None:
    shutil.rmtree(case)
    case.symlink_to(other.name)


def _link_to_nothing(case: Path, _: Path) -> None:
    shutil.rmtree(case)
    case.symlink_to("nowhere")


def _leave_a_file(case: Path, _: Path) -> None:
    shutil.rmtree(case)
    case.write_bytes(b"")


def _take_a_file(case: Path, other: Path) -> None:
    shutil.copy(other / "case.json", case)


def _forbid(case: Path, _: Path) -> None:
    (case / "labels.b2nd").write_bytes(b"")
    case.chmod(0)


@pytest.mark.parametrize(
    "harm", [_take_the_place, _link, _link_to_nothing, _leave_a_file, _take_a_file, _forbid], ids=lambda f: f.__name__
)
def test_whatever_stands_in_the_place_of_a_case_is_not_taken_for_it(
    dataset: Path, expected: CaseStore, tmp_path: Path, harm: Callable[[Path, Path], None]
) -> None:
    root = tmp_path / "store"
    shutil.copytree(expected.root, root)
    key, other = expected.keys()[:2]
    harm(root / key, root / other)
    assert not CaseStore(root).has(key)
    damaged = {case.folder for case in verify_store(CaseStore(root))}
    assert damaged == ({root / key} if (root / key).is_dir() else set())
    fill(dataset, root)
    assert not (root / key).is_symlink()
    _assert_complete(root, expected)


def test_what_was_verified_is_read_again_after_a_day_or_a_change(tmp_path: Path, dataset: Path) -> None:
    store, execution = CaseStore(tmp_path / "store"), Execution(workers=1)
    keys = list(fill(dataset, store.root).values())
    for key in keys:
        assert store.verify(key)
    assert are_verified(keys, store, execution=execution)
    assert not are_verified([*keys, "another"], store, execution=execution)
    folder = store.root / keys[0]
    yesterday = (folder / "case.json").stat().st_mtime - 90_000
    os.utime(folder / "case.json", (yesterday, yesterday))
    assert not are_verified(keys, store, execution=execution)
    assert store.verify(keys[0])
    assert are_verified(keys, store, execution=execution)
    content = (folder / "image.b2nd").read_bytes()
    times = (folder / "image.b2nd").stat()
    (folder / "image.b2nd").write_bytes(content[::-1])  # of the same size
    assert not are_verified(keys, store, execution=execution)
    os.utime(folder / "image.b2nd", ns=(times.st_atime_ns, times.st_mtime_ns))  # as a disk that fails would leave it
    assert are_verified(keys, store, execution=execution)
    assert not store.verify(keys[0])  # which is read, and remembered
    assert not are_verified(keys, store, execution=execution)
    fill(dataset, store.root)
    assert (folder / "image.b2nd").read_bytes() == content
