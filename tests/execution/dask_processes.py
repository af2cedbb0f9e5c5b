"""A dask cluster of processes on loopback, each of which a test may kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import pool_tasks


class DaskProcesses:
    """A scheduler and its workers, in another folder than this process; what is killed stays dead."""

    places = os.pathsep.join([str(Path(__file__).parent), *(path for path in sys.path if path)])

    def __init__(self, folder: Path, *options: str, protocol: str = "tcp") -> None:
        self._folder, self._options = folder, options
        self.workers: list[subprocess.Popen[bytes]] = []
        file = folder / "scheduler.json"
        self.scheduler = self._start(
            "dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--protocol", protocol, "--no-dashboard",
            "--scheduler-file", str(file),
        )  # fmt: skip
        pool_tasks.wait_for(lambda: file.exists() and bool(file.read_text().strip()))
        self.address: str = json.loads(file.read_text())["address"]

    def start(self, *options: str, environment: Mapping[str, str] | None = None, cwd: Path = Path("/")) -> None:
        """Start one more worker, of one thread unless the options say otherwise."""
        where = ("--host", "127.0.0.1", "--no-dashboard", "--local-directory", str(self._folder))
        what = ("--nthreads", "1", "--no-nanny", "--memory-limit", "1GB")
        process = self._start("dask_worker", self.address, *where, *what, *options, environment=environment, cwd=cwd)
        self.workers.append(process)

    def kill(self, number: int) -> None:
        self.workers[number].kill()
        self.workers[number].wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()

    def _start(
        self, module: str, *arguments: str, environment: Mapping[str, str] | None = None, cwd: Path = Path("/")
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{module}", "--dashboard-address", "127.0.0.1:0", *self._options,
             *arguments],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": self.places, "OMP_NUM_THREADS": "1"} | dict(environment or {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
