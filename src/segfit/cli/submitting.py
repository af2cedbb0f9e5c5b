"""What ``run --executor`` does: submit, show, wait."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from segfit.cli.common import open_project, print_json, project_folder
from segfit.cli.console import console_progress, say, table, wrapped
from segfit.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from segfit.project import Project
    from segfit.project.folder import ProjectFolder
    from segfit.project.submission import Trainings
    from segfit.project.submitted import TaskStatus

__all__ = ["next_with_tasks", "print_tasks", "run_by_tasks"]

_LOOK_S = 10.0  # between two looks at what a scheduler does


def run_by_tasks(
    dataset: Path | None,
    out: Path | None,
    settings: list[str],
    executor: str,
    cluster_file: str | None,
    only: Trainings | None = None,
    *,
    dry_run: bool,
    wait: bool,
    planned: bool,
    as_json: bool,
) -> Project | None:
    """Have a run, or trainings of it, done by a scheduler; return the project if they are done, else None."""
    from segfit.project.folder import ProjectFolder
    from segfit.project.submission import Cluster, scripts_of, submit
    from segfit.project.submitted import tasks_of

    cluster = Cluster(executor, None if cluster_file is None else Path(cluster_file))
    cluster.opened(ProjectFolder(project_folder(dataset, out).absolute()))  # what is wrong is told before all else
    project = open_project(dataset, out, settings)
    if dry_run:
        scripts = scripts_of(project, cluster, only)
        if as_json:
            print_json({"scripts": scripts})
        else:
            say("\n".join(scripts) if scripts else "nothing to submit: all is done")
        return None
    number = submit(project, cluster, only, planned=planned)
    tasks = tasks_of(project.folder)
    if wait:
        tasks = _awaited(project.folder)
    if not any(item.is_at_work for item in tasks):
        return _finished(project, tasks, only)
    if as_json:
        print_json({"submitted": number, "tasks": [item.model_dump(mode="json") for item in tasks]})
        return None
    print_tasks(tasks)
    root = quote(str(project.folder.root))
    say(f"submitted: {number}\nfollow: segfit status {root}\nend: segfit stop {root}")
    return None


def print_tasks(tasks: Sequence[TaskStatus]) -> None:
    """Print how tasks stand, where they run and what they have reached."""
    rows = [
        (item.title, item.id, item.state, item.where, "" if item.reached is None else f"{item.reached:.0%}")
        for item in tasks
    ]
    table(("task", "id", "state", "machine", "reached"), rows, sys.stdout)
    for item in tasks:
        if item.detail and item.state == "ended":
            unseen = f": see whether {item.where} has this folder and may write there" if item.where else ""
            log = f"; see {item.log}" if item.log.exists() else f", and left no {item.log}{unseen}"
            say(wrapped(f"{item.title}: {item.detail}{log}", sys.stdout, "  "))
    for problem in dict.fromkeys(item.detail for item in tasks if item.state == "unknown"):
        say(wrapped(f"unknown: {problem}", sys.stdout, "  "))


def next_with_tasks(command: str, tasks: Sequence[TaskStatus], folder: ProjectFolder) -> str:
    """Return the command to give next where tasks were submitted, instead of one that would run here."""
    from segfit.project.submitted import CLUSTER_FILE

    root, file = quote(str(folder.root)), folder.tasks / CLUSTER_FILE
    if any(item.state in ("waiting", "running") for item in tasks):
        return f"segfit stop {root} ends these tasks"
    if tasks and command == f"segfit run {root}" and tasks[-1].executor == "slurm":  # others come from a file
        return f"{command} --executor slurm{f' --cluster {quote(str(file))}' if file.exists() else ''}"
    return command


def _awaited(folder: ProjectFolder) -> list[TaskStatus]:
    """Wait until no task is at work, and tell what changes; Ctrl-C ends them."""
    from segfit.project.submitted import cancel_tasks, tasks_of

    progress, told = console_progress(), set[tuple[str, ...]]()
    try:
        while True:
            tasks = tasks_of(folder)
            for item in tasks:
                if (fact := (item.id, item.state, item.where)) not in told:
                    told.add(fact)
                    where = f" on {item.where}" if item.where and item.state == "running" else ""
                    progress.note(f"{item.title} ({item.id}): {item.state}{where}")
            if not any(item.is_at_work for item in tasks):
                return tasks
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        for title in cancel_tasks(folder, progress):
            progress.note(f"{title}: ended")
        raise


def _finished(project: Project, tasks: Sequence[TaskStatus], only: Trainings | None) -> Project:
    """Return the project as its tasks left it, if they did all; else say which did not."""
    from segfit.project import Project

    project = Project.open(project.folder.root)
    found = project.findings()
    if only is None:
        is_done = found.selected is not None and project.folder.report.exists()
    else:
        is_done = bool(found.trainings) and all(item.is_done() for item in only.of(project))
    if is_done:
        return project
    failed = next((item for item in tasks if item.detail.startswith(("failed", "cancelled", "timeout"))), tasks[-1])
    raise StageError(
        f"the tasks have ended before all was done: {failed.title} ({failed.detail or failed.state})",
        f"read {failed.log}, then give the same command again",
    )
