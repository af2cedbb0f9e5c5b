"""Training and validating every fold of every configuration of the run: tasks that several commands may share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from segfit.dataset.splits import Fold
from segfit.device import resolve_device
from segfit.errors import DivergedError, InputError, StageError, warning
from segfit.evaluation.summary import Summary
from segfit.files import content_hash, hash_file
from segfit.planning.budget import FEWEST_STEPS, MOST_STEPS
from segfit.planning.plan import Plan, RunSpec, Unfinished
from segfit.preprocessing.store import StoredCase
from segfit.project.acceleration import asked_acceleration
from segfit.project.preparation import Preparation
from segfit.project.race import exclude, remove_losers
from segfit.project.sharing import Task
from segfit.project.stages import STAGES
from segfit.project.validation import (
    NEXT_STAGE,
    PROBABILITIES,
    SUMMARY,
    next_stage_path,
    probabilities_path,
    traits_path,
    validate_fold,
)
from segfit.records import Key, Results, is_sealed, remove_damaged, seal
from segfit.specs import Configuration
from segfit.training.budget import TimeBudget
from segfit.training.job import TrainingJob
from segfit.training.loop import train_fold
from segfit.training.result import WEIGHTS, TrainingResult, before_and_after, finished_result
from segfit.training.starting_state import take_up_other_steps

__all__ = [
    "Training",
    "Validation",
    "held_weights",
    "is_begun",
    "require_trained",
    "results_of",
    "summaries_of",
    "train_all",
    "train_one",
    "training_of",
    "trainings_asked",
    "trainings_of",
    "validate_all",
    "validations_of",
]


@dataclass(frozen=True, slots=True)
class Training:
    """One training of the run.

    The second stage of a cascade is trained on what the first one predicted for cases that it had not seen, so its
    identity is known when all trainings of the first stage are finished; until then it is that of no training.
    """

    job: TrainingJob
    fold: int
    identity: str  # of the job
    folder: Path
    known: Results = field(compare=False, repr=False)  # to the session
    previous: tuple[Validation, ...] = ()  # of the first stage, every fold's

    @property
    def name(self) -> str:
        """Name of the configuration."""
        return self.job.configuration.name

    @property
    def title(self) -> str:
        """What people read."""
        return f"training {self.name}, fold {self.fold}{' so far' if self.job.so_far else ''}"

    def result(self) -> TrainingResult | None:
        """Return what it gave; None unless it is finished, and had all of its time."""
        return finished_result(self.folder, self.identity, self.job.budget, self.known)

    def is_done(self) -> bool:
        """Whether it is finished."""
        return self.result() is not None

    @property
    def is_second_stage(self) -> bool:
        """Whether it sees what another configuration predicted."""
        return self.job.configuration.previous_stage is not None


def trainings_of(project: Preparation) -> list[Training]:
    """Return the trainings of the run, configuration by configuration."""
    run, plan = project.run_plan(), project.plan()
    return [training_of(project, plan, name, fold) for name in run.configurations for fold in run.folds]


def trainings_asked(
    project: Preparation, folds: Sequence[int] | None, configurations: Sequence[str] | None
) -> list[Training]:
    """Return those trainings of the run that are of these folds and configurations; None: of all.

    Raises `InputError` for a fold or configuration that the run does not have.
    """
    run = project.run_plan()
    for asked, there, key in (
        (folds, run.folds, "folds"),
        (configurations, run.configurations, "configurations"),
    ):
        if missing := [value for value in asked or () if value not in there]:
            named = ", ".join(str(value) for value in there)
            raise InputError(
                f"the run has the {key} {named}, and not {missing[0]}",
                f"choose among these, or change the run: --set planning.{key}={missing[0]}",
            )
    return [
        item
        for item in trainings_of(project)
        if (folds is None or item.fold in folds) and (configurations is None or item.name in configurations)
    ]


def _budget(run: RunSpec, unfinished: Unfinished | None) -> TimeBudget:
    if unfinished is not None:  # it is used
        return TimeBudget(unfinished.seconds, None, most_steps=unfinished.steps)
    if run.steps is not None:
        return TimeBudget(None, run.steps)
    return TimeBudget(run.seconds_per_training, None, FEWEST_STEPS, MOST_STEPS)


def training_of(project: Preparation, plan: Plan, name: str, fold: int) -> Training:
    """Return a training of this plan or an earlier one of the same project."""
    configuration, split, run = plan.configurations[name], project.splits().folds[fold], plan.run
    assert run is not None
    previous, unfinished = _previous(project, plan, configuration), run.unfinished.get(f"{name}/{fold}")
    keys = project.case_keys(configuration)
    goes_on = run.start is not None and (name, fold) == (run.configurations[0], run.start_fold)  # from a race
    here = plan.machine == project.hardware.machine  # where it was measured
    job = TrainingJob(
        configuration=configuration,
        recipe=plan.training[name],
        labels=project.dataset.labels,
        cases_train=split.train,
        cases_validation=split.validation,
        seed=project.options.seed,
        budget=_budget(run, unfinished),
        weights=project.dataset.weights(split.train),
        data=_data(keys, split, previous if configuration.previous_stage is not None else None),
        start=project.folder.root / run.start if goes_on and run.start else None,
        start_identity=run.start_identity if goes_on else None,
        initial=project.initial,
        so_far=None if unfinished is None else f"{unfinished.training} {unfinished.steps}",
        acceleration=asked_acceleration(project.options.training, run.acceleration.get(name) if here else None),
    )
    if unfinished is None:
        folder = project.folder.training(name, fold, job.identity)
    else:
        folder = project.folder.so_far(name, fold, unfinished.training, job.identity)
    return Training(job, fold, job.identity, folder, project.results, previous)


def _previous(project: Preparation, plan: Plan, configuration: Configuration) -> tuple[Validation, ...]:
    """Return the validations of the first stage, of all folds; () for no cascade, and until all are trained."""
    name = configuration.previous_stage
    if name is None:
        return ()
    trained = [training_of(project, plan, name, fold) for fold in range(len(project.splits().folds))]
    results = results_of(trained)
    if len(results) < len(trained):
        return ()
    return tuple(_validation_of(project, plan, *pair, whole=True) for pair in zip(trained, results, strict=True))


def is_begun(project: Preparation, plan: Plan) -> bool:
    """Whether a training of a plan, this one or another one of the project, has left something."""
    run = plan.run
    return run is not None and any(
        training_of(project, plan, name, fold).folder.exists() for name in run.configurations for fold in run.folds
    )


def require_trained(project: Preparation) -> None:
    """Raise `InputError` unless all trainings of the run are finished: what uses a model starts none unasked."""
    root, plan = project.folder.root, project.plan()
    if plan.run is not None:
        with project.looking(plan):
            wanted = trainings_of(project)
            if len(results_of(wanted)) == len(wanted):
                return
    raise InputError(
        f"{root} has no finished training for its data and options", f"train first: segfit run {quote(str(root))}"
    )


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


def results_of(trainings: Sequence[Training]) -> list[TrainingResult]:
    """Return the results of those trainings that are finished."""
    return [result for item in trainings if (result := item.result()) is not None]


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


def _data(keys: Mapping[str, str], split: Fold, previous: Sequence[Validation] | None) -> str:
    """Return what names the content of the cases of a training; `previous`: what the second stage of a cascade sees."""
    own: dict[str, Any] = {case: keys[case] for case in (*split.train, *split.validation)}
    if previous is not None:
        own["previous stage"] = [item.next_key.hash for item in previous if item.next_key is not None]
    return content_hash(own)


@dataclass(frozen=True, slots=True)
class Validation:
    """The predictions of a training's validation cases, all or those there is time for."""

    training: Training
    weights: str  # hash
    cases: tuple[str, ...]
    folder: Path
    key: Key
    next_key: Key | None  # of the labels for the second stage of a cascade; None for other configurations

    @property
    def title(self) -> str:
        """What people read."""
        return f"validating {self.training.name}, fold {self.training.fold}"


