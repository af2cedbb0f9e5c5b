from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import segfit
from segfit.bundle.bundle import open_bundle
from segfit.dataset.phantom import make_phantom
from segfit.errors import InputError, Problem
from segfit.images.formats import read_case, read_grid, read_label
from segfit.images.image import Image
from segfit.options import Options
from segfit.planning.plan import Plan
from segfit.project import Project, measuring, preparation, sizing
from segfit.project.candidate import Candidate
from segfit.project.folder import ProjectFile
from segfit.specs import Configuration
from segfit.training.probe import StepCost, TileCost


def stages(project: Project) -> list[str]:
    return [json.loads(line)["stage"] for line in project.folder.stages.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, volumes: Path) -> Project:
    """A project that ran through."""
    settings = ["training.steps=6", "planning.base_features=4", "planning.batch_size=2", "planning.folds=0"]
    project = Project.create(tmp_path_factory.mktemp("project") / "p", volumes, settings=settings)
    project.run()
    return project


def test_a_run_leaves_every_file_of_a_project(finished: Project) -> None:
    folder = finished.folder
    for path in (
        folder.project,
        folder.check,
        folder.fingerprint,
        folder.plan,
        folder.splits,
        folder.selection,
        folder.validation_summary,
        folder.report,
        folder.model / "model.json",
        finished.findings().trainings[0].folder / "weights.safetensors",
        finished.findings().trainings[0].folder / "events.jsonl",
        folder.predictions / "summary.json",
    ):
        assert path.is_file(), path
    assert stages(finished) == [
        "check",
        "fingerprint",
        "plan",
        "size",
        "preprocess",
        "train",
        "validate",
        "select",
        "predict",
        "evaluate",
        "report",
    ]
    assert not list(folder.root.rglob(".partial-*"))


def test_a_second_run_does_nothing_but_the_report(finished: Project) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.root.rglob("*") if path.is_file()}
    again = Project.open(finished.folder.root)
    again.run()
    changed = {
        path.name
        for path in finished.folder.root.rglob("*")
        if path.is_file() and before.get(path) != path.stat().st_mtime_ns
    }
    assert changed <= {"report.html", "stages.jsonl", ".lock"}
    assert [stage for stage in stages(again)[11:] if stage not in ("report", "preprocess")] == []


def test_predictions_lie_on_the_grid_of_their_images(finished: Project) -> None:
    for case in finished.dataset.test:
        path = finished.folder.predictions / f"{case.id}.nii.gz"
        image, prediction = read_grid(case.images[0]), read_grid(path)
        assert prediction.shape == image.shape
        assert image.affine is not None
        np.testing.assert_array_equal(prediction.affine, image.affine)


def test_the_model_in_process_gives_what_the_project_wrote(finished: Project) -> None:
    model = segfit.load_model(finished.folder.model, device="cpu")
    case = finished.dataset.test[0]
    expected = read_label(finished.folder.predictions / f"{case.id}.nii.gz").array[0]
    np.testing.assert_array_equal(model.predict(case.images[0]).labels, expected)


def test_validation_from_stored_arrays_equals_prediction_from_files(finished: Project) -> None:
    """The validation skips reading and preprocessing; the model must agree voxel for voxel."""
    model = segfit.load_model(finished.folder.model, device="cpu")
    for name in finished.splits().folds[0].validation:
        path = finished.findings().validated[name] / f"{name}.nii.gz"
        found = model.predict(finished.dataset.case(name).images[0]).labels
        np.testing.assert_array_equal(found, read_label(path).array[0])


def test_the_methods_of_a_paper_say_what_was_done(finished: Project) -> None:
    paragraph, _, *references = finished.methods().splitlines()
    configuration = finished.plan().configurations["3d_fullres"]
    patch = "x".join(map(str, configuration.patch_size))
    for said in ("6 steps", f"patches of {patch} voxels", "4 to ", "Muon [3]", "[1]", "[2]"):
        assert said in paragraph
    assert [line[:3] for line in references] == ["[1]", "[2]", "[3]"]
    assert "10.1038/s41592-020-01008-z" in references[0]
    assert "[4]" not in paragraph


def test_references_are_read_from_the_dataset_where_the_store_was_emptied(finished: Project, tmp_path: Path) -> None:
    root = tmp_path / "p"
    shutil.copytree(finished.folder.root, root)
    chosen = finished.findings().selected
    assert chosen is not None
    shutil.rmtree(root / "cases")
    for path in root.rglob("selection.json"):
        path.unlink()
    again = Project.open(root)
    assert again.select() == chosen.selection
    assert not (root / "cases").exists()


