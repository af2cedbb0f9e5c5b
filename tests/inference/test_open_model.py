"""Models of nnU-Net by every door: folders, the folder of a dataset, the exported zip, several together."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pytest

from segfit.bundle.bundle import open_bundle
from segfit.cli.main import run
from segfit.dataset.layouts import cases_from_files
from segfit.errors import InputError
from segfit.execution.execution import Execution
from segfit.inference.model import load_model
from segfit.inference.open_model import is_model, open_model
from segfit.inference.predict_folder import predict_folder

if TYPE_CHECKING:
    from conftest import Elsewhere

pytestmark = pytest.mark.golden("inference/models/Dataset601_TinyBlobs")

NAMES = ["nnUNetTrainer__nnUNetPlans__2d", "nnUNetTrainer__nnUNetPlans__3d_fullres"]
PAIR = f"ensemble___{'___'.join(NAMES)}___0_1"
KEEP = "remove_all_but_largest_component_from_segmentation"


@pytest.fixture
def results(golden: Path, tmp_path: Path) -> Path:
    """Two models as nnU-Net leaves them, nothing said of which is best."""
    folder = tmp_path / "Dataset601_TinyBlobs"
    for name in NAMES:
        shutil.copytree(golden / "inference/models/Dataset601_TinyBlobs" / name, folder / name)
    return folder


@pytest.fixture
def image(golden: Path) -> Path:
    return sorted((golden / "inference/raw/Dataset601_TinyBlobs/imagesTs").glob("*_0000.nii.gz"))[0]


def choose(results: Path, *names: str, folds: tuple[int, ...] = (0, 1)) -> None:
    """Write what nnU-Net's comparison writes, and what it found to be useful for the predictions."""
    chosen = [
        dict(zip(("trainer", "plans_identifier", "configuration"), name.split("__"), strict=True)) for name in names
    ]
    place = results / "ensembles" / PAIR if len(names) > 1 else results / names[0] / "crossval_results_folds_0_1"
    place.mkdir(parents=True, exist_ok=True)
    steps = {"postprocessing_fns": [KEEP], "postprocessing_kwargs": [{"labels_or_regions": 1}]}
    (place / "postprocessing.json").write_text(json.dumps(steps))
    best = {"selected_model_or_models": chosen, "postprocessing_file": f"/elsewhere/{place.name}/postprocessing.pkl"}
    (results / "inference_information.json").write_text(
        json.dumps({"folds": list(folds), "best_model_or_ensemble": best})
    )


