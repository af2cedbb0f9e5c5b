"""A project of a MedNeXt: planned, sized, trained, bundled; its model predicts, and is started from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segfit.bundle.bundle import open_bundle
from segfit.inference.model import load_model
from segfit.project import Project


def test_a_mednext_goes_all_the_way(tmp_path: Path, pictures: Path, tiny: list[str]) -> None:
    asked = [*tiny, "planning.kind=mednext", "planning.expansion=3"]
    project = Project.create(tmp_path / "first", pictures, settings=asked)
    project.run()
    (member,) = open_bundle(tmp_path / "first/model").manifest.members
    planned = project.plan().configurations["2d"].network
    assert member.configuration.network == planned
    assert (planned.kind, planned.expansion) == ("mednext", 3)
    image = np.random.default_rng(0).random((3, 40, 40), np.float32) * 255
    assert load_model(tmp_path / "first/model").predict(image, 1.0).labels.shape == (40, 40)
    assert len(list((tmp_path / "first/predictions").glob("*.png"))) == 2
    tuned = ["training.steps=2", "planning.batch_size=2", f"training.start_from={tmp_path / 'first/model'}"]
    again = Project.create(tmp_path / "second", pictures, settings=[*tuned, "planning.folds=0"])
    again.run()
    run = again.plan().run
    assert run is not None
    assert run.initial is not None
    assert run.initial.fitted == run.initial.layers
    assert again.plan().configurations["2d"].network == planned
