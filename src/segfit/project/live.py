"""How the trainings of a project go at this moment, read from their logs: nothing is computed, locked or written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segfit.planning.plan import Plan, RunSpec
from segfit.project.folder import ProjectFolder
from segfit.project.status import ProjectStatus, read_if_whole, share_of, status_of
from segfit.report.data import TrainingCurve
from segfit.training.events import read_events
from segfit.training.result import EVENTS

__all__ = ["Live", "live_state"]

_AFTERWARDS = ("validate", "select", "predict", "evaluate", "report")


@dataclass(frozen=True, slots=True)
class Live:
    """The state of a project.

    Parameters
    ----------
    left_s : seconds until its run ends, about; None where that is not known
    silent_s : seconds since a training wrote into its log; None if none has
    done : the report is that of all that was asked for
    """

    status: ProjectStatus
    curves: tuple[TrainingCurve, ...]
    left_s: float | None
    silent_s: float | None
    done: bool


def live_state(root: Path) -> Live:
    """Return how far the project in a folder is; raise `InputError` if there is none."""
    status, folder = status_of(root), ProjectFolder(root)
    plan = read_if_whole(Plan, folder.plan)
    run = None if plan is None else plan.run
    folds = [] if run is None else [folder.runs / name / f"fold-{k}" for name in run.configurations for k in run.folds]
    logs = [max(fold.glob(f"*/{EVENTS}"), key=_written, default=None) for fold in folds]
    curves = tuple(
        TrainingCurve.from_events(fold.parent.name, int(fold.name.removeprefix("fold-")), read_events(log))
        for fold, log in zip(folds, logs, strict=True)
        if log is not None
    )
    written = [_written(log) for log in logs if log is not None]
    states = {item.stage: item.state for item in status.stages}
    return Live(
        status=status,
        curves=curves,
        left_s=None if run is None else _left(run, [share_of(fold) for fold in folds], curves, status),
        silent_s=max(0.0, time.time() - max(written)) if written else None,
        done=all(states[stage] == "done" for stage in ("train", "select", "report")),
    )


def _left(
    run: RunSpec, shares: Sequence[float], curves: Sequence[TrainingCurve], status: ProjectStatus
) -> float | None:
    """Return the seconds that trainings and later stages are still to take: trainings go on as they went so far."""
    whole = [one.seconds / one.share[-1] for one in curves if one.seconds and one.share and one.share[-1] > 0]
    each = sum(whole) / len(whole) if whole else run.seconds_per_training
    if each is None:
        return None
    open_stages = {item.stage for item in status.stages if item.state != "done"}
    waiting = {"validate"} | open_stages if "select" in open_stages else open_stages
    later = [forecast.seconds for stage, forecast in run.forecast.items() if stage in _AFTERWARDS and stage in waiting]
    return sum(each * (1 - share) for share in shares) + sum(later)


def _written(path: Path) -> float:
    return path.stat().st_mtime
