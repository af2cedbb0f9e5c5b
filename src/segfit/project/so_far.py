"""A model of what is trained so far, while trainings are not finished: their last saved states count as the networks.

The trainings themselves stay as they are, and go on as if nothing had been asked: what is handed over lies in a folder
of its own beside the saved states, under an identity of its own. Its networks lack the end of their training, in which
the learning rate falls, and the verdict says so.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from shlex import quote

from segfit.bundle.bundle import MANIFEST, open_bundle, weights_name
from segfit.errors import InputError
from segfit.files import write_bytes
from segfit.options import CASCADE
from segfit.planning.plan import Plan, RunSpec, Unfinished
from segfit.project.folder import SO_FAR
from segfit.project.handing_over import select_model
from segfit.project.preparation import Preparation
from segfit.project.sharing import Task
from segfit.project.train_and_validate import train_one
from segfit.project.trainings import Training, trainings_of
from segfit.selection.select import Selection
from segfit.training.checkpoint import Checkpoints, State
from segfit.training.result import BEFORE_COOLDOWN, EVENTS, STATE, TrainingResult, finished_result

__all__ = ["select_so_far"]


@dataclass(frozen=True, slots=True, eq=False)
class _Reached:
    """What a training has: a result, of less time than it has now, or a state."""

    training: Training
    result: TrainingResult | None
    state: State | None


def select_so_far(project: Preparation) -> Selection:
    """Validate what the trainings of the run have reached, choose, and write ``model/``; nothing is trained on.

    Folds and configurations that have reached nothing are left out. Raises `InputError` where none has anything.
    """
    plan = project.known_plan()
    reached = {} if plan is None or plan.run is None else _reached(project, plan)
    if plan is None or plan.run is None or not reached:
        root = project.folder.root
        raise InputError(f"{root} has no saved state of a training yet", f"train first: segfit run {quote(str(root))}")
    narrowed = plan.model_copy(update={"run": _narrowed(plan.run, reached)})
    with project.looking(narrowed):
        for item in trainings_of(project):
            _take(project, item, reached[item.name, item.fold])
        results = [result for item in trainings_of(project) if (result := item.result()) is not None]
        given = _given(project, results)  # waits for nobody who goes on with these trainings
        found = given or select_model(project, results).selection
    if any(item.state is not None and item.training.is_done() for item in reached.values()):
        return select_so_far(project)  # it has ended meanwhile, and its own model is the one to stay
    return found


def _given(project: Preparation, results: Sequence[TrainingResult]) -> Selection | None:
    """Return what was selected if ``model/`` is made of these results already."""
    selection = project.results.recall(Selection, project.folder.selection)
    if selection is None or not (project.folder.model / MANIFEST).exists():
        return None
    checksums = open_bundle(project.folder.model, verify=False).manifest.checksums
    winners = [
        (weights_name(item.name, item.fold), result.weights)
        for item, result in zip(trainings_of(project), results, strict=True)
        if item.name in selection.winner
    ]
    return selection if winners and all(checksums.get(name) == weights for name, weights in winners) else None


def _reached(project: Preparation, plan: Plan) -> dict[tuple[str, int], _Reached]:
    """Return what there is of each training of the run that has something."""
    found = {}
    with project.looking(plan):
        for item in trainings_of(project):
            result, state = finished_result(item.folder, item.identity), None
            if result is None:
                saved = (Checkpoints(item.folder / name, item.identity).peek() for name in (STATE, BEFORE_COOLDOWN))
                state = next((one for one in saved if one is not None), None)
            if result is not None or state is not None:
                found[item.name, item.fold] = _Reached(item, result, state)
    return found


def _narrowed(run: RunSpec, reached: Mapping[tuple[str, int], _Reached]) -> RunSpec:
    """Return the run of those trainings that have something, the same folds of each configuration."""
    complete = len(reached) == len(run.configurations) * len(run.folds)
    names = [name for name in run.configurations if any(key[0] == name for key in reached)]
    if not complete:  # the second stage of a cascade hangs on all of the first
        names = [name for name in names if name != CASCADE] or names
    folds = tuple(fold for fold in run.folds if (names[0], fold) in reached)
    names = [name for name in names if all((name, fold) in reached for fold in folds)]
    chosen = {key: item for key, item in reached.items() if key[0] in names and key[1] in folds}
    given = [item.result.budget_seconds for item in chosen.values() if item.result is not None]
    seconds = [value for value in (run.seconds_per_training, *given) if value is not None]
    return run.model_copy(
        update={
            "configurations": tuple(names),
            "folds": folds,
            "seconds_per_training": min(seconds, default=None),  # so that what had less time counts
            "unfinished": {
                f"{name}/{fold}": Unfinished(
                    training=item.training.identity,
                    steps=item.state.step - item.state.facts["first_step"],
                    seconds=item.state.facts["seconds"],
                )
                for (name, fold), item in chosen.items()
                if item.state is not None
            },
        }
    )


def _take(project: Preparation, item: Training, reached: _Reached) -> None:
    """Have weights and result of a state, in the folder of `item`, that is inside that of the training."""

    def do() -> None:
        assert reached.state is not None
        source = reached.training.folder
        for old in source.glob(f"{SO_FAR}*"):
            shutil.rmtree(old)
        if (source / EVENTS).exists():
            write_bytes(item.folder / EVENTS, (source / EVENTS).read_bytes())
        Checkpoints(item.folder / STATE, item.identity).save(reached.state)
        train_one(project, item)  # its budget is used: no step is done

    project.locks.share([Task(item.title, item.is_done, do)])
