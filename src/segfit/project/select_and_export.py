"""From trained networks to the model that is handed over, and what it makes of the test images."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib import metadata
from pathlib import Path

from segfit.bundle.bundle import MANIFEST, Member, ModelManifest, open_bundle, weights_name, write_bundle
from segfit.dataset.layouts.table import rows_beside
from segfit.dataset.manifest import Case
from segfit.errors import InputError
from segfit.evaluation.cohorts import column_of, groups_of, slices_behind, with_estimates
from segfit.evaluation.evaluate import evaluate
from segfit.evaluation.measurement import Margins
from segfit.evaluation.measures import Measures
from segfit.evaluation.pairs import Pair
from segfit.evaluation.summary import Summary
from segfit.files import hash_file, replace_folder
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.fingerprint.training_images import TrainingImages
from segfit.inference.model import load_model
from segfit.inference.predict_folder import predict_folder
from segfit.plugins import package_of, package_version
from segfit.project.folder import PlanFolder
from segfit.project.out_of_fold import candidates_of, has_own_predictions, pairs_of, quality_of, write_predictions
from segfit.project.preparation import Preparation
from segfit.project.sharing import Task
from segfit.project.stage_log import told_of_files
from segfit.project.stages import STAGES
from segfit.project.trainings import (
    Validation,
    held_weights,
    results_of,
    summaries_of,
    train_all,
    trainings_asked,
    trainings_of,
    validate_all,
    validations_of,
)
from segfit.project.validation import PROBABILITIES, SUMMARY
from segfit.records import Key, is_damaged, is_sealed, remove_damaged, seal
from segfit.selection.evidence import Evidence
from segfit.selection.margins import margins_of
from segfit.selection.select import Selection, select
from segfit.selection.verdict import judge
from segfit.training.result import WEIGHTS, TrainingResult

__all__ = [
    "Predictions",
    "Selected",
    "evaluate_test",
    "evidence_of",
    "metrics_of",
    "predict_test",
    "predictions_of",
    "select_model",
    "selected",
    "train_and_validate",
]


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


def select_model(project: Preparation, results: Sequence[TrainingResult] | None = None) -> Selected:
    """Train and validate what is missing, choose, and write ``selection.json``, ``validation.json`` and ``model/``.

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
    _hand_over(project, found)
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
        key = _selection_key(project, validations)
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


def _selection_key(project: Preparation, validations: Sequence[Validation]) -> Key:
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
    key = _selection_key(project, validations)
    summaries = summaries_of(validations)
    with project.stage_log.of("select") as use:
        candidates = candidates_of(project, summaries, validations)
        folds = {item.training.fold: item.cases for item in validations}
        groups = _groups(project, [name for names in folds.values() for name in names])
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


@dataclass(frozen=True, slots=True)
class Predictions:
    """The predictions of the test images by the model that was handed over, and where their metrics lie."""

    folder: Path
    key: Key
    cases: tuple[Case, ...]
    ending: str

    @property
    def names(self) -> list[str]:
        """Files in the folder."""
        return [f"{case.id}{self.ending}" for case in self.cases]


def predictions_of(project: Preparation, chosen: Selected) -> Predictions:
    """Return where the predictions of the test images are, or are to be."""
    cases = project.dataset.test
    key = STAGES["predict"].key(
        project.options,
        model=_model_key(project, chosen).hash,
        images={case.id: project.hashes.images(case) for case in cases},
    )
    return Predictions(project.plan_folder.predictions(key.hash), key, cases, project.dataset.file_ending)


def metrics_of(project: Preparation, predictions: Predictions) -> tuple[Path, Key]:
    """Return where the metrics of predictions lie, and what they count under."""
    references = {case.id: project.hashes.case(case) for case in predictions.cases if case.label_files}
    key = STAGES["evaluate"].key(project.options, predictions=predictions.key.hash, references=references)
    return predictions.folder / SUMMARY, key


def predict_test(project: Preparation) -> list[Path]:
    """Predict the test images into ``predictions/``."""
    top = project.folder.predictions
    return [top / name for name in _predicted(project).names]


def _predicted(project: Preparation) -> Predictions:
    """Predict the test images, and have a copy at the top of the project."""
    chosen = select_model(project)
    item, top = predictions_of(project, chosen), project.folder.predictions
    if not item.cases:
        shutil.rmtree(top, ignore_errors=True)  # of images that are gone
        return item

    def do() -> None:
        remove_damaged(item.folder, item.key)
        with project.stage_log.of("predict") as use:
            execution, device = project.execution, project.options.device
            if execution.is_here:  # one reads ahead: each holds a case beside the networks
                execution = replace(execution, workers=1)
            with project.locks.held("model"):  # other commands may have another one handed over
                _hand_over(project, chosen)
                repeated, here = bool(project.options.training.deterministic), device if execution.is_here else "cpu"
                model = load_model(project.folder.model, here, deterministic=repeated)
            predict_folder(model, item.cases, item.folder, ending=item.ending, device=device, execution=execution)
            seal(item.folder, item.key, item.names, use())

    project.locks.share([Task("predict", lambda: is_sealed(item.folder, item.key), do)])
    with project.locks.held("predictions"), told_of_files("results"):
        if not is_sealed(top, item.key):
            replace_folder(item.folder, top)
    return item


def evaluate_test(project: Preparation) -> Summary | None:
    """Score the predictions of the test images that have labels; None if there are none."""
    item, top = _predicted(project), project.folder.predictions / SUMMARY
    cases = [case for case in item.cases if case.label_files]
    if not cases:
        top.unlink(missing_ok=True)
        return None
    path, key = metrics_of(project, item)

    def make() -> Summary:
        return evaluate(
            _test_pairs(project, item), project.dataset.labels, measures=Measures(), execution=project.execution
        )

    found = project.documents.get(Summary, path, key, make)
    project.documents.publish(path, top)
    return found


