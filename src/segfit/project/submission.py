"""A run as tasks of a scheduler: planning first, then every training, then selection, model and report.

What is trained is known once it was planned on a machine of the cluster; so the task that plans submits the others, and
nobody waits for it. The same call submits what is missing, and nothing twice.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from segfit.errors import InputError, StageError
from segfit.execution.scheduler import Job, JobTask, Scheduler, open_scheduler, read_cluster_file
from segfit.files import content_hash, write_bytes
from segfit.planning.plan import Plan
from segfit.project.decide import require_possible
from segfit.project.folder import ProjectFolder
from segfit.project.project import Project
from segfit.project.submitted import CLUSTER_FILE, LOCK, Submitted, at_work, note, tasks_of
from segfit.project.trainings import Training, is_begun, trainings_asked, trainings_of

__all__ = ["Cluster", "Trainings", "awaited", "scripts_of", "submit"]

_PLANNING = "check, plan and preprocessing"
_LAST = "selection, model and report"
_PLAN, _TRAIN, _CASCADE, _SELECT = "plan", "train", "cascade", "select"  # steps


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where tasks are done.

    Parameters
    ----------
    executor : name of its scheduler, as in `open_scheduler`
    file : a YAML file of its options; None: as it does by itself
    """

    executor: str
    file: Path | None

    def opened(self, folder: ProjectFolder) -> Scheduler:
        """Return the scheduler; raise `InputError` for a file or an option that it does not take."""
        if self.file is None:
            return open_scheduler(self.executor, {}, folder.tasks)
        options = read_cluster_file(self.file)
        try:
            return open_scheduler(self.executor, options, folder.tasks)
        except InputError as error:
            raise InputError(f"{self.file}: {error.problem}", error.action) from None


