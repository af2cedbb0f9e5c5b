"""Which trainings and validations a run has, and what they count under."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from segfit.dataset.splits import Fold
from segfit.errors import InputError
from segfit.evaluation.summary import Summary
from segfit.files import content_hash
from segfit.planning.budget import FEWEST_STEPS, MOST_STEPS
from segfit.planning.plan import Plan, RunSpec, Unfinished
from segfit.project.acceleration import asked_acceleration
from segfit.project.preparation import Preparation
from segfit.project.stages import STAGES
from segfit.project.validation import (
    SUMMARY,
)
from segfit.records import Key, Results
from segfit.specs import Configuration
from segfit.training.budget import TimeBudget
from segfit.training.job import TrainingJob
from segfit.training.result import TrainingResult, finished_result

__all__ = [
    "Training",
    "Validation",
    "is_begun",
    "require_trained",
    "results_of",
    "summaries_of",
    "training_of",
    "trainings_asked",
    "trainings_of",
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


def results_of(trainings: Sequence[Training]) -> list[TrainingResult]:
    """Return the results of those trainings that are finished."""
    return [result for item in trainings if (result := item.result()) is not None]


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


def summaries_of(validations: Sequence[Validation]) -> dict[str, dict[int, Summary]]:
    """Return the metrics of validations that are done, by configuration and fold."""
    summaries: dict[str, dict[int, Summary]] = {}
    for item in validations:
        summaries.setdefault(item.training.name, {})[item.training.fold] = Summary.load(item.folder / SUMMARY)
    return summaries
