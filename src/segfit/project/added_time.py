"""Time that is added to a run, ``--time +30m``: the settings with the sum, whatever happened to the command before."""

from __future__ import annotations

import re
from collections.abc import Sequence

from segfit.errors import InputError
from segfit.options import require_settings
from segfit.planning.plan import Plan
from segfit.project.documents import load
from segfit.project.folder import ProjectFile, ProjectFolder
from segfit.text import duration

__all__ = ["with_added_time"]

_ADDED = re.compile(r"time_s=\+(\d+(?:\.\d+)?)")


def with_added_time(
    folder: ProjectFolder, before: ProjectFile | None, settings: Sequence[str]
) -> tuple[list[str], float | None]:
    """Return settings with the sum in the place of a time that is added, and what is gone on with: the time before.

    `before` is what the project's file says; None where there is no project yet.

    That is None where nothing is added. The same addition made again before its run is trained adds nothing more: it
    is the same command, which goes on where it was. A change of other options leaves an addition as it is.

    Raises `InputError` where there is no run by time to add to.
    """
    require_settings(settings)
    matches = {setting: match for setting in settings if (match := _ADDED.fullmatch(setting))}
    if not matches:
        timed = any(setting.partition("=")[0] in ("time_s", "training.steps") for setting in settings)
        return list(settings), None if before is None or timed else before.time_before_s
    *_, last = matches.values()
    added = float(last[1])
    base = None if before is None else _time_of(before, folder)
    if before is None or base is None:
        raise InputError(
            f"{duration(added)} cannot be added: {folder.root} has no run of a time",
            "give all of it, such as --time 2h",
        )
    if before.time_before_s is not None and base == before.time_before_s + added:
        base = before.time_before_s
    return [f"time_s={base + added}" if setting in matches else setting for setting in settings], base


def _time_of(before: ProjectFile, folder: ProjectFolder) -> float | None:
    """Return the time of a project's run: as it was given, or as it was taken where none was."""
    if before.options.time_s is not None or before.options.training.steps is not None:
        return before.options.time_s
    plan = load(Plan, folder.plan)
    return None if plan is None or plan.run is None else plan.run.time_s
