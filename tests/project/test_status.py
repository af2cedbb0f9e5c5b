"""How far a project is, and what projects, plans and datasets look like."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from segfit.dataset.layouts import open_dataset
from segfit.errors import InputError, Problem, warning
from segfit.planning.plan import RunSpec
from segfit.project import Project
from segfit.project.folder import CheckFile, ProjectFile
from segfit.project.status import status_of
from segfit.training.result import EVENTS, RESULT, STATE


@pytest.fixture
def project(volumes: Path, tmp_path: Path) -> Project:
    return Project.create(tmp_path / "p", volumes)


def states(project: Project) -> dict[str, str]:
    return {item.stage: item.state for item in project.status().stages}


def test_stages_are_counted_from_their_files(project: Project) -> None:
    assert set(states(project).values()) == {"open"}
    project.plan()
    done = [stage for stage, state in states(project).items() if state == "done"]
    assert done == ["check", "fingerprint", "plan"]
    assert (project.status().model, project.status().verdict) == (None, None)


def test_a_training_that_was_begun(project: Project) -> None:
    project.folder.training("2d", 0, "key").mkdir(parents=True)
    assert states(project)["train"] == "begun"


def test_progress_is_that_of_all_trainings_of_the_run(project: Project) -> None:
    run = RunSpec(configurations=("2d",), folds=(0, 1, 2, 3), steps=100)
    project.plan().model_copy(update={"run": run}).save(project.folder.plan)
    assert (project.status().trained, states(project)["train"]) == (0.0, "open")
    for fold, share in enumerate((0.25, 0.5)):
        folder = project.folder.training("2d", fold, "key")
        folder.mkdir(parents=True)
        (folder / EVENTS).write_text("".join(f'{{"kind": "step", "step": 1, "share": {x}}}\n' for x in (0.1, share)))
    (project.folder.training("2d", 2, "key")).mkdir(parents=True)
    (project.folder.training("2d", 2, "key") / RESULT).touch()
    assert project.status().trained == (0.25 + 0.5 + 1) / 4
    assert states(project)["train"] == "begun"


def test_a_training_that_is_given_more_time_is_not_done(project: Project) -> None:
    run = RunSpec(configurations=("2d",), folds=(0,), steps=100)
    project.plan().model_copy(update={"run": run}).save(project.folder.plan)
    folder = project.folder.training("2d", 0, "key")
    (folder / STATE).mkdir(parents=True)
    (folder / EVENTS).write_text('{"kind": "step", "step": 1, "share": 0.75}\n')
    for name, time_s in ((RESULT, 1000), (f"{STATE}/step-000000001.safetensors", 2000)):
        (folder / name).touch()
        os.utime(folder / name, (time_s, time_s))
    assert project.status().trained == 0.75
    os.utime(folder / RESULT, (3000, 3000))  # killed before the state was removed
    assert project.status().trained == 1.0


def test_what_is_handed_over_before_its_end_is_not_done(project: Project) -> None:
    run = RunSpec(configurations=("2d",), folds=(0,), steps=100)
    project.plan().model_copy(update={"run": run}).save(project.folder.plan)
    folder = project.folder.so_far("2d", 0, "key", "other")
    folder.mkdir(parents=True)
    (folder / RESULT).touch()
    assert project.status().trained == 0.0


def test_the_next_step_is_a_command(project: Project) -> None:
    root = project.folder.root
    assert project.status().next_step == f"segfit run {root}"
    problem = Problem("a", "is damaged")
    CheckFile(structure=(problem,), problems=()).save(project.folder.check)
    assert project.status().next_step == f"segfit check {root}"
    file = ProjectFile.load(project.folder.project)
    asked = file.options.with_settings(["dataset.skip_incomplete=true"])
    file.model_copy(update={"options": asked}).save(project.folder.project)
    assert project.status().next_step == f"segfit run {root}"


def test_a_damaged_file_counts_as_absent(project: Project) -> None:
    project.plan()
    project.folder.plan.write_text("{")
    assert states(project)["plan"] == "open"


def test_no_project(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a segfit project"):
        status_of(tmp_path)


def test_what_they_look_like(project: Project, volumes: Path) -> None:
    root = project.folder.root
    assert repr(project) == f"Project({str(root)!r} on Dataset001_Volumes: nothing done yet)"
    plan = project.plan(preset="stock")
    assert repr(project) == f"Project({str(root)!r} on Dataset001_Volumes: plan done)"
    assert repr(plan) == str(plan) == "Plan('Dataset001_Volumes', preset stock: 2d, 3d_fullres; not sized yet)"
    assert repr(project.fingerprint()) == "Fingerprint('Dataset001_Volumes': 5 cases, 3D, MRI)"
    assert repr(open_dataset(volumes)) == (
        "Dataset('Dataset001_Volumes', nnunet-v2: 5 training cases, 2 test cases; MRI to organ and lesion)"
    )
    patch = "x".join(map(str, plan.configurations["3d_fullres"].patch_size))
    for part in ("Dataset001_Volumes, preset stock", "<td>3d_fullres</td>", f"<td>{patch}</td>"):
        assert part in plan._repr_html_()
    assert "<tr><td>fingerprint</td><td>done</td><td>5 cases</td></tr>" in project._repr_html_()
    project.folder.project.unlink()
    assert repr(project) == f"Project({str(root)!r})"


def test_what_is_told_is_logged(volumes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    project = Project.create(tmp_path / "p", volumes)
    project.progress.warn(warning("code", "look here"))
    with caplog.at_level(logging.INFO, "segfit"):
        project.progress.note("a fact")
    assert [(item.name, item.levelname) for item in caplog.records] == [("segfit", "WARNING"), ("segfit", "INFO")]
