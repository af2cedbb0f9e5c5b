"""The tasks of a project that were submitted to a scheduler: what they are, how they stand, and their end.

In ``tasks/``:

  submitted.jsonl    what was submitted, a line each
  cluster.yaml       the options it was submitted with
  <id>.log           what a task said
  <id>.done          of SLURM: it has succeeded
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from segfit.errors import SegfitError
from segfit.execution.scheduler import Scheduler, State, TaskState, open_scheduler
from segfit.files import Record
from segfit.progress import Progress
from segfit.project.folder import ProjectFolder
from segfit.project.sharing import Locks
from segfit.project.status import share_of

__all__ = ["CLUSTER_FILE", "LOCK", "Submitted", "TaskStatus", "at_work", "cancel_tasks", "note", "tasks_of"]

CLUSTER_FILE = "cluster.yaml"
LOCK = "tasks"  # held by whoever submits or cancels
_SUBMITTED = "submitted.jsonl"


class Submitted(Record):
    """One line of what was submitted."""

    id: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    title: str
    of: str  # hash of what it is done for
    executor: Annotated[str, Field(pattern=r"^[\w.:-]{1,200}$")]
    training: tuple[Annotated[str, Field(pattern=r"^[\w-]+$")], int] | None = None  # configuration and fold


class TaskStatus(Record):
    """How a task that was submitted stands."""

    id: str
    title: str
    state: State
    where: str
    reached: float | None  # share of its work, 0 to 1, of a training
    detail: str  # in the scheduler's words
    executor: str
    log: Path

    @property
    def is_at_work(self) -> bool:
        """Whether it has begun or will begin, or that cannot be known."""
        return self.state in ("waiting", "running", "unknown")


def tasks_of(folder: ProjectFolder) -> list[TaskStatus]:
    """Return how the tasks stand that were submitted, each title once: as it was submitted last."""
    found: list[TaskStatus] = []
    latest = {item.title: item for item in _submitted(folder)}
    for executor, items in _by_executor(latest.values()).items():
        log: Callable[[str], Path] = folder.tasks.joinpath
        try:
            scheduler = open_scheduler(executor, {}, folder.tasks)
            log = scheduler.log
            states, other = scheduler.states([item.id for item in items]), TaskState("ended")
        except SegfitError as error:
            states, other = {}, TaskState("unknown", detail=error.problem)
        found += [_status(folder, item, states.get(item.id, other), log(item.id)) for item in items]
    return found


def cancel_tasks(folder: ProjectFolder, progress: Progress) -> list[str]:
    """End what is at work, each task with its state saved, and take what waits from the queue; return its titles."""
    titles: list[str] = []
    if _submitted(folder):
        with Locks(folder, progress).held(LOCK):
            for executor, items in _by_executor(_submitted(folder)).items():
                scheduler = open_scheduler(executor, {}, folder.tasks)
                left = _left(scheduler, items)
                scheduler.cancel([item.id for item in left])
                titles += [item.title for item in left]
    return titles


def at_work(folder: ProjectFolder, executor: str, scheduler: Scheduler) -> dict[tuple[str, str], str]:
    """Return the ids of the tasks that have not ended, by title and what each is done for."""
    known = [item for item in _submitted(folder) if item.executor == executor]
    return {(item.title, item.of): item.id for item in _left(scheduler, known)}


def note(folder: ProjectFolder, items: list[Submitted]) -> None:
    """Write down what was submitted."""
    path = folder.tasks / _SUBMITTED
    torn = path.exists() and not path.read_bytes().endswith(b"\n")  # by a full disk
    with path.open("a", encoding="utf-8") as handle:
        handle.write("\n" * torn + "".join(f"{item.model_dump_json()}\n" for item in items))


def _left(scheduler: Scheduler, items: list[Submitted]) -> list[Submitted]:
    """Return those that the scheduler has not ended."""
    states: Mapping[str, TaskState] = scheduler.states([item.id for item in items])
    return [item for item in items if item.id in states and states[item.id].state not in ("done", "ended")]


def _by_executor(items: Iterable[Submitted]) -> dict[str, list[Submitted]]:
    found: dict[str, list[Submitted]] = {}
    for item in items:
        found.setdefault(item.executor, []).append(item)
    return found


def _submitted(folder: ProjectFolder) -> list[Submitted]:
    """Return what was submitted; a line torn by a crash is left out."""
    path, found = folder.tasks / _SUBMITTED, list[Submitted]()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            found.append(Submitted.model_validate(json.loads(line)))
        except ValueError:
            continue
    return found


def _status(folder: ProjectFolder, item: Submitted, state: TaskState, log: Path) -> TaskStatus:
    reached = None
    if item.training is not None:
        name, fold = item.training
        reached = share_of(folder.runs / name / f"fold-{fold}")
    return TaskStatus(
        id=item.id,
        title=item.title,
        state="done" if state.state in ("ended", "unknown") and reached == 1 else state.state,
        where=state.where,
        reached=reached,
        detail=state.detail,
        executor=item.executor,
        log=log,
    )
