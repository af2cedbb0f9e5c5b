"""``model/``: the selected networks with what predicting with them takes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

from segfit.bundle.bundle import MANIFEST, Member, ModelManifest, open_bundle, weights_name, write_bundle
from segfit.dataset.layouts.table import rows_beside
from segfit.errors import InputError
from segfit.evaluation.cohorts import groups_of_cases, slices_behind
from segfit.evaluation.summary import Summary
from segfit.files import hash_file
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.fingerprint.training_images import TrainingImages
from segfit.inference.carried_case import add_test_case
from segfit.plugins import package_of, package_version
from segfit.project.preparation import Preparation
from segfit.project.selecting import Selected, select_best
from segfit.project.stage_log import told_of_files
from segfit.project.stages import STAGES
from segfit.project.train_and_validate import held_weights
from segfit.project.trainings import trainings_of
from segfit.records import Key
from segfit.selection.evidence import Evidence
from segfit.selection.verdict import judge
from segfit.training.result import WEIGHTS, TrainingResult

__all__ = ["evidence_of", "hand_over", "model_key", "select_model"]


def select_model(project: Preparation, results: Sequence[TrainingResult] | None = None) -> Selected:
    """Select as `select_best`, and write ``model/``."""
    found = select_best(project, results)
    hand_over(project, found)
    return found


def model_key(project: Preparation, chosen: Selected) -> Key:
    """Return what the model that is made of a selection counts under."""
    return STAGES["model"].key(
        project.options,
        selection=chosen.key.hash,
        weights=[result.weights for result in chosen.results],
        plan=project.size().content_hash(),
    )


def hand_over(project: Preparation, chosen: Selected) -> None:
    """See that ``model/`` is the selected one."""
    key = model_key(project, chosen)
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
    return Evidence(
        validation=chosen.summary,
        selection=chosen.selection,
        trainings=chosen.results,
        plan=project.plan(),
        fingerprint=fingerprint,
        num_folds=len(project.splits().folds),
        test=test,
        behind=slices_behind(chosen.summary, groups_of_cases(project.dataset.training), rows),
    )


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
        **project.options.model.model_dump(exclude_none=True),
    )
    with held_weights(project, trainings_of(project), [result.weights for result in results]):
        written = write_bundle(project.folder.model, manifest, weights)
    add_test_case(project.folder.model, written, project.options.device, progress=project.execution.progress)