def test_scores_in_the_model_are_those_of_the_validation(finished: Project) -> None:
    selection = finished.select()
    manifest = open_bundle(finished.folder.model).manifest
    assert manifest.dice == selection.candidates[0].per_class
    assert manifest.training["steps"] == [6]
    assert [member.configuration.name for member in manifest.members] == ["3d_fullres"]


def test_the_model_knows_its_training_images(finished: Project) -> None:
    known = open_bundle(finished.folder.model).manifest.training_images
    assert known is not None
    assert (known.num_cases, known.channel_names) == (len(finished.dataset.training), finished.dataset.channel_names)
    assert [known.differences(case) for case in finished.fingerprint().cases] == [[]] * known.num_cases
    model = segfit.load_model(finished.folder.model, device="cpu")
    assert [model.predict(case.images[0]).warnings for case in finished.dataset.training] == [()] * known.num_cases
    image = read_case(finished.dataset.training[0].images)
    raw = model.predict(Image(20 * image.array + 5000, image.grid))
    assert [item.code for item in raw.warnings] == ["intensity_range"]


def test_the_plan_keeps_what_was_measured(finished: Project) -> None:
    run = Plan.load(finished.folder.plan).run
    assert run is not None
    assert (run.configurations, run.folds, run.steps) == (("3d_fullres",), (0,), 6)
    assert run.seconds_per_step["3d_fullres"] > 0
    assert set(run.forecast) == {"size", "preprocess", "train", "validate", "select", "predict", "report"}


def test_results_of_other_options_lie_side_by_side(tmp_path: Path, volumes: Path, tiny: list[str]) -> None:
    def model(project: Project) -> bytes:
        return (project.folder.model / "weights-3d_fullres-0.safetensors").read_bytes()

    project = Project.create(tmp_path / "p", volumes, settings=tiny)
    project.run()
    first, plan, page = model(project), project.plan(), project.folder.predictions / "summary.json"
    scores = page.read_bytes()
    other = Project.open(tmp_path / "p", settings=["training.steps=3"])
    assert other.plan() != plan
    assert model(other) == first  # looking at another plan changes nothing
    other.run()
    assert model(other) != first
    assert page.read_bytes() != scores
    back = Project.open(tmp_path / "p", settings=["training.steps=6"])
    back.run()
    assert back.plan() == plan
    assert [result.steps for result in back.train()] == [6]
    assert (model(back), page.read_bytes()) == (first, scores)
    assert (stages(back).count("train"), stages(back).count("predict")) == (2, 2)


def test_pictures(tmp_path: Path, pictures: Path, tiny: list[str]) -> None:
    project = Project.create(tmp_path / "p", pictures, settings=tiny)
    summary = project.run()
    assert summary is not None
    assert len(summary.cases) == 2
    assert project.plan().configurations["2d"].network.in_channels == 3


def test_two_configurations_are_compared_with_their_ensemble(tmp_path: Path, volumes: Path, tiny: list[str]) -> None:
    settings = [*tiny, "planning.configurations=3d_fullres,2d", "planning.folds=0,1"]
    project = Project.create(tmp_path / "p", volumes, settings=settings)
    selection = project.select()
    assert [item.members for item in selection.candidates] == [("3d_fullres",), ("2d",), ("3d_fullres", "2d")]
    assert all(set(item.per_fold) == {0, 1} for item in selection.candidates)
    assert not list(project.folder.runs.rglob("*.npy"))
    manifest = open_bundle(project.folder.model).manifest
    assert tuple(member.configuration.name for member in manifest.members) == selection.winner
    assert all(list(member.weights) == ["0", "1"] for member in manifest.members)
    assert len(project.predict()) == 2
    assert stages(project).count("validate") == 4
    assert Project.open(tmp_path / "p").select() == selection
    assert stages(project).count("validate") == 4


def test_trainings_that_are_validated_one_by_one_are_what_is_selected_from(
    tmp_path: Path, volumes: Path, tiny: list[str]
) -> None:
    settings = [*tiny, "planning.configurations=3d_fullres,2d", "training.precision=fp32"]
    settings += ["training.channels_last=true"]
    project = Project.create(tmp_path / "p", volumes, settings=settings)
    for number, name in enumerate(("3d_fullres", "2d"), 1):
        project.train(configurations=[name], validate=True)
        assert stages(project).count("validate") == number
    selection = project.select()
    project.train(validate=True)
    assert stages(project).count("validate") == 2
    assert not list(project.folder.runs.rglob("*.npy"))
    together = Project.create(tmp_path / "q", volumes, settings=settings)
    assert together.select() == selection


@pytest.mark.parametrize("cases", [1, 3])
def test_few_cases(tmp_path: Path, cases: int, tiny: list[str]) -> None:
    data = make_phantom(tmp_path / "Dataset003_Few", cases=cases, test_cases=0, shape=(12, 24, 24))
    project = Project.create(tmp_path / "p", data, settings=tiny)
    assert project.run() is None
    assert len(project.splits().folds) == cases
    assert project.folder.report.exists()


