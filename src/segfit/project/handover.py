"""From trained networks to the model that is handed over, and what it makes of the test images."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import date
from functools import partial
from importlib import metadata
from itertools import combinations
from pathlib import Path

from segfit.bundle.bundle import Member, ModelManifest, weights_name, write_bundle
from segfit.evaluation.summary import Pair, Summary, summarize
from segfit.files import content_hash
from segfit.inference.model import load_model
from segfit.inference.predict_folder import predict_folder
from segfit.project.preparation import Preparation
from segfit.project.trainings import train_all, validate_all
from segfit.project.validation import probabilities_path, validation_pairs
from segfit.selection.ensemble import Member as EnsembleMember
from segfit.selection.ensemble import StoredProbabilities, evaluate_ensembles, merged_pairs
from segfit.selection.evidence import Evidence
from segfit.selection.select import Candidate, Selection, select
from segfit.selection.verdict import judge
from segfit.training.result import WEIGHTS, TrainingResult

__all__ = ["predict_test", "select_model"]


def select_model(project: Preparation) -> Selection:
    """Validate, choose, and write ``selection.json``, ``validation.json`` and ``model/``.

    What was selected from all validation cases stays, also where a part of them would do.
    """
    results = train_all(project)
    basis = content_hash([result.identity for result in results])
    folder, whole = project.folder, f"{basis}/all"
    if project.validates_all and project.run_plan().validation_cases is not None:
        basis = whole
    done = folder.selection.exists() and (folder.model / "model.json").exists()
    if done and project.marks.get("selection") in (basis, whole):
        return Selection.load(folder.selection)
    summaries = validate_all(project, results)
    with project.stage("select"):
        candidates = _candidates(project, summaries)
        selection = select(
            candidates,
            project.dataset.labels,
            {fold: project.validated(fold) for fold in project.run_plan().folds},
            partial(_pairs, project),
            workers=project.options.workers,
            progress=project.progress,
        )
        winner = next(item for item in candidates if item.members == selection.winner)
        winner.summary.save(folder.validation_summary)
        selection.save(folder.selection)
        _write_model(project, selection, winner.summary, results)
        project.marks.set("selection", basis)
        for name in summaries:
            for fold in summaries[name]:
                shutil.rmtree(folder.validation(name, fold) / "probabilities", ignore_errors=True)
    return selection


def predict_test(project: Preparation) -> list[Path]:
    """Predict the test images into ``predictions/``."""
    select_model(project)
    cases = project.dataset.test
    if not cases:
        return []
    folder = project.folder
    basis = content_hash([(folder.model / "model.json").read_text(), [case.spacing_mm for case in cases]])
    if not project.marks.holds("predictions", basis):
        shutil.rmtree(folder.predictions, ignore_errors=True)
        project.marks.set("predictions", basis)
    ending = project.dataset.file_ending
    paths = [folder.predictions / f"{case.id}{ending}" for case in cases]
    if all(path.exists() for path in paths):
        return paths
    with project.stage("predict"):
        model = load_model(folder.model, project.options.device)
        return predict_folder(model, cases, folder.predictions, ending=ending, progress=project.progress)


def _candidates(project: Preparation, summaries: Mapping[str, Mapping[int, Summary]]) -> list[Candidate]:
    """Return every configuration and every pair of them with cross-validated scores."""
    targets = project.dataset.labels.classes
    singles = [
        Candidate((name,), summarize([case for summary in folds.values() for case in summary.cases], targets))
        for name, folds in summaries.items()
    ]
    if len(singles) < 2:
        return singles
    scored = evaluate_ensembles(
        [_member(project, name) for name in summaries],
        _pairs(project, singles[0]),
        project.dataset.labels,
        workers=project.options.workers,
        progress=project.progress,
    )
    return [*singles, *(Candidate(names, scored[names]) for names in combinations(summaries, 2))]


def _member(project: Preparation, name: str) -> EnsembleMember:
    """Return a configuration with its validation probabilities, read slab by slab."""
    run = project.run_plan()
    found = {
        case: StoredProbabilities(probabilities_path(project.folder.validation(name, fold), case))
        for fold in run.folds
        for case in project.validated(fold)
    }
    return EnsembleMember(name, found)


def _pairs(project: Preparation, candidate: Candidate) -> list[Pair]:
    """Return the validation predictions of a candidate with their references."""
    run = project.run_plan()
    first = [
        pair
        for fold in run.folds
        for pair in validation_pairs(
            project.dataset, project.folder.validation(candidate.members[0], fold), project.validated(fold)
        )
    ]
    if len(candidate.members) == 1:
        return first
    members = [_member(project, name) for name in candidate.members]
    return merged_pairs(members, first, project.dataset.labels)


def _write_model(
    project: Preparation, selection: Selection, validation: Summary, results: list[TrainingResult]
) -> None:
    plan, run, inference = project.plan(), project.run_plan(), project.options.inference
    verdict = judge(
        Evidence(
            validation=validation,
            selection=selection,
            trainings=results,
            plan=plan,
            fingerprint=project.fingerprint(),
            num_folds=len(project.splits().folds),
        )
    )
    members: list[Member] = []
    weights: dict[str, Path] = {}
    for name in selection.winner:
        recipe = plan.training[name]
        files = {str(fold): weights_name(name, fold) for fold in run.folds}
        weights |= {files[str(fold)]: project.folder.training(name, fold) / WEIGHTS for fold in run.folds}
        members.append(
            Member(
                configuration=plan.configurations[name],
                weights=files,
                mirror_axes=() if inference.mirror is False else recipe.augmentation.mirror_axes,
                tile_step=inference.tile_step,
                precision=recipe.precision,
                channels_last=recipe.channels_last,
                exchange=recipe.augmentation.exchange,
            )
        )
    chosen = next(item for item in selection.candidates if item.members == selection.winner)
    dataset = project.dataset
    manifest = ModelManifest(
        name=dataset.name,
        labels=dataset.labels,
        channel_names=dataset.channel_names,
        file_ending=dataset.file_ending,
        image_ending=dataset.image_ending,
        spacing_mm=project.typical_spacing(),
        members=tuple(members),
        postprocessing=selection.steps,
        dice=chosen.per_target,
        verdict=verdict.facts(),
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
        },
    )
    write_bundle(project.folder.model, manifest, weights)