def validations_of(
    project: Preparation,
    results: Sequence[TrainingResult],
    *,
    whole: bool,
    trainings: Sequence[Training] | None = None,
) -> list[Validation]:
    """Return the validations of trainings, by default all of the run, of `whole` folds or what there is time for."""
    items = trainings_of(project) if trainings is None else trainings
    pairs = zip(items, results, strict=True)
    return [_validation_of(project, project.size(), *pair, whole=whole) for pair in pairs]


def _validation_of(
    project: Preparation, plan: Plan, item: Training, result: TrainingResult, *, whole: bool
) -> Validation:
    run, configuration = plan.run, item.job.configuration
    assert run is not None
    following = configuration.next_stage if configuration.next_stage in run.configurations else None
    fold = project.splits().folds[item.fold].validation
    cases = fold if whole or following is not None else project.validated(item.fold, whole=False)
    keys = project.case_keys(configuration)
    seen = [one.next_key.hash for one in item.previous if one.next_key is not None and one.training.fold == item.fold]
    made_of = {case: [keys[case], project.hashes.case(project.dataset.case(case)), *seen] for case in cases}
    key = STAGES["validate"].key(project.options, weights=result.weights, cases=made_of, mirror=run.validation_mirror)
    next_key = None
    if following is not None:
        grids = project.case_keys(plan.configurations[following])
        next_key = STAGES["next_stage"].key(
            project.options, validation=key.hash, grids={case: grids[case] for case in cases}
        )
    return Validation(item, result.weights, cases, item.folder / f"validation-{key.hash}", key, next_key)


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


def summaries_of(validations: Sequence[Validation]) -> dict[str, dict[int, Summary]]:
    """Return the metrics of validations that are done, by configuration and fold."""
    summaries: dict[str, dict[int, Summary]] = {}
    for item in validations:
        summaries.setdefault(item.training.name, {})[item.training.fold] = Summary.load(item.folder / SUMMARY)
    return summaries


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
