"""Commands done as jobs of a scheduler: what a job is, what a scheduler does, and which there are.

An executor that does tasks is a module, or any object, with a function ``open_tasks(options, folder)`` that returns a
`Scheduler`. One of another package is an entry point of the group `segfit.executors`, asked for as ``PACKAGE:NAME``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol

from segfit.errors import InputError, reason_of
from segfit.plugins import guarded, load_plugin

__all__ = [
    "AGAIN_LATER",
    "SCHEDULERS",
    "Job",
    "JobTask",
    "Scheduler",
    "State",
    "TaskState",
    "open_scheduler",
    "read_cluster_file",
]

State = Literal["waiting", "running", "done", "ended", "unknown"]
"""Of a task: done if it succeeded, ended if it did not or that is forgotten, unknown where nobody answers."""

SCHEDULERS: Mapping[str, str] = {"slurm": "segfit.execution.slurm"}  # modules that are imported when they are asked for
AGAIN_LATER = 75
"""Exit code of a command that is to be begun again later, as what it needs is at work yet (EX_TEMPFAIL)."""
_LARGEST_FILE = 1 << 16  # bytes of a cluster file


@dataclass(frozen=True, slots=True)
class JobTask:
    """What one process after the other does on one machine.

    Parameters
    ----------
    title : what it is, for people
    commands : programs with their arguments, each begun when the one before has succeeded. They go on where they were
        when they are begun again
    """

    title: str
    commands: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Job:
    """Tasks that may be done side by side.

    Parameters
    ----------
    name : of letters, digits, and - and _
    tasks : at least one
    after : ids of tasks that have to end before; whether they succeeded is seen by the commands
    """

    name: str
    tasks: tuple[JobTask, ...]
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskState:
    """How a task stands."""

    state: State
    where: str = ""  # the machine
    detail: str = ""  # in the scheduler's words


class Scheduler(Protocol):
    """Has commands done by a cluster. What it refuses is an `InputError`, what it cannot do now a `StageError`.

    A task whose machine fails, that is pre-empted, or whose time ends is begun again by it.
    """

    def script(self, job: Job) -> str:
        """Return what is submitted for a job, to be read by people."""

    def submit(self, job: Job) -> list[str]:
        """Submit a job; return the ids of its tasks, of letters, digits, and . _ and -."""

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        """Return how tasks stand; those that the scheduler has forgotten are left out."""

    def cancel(self, ids: Sequence[str]) -> None:
        """End tasks, or take them from the queue; those that have ended stay as they are."""

    def log(self, task: str) -> Path:
        """Return the file that the output of a task goes to."""


def open_scheduler(name: str, options: Mapping[str, str], folder: Path) -> Scheduler:
    """Return the scheduler of a name.

    Parameters
    ----------
    name : "slurm", or ``PACKAGE:NAME`` of an entry point
    options : of a cluster file; raises `InputError` for one that it does not know
    folder : where its jobs begin and write their logs; seen under this path by all machines
    """
    if name in SCHEDULERS:
        scheduler: Scheduler = import_module(SCHEDULERS[name]).open_tasks(options, folder)
        return scheduler
    if ":" not in name:
        raise InputError(f"{name} does not do tasks", "give --executor slurm, or PACKAGE:NAME of one that is installed")
    make = getattr(load_plugin("executors", name), "open_tasks", None)
    if make is None:
        raise InputError(f"the executor {name} does no tasks", "give --executor slurm")
    scheduler = guarded("executors", name, make)(options, folder)
    return scheduler


def read_cluster_file(path: Path) -> dict[str, str]:
    """Return the options in a YAML file, ``name: value`` each, as they are written there.

    YAML would take ``time: 12:00:00`` for a number; names may be written with ``-`` or ``_``.
    """
    try:
        import yaml
    except ImportError:
        raise InputError(f"{path} needs PyYAML, which is not installed", "pip install 'segfit[cluster]'") from None
    try:
        with path.open("rb") as handle:
            content = handle.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise InputError(f"{path} is no file of options: it has more than {_LARGEST_FILE} bytes")
        found = yaml.compose(content.decode("utf-8-sig"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", "give a YAML file of options") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML ({reason_of(error)})", "write NAME: VALUE, a line each") from None
    options: dict[str, str] = {}
    for key, value in [] if found is None else found.value if isinstance(found, yaml.MappingNode) else [(found, found)]:
        if not (isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode)) or key is value:
            line = key.start_mark.line + 1
            raise InputError(f"{path} has something else than NAME: VALUE in line {line}", "write one option a line")
        name = key.value.replace("-", "_")
        if name in options:
            raise InputError(f"{path} has the option {name} twice", "leave one out")
        options[name] = value.value
    return options