def test_a_budget_too_small_says_how_much_is_needed(tmp_path: Path, volumes: Path) -> None:
    project = Project.create(tmp_path / "p", volumes, settings=["time_s=5"])
    with pytest.raises(
        InputError, match=r"5.0 s are too short for 3d_fullres.*the smallest budget that works here is --time \d+m"
    ):
        project.train()
    assert not project.folder.runs.exists()


def test_a_budget_that_one_network_uses_up_is_refused_before_others_are_measured(
    tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sized: list[str] = []
    best = sizing.Sizer.best

    def noted(self: sizing.Sizer, configuration: Configuration, *rest: Any) -> Candidate:
        found = best(self, configuration, *rest)
        sized.append(configuration.name)
        return found

    monkeypatch.setattr(sizing.Sizer, "best", noted)
    monkeypatch.setattr(sizing.Sizer, "enough", lambda *_: False)  # on the fastest machine neither
    monkeypatch.setattr(preparation.Preparation, "seconds", lambda _: 10.0 if sized else 0.0)
    project = Project.create(tmp_path / "p", volumes, settings=["time_s=10"])
    with pytest.raises(InputError, match=r"10 s are too short for 3d_fullres.*--time \d+m"):
        project.train()
    assert sized == ["3d_fullres"]


@pytest.mark.parametrize(
    ("settings", "problem"), [(["time_s=4"], "4.0 s are too short"), (["time_s=60", "training.steps=5"], "not by both")]
)
def test_what_the_options_alone_rule_out_is_refused_before_anything_is_read(
    tmp_path: Path, volumes: Path, settings: list[str], problem: str
) -> None:
    project = Project.create(tmp_path / "p", volumes, settings=settings)
    with pytest.raises(InputError, match=problem):
        project.run()
    assert not project.folder.check.exists()
    assert ProjectFile.load(tmp_path / "p" / "project.json").options == Options()


@pytest.mark.parametrize(
    "refused", [["training.steps=null", "time_s=1"], ["planning.folds=9"], ["planning.configurations=3d_lowres"]]
)
def test_options_that_are_refused_are_not_kept(
    tmp_path: Path, volumes: Path, tiny: list[str], refused: list[str]
) -> None:
    def kept() -> Options:
        return ProjectFile.load(tmp_path / "p" / "project.json").options

    project = Project.create(tmp_path / "p", volumes, settings=[*tiny, *refused])
    with pytest.raises(InputError):
        project.run()
    assert kept() == Options()
    accepted = Project.open(tmp_path / "p", settings=tiny)
    accepted.size()
    with pytest.raises(InputError):
        Project.open(tmp_path / "p", settings=refused).train()
    assert kept() == accepted.options
    project = Project.open(tmp_path / "p", settings=refused)
    other = Project.open(tmp_path / "p", settings=["workers=1"])  # another command, meanwhile
    with pytest.raises(InputError):
        project.preprocess() if "lowres" in refused[0] else project.size()
    assert kept() == other.options


def test_options_of_a_session_are_kept_that_goes_on_after_a_refusal(
    tmp_path: Path, volumes: Path, tiny: list[str]
) -> None:
    path = tmp_path / "p" / "project.json"
    project = Project.create(tmp_path / "p", volumes, settings=tiny)
    with pytest.raises(InputError):
        project.predict()  # nothing is trained
    assert ProjectFile.load(path).options == Options()
    project.preprocess()
    assert ProjectFile.load(path).options == project.options
    with pytest.raises(InputError):
        project.predict()  # what was used is kept
    assert ProjectFile.load(path).options == project.options


def test_time_sizes_the_run(tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a machine that takes a tenth of a second for a step, however slow or busy this one is.
    monkeypatch.setattr(measuring, "probe_step", lambda *_, **__: StepCost(0.1, 1.0, 0.001))
    monkeypatch.setattr(measuring, "probe_forward", lambda *_: TileCost(0.01, 0.5))
    project = Project.create(tmp_path / "p", volumes)
    project.plan(time="1h")
    plan = project.size()
    assert plan.run is not None
    assert plan.run.seconds_per_training is not None
    assert (plan.run.configurations, plan.run.folds) == (("3d_fullres",), (0, 1, 2))
    assert 3400 < 3 * plan.run.seconds_per_training < 3600
    steps = plan.run.seconds_per_training / (0.1 * sizing.SLACK)
    assert plan.run.expected_steps["3d_fullres"] in {int(steps - 1e-6), int(steps + 1e-6)}  # whole ones may round down
    assert 3400 < plan.run.total.seconds < 3600.5
    assert next(decision for decision in plan.decisions if decision.key == "run").bound == "time"
    assert project.size() == plan


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, volumes: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and not a segfit project"):
        Project.create(tmp_path, volumes)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_project_killed_at_its_birth_can_be_made_again(tmp_path: Path, volumes: Path) -> None:
    (tmp_path / ".locks").mkdir()
    (tmp_path / ".partial-abcproject.json").touch()
    assert Project.create(tmp_path, volumes).folder.project.exists()


def test_a_project_keeps_its_dataset(tmp_path: Path, volumes: Path, pictures: Path) -> None:
    Project.create(tmp_path / "p", volumes)
    with pytest.raises(InputError, match="is a project on"):
        Project.create(tmp_path / "p", pictures)


def test_a_dataset_may_be_given_by_way_of_links(tmp_path: Path, volumes: Path) -> None:
    project = Project.create(tmp_path / "p", volumes)
    project.check()
    (tmp_path / "link").symlink_to(volumes)
    for path in (tmp_path / "link", volumes.parent / ".." / volumes.parent.name / volumes.name):
        again = Project.create(tmp_path / "p", path)
        again.check()
        assert again.dataset.root == volumes
    assert stages(project) == ["check"]


def test_no_project_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a segfit project"):
        Project.open(tmp_path / "nothing")


def test_changed_files_are_checked_again(tmp_path: Path) -> None:
    data = make_phantom(tmp_path / "Dataset004_Changing", cases=5, test_cases=0, shape=(8, 16, 16))
    project = Project.create(tmp_path / "p", data)
    assert project.check() == ()
    label = data / "labelsTr" / "phantom_tr_002.nii.gz"
    label.write_bytes(label.read_bytes()[:100])
    problems = Project.open(tmp_path / "p").check()
    assert [(problem.case, problem.fatal) for problem in problems] == [("phantom_tr_002", True)]


def test_problems_of_the_structure_are_those_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_phantom(tmp_path / "Dataset004_Changing", cases=5, test_cases=0, shape=(8, 16, 16))
    assert Project.create(tmp_path / "p", data).check() == ()
    monkeypatch.setattr(preparation, "check_dataset", lambda *_, **__: pytest.fail("files were read again"))
    stray = data / "labelsTr" / "stray.nii.gz"
    stray.write_bytes((data / "labelsTr" / "phantom_tr_002.nii.gz").read_bytes())
    (problem,) = Project.open(tmp_path / "p").check()
    assert (problem.case, problem.fatal) == ("stray", False)
    assert Project.open(tmp_path / "p").status().stages[0].detail == "0 errors, 1 warning"
    stray.unlink()
    assert Project.open(tmp_path / "p").check() == ()


def test_files_that_cannot_be_read_are_problems_of_their_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_phantom(tmp_path / "Dataset004_Changing", cases=7, test_cases=1, shape=(8, 16, 16))
    names = ["phantom_tr_002", "phantom_tr_004", "phantom_ts_000"]
    paths = [data / "labelsTr" / f"{name}.nii.gz" for name in names[:2]] + [
        data / "imagesTs" / f"{names[2]}_0000.nii.gz"
    ]
    kept = [path.rename(tmp_path / path.name) for path in paths]
    for path in paths:
        path.symlink_to(tmp_path / "nowhere")
    project = Project.create(tmp_path / "p", data)
    problems = project.check()
    assert {item.case for item in problems if item.fatal} == set(names[:2])
    assert {item.case for item in problems} == set(names)
    skipping = Project.create(tmp_path / "q", data, Options().with_settings(["dataset.skip_incomplete=true"]))
    assert len(skipping.fingerprint().cases) == 5
    with monkeypatch.context() as patched:
        patched.setattr(preparation, "check_dataset", lambda *_, **__: pytest.fail("files were read again"))
        assert Project.open(tmp_path / "p").check() == problems
    for path, source in zip(paths, kept, strict=True):
        path.unlink()
        source.rename(path)
    assert Project.open(tmp_path / "p").check() == ()


def test_what_a_busy_machine_caused_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_phantom(tmp_path / "Dataset005_Large", cases=5, test_cases=0, shape=(8, 16, 16))
    found = [(Problem("phantom_tr_002", "could not be read", "check again", transient=True),)] * 2 + [()]
    looks = iter(found)
    monkeypatch.setattr(preparation, "check_dataset", lambda *_, **__: next(looks))
    project = Project.create(tmp_path / "p", data)
    assert project.check() == project.check() == found[0]  # told twice, looked at once
    assert Project.open(tmp_path / "p").check() == found[1]
    assert Project.open(tmp_path / "p").check() == ()
    assert Project.open(tmp_path / "p").check() == ()  # of files: remembered
