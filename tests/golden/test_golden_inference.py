"""Models trained by the reference, run by segfit: preprocessed input, logits, label maps, probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from segfit.images.formats import read_label
from segfit.inference.model import load_model

pytestmark = pytest.mark.golden

B, R, C = "Dataset601_TinyBlobs", "Dataset602_TinyRegions", "Dataset603_TinyCascade"
MODELS = (
    f"{B}/nnUNetTrainer__nnUNetPlans__2d",
    f"{B}/nnUNetTrainer__nnUNetPlans__3d_fullres",
    f"{B}/nnUNetTrainer__nnUNetResEncUNetMPlans__3d_fullres",
    f"{R}/nnUNetTrainer__nnUNetPlans__3d_fullres",
    f"{C}/nnUNetTrainer__nnUNetPlans__3d_lowres",
    f"{C}/nnUNetTrainer__nnUNetPlans__3d_cascade_fullres",
)
LOWRES = f"{C}/nnUNetTrainer__nnUNetPlans__3d_lowres/f01_mirror"


def entries(golden: Path, model: str) -> Iterator[dict[str, Any]]:
    for entry in json.loads((golden / "inference" / "index.json").read_text()):
        if entry["model"] == model:
            yield entry


def channels(golden: Path, model: str, case: str) -> list[Path]:
    return sorted((golden / "inference" / "raw" / model.partition("/")[0] / "imagesTs").glob(f"{case}_*.nii.gz"))


def previous_stage(golden: Path, model: str, case: str) -> Path | None:
    if "cascade" not in model:
        return None
    return golden / "inference" / "predictions" / LOWRES / f"{case}.nii.gz"


@pytest.mark.parametrize("name", MODELS)
def test_stages(golden: Path, name: str) -> None:
    model = load_model(golden / "inference" / "models" / name, "cpu", [0], mirror=False)
    files = sorted((golden / "inference" / "stages" / name).glob("*.npz"))
    assert len(files) == 2
    for file in files:
        expected = np.load(file)
        prepared = model.prepare(
            channels(golden, name, file.stem), previous_stage=previous_stage(golden, name, file.stem)
        )
        array, _ = prepared.inputs[0]
        np.testing.assert_allclose(array, expected["preprocessed"], atol=1e-4)
        logits = model.predictors[0].logits(array).numpy()
        np.testing.assert_allclose(logits, expected["logits_full_precision"], atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_predictions(golden: Path, name: str, tmp_path: Path) -> None:
    found = list(entries(golden, name))
    assert len(found) >= 6
    for entry in found:
        model = load_model(
            golden / "inference" / "models" / name,
            "cpu",
            entry["folds"],
            mirror=entry["use_mirroring"],
            tile_step=entry["tile_step_size"],
        )
        model.predictors[0].gaussian = entry["use_gaussian"]
        case = entry["case"]
        source = channels(golden, name, case)
        prediction = model.predict(source, previous_stage=previous_stage(golden, name, case), probabilities=True)
        stem = golden / "inference" / "predictions" / name / entry["run"] / case
        labels = read_label(stem.with_suffix(".nii.gz"))
        assert (prediction.labels != labels.array[0]).sum() <= 5, entry
        assert labels.grid.mismatch(prediction.grid) == ""
        difference = np.abs(prediction.probabilities - np.load(stem.with_suffix(".npz"))["probabilities"])
        assert (difference.max(0) > 0.01).mean() <= 0.01, entry
        prediction.save(tmp_path / "out.nii.gz")
        ours, theirs = nibabel.load(tmp_path / "out.nii.gz"), nibabel.load(stem.with_suffix(".nii.gz"))
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)
        assert ours.get_data_dtype() == theirs.get_data_dtype()
