"""Ensembles and the choice of the best configuration against the reference's files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from segfit.evaluation.evaluate import evaluate
from segfit.evaluation.pairs import Pair
from segfit.evaluation.summary import Summary
from segfit.images.formats import read_label
from segfit.labels import LabelScheme
from segfit.selection.ensemble import (
    EnsembleMember,
    average_probabilities,
    evaluate_ensembles,
    merge_labels,
    merged_pairs,
)
from segfit.selection.select import Candidate, select

pytestmark = pytest.mark.golden("inference/find_best_configuration")

FOLDS = (0, 1)
SINGLE = ("2d", "3d_fullres")


@pytest.mark.golden("evaluation/ensembling")
@pytest.mark.golden_each("evaluation/ensembling/*/")
def test_merged_probabilities_and_labels(path: Path) -> None:
    members = sorted(member for member in path.iterdir() if member.is_dir() and member.name != "merged")
    dataset = json.loads((members[0] / "dataset.json").read_text())
    scheme = LabelScheme.from_declaration(dataset["labels"], dataset.get("regions_class_order"))
    files = sorted((path / "merged").glob("*.npz"))
    assert files
    for merged in files:
        arrays = [np.load(member / merged.name)["probabilities"] for member in members]
        mean = average_probabilities(arrays)
        np.testing.assert_allclose(mean, np.load(merged)["probabilities"], rtol=0, atol=1e-6)
        labels = read_label(merged.with_suffix(".nii.gz")).array[0]
        np.testing.assert_array_equal(merge_labels(arrays, scheme), labels)


@pytest.fixture(scope="module")
def scheme(golden: Path, folder: Path) -> LabelScheme:
    name = json.loads((folder / "inference_information.json").read_text())["dataset_name_or_id"]
    dataset = json.loads((golden / "inference" / "raw" / name / "dataset.json").read_text())
    return LabelScheme.from_declaration(dataset["labels"], dataset.get("regions_class_order"))


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "inference" / "find_best_configuration"


def fold_files(folder: Path, name: str, ending: str) -> dict[str, Path]:
    """Validation files of both folds by case id."""
    files = [file for fold in FOLDS for file in (folder / name / f"fold_{fold}" / "validation").glob(f"*{ending}")]
    return {file.name.removesuffix(ending): file for file in sorted(files, key=lambda file: file.name)}


def references(folder: Path) -> dict[str, Path]:
    files = sorted((folder / "gt_segmentations").glob("*.nii.gz"))
    return {file.name.removesuffix(".nii.gz"): file for file in files}


def pairs_of(folder: Path, predictions: dict[str, Path]) -> list[Pair]:
    expected = references(folder)
    assert set(predictions) == set(expected)
    return [Pair.of_files(case, predictions[case], expected[case]) for case in sorted(expected)]


def all_results(folder: Path) -> dict[str, float]:
    """Dice of the reference by configuration, the ensemble under "ensemble"."""
    results = json.loads((folder / "inference_information.json").read_text())["all_results"]
    return {"ensemble" if key.startswith("ensemble") else key.split("__")[-1]: dice for key, dice in results.items()}


def ensemble_of_files(folder: Path) -> dict[str, Path]:
    return {file.name.removesuffix(".nii.gz"): file for file in (folder / "ensemble").glob("*.nii.gz")}


def test_the_best_configuration_and_its_postprocessing(folder: Path, scheme: LabelScheme) -> None:
    singles = {name: pairs_of(folder, fold_files(folder, name, ".nii.gz")) for name in SINGLE}
    pairs = {(name,): found for name, found in singles.items()} | {SINGLE: pairs_of(folder, ensemble_of_files(folder))}
    candidates = [Candidate(members, evaluate(found, scheme)) for members, found in pairs.items()]
    splits = json.loads((folder / "splits_final.json").read_text())
    folds = {fold: splits[fold]["val"] for fold in FOLDS}
    selection, _ = select(candidates, scheme, folds, lambda winner: pairs[winner.members])

    for scores, key in zip(selection.candidates, ("2d", "3d_fullres", "ensemble"), strict=True):
        assert scores.mean_dice == pytest.approx(all_results(folder)[key], abs=1e-6)
    for scores in selection.candidates[:2]:
        for fold in FOLDS:
            summary = json.loads(
                (folder / scores.members[0] / f"fold_{fold}" / "validation" / "summary.json").read_text()
            )
            assert scores.per_fold[fold] == pytest.approx(summary["foreground_mean"]["Dice"], abs=1e-6)
    best = json.loads((folder / "inference_information.json").read_text())["best_model_or_ensemble"]
    assert selection.winner == tuple(model["configuration"] for model in best["selected_model_or_models"])
    assert selection.folds == FOLDS
    assert selection.reason.startswith(
        f"{' + '.join(selection.winner)} has the highest mean Dice in cross-validation: "
        f"{best['result_on_crossval_pre_pp']:.4f}, followed by "
    )
    theirs = json.loads((folder / "postprocessing_of_best.json").read_text())
    steps = [np.atleast_1d(item["labels_or_regions"]).tolist() for item in theirs["postprocessing_kwargs"]]
    assert [list(step.values) for step in selection.steps] == steps
    assert selection.dice_after_steps == pytest.approx(theirs["postprocessed"]["foreground_mean"]["Dice"], abs=1e-6)


def test_the_ensemble_from_stored_probabilities(folder: Path, scheme: LabelScheme) -> None:
    members = [
        EnsembleMember(
            name,
            {
                case: (lambda file=file: np.load(file)["probabilities"])
                for case, file in fold_files(folder, name, ".npz").items()
            },
        )
        for name in SINGLE
    ]
    expected = pairs_of(folder, ensemble_of_files(folder))
    # float16 probabilities: a handful of voxels may differ from the labels made in float32.
    for ours, theirs in zip(merged_pairs(members, expected, scheme), expected, strict=True):
        assert np.count_nonzero(ours.load_prediction() != theirs.load_prediction()) <= 5
    summary: Summary = evaluate_ensembles(members, expected, scheme)[SINGLE]
    assert summary.mean_dice == pytest.approx(all_results(folder)["ensemble"], abs=1e-3)
