"""Training and validating every fold of every configuration of the run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from segfit.dataset.splits import Fold
from segfit.device import resolve_device
from segfit.errors import DivergedError, InputError
from segfit.evaluation.summary import Summary
from segfit.files import content_hash
from segfit.planning.budget import FEWEST_STEPS
from segfit.preprocessing.store import CaseStore, StoredCase
from segfit.project.preparation import Preparation
from segfit.project.race import exclude, remove_losers
from segfit.project.validation import validate_fold
from segfit.training.loop import train_fold
from segfit.training.result import WEIGHTS, TrainingResult

__all__ = ["require_trained", "train_all", "validate_all"]


def require_trained(project: Preparation) -> None:
    """Raise `InputError` unless all trainings of the run are finished: what uses a model starts none unasked."""
    plan, root = project.plan(), project.folder.root
    run, results = plan.run, project.results_of(plan.basis)
    if run is None or not all(results.trained(name, fold) for name in run.configurations for fold in run.folds):
        raise InputError(
            f"{root} has no finished training for its data and options; train first: segfit run --out {root}"
        )


def train_all(project: Preparation) -> list[TrainingResult]:
    """Train what is not trained yet, one after the other.

    Where the first training that a race decided on diverges for good, the next candidate of the race is trained.
    """
    while True:
        try:
            results = _train_planned(project)
        except DivergedError as error:
            run = project.run_plan()
            name, fold = run.configurations[0], run.folds[0]
            if project.folder.trained(name, fold) or not exclude(project, project.plan()):
                raise
            project.progress.warn(f"{error}; the next candidate of the race is trained instead")
            shutil.rmtree(project.folder.training(name, fold), ignore_errors=True)
            project.decide_anew()
        else:
            remove_losers(project, project.plan())
            return results


def _train_planned(project: Preparation) -> list[TrainingResult]:
    run, keys = project.run_plan(), project.preprocess()
    results = []
    for name in run.configurations:
        for fold in run.folds:
            with project.stage("train", unless=project.folder.trained(name, fold)):
                results.append(_train(project, name, fold, keys[name]))
    return results


def validate_all(project: Preparation, results: Sequence[TrainingResult]) -> dict[str, dict[int, Summary]]:
    """Predict and score the validation cases of every training; return the scores by configuration and fold."""
    run, keys = project.run_plan(), project.preprocess()
    identities = {
        (item.configuration, fold): item.identity for item, fold in zip(results, _folds(project), strict=True)
    }
    summaries: dict[str, dict[int, Summary]] = {}
    for name in run.configurations:
        for fold in run.folds:
            folder = project.folder.validation(name, fold)
            mark = f"validation/{name}/{fold}"
            if not project.marks.holds(mark, identities[name, fold]):
                shutil.rmtree(folder, ignore_errors=True)
                project.marks.set(mark, identities[name, fold])
            with project.stage("validate", unless=(folder / "summary.json").exists()):
                summaries.setdefault(name, {})[fold] = _validate(project, name, fold, keys[name])
    return summaries


def _folds(project: Preparation) -> list[int]:
    run = project.run_plan()
    return [fold for _ in run.configurations for fold in run.folds]


def _train(project: Preparation, name: str, fold: int, keys: dict[str, str]) -> TrainingResult:
    plan, run = project.plan(), project.run_plan()
    split = project.splits().folds[fold]
    train, validation = _cases(project, split, keys)
    raced = run.start is not None and (name, fold) == (run.configurations[0], run.folds[0])
    return train_fold(
        configuration=plan.configurations[name],
        recipe=plan.training[name],
        labels=project.dataset.labels,
        cases_train=train,
        cases_validation=validation,
        weights=project.weights(split.train),
        folder=project.folder.training(name, fold),
        device=resolve_device(project.options.device),
        seed=project.options.seed,
        seconds=run.seconds_per_training if run.steps is None else None,
        steps=run.steps,
        fewest_steps=FEWEST_STEPS if run.steps is None else 0,
        expected_seconds_per_step=run.seconds_per_step.get(name),
        checkpoint_seconds=project.options.training.checkpoint_seconds,
        identity=content_hash({case: keys[case] for case in (*split.train, *split.validation)}),
        title=f"training {name}, fold {fold}",
        start=project.folder.root / run.start if raced and run.start else None,
        start_identity=run.start_identity if raced else None,
        progress=project.progress,
    )


def _validate(project: Preparation, name: str, fold: int, keys: dict[str, str]) -> Summary:
    plan, run, inference = project.plan(), project.run_plan(), project.options.inference
    store = CaseStore(project.folder.cases)
    return validate_fold(
        plan.configurations[name],
        plan.training[name],
        project.dataset,
        [store.open(keys[case]) for case in project.validated(fold)],
        project.folder.training(name, fold) / WEIGHTS,
        project.folder.validation(name, fold),
        device=resolve_device(project.options.device),
        mirror=inference.mirror is not False and run.validation_mirror,
        tile_step=inference.tile_step,
        probabilities=len(run.configurations) > 1,
        title=f"validating {name}, fold {fold}",
        workers=project.options.workers,
        progress=project.progress,
    )


def _cases(project: Preparation, split: Fold, keys: dict[str, str]) -> tuple[list[StoredCase], list[StoredCase]]:
    store = CaseStore(project.folder.cases)
    return [store.open(keys[case]) for case in split.train], [store.open(keys[case]) for case in split.validation]