def zipped(results: Path) -> Path:
    path = results.with_name("model.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(results.rglob("*")):
            archive.write(file, file.relative_to(results.parent))
    return path


def test_what_was_found_to_be_best_is_taken(results: Path, image: Path) -> None:
    choose(results, NAMES[1], folds=(0,))
    bundle = open_model(results)
    assert [member.configuration.name for member in bundle.manifest.members] == ["3d_fullres"]
    assert list(bundle.manifest.members[0].weights) == ["0"]
    assert list(open_model(results, [1]).manifest.members[0].weights) == ["1"]
    choose(results, NAMES[1])
    alone = open_model(results).manifest
    assert alone == open_model(results / NAMES[1]).manifest
    assert [step.values for step in alone.postprocessing] == [(1,)]


def test_a_pair_and_its_zip_average_probabilities(results: Path, image: Path, tmp_path: Path) -> None:
    parts = [load_model(results / name, "cpu").predict(image, probabilities=True).probabilities for name in NAMES]
    assert parts[0] is not None
    assert parts[1] is not None
    choose(results, *NAMES)
    for place in (results, zipped(results), [results / name for name in NAMES]):
        model = load_model(place, "cpu")
        found = model.predict(image, probabilities=True)
        assert found.probabilities is not None
        np.testing.assert_allclose(found.probabilities, (parts[0] + parts[1]) / 2, atol=1e-6)
        assert len(model.manifest.postprocessing) == (0 if isinstance(place, list) else 1)
    assert len(list(tmp_path.iterdir())) == 2  # the folder and the zip: nothing is left of what was unpacked


def test_commands_take_them(results: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choose(results, *NAMES)
    outputs = {}
    for name, models in {
        "folder": [results],
        "zip": [zipped(results)],
        "two": [results / NAMES[0], results / NAMES[1]],
        "one": [results / NAMES[1]],
    }.items():
        given = [part for model in models for part in ("--model", str(model))]
        assert run(["predict", *given, str(image), "-o", str(tmp_path / name)]) == 0
        outputs[name] = np.asarray(nib.load(next((tmp_path / name).iterdir())).dataobj)
    assert np.array_equal(outputs["folder"], outputs["zip"])
    assert not np.array_equal(outputs["two"], outputs["one"])  # a repeated option is not the last one
    for place in (results, zipped(results), results / NAMES[0]):
        assert is_model(place)
        capsys.readouterr()
        assert run(["info", str(place), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kind"] == "model"
    model = tmp_path / "model"
    assert run(["import", str(results), "-o", str(model)]) == 0
    assert open_bundle(model).manifest.members == open_model(results).manifest.members
    assert run(["predict", "--model", str(model), str(image), "-o", str(tmp_path / "imported")]) == 0
    found = np.asarray(nib.load(next((tmp_path / "imported").iterdir())).dataobj)
    assert np.array_equal(found, outputs["folder"])
    assert run(["import", str(model), "-o", str(tmp_path / "again")]) == 2


def test_checkpoints(results: Path, image: Path, tmp_path: Path) -> None:
    model = results / NAMES[0]
    for file in model.glob("fold_*/checkpoint_final.pth"):
        file.rename(file.with_name("checkpoint_best.pth"))
    with pytest.raises(InputError, match="checkpoint_final") as caught:
        open_model(model)
    assert "--checkpoint best" in caught.value.action
    best = open_model(model, checkpoint="best")
    assert best.manifest == open_model(model, checkpoint="checkpoint_best.pth").manifest
    command = ["predict", "--model", str(model), str(image), "-o", str(tmp_path / "out")]
    assert run(command) == 2
    assert run([*command, "--checkpoint", "best"]) == 0
    with pytest.raises(InputError, match="checkpoint_latest"):
        open_model(model, checkpoint="latest")
    assert run(["import", str(model), "-o", str(tmp_path / "model"), "--checkpoint", "best"]) == 0
    with pytest.raises(InputError, match="only models of nnU-Net have a checkpoint"):
        open_model(tmp_path / "model", checkpoint="best")


def test_workers_elsewhere_load_them_as_they_were_asked_for(
    results: Path, image: Path, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in results.glob("*/fold_*/checkpoint_final.pth"):
        file.rename(file.with_name("checkpoint_best.pth"))
    monkeypatch.chdir(results.parent)
    model = load_model(
        [f"{results.name}/{name}" for name in NAMES], "cpu", [1], checkpoint="best", mirror=False, tile_step=0.7,
        precision="fp32", deterministic=True,
    )  # fmt: skip
    assert model.source is not None
    assert model.source.paths == tuple(results / name for name in NAMES)
    assert model.source.load().source == model.source
    cases, files = cases_from_files([image], len(model.channel_names)), []
    for execution in (Execution(), Execution(engine=elsewhere)):
        folder = Path(f"labels{len(files)}")
        (path,) = predict_folder(model, cases, folder, save_probabilities=True, execution=execution)
        assert path.parent == folder
        files.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert len(files[0]) == 2
    assert files[0] == files[1]
    assert [(one.device, one.num_bytes > 1) for one in elsewhere.functions] == [("cpu", True)]


def test_what_cannot_be_told_or_averaged_is_refused(results: Path, golden: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds 2 models"):
        open_model(results)
    other = golden / "inference/models/Dataset602_TinyRegions/nnUNetTrainer__nnUNetPlans__3d_fullres"
    with pytest.raises(InputError, match="cannot be averaged"):
        open_model([results / NAMES[0], other])
    with pytest.raises(InputError, match="no model is given"):
        open_model([])
    with pytest.raises(InputError, match="is not a model"):
        open_model(tmp_path)
    choose(results, *NAMES)
    shutil.rmtree(results / NAMES[0])
    with pytest.raises(InputError, match=f"lacks {NAMES[0]}"):
        open_model(results)
    (results / "inference_information.json").write_text("[]")
    with pytest.raises(InputError, match="inference_information"):
        open_model(results)
    (results / "inference_information.json").unlink()
    assert open_model(results).manifest == open_model(results / NAMES[1]).manifest  # the only one


def test_zips_that_are_none(results: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    for content in (b"", b"PK\x05\x06" + bytes(18), b"garbage"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.zip"):
            open_model(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../outside/plans.json", "{}")
        archive.writestr("/tmp/segfit-outside.json", "{}")
    with pytest.raises(InputError, match="0 datasets"):
        open_model(path)
    assert not (tmp_path.parent / "outside").exists()
    assert not Path("/tmp/segfit-outside.json").exists()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("Dataset001_A/nnUNetTrainer__nnUNetPlans__2d/plans.json", bytes(2**26))
    with pytest.raises(InputError, match="far larger"):
        open_model(path)
    whole = zipped(results).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.zip"):
        open_model(path)
    with zipfile.ZipFile(zipped(results)) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.compress_size)
    start = largest.header_offset + 30 + len(largest.filename)
    path.write_bytes(whole[:start] + b"\xff" * 64 + whole[start + 64 :])  # no block of Deflate begins so
    with pytest.raises(InputError, match=r"a\.zip"):
        open_model(path)
