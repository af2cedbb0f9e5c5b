"""Jobs of SLURM: a script for ``sbatch`` that has each command told before its time ends, and begun again then.

SLURM itself begins a task again whose node failed or that was pre-empted (``--requeue``). Where the time ends, it sends
SIGUSR1 to the script, which has the command stop and save what it has, and puts the task into the queue again.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import join

from segfit.errors import InputError, StageError, nearest
from segfit.execution.processors import affinity, available_workers
from segfit.execution.scheduler import AGAIN_LATER, Job, JobTask, State, TaskState

__all__ = ["Slurm", "open_tasks"]

_OPTIONS = (
    "account",
    "begin",
    "comment",
    "constraint",
    "core_spec",
    "cpus_per_gpu",
    "cpus_per_task",
    "deadline",
    "exclude",
    "exclusive",
    "export",
    "gpus",
    "gpus_per_node",
    "gpus_per_task",
    "gres",
    "hint",
    "licenses",
    "mail_type",
    "mail_user",
    "mem",
    "mem_per_cpu",
    "mem_per_gpu",
    "nice",
    "nodelist",
    "oversubscribe",
    "partition",
    "prefer",
    "priority",
    "qos",
    "reservation",
    "threads_per_core",
    "time",
    "time_min",
    "tmp",
    "wckey",
)
"""Those of sbatch that a user may set."""
_AT_ONCE = "tasks_at_once"  # ours: how many tasks of a job run side by side
_OWN = ("array", "chdir", "dependency", "job_name", "open_mode", "output", "requeue", "signal")
_VALUE = re.compile(r"[\w.:,/@%=+*&|!()\[\]-]+", re.ASCII)  # nothing that ends a word or a line
_TOLD_S = 120  # before the time ends
_MOST_STARTS = 100  # of a task whose time ended: one that gets nowhere does not go on for ever
_MOST_KILLS = 3  # and of one whose command was killed, as by a lack of memory
_PATIENCE_S = 60.0  # with a command of SLURM
_STATES: dict[State, tuple[str, ...]] = {
    "waiting": ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
    "done": ("COMPLETED",),
    "ended": ("BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
}
"""As SLURM calls them; in all others a task runs."""
_ID = re.compile(r"[0-9]+_[0-9]+", re.ASCII)

_RUN = f"""\
told=  # an x for each time that SLURM has said that this job ends
again() {{  # have this task begun again, but not for ever, nor where SLURM ends it (cancelled, pre-empted): COMPLETING
    [ "${{SLURM_RESTART_COUNT:-0}}" -lt "$1" ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ] &&
        scontrol requeue "$SLURM_JOB_ID"
}}
run() {{  # a command, which saves its state and ends with 143 when it is told to stop
    code=143
    if [ -z "$told" ]; then
        "$@" &
        trap 'told=x$told' TERM
        trap '[ "$told" ] || kill -TERM $!; told=x$told' USR1  # a second one would not wait for its state
        before=none
        until [ "$before" = "$told" ]; do before=$told; wait $!; code=$?; done  # a signal ends one wait
    fi
    case $code$told in
    143x*) again {_MOST_STARTS} ;;
    137*) again {_MOST_KILLS} ;;  # killed
    {AGAIN_LATER}*) again {_MOST_STARTS} ;;  # what it needs is at work
    esac
    [ $code = 0 ] || [ $code = 3 ] || exit $code  # 3: it is done, and says that its model is not to be trusted
}}
"""


class Slurm:
    """The SLURM that ``sbatch`` on this machine submits to.

    Parameters
    ----------
    options : of sbatch, by their long names with ``_`` for ``-``, and ``tasks_at_once``
    folder : where jobs begin and write their logs
    """

    def __init__(self, options: Mapping[str, str], folder: Path) -> None:
        known = (*_OPTIONS, _AT_ONCE)
        for name, value in options.items():
            if name in _OWN:
                raise InputError(f"the option {name} of sbatch is set by segfit itself", "leave it out")
            if name not in known:
                raise InputError(f"the option {name} is not known{nearest(name, known)}", "correct or remove it")
            if not _VALUE.fullmatch(value) or (name == _AT_ONCE and not (value.isdigit() and int(value))):
                expected = "a number from 1" if name == _AT_ONCE else "one word without quotes"
                raise InputError(f"the option {name} is {value!r}, expected {expected}", "correct it")
        self._options, self._folder = dict(options), folder
        if strange := sorted(set(str(folder)) & set('"\\%\n')):
            raise InputError(f"{folder} has {strange[0]!r} in its name, which SLURM would misread", "rename the folder")

    def script(self, job: Job) -> str:
        """Return the script of a job."""
        at_once = f"%{self._options[_AT_ONCE]}" if _AT_ONCE in self._options else ""
        facts = {
            "job-name": job.name,
            "array": f"0-{len(job.tasks) - 1}{at_once}",
            **{name.replace("_", "-"): value for name, value in self._options.items() if name != _AT_ONCE},
            "chdir": f'"{self._folder}"',
            "output": f'"{self._folder}/%A_%a.log"',
            "open-mode": "append",
            "requeue": "true",
            "signal": f"B:USR1@{_TOLD_S}",
        }
        if job.after:  # not afterok: SLURM may count a task that it queues again as failed, and drops what waits for it
            facts |= {"dependency": f"afterany:{':'.join(job.after)}"}
        lines = [f"#SBATCH --{name}{'' if value == 'true' else f'={value}'}" for name, value in facts.items()]
        cases = [line for number, task in enumerate(job.tasks) for line in _case(number, task)]
        end = 'touch "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID.done"  # SLURM soon forgets it'
        return "\n".join(["#!/bin/bash", *lines, "", _RUN, "case $SLURM_ARRAY_TASK_ID in", *cases, "esac", end, ""])

    def submit(self, job: Job) -> list[str]:
        """Submit a job; return the ids of its tasks."""
        told = _told_by(["sbatch", "--parsable"], self.script(job), refusing=True)
        number = told.strip().partition(";")[0]
        if not number.isdigit():
            raise StageError(f"sbatch answered {told.strip()!r} instead of the number of a job")
        return [f"{number}_{index}" for index in range(len(job.tasks))]

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        """Return how tasks stand; of those that ended minutes ago the ones that succeeded are known."""
        if not ids:
            return {}
        jobs = ",".join(sorted({task.partition("_")[0] for task in _checked(ids)}))
        told = _told_by(["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%r", f"--jobs={jobs}"])
        found = {task: TaskState("done") for task in ids if (self._folder / f"{task}.done").exists()}
        for line in told.splitlines():
            task, state, where, reason = line.strip().split("|", 3)
            if task in ids:
                words = state.lower().replace("_", " ")
                detail = words if reason in ("None", "") else f"{words}: {reason}"
                kind: State = next((kind for kind, names in _STATES.items() if state in names), "running")
                found[task] = TaskState(kind, where, detail)
        return found

    def cancel(self, ids: Sequence[str]) -> None:
        """End tasks: each command is told, and has half a minute to save what it has."""
        if ids:
            _told_by(["scancel", *_checked(ids)])

    def log(self, task: str) -> Path:
        """Return the file that the output of a task goes to."""
        return self._folder / f"{task}.log"


def open_tasks(options: Mapping[str, str], folder: Path) -> Slurm:
    """Return the SLURM that tasks are submitted to; raise `InputError` for an option that it does not know."""
    return Slurm(options, folder)


def _case(number: int, task: JobTask) -> list[str]:
    """Return the lines of a script for one task of its job."""
    return [f"{number})  # {task.title}", *(f"    run {join(command)}" for command in task.commands), "    ;;"]


def _checked(ids: Sequence[str]) -> Sequence[str]:
    """Return ids that are ids: they may come from a file."""
    if strange := [task for task in ids if not _ID.fullmatch(task)]:
        raise InputError(f"{strange[0]!r} is no task of SLURM")
    return ids


def _told_by(command: Sequence[str], given: str = "", *, refusing: bool = False) -> str:
    """Return what a command of SLURM says; `refusing`: what it does not do is the fault of the input."""
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=_PATIENCE_S, check=False, env=_environment()
        )
    except FileNotFoundError:
        raise InputError(
            f"{command[0]} is not on this machine", "give the command where jobs of SLURM are submitted"
        ) from None
    except subprocess.TimeoutExpired:
        raise StageError(f"{command[0]} did not answer within {_PATIENCE_S:.0f} s", "try again") from None
    if done.returncode == 0:
        return done.stdout
    words = " ".join(done.stderr.replace(f"{command[0]}: error: ", "").split()) or f"exit code {done.returncode}"
    if "Invalid job id specified" in words:  # all of them are forgotten
        return ""
    if refusing and "ontact" not in words:  # Unable to contact, Communication: the controller is away
        raise InputError(f"{command[0]} refused the job ({words})", "correct the cluster file")
    raise StageError(f"{command[0]} failed ({words})", "try again when SLURM answers: nothing was submitted")


def _environment() -> dict[str, str]:
    """Return the environment for jobs: without the number of threads that the command line took for this machine."""
    own = str(available_workers()) if available_workers() < affinity() else None
    return {name: value for name, value in os.environ.items() if (name, value) != ("OMP_NUM_THREADS", own)}
