"""From DICOM series with NIfTI labels to a prediction, and back to the NIfTI files the series were made from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from segfit.bundle.bundle import open_bundle
from segfit.cli.main import run
from segfit.images.formats import read_image, read_label, write_labels
from segfit.images.image import LabelMap
from segfit.inference.model import load_model
from segfit.project import Project
from series_builder import affine_of, clutter, write_series

Spacing = tuple[float, ...]


def as_series(source: Path, folder: Path) -> tuple[Spacing, Spacing]:
    """Write a RAS+ volume as an axial series, whose rows and columns run the other way; return spacing and origin."""
    image = read_image(source)
    assert image.grid.affine is not None
    size = np.array(image.grid.shape[::-1])
    corner = image.grid.affine @ np.array([size[0] - 1, size[1] - 1, 0, 1.0])
    origin = tuple(np.round(corner[:3] * [-1, -1, 1], 6).tolist())
    write_series(folder, turned(image.array[0]), image.grid.spacing_mm, origin)
    return image.grid.spacing_mm, origin


def turned(array: np.ndarray) -> np.ndarray:
    return array[:, ::-1, ::-1]


@pytest.fixture(scope="module")
def series(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The volumes as DICOM series, one of them a folder deeper, with NIfTI labels on their grids."""
    root = tmp_path_factory.mktemp("series") / "Dataset003_Series"
    for source in sorted(volumes.glob("images*/*.nii.gz")):
        case = root / source.parent.name / source.name.removesuffix(".nii.gz")
        folder = case / "1.2.840" if case.name == "phantom_tr_001_0000" else case
        spacing, origin = as_series(source, folder)
        clutter(case)
        label = volumes / source.parent.name.replace("images", "labels") / source.name.replace("_0000", "")
        on_series = read_image(folder).grid
        np.testing.assert_allclose(on_series.affine, affine_of(spacing, origin), atol=1e-5)
        write_labels(root / label.parent.name / label.name, LabelMap(turned(read_label(label).array[0]), on_series))
    declared = json.loads((volumes / "dataset.json").read_text())
    del declared["file_ending"]
    (root / "dataset.json").write_text(json.dumps(declared))
    return root


@pytest.fixture(scope="module")
def finished(series: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    settings = ["training.steps=6", "planning.base_features=4", "planning.batch_size=2", "planning.folds=0"]
    project = Project.create(tmp_path_factory.mktemp("project") / "p", series, settings=settings)
    project.run()
    return project


def test_a_run_on_series_predicts_on_their_grids(finished: Project) -> None:
    manifest = open_bundle(finished.folder.model).manifest
    assert (manifest.input_ending, manifest.file_ending) == ("/", ".nii.gz")
    assert "Made from DICOM series. " in (finished.folder.model / "card.md").read_text()
    assert len(finished.dataset.test) == 2
    for case in finished.dataset.test:
        predicted = read_label(finished.folder.predictions / f"{case.id}.nii.gz")
        assert read_image(case.images[0]).grid.mismatch(predicted.grid) == ""
    assert {case.case for case in finished.evaluate().cases} == {case.id for case in finished.dataset.test}


def test_series_and_files_are_measured_and_predicted_alike(
    finished: Project, series: Path, volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Voxel for voxel on the same physical grid, from both kinds of folders with the same command."""
    model = ["predict", "--model", str(finished.folder.model)]
    for name, source in (("series", series), ("files", volumes)):
        assert run([*model, "-i", str(source / "imagesTs"), "-o", str(tmp_path / name)]) == 0
        told = " ".join(capsys.readouterr().err.split())
        assert (".nii.gz files, the model was made from DICOM series" in told) == (name == "files")
    alone = str(series / "imagesTs" / "phantom_ts_001_0000")
    assert run([*model, "-i", alone, "-o", str(tmp_path / "alone")]) == 0
    names = ["phantom_ts_000.nii.gz", "phantom_ts_001.nii.gz"]
    assert sorted(path.name for path in (tmp_path / "series").iterdir()) == names
    assert [path.name for path in (tmp_path / "alone").iterdir()] == names[1:]
    loaded = load_model(finished.folder.model, device="cpu")
    for name in names:
        case = name.replace(".nii.gz", "_0000")
        of_series, of_file = (read_label(tmp_path / kind / name) for kind in ("series", "files"))
        assert np.array_equal(turned(of_series.array[0]), of_file.array[0])
        assert of_series.grid.affine is not None
        assert of_file.grid.affine is not None
        last = [*np.array(of_series.grid.shape[::-1])[:2] - 1, 0, 1]
        np.testing.assert_allclose(of_series.grid.affine @ last, of_file.grid.affine @ [0, 0, 0, 1], atol=1e-4)
        scores = [
            loaded.predict(path, probabilities=True).probabilities
            for path in (series / "imagesTs" / case, volumes / "imagesTs" / f"{case}.nii.gz")
        ]
        assert scores[0] is not None
        assert scores[1] is not None
        assert scores[1].std() > 1e-3  # so little training may leave the labels empty; the probabilities say more
        np.testing.assert_allclose(scores[0][..., ::-1, ::-1], scores[1], atol=1e-5)
    last_one, alone_one = (read_label(tmp_path / kind / names[1]).array for kind in ("series", "alone"))
    assert np.array_equal(last_one, alone_one)


def test_a_model_of_files_predicts_a_folder_of_series(finished: Project, series: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.folder.model, tmp_path / "model"))
    text = (folder / "model.json").read_text()
    assert '"image_ending": "/"' in text
    text = re.sub('"seal": "[^"]*"', '"seal": ""', text)
    (folder / "model.json").write_text(text.replace('"image_ending": "/"', '"image_ending": ".nii.gz"'))
    assert run(["predict", "--model", str(folder), "-i", str(series / "imagesTs"), "-o", str(tmp_path / "out")]) == 0
    for case in finished.dataset.test:
        expected = read_label(finished.folder.predictions / f"{case.id}.nii.gz").array
        assert np.array_equal(read_label(tmp_path / "out" / f"{case.id}.nii.gz").array, expected)


def test_what_is_said_of_series(finished: Project, series: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(series)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("nnU-Net v2 folder: 5 training cases, 2 test cases\n1 channel: MRI (DICOM series); labels (")
    assert run(["info", str(series), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["image_ending"], facts["file_ending"]) == ("/", ".nii.gz")
    assert run(["info", str(finished.folder.model)]) == 0
    assert re.search(r"made from +DICOM series", capsys.readouterr().out)
    assert "model.predict('image/')" in finished.folder.report.read_text().replace("&#39;", "'")


@pytest.mark.parametrize("deeper", ["", "1.2.840"])
def test_a_slice_that_changes_in_its_place_is_seen(series: Path, tmp_path: Path, deeper: str, tiny: list[str]) -> None:
    root = Path(shutil.copytree(series, tmp_path / "data"))
    project = Project.create(tmp_path / "p", root, settings=tiny)
    before = project.fingerprint()
    case = "phantom_tr_001" if deeper else "phantom_tr_000"
    part = root / "imagesTr" / f"{case}_0000" / deeper / "slice999"
    content = bytearray(part.read_bytes())
    content[-2:] = b"\x11\x01"
    part.write_bytes(content)
    after = Project.open(tmp_path / "p").fingerprint()
    changed = [old.case for old, new in zip(before.cases, after.cases, strict=True) if old.content != new.content]
    assert changed == [case]
