"""Labels on another grid than their image, through all stages."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from segfit.dataset.phantom import make_phantom
from segfit.errors import DatasetError
from segfit.evaluation.summary import Summary
from segfit.preprocessing.store import CaseStore
from segfit.project import Project

STORED_ELSEWHERE = ("labelsTr/phantom_tr_001.nii.gz", "labelsTs/phantom_ts_000.nii.gz")


@pytest.fixture(scope="module")
def fitting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitting") / "Dataset001_Volumes"
    return make_phantom(folder, cases=3, test_cases=1, shape=(12, 24, 24))


@pytest.fixture(scope="module")
def apart(fitting: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same dataset; two labels have a reversed axis and twice as many slices along it."""
    root = Path(shutil.copytree(fitting, tmp_path_factory.mktemp("apart") / fitting.name))
    for name in STORED_ELSEWHERE:
        image = nibabel.load(root / name)
        to_stored = np.diag([1, 1, -0.5, 1.0])
        to_stored[2, 3] = image.shape[2] - 0.75
        stored = np.asarray(image.dataobj)[:, :, ::-1].repeat(2, axis=2)
        nibabel.save(nibabel.Nifti1Image(stored, image.affine @ to_stored), root / name)
    return root


def project(folder: Path, dataset: Path, tiny: list[str], *settings: str) -> Project:
    return Project.create(folder, dataset, settings=[*tiny, "planning.folds=0,1,2", *settings])


def test_a_run_on_resampled_labels_is_the_run_on_fitting_ones(
    tmp_path: Path, fitting: Path, apart: Path, tiny: list[str]
) -> None:
    expected = project(tmp_path / "a", fitting, tiny)
    expected.run()
    found = project(tmp_path / "b", apart, tiny)
    with pytest.raises(DatasetError, match=r"its shape is \(26, 24, 22\).*--resample-labels"):
        found.plan()
    found.plan(settings=["dataset.resample_labels=true"])
    notes = [item.problem for item in found.check() if "its labels are resampled to that image" in item.problem]
    assert [note.split()[:4] for note in notes] == [
        ["phantom_tr_001.nii.gz", "does", "not", "fit"],
        ["test", "case:", "phantom_ts_000.nii.gz", "does"],
    ]
    found = Project.open(tmp_path / "b")  # the project remembers
    found.run()
    stored = []
    for one in (expected, found):
        keys = one.preprocess()["3d_fullres"]
        stored.append({name: CaseStore(one.folder.cases).open(key) for name, key in keys.items()})
    for name, case in stored[0].items():
        assert np.array_equal(case.labels(), stored[1][name].labels()), name
    assert [case.label_voxels for case in found.fingerprint().cases] == [
        case.label_voxels for case in expected.fingerprint().cases
    ]
    for part in ("validation_summary", "test"):
        paths = [
            one.folder.predictions / "summary.json" if part == "test" else one.folder.validation_summary
            for one in (expected, found)
        ]
        scores = [[case.metrics for case in Summary.load(path).cases] for path in paths]
        assert scores[0] == scores[1], part
        assert len(scores[0]) == (1 if part == "test" else 3)


def test_preprocessed_cases_know_how_their_labels_were_read(tmp_path: Path, fitting: Path, tiny: list[str]) -> None:
    keys = [
        project(tmp_path / value, fitting, tiny, f"dataset.resample_labels={value}").preprocess()["3d_fullres"]
        for value in ("false", "true")
    ]
    assert all(keys[0][name] != keys[1][name] for name in keys[0])
