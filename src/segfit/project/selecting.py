"""The choice of what is handed over, from validations of all trainings, and its predictions of their cases."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from segfit.evaluation.cohorts import groups_of_cases
from segfit.evaluation.measurement import Margins
from segfit.evaluation.summary import Summary
from segfit.project.folder import PlanFolder
from segfit.project.out_of_fold import candidates_of, has_own_predictions, pairs_of, quality_of, write_predictions
from segfit.project.preparation import Preparation
from segfit.project.stages import STAGES
from segfit.project.train_and_validate import train_all, validate_all
from segfit.project.trainings import (
    Validation,
    results_of,
    summaries_of,
    trainings_asked,
    trainings_of,
    validations_of,
)
from segfit.project.validation import PROBABILITIES
from segfit.records import Key, is_damaged, is_sealed, record_of, remove_damaged
from segfit.selection.margins import margins_of
from segfit.selection.select import Selection, select
from segfit.training.result import TrainingResult

__all__ = ["Selected", "select_best", "selected", "train_and_validate"]


@dataclass(frozen=True, slots=True)
class Selected:
    """What was handed over, and what it was chosen from."""

    selection: Selection
    summary: Summary  # of the winner after its post-processing
    key: Key
    validations: tuple[Validation, ...]
    results: tuple[TrainingResult, ...]
    own: Path | None  # its predictions of the validation cases; None where those of the validations are they

    def validated(self) -> dict[str, Path]:
        """Return in which folder the prediction of each validation case lies that `summary` scores."""
        first = self.selection.winner[0]
        return {
            case: self.own or item.folder
            for item in self.validations
            if item.training.name == first
            for case in item.cases
        }


def select_best(project: Preparation, results: Sequence[TrainingResult] | None = None) -> Selected:
    """Train and validate what is missing, choose, and write ``selection.json`` and ``validation.json``.

    Nothing is trained where the results of all trainings are given. What was selected from all validation cases stays,
    also where a part of them would do.
    """
    results = train_all(project) if results is None else results
    known = selected(project, results)
    found = known or _select(project, results)
    looked_at = () if known is None else found.validations  # what was just made is whole
    project.once(f"validations {found.key.hash}", lambda: _mend(project, found, looked_at))
    folder = _selections(project)
    project.documents.publish(folder.selection, project.folder.selection)
    project.documents.publish(folder.validation_summary, project.folder.validation_summary)
    return found


def train_and_validate(
    project: Preparation, folds: Sequence[int] | None, configurations: Sequence[str] | None
) -> list[TrainingResult]:
    """Train as `train_all`, then predict and score the validation cases, unless a selection from them is done."""
    results = train_all(project, folds, configurations)
    items = trainings_asked(project, folds, configurations)
    validations = validations_of(project, results, whole=project.validates_all, trainings=items)

    def is_selected() -> bool:
        trainings = trainings_of(project)
        there = results_of(trainings)
        return len(there) == len(trainings) and selected(project, there) is not None

    validate_all(project, validations, unless=is_selected)
    return results


def selected(project: Preparation, results: Sequence[TrainingResult]) -> Selected | None:
    """Return what was selected already; None if nothing was."""
    folder = _selections(project)
    for whole in (True,) if project.validates_all else (True, False):
        validations = validations_of(project, results, whole=whole)
        key = _key(project, validations)
        selection = project.results.recall(Selection, folder.selection, key)
        summary = project.results.recall(Summary, folder.validation_summary, key)
        if selection is not None and summary is not None:
            own = _own_folder(project, selection, key)
            return Selected(selection, summary, key, tuple(validations), tuple(results), own)
    return None


def _selections(project: Preparation) -> PlanFolder:
    """Return where what is selected lies: what is trained so far takes no place of what has ended."""
    folder = project.plan_folder
    return folder.so_far if project.run_plan().unfinished else folder


def _mend(project: Preparation, found: Selected, looked_at: Sequence[Validation]) -> None:
    """Predict again, for who looks at them, validation cases whose predictions were damaged after they were scored."""
    damaged = [item for item in looked_at if is_damaged(item.folder, item.key)]
    own = found.own
    if own is not None and not is_sealed(own, found.key):
        damaged = list(found.validations)
    if not damaged:
        return
    validate_all(project, damaged, unless=lambda: False)
    if own is not None and not is_sealed(own, found.key):
        with project.locks.held("select"):
            remove_damaged(own, found.key)
            write_predictions(project, found.validations, found.selection, own, found.key)
    _remove_probabilities(damaged)


def _remove_probabilities(validations: Sequence[Validation]) -> None:
    for item in validations:
        shutil.rmtree(item.folder / PROBABILITIES, ignore_errors=True)


def _key(project: Preparation, validations: Sequence[Validation]) -> Key:
    return STAGES["select"].key(
        project.options,
        validations={f"{item.training.name}/{item.training.fold}": item.key.hash for item in validations},
        labels=project.dataset.labels.content_hash(),
    )


def _select(project: Preparation, results: Sequence[TrainingResult]) -> Selected:
    validations = validations_of(project, results, whole=project.validates_all)
    validate_all(project, validations, unless=lambda: selected(project, results) is not None)
    with project.locks.held("select"):
        return selected(project, results) or _chosen(project, results, validations)


def _chosen(project: Preparation, results: Sequence[TrainingResult], validations: Sequence[Validation]) -> Selected:
    """Choose from validations that are done, and write it down."""
    key = _key(project, validations)
    summaries = summaries_of(validations)
    before = record_of(_selections(project).selection)
    if before is not None and before.key != key.model_copy(update={"made_of": before.made_of}).hash:
        project.progress.note("selected by an earlier version of segfit: selected anew")
    with project.stage_log.of("select") as use:
        candidates = candidates_of(project, summaries, validations)
        folds = {item.training.fold: item.cases for item in validations}
        groups = groups_of_cases(project.dataset.training)
        rule = project.options.selection_rule
        selection, summary = select(
            candidates,
            project.dataset.labels,
            folds,
            lambda winner: pairs_of(project, validations, winner.members),
            rule=rule,
            groups=groups,
            execution=project.execution,
        )
        margins = _margins(project, validations, selection, summary, groups)
        quality = quality_of(validations, selection, summary, groups)
        selection = selection.model_copy(update={"margins": margins, "quality": quality})
        write_predictions(project, validations, selection, _selections(project).validated(key.hash), key)
        summary = project.results.store(summary, _selections(project).validation_summary, key, use())
        selection = project.results.store(selection, _selections(project).selection, key, use())
    _remove_probabilities(validations)
    return Selected(selection, summary, key, tuple(validations), tuple(results), _own_folder(project, selection, key))


def _margins(
    project: Preparation,
    validations: Sequence[Validation],
    selection: Selection,
    summary: Summary,
    groups: Mapping[str, str],
) -> Margins:
    fingerprint = project.fingerprint()
    spacings = {case.case: case.spacing_mm[-2:] for case in fingerprint.cases}
    return margins_of(
        summary,
        selection.steps,
        pairs_of(project, validations, selection.winner),
        project.dataset.labels,
        groups,
        pictures=fingerprint.ndim == 2,
        spacing_of=spacings.__getitem__,
        execution=project.execution,
    )


def _own_folder(project: Preparation, selection: Selection, key: Key) -> Path | None:
    return _selections(project).validated(key.hash) if has_own_predictions(selection) else None
