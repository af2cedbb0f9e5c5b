"""What sharing work costs: many small cases by one, two and four workers, and a long list of tasks by several commands.

    python benchmarks/scaling.py --work DIR [--cases 200,2000] [--workers 1,2,4] [--engines pool,processes,dask]
                                 [--tasks 500]

Cases are phantoms of 12 x 24 x 24 voxels. Three pieces of work are done on them: nothing (what handing over costs),
check and measure, and preprocess; then a new session looks whether all is done, as every command begins. The scheduler
of dask and its workers are processes on loopback; its largest memory is told. The work list is taken by processes that
share a project folder, each task making an empty file.
The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from segfit import Execution, Project
from segfit.dataset.phantom import make_phantom
from segfit.execution.workers import WorkerPool
from segfit.progress import SILENT
from segfit.project.folder import ProjectFolder
from segfit.project.sharing import Locks, Task

_PATIENCE_S = 120.0
Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cases", type=_numbers, default=[200, 2000])
    parser.add_argument("--workers", type=_numbers, default=[1, 2, 4])
    parser.add_argument("--engines", default="pool,processes,dask")
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--nothing", action="store_true", help="measure handing over alone, and the work list")
    parser.add_argument("--take", type=Path, help=argparse.SUPPRESS)  # what a process of the work list is started with
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends too
    if given.take is not None:
        take(given.take, given.tasks)
        return
    lines: list[Line] = []
    for cases in given.cases:
        dataset = given.work / f"Dataset{cases:03d}_Small"
        if not (given.nothing or (dataset / "dataset.json").exists()):
            make_phantom(dataset, cases=cases, test_cases=0, shape=(12, 24, 24))
        for engine in given.engines.split(","):
            for workers in given.workers:
                place = None if given.nothing else dataset
                lines.append(measured(engine, workers, place, cases, given.work / "p"))
                told(lines, lines[-1])
    lists = [work_list(count, given.tasks, given.work / "list") for count in given.workers] if given.tasks else []
    for line in lists:
        print(
            f"work list of {given.tasks}, {line['processes']} processes: {line['ms_per_task']} ms per task, "
            f"{line['cpu_ms_per_task']} ms of processors",
            flush=True,
        )
    print(json.dumps({"cases": lines, "work_list": lists}))


def measured(engine: str, workers: int, dataset: Path | None, cases: int, folder: Path) -> Line:
    """Do the three pieces of work in a new project."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    line: Line = {"engine": engine, "workers": workers, "cases": cases}
    with opened(engine, workers, folder.parent) as (execution, scheduler):
        before = processor_seconds()
        line["nothing_s"] = timed(lambda: sum(result for _, result in _nothing(execution, cases)))
        line["nothing_cpu_s"] = round(processor_seconds() - before, 3)
        line["scheduler_mb"] = None if scheduler is None else peak_mb(scheduler)
        if dataset is None:
            return line
        project = Project.create(folder, dataset, settings=["planning.configurations=3d_fullres"], execution=execution)
        line["check_s"] = timed(lambda: (project.check(), project.fingerprint()))
        project.plan()
        line["preprocess_s"] = timed(project.preprocess)
        again = timed(lambda: Project.open(folder, execution=execution).preprocess())  # what each command begins with
        line["again_s"], line["per_case"] = again, per_case(folder, cases)
        line["scheduler_mb"] = None if scheduler is None else peak_mb(scheduler)
    shutil.rmtree(folder)
    return line


def per_case(folder: Path, cases: int) -> Line:
    """Return files and bytes of a project by what they are, per case."""
    found: dict[str, list[int]] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.name if path.name == "files.json" else path.relative_to(folder).parts[0]
            found.setdefault(name, []).append(path.stat().st_size)
    return {name: [round(len(sizes) / cases, 2), round(sum(sizes) / cases)] for name, sizes in sorted(found.items())}


def _nothing(execution: Execution, cases: int) -> Iterator[tuple[int, int]]:
    return execution.map(abs, range(cases), description="nothing", size=lambda _: 1)


