"""Models trained by the reference, run by segfit: preprocessed input, logits, label maps, probabilities."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from segfit.images.formats import read_label
from segfit.inference.model import load_model
from segfit.inference.onnx_export import export_onnx
from segfit.inference.open_model import open_model

pytestmark = pytest.mark.golden("inference")

LOWRES_RUN = "f01_mirror"  # what the cascades were given


def entries(golden: Path, model: str) -> Iterator[dict[str, Any]]:
    for entry in json.loads((golden / "inference" / "index.json").read_text()):
        if entry["model"] == model:
            yield entry


def channels(golden: Path, model: str, case: str) -> list[Path]:
    return sorted((golden / "inference" / "raw" / model.partition("/")[0] / "imagesTs").glob(f"{case}_*.nii.gz"))


def previous_stage(golden: Path, model: str, case: str) -> Path | None:
    if "cascade" not in model:
        return None
    lowres = model.replace("3d_cascade_fullres", "3d_lowres")
    return golden / "inference" / "predictions" / lowres / LOWRES_RUN / f"{case}.nii.gz"


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.golden_each("inference/stages/*/*/")
def test_stages(golden: Path, path: Path) -> None:
    name = name_of(path)
    model = load_model(golden / "inference" / "models" / name, "cpu", [0], mirror=False)
    files = sorted(path.glob("*.npz"))
    assert files
    for file in files:
        expected = np.load(file)
        prepared = model.prepare(
            channels(golden, name, file.stem), previous_stage=previous_stage(golden, name, file.stem)
        )
        array, _ = prepared.inputs[0]
        np.testing.assert_allclose(array, expected["preprocessed"], atol=1e-4)
        logits = model.predictors[0].logits(array).numpy()
        np.testing.assert_allclose(logits, expected["logits_full_precision"], atol=1e-3)


@pytest.mark.golden_each("inference/predictions/*/*/")
def test_predictions(golden: Path, path: Path, tmp_path: Path) -> None:
    name = name_of(path)
    found = list(entries(golden, name))
    assert found
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


@pytest.mark.golden_each("inference/predictions/*/*cascade*/")
def test_a_cascade_brings_its_first_stage_along(golden: Path, path: Path) -> None:
    """Both stages beside each other predict in one go what nnU-Net predicted in two."""
    name = name_of(path)
    model = load_model(golden / "inference" / "models" / name, "cpu")
    found = [entry for entry in entries(golden, name) if entry["run"] == LOWRES_RUN]
    assert found
    for entry in found:
        prediction = model.predict(channels(golden, name, entry["case"]))
        expected = read_label(golden / "inference" / "predictions" / name / LOWRES_RUN / f"{entry['case']}.nii.gz")
        assert (prediction.labels != expected.array[0]).sum() <= 10, entry


@pytest.mark.golden_each("inference/predictions/*/*/")
def test_what_is_exported_as_onnx_predicts_the_same(golden: Path, path: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime", exc_type=ImportError)
    name = name_of(path)
    folder = export_onnx(open_model(golden / "inference" / "models" / name), tmp_path / "exported")
    found = [entry for entry in entries(golden, name) if entry["run"] == LOWRES_RUN]
    assert found
    for entry in found:
        output = tmp_path / f"{entry['case']}.nii.gz"
        run_exported(folder, *map(str, channels(golden, name, entry["case"])), "-o", str(output))
        expected = nibabel.load(golden / "inference" / "predictions" / name / LOWRES_RUN / output.name)
        ours = nibabel.load(output)
        np.testing.assert_allclose(ours.affine, expected.affine, atol=1e-4)
        assert (np.asarray(ours.dataobj) != np.asarray(expected.dataobj)).mean() <= 1e-3, entry


def run_exported(folder: Path, *arguments: str) -> None:
    """Run predict.py where there is neither segfit nor torch."""
    code = """
import runpy, sys
class Missing:
    def find_spec(self, name, *_):
        if name in ("segfit", "torch"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    subprocess.run([sys.executable, "-c", code, str(folder / "predict.py"), *arguments], check=True, timeout=300)