def measure_test(project: Preparation, measures: Measures, by: str) -> Summary:
    """Measure more of the same predictions, with intervals of means over groups; nothing of it is kept."""
    item = _predicted(project)
    pairs = _test_pairs(project, item)
    rows = rows_beside(project.dataset.root)
    values = column_of(rows, by) if by else None
    groups = groups_of([pair.case for pair in pairs], rows)
    found = evaluate(pairs, project.dataset.labels, measures=measures, execution=project.execution)
    return with_estimates(found, groups, by, values)


def _test_pairs(project: Preparation, item: Predictions) -> list[Pair]:
    """Return the predictions of the test images that have labels, with these."""
    cases = [case for case in item.cases if case.label_files]
    return [Pair.of_case(case, item.folder / f"{case.id}{item.ending}", project.dataset.labels) for case in cases]


def _model_key(project: Preparation, chosen: Selected) -> Key:
    return STAGES["model"].key(
        project.options,
        selection=chosen.key.hash,
        weights=[result.weights for result in chosen.results],
        plan=project.size().content_hash(),
    )


def _hand_over(project: Preparation, chosen: Selected) -> None:
    """See that ``model/`` is the selected one."""
    key = _model_key(project, chosen)
    with project.locks.held("model"), told_of_files("results"):
        if not _is_handed_over(project, key):
            _write_model(project, chosen, key)


def _is_handed_over(project: Preparation, key: Key) -> bool:
    """Whether ``model/`` has this key, every byte of it as it was written."""
    folder, read = project.folder.model, project.results.read
    manifest = read(folder / MANIFEST, _manifest)
    if manifest is None or manifest.provenance.get("key") != key.hash:
        return False
    return all(read(folder / name, hash_file) == manifest.checksums.get(name) for name in manifest.files)


def _manifest(path: Path) -> ModelManifest | None:
    try:
        return open_bundle(path.parent, verify=False).manifest
    except InputError:
        return None


def _manifest_member(project: Preparation, name: str) -> Member:
    plan, inference = project.plan(), project.options.inference
    recipe = plan.training[name]
    return Member(
        configuration=plan.configurations[name],
        weights={str(fold): weights_name(name, fold) for fold in project.run_plan().folds},
        mirror_axes=() if inference.mirror is False else recipe.augmentation.mirror_axes,
        tile_step=inference.tile_step,
        precision=recipe.precision,
        channels_last=recipe.channels_last,
        exchange=recipe.augmentation.exchange,
    )


def evidence_of(
    project: Preparation, chosen: Selected, fingerprint: Fingerprint, test: Summary | None = None
) -> Evidence:
    """Return what a verdict on the selected model is made from."""
    rows = rows_beside(project.dataset.root)
    groups = _groups(project, [case.case for case in chosen.summary.cases])
    return Evidence(
        validation=chosen.summary,
        selection=chosen.selection,
        trainings=chosen.results,
        plan=project.plan(),
        fingerprint=fingerprint,
        num_folds=len(project.splits().folds),
        test=test,
        behind=slices_behind(chosen.summary, groups, rows),
    )


def _groups(project: Preparation, cases: Sequence[str]) -> dict[str, str]:
    """Return the group of each training case by the dataset, else as the names say it."""
    return groups_of(cases, {case.id: {"group": case.group or ""} for case in project.dataset.training})


def _write_model(project: Preparation, chosen: Selected, key: Key) -> None:
    run, plan, selection, results = project.run_plan(), project.plan(), chosen.selection, chosen.results
    before = {plan.configurations[name].previous_stage for name in selection.winner} - {None}
    weights = {
        weights_name(item.name, item.fold): item.folder / WEIGHTS
        for item in trainings_of(project)
        if item.name in (*selection.winner, *before)
    }
    dice = {name: one.dice for name, one in chosen.summary.mean.items()}
    dataset, fingerprint = project.dataset, project.fingerprint()
    members = tuple(_manifest_member(project, name) for name in selection.winner)
    previous = next((_manifest_member(project, name) for name in before if name), None)
    stages = members if previous is None else (*members, previous)
    plugins = [plugin for item in stages if (plugin := item.configuration.network.plugin) is not None]
    manifest = ModelManifest(
        name=dataset.name,
        labels=dataset.labels,
        channel_names=dataset.channel_names,
        file_ending=dataset.file_ending,
        image_ending=dataset.image_ending,
        spacing_mm=fingerprint.typical_spacing,
        training_images=TrainingImages.of(fingerprint.cases, fingerprint.orientation, fingerprint.channel_names),
        members=members,
        previous_stage=previous,
        postprocessing=selection.steps,
        margins=selection.margins,
        quality=selection.quality,
        dice=dice,
        verdict=judge(evidence_of(project, chosen, fingerprint)).facts(),
        selection={
            "winner": " + ".join(selection.winner),
            "reason": selection.reason,
            "folds": list(selection.folds),
            "mean_dice": selection.dice_after_steps,
        },
        training={
            "cases": len(dataset.training),
            "preset": plan.preset,
            "stock": plan.stock,
            "steps": [result.steps for result in results],
            "seconds_per_training": run.seconds_per_training,
        },
        provenance={
            "segfit": metadata.version("segfit"),
            "made": date.today().isoformat(),
            "plan": plan.content_hash(),
            "data": plan.fingerprint_hash,
            "key": key.hash,
        },
        requires={package_of(plugin): package_version(package_of(plugin)) for plugin in plugins},
    )
    with held_weights(project, trainings_of(project), [result.weights for result in results]):
        write_bundle(project.folder.model, manifest, weights)
