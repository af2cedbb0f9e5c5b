"""Training and validating every fold of every configuration of the run: tasks that several commands may share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from segfit.device import resolve_device
from segfit.errors import DivergedError, StageError, warning
from segfit.files import hash_file
from segfit.preprocessing.store import StoredCase
from segfit.project.preparation import Preparation
from segfit.project.race import exclude, remove_losers
from segfit.project.sharing import Task
from segfit.project.trainings import Training, Validation, results_of, trainings_asked, trainings_of
from segfit.project.validation import (
    NEXT_STAGE,
    PROBABILITIES,
    SUMMARY,
    next_stage_path,
    probabilities_path,
    traits_path,
    validate_fold,
)
from segfit.records import is_sealed, remove_damaged, seal
from segfit.training.loop import train_fold
from segfit.training.result import WEIGHTS, TrainingResult, before_and_after
from segfit.training.starting_state import take_up_other_steps

__all__ = ["held_weights", "train_all", "train_one", "validate_all"]


def train_all(
    project: Preparation, folds: Sequence[int] | None = None, configurations: Sequence[str] | None = None
) -> list[TrainingResult]:
    """Train what is not trained yet, and what has been given more time since; return the results.

    Of all trainings of the run, or of those that `trainings_asked` returns.

    Where the first training that a race decided on diverges for good, the next candidate of the race is trained.
    """
    while True:
        try:
            results = _train_planned(project, folds, configurations)
        except _DecidedAnewError:
            continue
        if results is not None:
            if folds is None and configurations is None:
                remove_losers(project, project.plan())
                project.end_addition()
            return results


class _DecidedAnewError(Exception):
    """What is trained is not what it was."""


def _train_planned(
    project: Preparation, folds: Sequence[int] | None, configurations: Sequence[str] | None
) -> list[TrainingResult] | None:
    """Train what is missing; return the results, None if another command is just writing one of them.

    The second stage of a cascade has the whole first stage trained before.
    """
    wanted = trainings_asked(project, folds, configurations)
    results = results_of(wanted)
    if len(results) < len(wanted):
        project.preprocess()
        firsts = {item.job.configuration.previous_stage for item in wanted}
        needed = [item for item in trainings_of(project) if item.name in firsts]
        _share(project, [*(item for item in wanted if not item.is_second_stage and item.name not in firsts), *needed])
        wanted = trainings_asked(project, folds, configurations)  # the second stage is known now
        _share(project, [item for item in wanted if item.is_second_stage])
        results = results_of(wanted)
    return results if len(results) == len(wanted) else None


def _share(project: Preparation, wanted: Sequence[Training]) -> None:
    project.locks.share([Task(item.title, item.is_done, partial(_train_or_give_way, project, item)) for item in wanted])
    _require_decided(project)


def _train_or_give_way(project: Preparation, item: Training) -> None:
    """Train, or raise `_DecidedAnewError` where another candidate is trained instead: nobody else is at work on it."""
    _require_decided(project)
    run = project.run_plan()
    try:
        train_one(project, item)
    except DivergedError as error:
        first = (item.name, item.fold) == (run.configurations[0], run.folds[0])
        if not first or (item.folder / WEIGHTS).exists() or not exclude(project, project.plan()):
            raise
        problem = f"{error}; the next candidate of the race is trained instead"
        project.progress.warn(warning("winner_diverged", problem))
        shutil.rmtree(item.folder, ignore_errors=True)
        with project.locks.held("what is trained"):
            project.plan_anew()
        raise _DecidedAnewError from error


def _require_decided(project: Preparation) -> None:
    """Raise `_DecidedAnewError` where another command gave way to another candidate."""
    if project.known_plan() != project.size():
        project.look_again()
        raise _DecidedAnewError


def train_one(project: Preparation, item: Training) -> TrainingResult:
    """Train, or go on; the lock of the training is held meanwhile."""
    job = item.job
    train, validation = (_stored(project, item, cases) for cases in (job.cases_train, job.cases_validation))
    take_up_other_steps(job, item.folder, item.folder.parent.glob("*"))
    with project.stage_log.of("train"):
        result = train_fold(
            job,
            train,
            validation,
            item.folder,
            resolve_device(project.options.device),
            expected_seconds_per_step=project.run_plan().seconds_per_step.get(item.name),
            checkpoint_seconds=project.options.training.checkpoint_seconds,
            title=item.title,
            trackers=project.options.training.trackers,
            progress=project.progress,
            team=project.team,
        )
    initial = project.run_plan().initial
    if initial is not None and (words := before_and_after(result, initial.kept)):
        project.progress.note(words)
    return result


def _stored(project: Preparation, item: Training, cases: Sequence[str]) -> list[StoredCase]:
    """Return preprocessed cases, in the second stage of a cascade with what the first one predicts for them."""
    _share_validations(project, item.previous, _has_next_stage)
    keys, found = project.preprocess()[item.name], dict[str, Path]()
    for validation in item.previous:
        found |= {case: next_stage_path(validation.folder, case) for case in validation.cases}
    assert not item.is_second_stage or found.keys() >= set(cases)
    return [replace(project.stored(keys[case]), previous=found.get(case)) for case in cases]


def _has_next_stage(item: Validation) -> bool:
    return item.next_key is not None and is_sealed(item.folder / NEXT_STAGE, item.next_key)


def validate_all(project: Preparation, validations: Sequence[Validation], *, unless: Callable[[], bool]) -> None:
    """Predict and score validation cases, `unless` they are not needed any more."""
    several = len(project.run_plan().configurations) > 1

    def is_done(item: Validation) -> bool:
        probabilities = not several or is_sealed(item.folder / PROBABILITIES, item.key)
        return (is_sealed(item.folder, item.key) and probabilities) or unless()

    _share_validations(project, validations, is_done)


def _share_validations(
    project: Preparation, validations: Sequence[Validation], is_done: Callable[[Validation], bool]
) -> None:
    project.locks.share(
        [Task(item.title, partial(is_done, item), partial(_validate, project, item)) for item in validations]
    )


def _validate(project: Preparation, item: Validation) -> None:
    run, plan, inference = project.run_plan(), project.plan(), project.options.inference
    cases, probabilities = _stored(project, item.training, item.cases), len(run.configurations) > 1
    name, following = item.training.name, item.training.job.configuration.next_stage
    remove_damaged(item.folder, item.key)
    remove_damaged(item.folder / PROBABILITIES, item.key)
    grids = None
    if item.next_key is not None and following is not None:
        remove_damaged(item.folder / NEXT_STAGE, item.next_key)
        keys = project.preprocess()[following]
        grids = {case: project.stored(keys[case]).properties for case in item.cases}
    with held_weights(project, [item.training], [item.weights]), project.stage_log.of("validate") as use:
        validate_fold(
            plan.configurations[name],
            plan.training[name],
            project.dataset,
            cases,
            item.training.folder / WEIGHTS,
            item.folder,
            device=resolve_device(project.options.device),
            mirror=inference.mirror is not False and run.validation_mirror,
            tile_step=inference.tile_step,
            probabilities=probabilities,
            title=item.title,
            next_stage=grids,
            execution=project.execution,
        )
        names = [f"{case}{project.dataset.file_ending}" for case in item.cases]
        names += [traits_path(item.folder, case).name for case in item.cases]
        if probabilities:
            files = [probabilities_path(item.folder, case).name for case in item.cases]
            seal(item.folder / PROBABILITIES, item.key, files, use())
        if item.next_key is not None:
            files = [next_stage_path(item.folder, case).name for case in item.cases]
            seal(item.folder / NEXT_STAGE, item.next_key, files, use())
        seal(item.folder, item.key, [SUMMARY, *names], use())


@contextmanager
def held_weights(project: Preparation, trainings: Sequence[Training], weights: Sequence[str]) -> Iterator[None]:
    """Keep other commands from going on with trainings, whose weights must have these hashes."""
    with ExitStack() as stack:
        for item, wanted in zip(trainings, weights, strict=True):
            stack.enter_context(project.locks.held(item.title))
            if hash_file(item.folder / WEIGHTS) != wanted:
                raise StageError(f"{item.title} was given more time by another command meanwhile", "rerun the command")
        yield
