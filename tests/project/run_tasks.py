"""Runs that are killed: ``python run_tasks.py DATASET FOLDER KILLS locks|leases COMMANDS SEED``."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from segfit.dataset.contents import FileHashes
from segfit.preprocessing.dataset import verify_store
from segfit.preprocessing.store import CaseStore
from segfit.project import Project
from segfit.project.folder import ProjectFolder
from segfit.project.upkeep import damage_of

SETTINGS = [
    "training.steps=40",
    "training.checkpoint_seconds=0.2",
    "planning.configurations=2d",
    "planning.base_features=4",
    "planning.batch_size=2",
    "planning.folds=0,1",
    "training.precision=fp32",
    "training.channels_last=true",
]
_LONGEST_S = 600.0


def main(dataset: Path, folder: Path, kills: int, how: str, commands: int, seed: int) -> None:
    """Kill `segfit run` so often, of several `commands` at work on one project each in turn; print what happened.

    After every kill all results that are there must be whole. A run that ends must have made what one that nobody
    killed has made; its project is removed, and the next one begins.
    """
    torch.set_num_threads(1)
    if how == "leases":
        fcntl.flock = _no_locks
    started = time.perf_counter()
    _in_child(lambda: _run(folder / "whole", dataset))
    duration = time.perf_counter() - started
    whole, generator = _made(folder / "whole"), random.Random(seed)
    root, attempts, killed, ended = folder / "killed", 0, 0, 0
    while killed < kills:
        children = [_forked(lambda: _run(root, dataset)) for _ in range(commands)]
        for child in generator.sample(children, len(children)):
            attempts += 1
            time.sleep(generator.uniform(0.0, duration * generator.choice((0.1, 0.4, 1.0))))
            os.kill(child, signal.SIGKILL)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        killed += sum(map(os.WIFSIGNALED, statuses))
        failed = [status for status in statuses if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status)]
        if failed:
            raise AssertionError(f"a run that nobody killed failed: {failed}")
        _in_child(lambda: _require_whole(root))
        if not all(map(os.WIFSIGNALED, statuses)):
            if (made := _made(root)) != whole:
                raise AssertionError(f"{sorted(name for name in whole if made.get(name) != whole[name])} differ")
            ended += 1
            shutil.rmtree(root)
    _in_child(lambda: _run(root, dataset))
    if _made(root) != whole:
        raise AssertionError("the last run differs")
    sys.stdout.write(f"{killed} kills in {attempts} attempts, {ended} runs ended in between\n")


def _run(root: Path, dataset: Path) -> None:
    Project.create(root, dataset, settings=SETTINGS).run()


def _require_whole(root: Path) -> None:
    damaged = [*damage_of(ProjectFolder(root)), *verify_store(CaseStore(ProjectFolder(root).cases, FileHashes()))]
    if damaged:
        raise AssertionError(damaged)


def _made(root: Path) -> dict[str, bytes]:
    """Return weights and predictions."""
    files = [*(root / "model").glob("*.safetensors"), *(root / "predictions").glob("*.png")]
    assert len(files) >= 2
    return {path.name: path.read_bytes() for path in files}


def _no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def _forked(work: Callable[[], None]) -> int:
    """Return a process that does this: without importing all again, so that kills come at all moments."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(int(_LONGEST_S))
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:  # noqa: BLE001 - it is told
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def _in_child(work: Callable[[], None]) -> None:
    _, status = os.waitpid(_forked(work), 0)
    if status:
        raise AssertionError(f"it ended with {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
