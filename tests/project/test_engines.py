"""Every stage that works case by case, done by an executor that is none of ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from segfit.dataset.layouts import open_dataset
from segfit.execution.execution import LOCAL, Execution
from segfit.nnunet.dataset_export import export_nnunet
from segfit.preprocessing.dataset import verify_store
from segfit.project import Project

if TYPE_CHECKING:
    from conftest import Elsewhere


def test_a_project_is_the_same_whoever_does_its_cases(
    tmp_path: Path, volumes: Path, tiny: list[str], elsewhere: Elsewhere
) -> None:
    here = Project.create(tmp_path / "here", volumes, settings=tiny)
    far = Project.create(tmp_path / "far", volumes, settings=tiny, execution=Execution(engine=lambda *_: elsewhere))
    summaries = here.run(), far.run()
    assert elsewhere.modules == {
        "segfit.dataset.checks",
        "segfit.fingerprint.measure",
        "segfit.preprocessing.dataset",
        "segfit.evaluation.evaluate",
        "segfit.inference.predict_folder",
        "segfit.selection.postprocess",
        "segfit.selection.sizes_and_holes",
        "segfit.project.reporting",
    }
    assert far.check() == here.check()
    assert far.fingerprint() == here.fingerprint()
    assert far.preprocess() == here.preprocess()
    assert far.select() == here.select()
    assert summaries[0] is not None
    assert summaries[1] is not None
    assert summaries[1].mean == summaries[0].mean
    elsewhere.functions.clear()
    assert verify_store(far.store, execution=far.execution) == ()
    assert len(elsewhere.functions) == len(far.store.keys()) > 0


def test_an_export_is_the_same_whoever_writes_it(tmp_path: Path, volumes: Path, elsewhere: Elsewhere) -> None:
    dataset = open_dataset(volumes)
    here, far = (
        export_nnunet(dataset, tmp_path / name, execution=execution)
        for name, execution in (("here", LOCAL), ("far", Execution(engine=lambda *_: elsewhere)))
    )
    files = sorted(path.relative_to(here) for path in here.rglob("*"))
    assert files == sorted(path.relative_to(far) for path in far.rglob("*"))
    images = [path for path in files if path.name.endswith(".nii.gz")]
    assert len(images) > len(elsewhere.functions) == len(dataset.training) + len(dataset.test)
    for path in images:
        assert (here / path).read_bytes() == (far / path).read_bytes()


@pytest.mark.parametrize(("given", "option", "used"), [(None, None, None), (None, 2, 2), (3, 2, 3), (3, None, 3)])
def test_workers_of_the_execution_go_before_those_of_the_options(
    tmp_path: Path, volumes: Path, given: int | None, option: int | None, used: int | None
) -> None:
    settings = [] if option is None else [f"workers={option}"]
    project = Project.create(tmp_path / "p", volumes, settings=settings, execution=Execution(workers=given))
    assert project.execution.workers == used
