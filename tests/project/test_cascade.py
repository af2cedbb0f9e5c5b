"""A cascade from its dataset to its predictions: the second stage is trained on what the first had not seen."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from segfit.bundle.bundle import Bundle, open_bundle
from segfit.errors import InputError
from segfit.files import hash_file, write_json
from segfit.images.formats import read_label
from segfit.inference.model import Model
from segfit.inference.predict_folder import predict_folder
from segfit.inference.predictor import Predictor
from segfit.networks.unet import build_network
from segfit.project import Project, measuring
from segfit.project.handing_over import _write_model
from segfit.project.trainings import Training
from segfit.project.validation import next_stage_path
from segfit.records import store
from segfit.resampling import resample_image
from segfit.training.interruption import Interruption
from segfit.training.probe import StepCost, TileCost
from segfit.training.result import RESULT, WEIGHTS, result_key

CASCADE, FIRST = "3d_cascade_fullres", "3d_lowres"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, volumes: Path) -> list[str]:
    names = sorted(path.name.removesuffix(".nii.gz") for path in (volumes / "labelsTr").iterdir())
    path = tmp_path_factory.mktemp("folds") / "splits_final.json"
    write_json(path, [{"train": names[2:], "val": names[:2]}, {"train": names[:2], "val": names[2:]}])
    return [
        "training.steps=3",
        "planning.base_features=4",
        "planning.batch_size=2",
        "planning.3d_lowres.target_spacing_mm=3,2,2",
        f"planning.configurations={CASCADE}",
        f"planning.splits={path}",
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, volumes: Path, settings: list[str]) -> Project:
    project = Project.create(tmp_path_factory.mktemp("project") / "p", volumes, settings=settings)
    project.run()
    return project


@pytest.fixture
def copied(finished: Project, tmp_path: Path) -> Path:
    shutil.copytree(finished.folder.root, tmp_path / "p")
    return tmp_path / "p"


def trained(root: Path) -> list[str]:
    """Stages that did something, without the report."""
    lines = (root / "stages.jsonl").read_text().splitlines()
    return [stage for line in lines if (stage := json.loads(line)["stage"]) not in ("report", "preprocess")]


def of(project: Project, name: str) -> list[Training]:
    return [item for item in project.findings().trainings if item.name == name]


def test_the_first_stage_is_trained_and_validated_before_the_second(finished: Project) -> None:
    run = finished.findings().plan.run  # type: ignore[union-attr]
    assert run is not None
    assert (run.configurations, run.folds) == ((FIRST, CASCADE), (0, 1))
    pair = ["train", "train", "validate", "validate"]
    before, after = ["check", "fingerprint", "plan", "size"], ["select", "predict", "evaluate"]
    assert trained(finished.folder.root) == [*before, *pair, *pair, *after]
    candidates = finished.select().candidates
    assert [item.members for item in candidates] == [(FIRST,), (CASCADE,), (FIRST, CASCADE)]
    assert all(item.per_fold.keys() == {0, 1} for item in candidates)


def test_a_case_is_seen_as_the_fold_that_held_it_out_predicted_it(finished: Project) -> None:
    plan, labels, found = finished.plan(), finished.dataset.labels, finished.findings()
    assert found.selected is not None
    low, keys = plan.configurations[FIRST], finished.case_keys(plan.configurations[CASCADE])
    seen: dict[str, NDArray[Any]] = {}
    for item in found.selected.validations:
        if item.training.name != FIRST:
            continue
        network = build_network(low.network, deep_supervision=False)
        network.load_state_dict(load_file(item.training.folder / WEIGHTS))
        axes = plan.training[FIRST].augmentation.mirror_axes
        predictor = Predictor(low, labels, [network], axes, torch.device("cpu"))
        for case in item.cases:
            here, there = finished.stored(finished.case_keys(low)[case]), finished.stored(keys[case])
            logits = predictor.logits(here.image()).numpy()
            mm = low.spacing_mm
            spec = low.preprocessing.resample_logits
            expected = resample_image(logits, there.shape, mm, mm, spec).argmax(0)
            found_labels = replace(there, previous=next_stage_path(item.folder, case)).previous_stage()
            assert found_labels is not None
            seen[case] = found_labels
            assert (seen[case] != expected).mean() < 1e-3  # ties
    assert seen.keys() == {case.id for case in finished.dataset.training}
    second = of(finished, CASCADE)
    assert [{case for one in item.previous for case in one.cases} for item in second] == [seen.keys()] * 2
    assert all(set(one.cases).isdisjoint(one.training.job.cases_train) for one in second[0].previous)


@pytest.mark.parametrize("winner", [(CASCADE,), (FIRST, CASCADE)])
def test_a_model_has_both_stages_and_predicts_in_one_go(copied: Path, winner: tuple[str, ...]) -> None:
    project = Project.open(copied)
    chosen = project.findings().selected
    assert chosen is not None
    selection = chosen.selection.model_copy(update={"winner": winner, "steps": ()})
    _write_model(project, replace(chosen, selection=selection), chosen.key)
    bundle = open_bundle(project.folder.model)
    manifest = bundle.manifest
    assert manifest.previous_stage is not None
    assert manifest.previous_stage.configuration.name == FIRST
    assert tuple(member.configuration.name for member in manifest.members) == winner
    assert sorted(manifest.checksums) == sorted(manifest.sealed_files)
    assert len(manifest.files) == 4

    first = manifest.model_copy(update={"members": (manifest.previous_stage,), "previous_stage": None})
    image, cpu = project.dataset.test[0].images[0], torch.device("cpu")
    labels = Model(Bundle(first, bundle.source, files=bundle.files), cpu).predict(image).labels
    model = Model(bundle, cpu)
    found = model.predict(image, probabilities=True)
    given = model.predict(image, previous_stage=labels, probabilities=True)
    assert found.probabilities is not None
    assert given.probabilities is not None
    np.testing.assert_array_equal(found.probabilities, given.probabilities)
    other = model.predict(image, previous_stage=np.ones_like(labels), probabilities=True)
    assert other.probabilities is not None
    assert np.abs(other.probabilities - found.probabilities).max() > 1e-4
    [path] = predict_folder(model, project.dataset.test[:1], copied / "out")
    np.testing.assert_array_equal(read_label(path).array[0], found.labels)


def test_other_weights_of_the_first_stage_have_the_second_trained_anew(copied: Path) -> None:
    project = Project.open(copied)
    first, before = of(project, FIRST), of(project, CASCADE)
    result = first[0].result()
    assert result is not None
    weights = {name: value * 0.5 for name, value in load_file(first[0].folder / WEIGHTS).items()}
    save_file(weights, first[0].folder / WEIGHTS, {"identity": result.identity})
    changed = result.model_copy(update={"weights": hash_file(first[0].folder / WEIGHTS)})
    store(changed, first[0].folder / RESULT, result_key(result.identity))

    again, known = Project.open(copied), trained(copied)
    stale = of(again, CASCADE)
    assert [item.is_done() for item in of(again, FIRST)] == [True, True]
    assert [item.is_done() for item in stale] == [False, False]
    assert {item.identity for item in stale}.isdisjoint(item.identity for item in before)
    again.run()
    made = trained(copied)[len(known) :]
    assert made[:6] == ["validate", "train", "train", "validate", "validate", "validate"]  # probabilities were removed
    assert [item.is_done() for item in of(again, CASCADE)] == [True, True]


def test_an_interrupted_second_stage_is_gone_on_with(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = of(Project.open(copied), CASCADE)
    before = [(item.folder / WEIGHTS).read_bytes() for item in items]
    shutil.rmtree(copied / "runs" / CASCADE)
    known, steps = trained(copied), iter(range(10))

    def killed(_: Interruption) -> None:
        if next(steps) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Interruption, "raise_if_asked", killed)
        with pytest.raises(KeyboardInterrupt):
            Project.open(copied).run()
    assert (items[0].folder / "state").is_dir()
    Project.open(copied).run()
    made = trained(copied)[len(known) :]
    assert made == ["train"] * 3  # nothing of the first stage; what is selected from equal weights is known
    assert [(item.folder / WEIGHTS).read_bytes() for item in items] == before


def test_labels_for_the_second_stage_that_are_damaged_are_predicted_again(copied: Path) -> None:
    second = of(Project.open(copied), CASCADE)[0]
    item = second.previous[0]
    path = next_stage_path(item.folder, item.cases[0])
    [prediction] = second.folder.glob(f"validation-*/{item.cases[0]}.nii.gz")
    whole, predicted = path.read_bytes(), prediction.read_bytes()
    path.write_bytes(whole[:-1])
    Project.open(copied).run()
    assert path.read_bytes() == whole[:-1]  # nobody looks at them any more
    prediction.write_bytes(predicted[:-1])
    Project.open(copied).run()
    assert (path.read_bytes(), prediction.read_bytes()) == (whole, predicted)

    path.unlink()
    weights = hash_file(second.folder / WEIGHTS)
    shutil.rmtree(second.folder)
    known = trained(copied)
    [result] = Project.open(copied).train(folds=[0], configurations=[CASCADE])
    assert result.weights == weights
    assert trained(copied)[len(known) :] == ["validate", "train"]
    assert path.read_bytes() == whole


def test_a_cascade_needs_every_case_held_out(tmp_path: Path, volumes: Path, settings: list[str]) -> None:
    project = Project.create(tmp_path / "p", volumes, settings=[*settings, "planning.folds=0"])
    with pytest.raises(InputError) as refused:
        project.size()
    assert refused.value.action.endswith("planning.folds=0,1")
    never = sorted(case.id for case in project.dataset.training)
    path = tmp_path / "splits_final.json"
    write_json(path, [{"train": never[1:], "val": never[:1]}])
    alone = [item for item in settings if not item.startswith("planning.splits")] + [f"planning.splits={path}"]
    with pytest.raises(InputError, match=never[1]):
        Project.create(tmp_path / "q", volumes, settings=alone).size()


@pytest.mark.parametrize("preset", ["stock", "auto"])
@pytest.mark.parametrize(("time_s", "asked"), [(2000, False), (500, False), (60, True)])
def test_a_cascade_is_trained_where_the_time_suffices(
    preset: str,
    time_s: int,
    asked: bool,
    tmp_path: Path,
    volumes: Path,
    settings: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "probe_step", lambda *_, **__: StepCost(0.01, 0.5, 0.001))
    monkeypatch.setattr(measuring, "probe_forward", lambda *_: TileCost(0.001, 0.5))
    left_out = [item for item in settings if asked or not item.startswith("planning.configurations")]
    rest = [item for item in left_out if not item.startswith("training.steps")]
    project = Project.create(tmp_path / "p", volumes, settings=[*rest, f"preset={preset}", f"time_s={time_s}"])
    plan = project.size()
    assert plan.run is not None
    told = next(item for item in plan.decisions if item.key == "run").inputs
    if asked:
        assert (plan.run.configurations, plan.run.folds) == ((FIRST, CASCADE), (0, 1))
        assert plan.run.validation_cases is None
    elif time_s == 2000:
        assert plan.run.configurations == ("3d_fullres", "2d", FIRST, CASCADE)
        assert plan.run.folds == (0, 1)
    else:
        assert CASCADE not in plan.run.configurations
    assert told.get("left_out") == (None if CASCADE in plan.run.configurations else [CASCADE])