@contextmanager
def opened(engine: str, workers: int, folder: Path) -> Iterator[tuple[Execution, int | None]]:
    """Yield an execution by so many workers, and the process of the scheduler if there is one."""
    if engine != "dask":  # the pool takes threads for small work, and processes for large work
        ways: Line = {"processes": {"engine": lambda count, *_: WorkerPool(count)}}.get(engine, {})
        yield Execution(workers=workers, progress=SILENT, **ways), None
        return
    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    processes = [
        start([*command, "--no-dashboard", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file)])
    ]
    try:
        address = json.loads(_awaited(file))["address"]
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--host", "127.0.0.1", "--no-dashboard"]
        worker += ["--dashboard-address", "127.0.0.1:0", "--nthreads", "1", "--no-nanny", "--memory-limit", "1GB"]
        processes += [start([*worker, "--local-directory", str(folder)]) for _ in range(workers)]
        with Execution.by("dask", address, progress=SILENT) as execution:
            while execution.engine.slots < workers:  # type: ignore[union-attr]
                time.sleep(0.1)
            yield execution, processes[0].pid
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


def work_list(processes: int, tasks: int, folder: Path) -> Line:
    """Have processes share a list of tasks."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    given = [sys.executable, __file__, "--work", str(folder), "--tasks", str(tasks), "--take", str(folder)]
    started = [start(given, stdout=subprocess.PIPE) for _ in range(processes)]
    said = [json.loads(process.communicate()[0]) for process in started]
    begun, ended = min(item["begun"] for item in said), max(item["ended"] for item in said)
    done = [item["done"] for item in said]
    assert sum(done) == tasks, done  # each was done once
    cpu = sum(item["cpu"] for item in said)
    each = {"ms_per_task": round(1000 * (ended - begun) / tasks, 2), "cpu_ms_per_task": round(1000 * cpu / tasks, 2)}
    return {"processes": processes, "done": done, **each}


def take(folder: Path, tasks: int) -> None:
    """Take part in the work list of a folder; print when, and how much was done here."""
    done = 0

    def do(path: Path) -> None:
        nonlocal done
        path.touch()
        done += 1

    paths = [folder / f"result {number}" for number in range(tasks)]
    begun, cpu = time.time(), time.process_time()
    Locks(ProjectFolder(folder), SILENT).share(
        [Task(path.name, path.exists, lambda path=path: do(path)) for path in paths]
    )
    print(json.dumps({"begun": begun, "ended": time.time(), "cpu": time.process_time() - cpu, "done": done}))


def told(lines: Sequence[Line], line: Line) -> None:
    """Print a line: what a case took, and how much of the workers was used compared with the fewest workers."""
    same = [item for item in lines if (item["engine"], item["cases"]) == (line["engine"], line["cases"])]
    parts = []
    for name in [one for one in ("nothing_s", "check_s", "preprocess_s", "again_s") if one in line]:
        share = same[0]["workers"] * same[0][name] / (line["workers"] * line[name])
        parts.append(f"{name[:-2]} {1000 * line[name] / line['cases']:.2f} ms a case ({share:.0%})")
    parts[0] += f" and {1000 * line['nothing_cpu_s'] / line['cases']:.2f} ms of processors"
    memory = "" if line["scheduler_mb"] is None else f"; scheduler {line['scheduler_mb']} MB"
    print(f"{line['engine']}, {line['workers']} workers, {line['cases']} cases: {', '.join(parts)}{memory}", flush=True)


def timed(do: Any) -> float:
    begun = time.perf_counter()
    do()
    return round(time.perf_counter() - begun, 3)


def processor_seconds() -> float:
    """Return the processor time of this process and of those that it started."""
    total, known = 0.0, {os.getpid()}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(folder.name) in known or int(fields[1]) in known:
            known.add(int(folder.name))
            total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def peak_mb(process: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


def start(command: Sequence[str], stdout: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def _awaited(file: Path) -> str:
    deadline = time.monotonic() + _PATIENCE_S
    while not (file.exists() and (content := file.read_text().strip())):
        if time.monotonic() > deadline:
            raise SystemExit("the scheduler of dask did not start: is segfit[cluster] installed?")
        time.sleep(0.1)
    return content


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
