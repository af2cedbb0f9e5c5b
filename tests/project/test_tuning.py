"""Faster ways to predict: what is tried, what passes, and that a model predicts so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segfit.bundle.bundle import open_bundle, with_speeds
from segfit.bundle.speeds import Speed
from segfit.cli.main import run
from segfit.dataset.splits import Fold, Splits
from segfit.errors import InputError
from segfit.inference.carried_case import write_packed
from segfit.inference.model import Model, load_model
from segfit.project import Project
from segfit.selection import tuning


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, volumes: Path) -> Project:
    settings = ["training.steps=6", "planning.base_features=4", "planning.batch_size=2", "training.precision=fp32"]
    made = Project.create(
        tmp_path_factory.mktemp("tuned") / "p", volumes, settings=[*settings, "planning.folds=0,1,2,3,4"]
    )
    made.select()
    return made


class Noted:
    """Stands in for prediction: what each way of a network makes of a case, by a rule of the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, int]) -> None:
        self.asked: list[tuple[Any, ...]] = []

        def load(path: Path, device: str, folds: list[int], **way: Any) -> Noted:
            assert path.is_dir()
            self.way = {key: value for key, value in way.items() if value is not None}
            self.fold = folds
            return self

        monkeypatch.setattr(tuning, "load_model", load)
        self.wrong = wrong

    def predict(self, images: list[Path], _: object) -> Any:
        from types import SimpleNamespace

        from segfit.images.formats import read_label

        case = images[0].name.removesuffix("_0000.nii.gz")
        labels = read_label(images[0].parent.parent / "labelsTr" / f"{case}.nii.gz").array[0].copy()
        self.asked.append((case, *self.fold, *self.way.items()))
        for key in self.way:
            flat = labels.reshape(-1)
            flat[np.flatnonzero(flat)[: self.wrong[key]]] = 0
        return SimpleNamespace(labels=labels)


def asked(noted: Noted) -> list[tuple[Any, ...]]:
    """The ways that were asked for, in order."""
    return list(dict.fromkeys(one[2:] for one in noted.asked))


@pytest.mark.parametrize(
    ("wrong", "passing"),
    [({"mirror": 0, "tile_step": 0}, 3), ({"mirror": 0, "tile_step": 200}, 1), ({"mirror": 200, "tile_step": 200}, 0)],
)
def test_only_what_loses_nothing_passes(
    project: Project, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, int], passing: int
) -> None:
    noted = Noted(monkeypatch, wrong)
    bf16 = type("Hardware", (), {"fast_bf16": False})
    monkeypatch.setattr(tuning, "measure_hardware", lambda _: bf16)
    found = tuning.tune(project.folder.model, project.dataset, project.splits(), {})
    assert found.cases == found.groups == 5
    for case, fold, *_ in noted.asked:
        assert case in project.splits().folds[fold].validation
    assert sum(bool(one.least) and min(one.least.values()) > -tuning.LOSS for one in found.tried[1:]) == passing
    both = (("mirror", False), ("tile_step", 0.75)) in asked(noted)
    assert both == (passing == 3)  # what loses alone is combined with nothing
    assert found.speeds["accurate"] == found.tried[0]
    assert found.tried[0].dice == {"organ": 1.0, "lesion": 1.0}
    if not passing:
        assert found.speeds["fast"] == found.speeds["balanced"] == found.tried[0]
    assert found.speeds["fast"].time == min(one.time for one in found.tried if one.dice == found.tried[0].dice)


def test_too_few_groups_and_other_datasets_are_refused(project: Project) -> None:
    cases = {case.id: "one" for case in project.dataset.training}
    with pytest.raises(InputError, match="1 group of validation cases"):
        tuning.tune(project.folder.model, project.dataset, project.splits(), cases)
    nothing = Splits(folds=(Fold(train=("a",), validation=()),) * 5)
    with pytest.raises(InputError, match="left cases out"):
        tuning.tune(project.folder.model, project.dataset, nothing, {})


def test_a_model_predicts_with_its_speeds(project: Project, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(project.folder.model, model)
    with pytest.raises(InputError, match="was not measured"):
        load_model(model, "cpu", speed="fast")
    before = open_bundle(model).manifest
    with_speeds(model, {"fast": Speed(mirror=False, tile_step=0.75, time=0.2), "accurate": Speed()})
    after = open_bundle(model).manifest
    assert after.model_copy(update={"speeds": {}, "seal": before.seal}) == before

    def steps(one: Model) -> list[tuple[Any, ...]]:
        return [(len(predictor.subsets), predictor.tile_step) for predictor in one.predictors]

    own = steps(load_model(model, "cpu"))
    assert steps(load_model(model, "cpu", speed="accurate")) == own
    assert steps(load_model(model, "cpu", speed="fast")) == [(1, 0.75)]
    assert steps(load_model(model, "cpu", speed="fast", tile_step=0.5)) == [(1, 0.5)]
    with pytest.raises(InputError, match="speed is"):
        load_model(model, "cpu", speed="quick")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="was not measured"):
        load_model(model, "cpu", speed="balanced")
    with pytest.raises(InputError, match="was not measured"):  # of their average
        load_model([model, project.folder.model], "cpu", speed="fast")
    write_packed(open_bundle(model), tmp_path / "model.zip", {})
    assert steps(load_model(tmp_path / "model.zip", "cpu", speed="fast")) == [(1, 0.75)]


def test_tune_and_predict_by_command(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = project.folder.root
    assert run(["tune", str(root), "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["cases"], set(told["speeds"])) == (5, {"fast", "balanced", "accurate"})
    assert set(open_bundle(project.folder.model).manifest.speeds) == set(told["speeds"])
    assert run(["verify", str(root)]) == 0
    assert run(["verify", str(project.folder.model)]) == 0
    image = str(project.dataset.test[0].images[0])
    out = tmp_path / "out"
    assert run(["predict", "-m", str(project.folder.model), image, "-o", str(out), "--speed", "fast"]) == 0
    assert len(list(out.glob("*.nii.gz"))) == 1
    data = str(project.dataset.root)
    assert run(["tune", str(project.folder.model), "--dataset", data, "--splits", str(root / "splits.json")]) == 0
    assert run(["tune", str(project.folder.model)]) == 2
    packed = str(tmp_path / "model.zip")
    assert run(["export", str(root), "--to", "zip", "-o", packed]) == 0
    assert run(["tune", packed, "--dataset", data]) == 2  # it is not written into
    theirs, imported = str(tmp_path / "theirs"), tmp_path / "imported"
    assert run(["export", str(project.folder.model), "--to", "nnunet", "-o", theirs]) == 0
    assert run(["tune", theirs, "--dataset", data]) == 2
    assert run(["import", theirs, "-o", str(imported)]) == 0
    assert run(["tune", str(imported), "--dataset", data, "--splits", str(root / "splits.json")]) == 0
    assert set(open_bundle(imported).manifest.speeds) == set(told["speeds"])
    assert run(["verify", str(imported)]) == 0
    assert run(["predict", "-m", str(imported), image, "-o", str(tmp_path / "again"), "--speed", "fast"]) == 0
    assert run(["tune", str(root), "--dataset", data]) == 2
    assert run(["tune", data, "--dataset", data]) == 2