@dataclass(frozen=True, slots=True)
class Trainings:
    """Those of a run that are asked for, and nothing after them; None: of all folds, of all configurations."""

    folds: tuple[int, ...] | None = None
    configurations: tuple[str, ...] | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """What says so on the command line."""
        folds = () if self.folds is None else ("--folds", ",".join(map(str, self.folds)))
        return (*folds, *(() if self.configurations is None else ("--configurations", ",".join(self.configurations))))

    def of(self, project: Project) -> list[Training]:
        """Return them as they are planned; raise `InputError` for those that the run does not have."""
        plan = _known_plan(project)
        if plan is None:
            raise StageError(f"{project.folder.root} has no plan for its data and options", "rerun the command")
        with project.looking(plan):
            return trainings_asked(project, self.folds, self.configurations)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A task to be done."""

    of: str  # hash of what it is done for
    task: JobTask
    training: Training | None = None

    @property
    def is_second_stage(self) -> bool:
        return self.training is not None and self.training.is_second_stage


@dataclass(frozen=True, slots=True)
class _Step:
    """Tasks that may be done side by side, when those of the steps before have ended."""

    name: str
    wanted: Sequence[_Wanted]


def scripts_of(project: Project, cluster: Cluster, only: Trainings | None = None) -> list[str]:
    """Return what `submit` would submit if nothing of it were at work; nothing is submitted.

    Where ids are not known yet, names of steps stand. Before it is planned, the scripts after that of planning are
    those of one training for all, and of what follows: planning decides which trainings there are, and submits them.
    """
    require_possible(project.options)
    scheduler, scripts, after = cluster.opened(project.folder), list[str](), list[str]()
    steps = _steps(project, cluster, only, planned=False)
    if [step.name for step in steps] == [_PLAN]:
        scripts.append(scheduler.script(_job(project, steps[0], steps[0].wanted, after)))
        each = JobTask("each training", (_train(project, "FOLD", "CONFIGURATION"),))
        steps = [_Step(_TRAIN, [_Wanted("", each)])]
        steps += [_Step(_SELECT, [_last(project)])] if only is None else []
    for step in steps:
        scripts.append(scheduler.script(_job(project, step, step.wanted, after)))
        after.append(step.name.upper())
    return scripts


def submit(project: Project, cluster: Cluster, only: Trainings | None = None, *, planned: bool = False) -> int:
    """Submit what is missing of the run and not at work; return how many tasks that are.

    If it is interrupted or a job is refused, nothing is left of what it submitted.

    Parameters
    ----------
    only : trainings that are asked for; None: the whole run
    planned : what is trained was just decided where it will be trained
    """
    require_possible(project.options)
    folder, submitted, after = project.folder, list[str](), list[str]()
    scheduler = cluster.opened(folder)
    with project.locks.held(LOCK):
        known = at_work(folder, cluster.executor, scheduler)
        _keep(cluster.file, folder.tasks)
        try:
            for step in _steps(project, cluster, only, planned=planned):
                there = {key: known[key] for item in step.wanted if (key := (item.task.title, item.of)) in known}
                if submitted and there:  # they wait for others than those that are submitted now
                    scheduler.cancel(list(there.values()))
                    there = {}
                if missing := [item for item in step.wanted if (item.task.title, item.of) not in there]:
                    _begin(missing)
                    ids = scheduler.submit(_job(project, step, missing, after))
                    submitted += ids
                    note(folder, [_line(cluster, *pair) for pair in zip(ids, missing, strict=True)])
                    after += ids
                after += there.values()
        except BaseException:
            scheduler.cancel(submitted)
            raise
    return len(submitted)


def awaited(project: Project, configurations: Sequence[str] | None) -> list[str]:
    """Return the titles of tasks that are at work on trainings which are missing; none: what needs them may begin.

    A task that ended without its training is a `StageError`. A training that no task was submitted for is not waited
    for: who needs it makes it.
    """
    asked = Trainings(configurations=None if configurations is None else tuple(configurations)).of(project)
    missing = {item.title for item in asked if not item.is_done()}
    tasks = [item for item in tasks_of(project.folder) if item.title in missing]
    if failed := [item for item in tasks if item.state == "ended"]:
        names = ", ".join(item.title for item in failed)
        raise StageError(
            f"{len(failed)} of the trainings that this waits for have failed: {names}",
            f"read {failed[0].log}, then submit the run again",
        )
    return [item.title for item in tasks if item.is_at_work]


def _steps(project: Project, cluster: Cluster, only: Trainings | None, *, planned: bool) -> list[_Step]:
    """Return what is to be done now, in order."""
    plan = _known_plan(project)
    if plan is None or not (planned or is_begun(project, plan)):
        if planned:
            raise StageError(f"{project.folder.root} has no plan for its data and options", "rerun the command")
        return [_Step(_PLAN, [_planning(project, cluster, only)])]
    with project.looking(plan):
        every = trainings_of(project)
        asked = every if only is None else only.of(project)
        left = [item for item in asked if not item.is_done()]
    if only is None and not left and project.findings().selected is not None and project.folder.report.exists():
        return []
    firsts = ",".join(dict.fromkeys(item.name for item in every if not item.is_second_stage))
    wanted = [_training(project, item, firsts) for item in left]
    steps = (
        _Step(_TRAIN, [item for item in wanted if not item.is_second_stage]),
        _Step(_CASCADE, [item for item in wanted if item.is_second_stage]),
        _Step(_SELECT, [_last(project)] if only is None else []),
    )
    return [step for step in steps if step.wanted]


def _planning(project: Project, cluster: Cluster, only: Trainings | None) -> _Wanted:
    given = [] if cluster.file is None else ["--cluster", str(project.folder.tasks / CLUSTER_FILE)]
    commands = (
        _segfit("plan", project, "--probe"),
        _segfit("preprocess", project),
        _segfit(
            "run" if only is None else "train",
            project,
            *(() if only is None else only.options),
            *("--executor", cluster.executor, *given, "--planned"),
        ),
    )
    of = (
        project.options.content_hash() if only is None else content_hash([project.options.content_hash(), only.options])
    )
    return _Wanted(of, JobTask(_PLANNING, commands))


def _training(project: Project, item: Training, firsts: str) -> _Wanted:
    """Return the task of a training; a second stage begins by a look whether the first ones are there."""
    look = [_segfit("train", project, "--configurations", firsts, "--trained")] if item.is_second_stage else []
    commands = (*look, _train(project, str(item.fold), item.name))
    return _Wanted(project.plan_key.hash, JobTask(item.title, commands), item)


def _train(project: Project, fold: str, configuration: str) -> tuple[str, ...]:
    return _segfit("train", project, "--folds", fold, "--configurations", configuration, "--validate")


def _last(project: Project) -> _Wanted:
    commands = (_segfit("train", project, "--trained"), _segfit("run", project))
    return _Wanted(project.options.content_hash(), JobTask(_LAST, commands))


def _known_plan(project: Project) -> Plan | None:
    """Return what is planned for the data and options, if it says what is trained; no image is opened to know it."""
    if not project.folder.plan.exists() or not project.holds_results_of_dataset():
        return None
    project.check()
    plan = None if project.known_fingerprint() is None else project.known_plan()
    return None if plan is None or plan.run is None else plan


def _segfit(verb: str, project: Project, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "segfit", "--expect", version("segfit"), verb, str(project.folder.root), *arguments)


def _job(project: Project, step: _Step, wanted: Sequence[_Wanted], after: Sequence[str]) -> Job:
    name = re.sub(r"[^\w-]+", "-", f"{project.folder.root.name}-{step.name}", flags=re.ASCII)
    return Job(name, tuple(item.task for item in wanted), tuple(after))


def _keep(file: Path | None, folder: Path) -> None:
    """Keep the options where the task that submits the others finds them."""
    folder.mkdir(exist_ok=True)
    if file is not None and file.resolve() != (folder / CLUSTER_FILE).resolve():
        write_bytes(folder / CLUSTER_FILE, file.read_bytes())


def _begin(wanted: Sequence[_Wanted]) -> None:
    """Have trainings count as begun, so that machines which differ a little from the one that planned keep its plan."""
    for item in wanted:
        if item.training is not None:
            item.training.folder.mkdir(parents=True, exist_ok=True)


def _line(cluster: Cluster, task: str, item: _Wanted) -> Submitted:
    training = None if item.training is None else (item.training.name, item.training.fold)
    return Submitted(id=task, title=item.task.title, of=item.of, executor=cluster.executor, training=training)
