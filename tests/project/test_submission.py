"""A run as tasks of a scheduler that is none of ours: what is submitted, once, in order; and what comes out."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from segfit.cli.main import run
from segfit.errors import InputError, StageError
from segfit.execution.scheduler import AGAIN_LATER, Job, TaskState
from segfit.progress import SILENT
from segfit.project import Project, submission
from segfit.project.folder import ProjectFolder
from segfit.project.submission import Cluster, scripts_of, submit
from segfit.project.submitted import cancel_tasks, tasks_of

TOY = """
import json, os, signal, subprocess
from pathlib import Path
from shlex import join

from segfit.errors import InputError
from segfit.execution.scheduler import TaskState


class Toy:
    '''Each task is a shell that waits for the files which those before leave when they have ended.'''

    def __init__(self, options, folder):
        if options:
            raise InputError(f"toy does not know the option {sorted(options)[0]}")
        self.folder = folder

    def script(self, job):
        return job.name

    def submit(self, job):
        ids = []
        for task in job.tasks:
            name = f"t{len(list(self.folder.glob('*.pid')))}"
            waits = [f"until [ -e {one}.code ]; do sleep 0.05; done" for one in job.after]
            does = " && ".join([*waits, *map(join, task.commands)])
            does = f"({does}); code=$?; [ $code = 3 ] && code=0; echo $code >{name}.code"
            start = 'setsid sh -c "$0" </dev/null >"$1" 2>&1 & echo $! >"$2"'
            subprocess.run(["sh", "-c", start, does, f"{name}.log", f"{name}.pid"], cwd=self.folder, check=True)
            ids.append(name)
        return ids

    def states(self, ids):
        codes = {one: self.folder / f"{one}.code" for one in ids}
        return {
            one: TaskState("running", "here") if not code.exists()
            else TaskState("done" if code.read_text() == "0\\n" else "ended", "here", code.read_text())
            for one, code in codes.items()
        }

    def cancel(self, ids):
        for one in ids:
            (self.folder / f"{one}.code").write_text("143\\n")
            os.killpg(int((self.folder / f"{one}.pid").read_text()), signal.SIGTERM)

    def log(self, task):
        return self.folder / f"{task}.log"


class toy:
    open_tasks = Toy
"""
SETTINGS = ["planning.configurations=3d_fullres", "training.precision=fp32", "training.channels_last=true"]
_PATIENCE_S = 600.0


@pytest.fixture
def toy(plugin_package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> str:
    folder = plugin_package(TOY, executors=["toy"])
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return "own-things:toy"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs setsid, which Linux has")
def test_an_engine_from_outside_does_a_run(
    tmp_path: Path, volumes: Path, tiny: list[str], toy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*tiny, *SETTINGS, "planning.folds=0,1"]
    given = [part for setting in settings for part in ("--set", setting)]
    out = tmp_path / "far"
    command = ["run", str(volumes), "--out", str(out), *given, "--executor", toy]
    assert run([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.split() == ["far-plan", "far-train", "far-select"]
    assert not (out / "tasks").exists()
    code = run([*command, "--wait"])
    assert code in (0, 3), capsys.readouterr()
    tasks = tasks_of(ProjectFolder(out))
    assert [(item.title, item.state, item.reached) for item in tasks] == [
        ("check, plan and preprocessing", "done", None),
        ("training 3d_fullres, fold 0", "done", 1.0),
        ("training 3d_fullres, fold 1", "done", 1.0),
        ("selection, model and report", "done", None),
    ]
    here = Project.create(tmp_path / "here", volumes, settings=settings)
    here.run()
    for weights in (here.folder.root / "model").glob("*.safetensors"):
        assert (out / "model" / weights.name).read_bytes() == weights.read_bytes()
    capsys.readouterr()
    assert run([*command, "--json"]) == code  # all is done
    assert json.loads(capsys.readouterr().out)["report"] == str(out / "report.html")
    assert len((out / "tasks/submitted.jsonl").read_text().splitlines()) == 4
    assert run(["status", str(out), "--json"]) == 0
    assert [item["where"] for item in json.loads(capsys.readouterr().out)["tasks"]] == ["here"] * 4


class Listed:
    """A scheduler that writes down what it is told, and does nothing."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.ended: list[str] = []
        self.refused: str | None = None

    def script(self, job: Job) -> str:
        return f"{job.name} after {' '.join(job.after)}"

    def submit(self, job: Job) -> list[str]:
        if self.refused is not None and job.name.endswith(self.refused):
            raise InputError(f"{job.name} is refused")
        self.jobs.append(job)
        return [f"{len(self.jobs)}_{number}" for number in range(len(job.tasks))]

    def states(self, ids: list[str]) -> dict[str, TaskState]:
        return {one: TaskState("ended" if one in self.ended else "waiting") for one in ids}

    def cancel(self, ids: list[str]) -> None:
        self.ended += ids

    def log(self, task: str) -> Path:
        return Path(task)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Listed:
    scheduler = Listed()
    for module in ("submission", "submitted"):
        monkeypatch.setattr(f"segfit.project.{module}.open_scheduler", lambda *_: scheduler)
    return scheduler


CLUSTER = Cluster("slurm", None)


def sized(folder: Path, volumes: Path, tiny: list[str], *more: str) -> Project:
    project = Project.create(folder, volumes, settings=[*tiny, *SETTINGS, "planning.folds=0,1", *more])
    project.size()
    return project


def test_before_planning_planning_alone_is_submitted_once(
    tmp_path: Path, volumes: Path, tiny: list[str], listed: Listed
) -> None:
    project = Project.create(tmp_path / "p", volumes, settings=tiny)
    assert submit(project, CLUSTER) == 1
    assert submit(project, CLUSTER) == 0
    (job,) = listed.jobs
    (task,) = job.tasks
    assert [command[5] for command in task.commands] == ["plan", "preprocess", "run"]
    assert {command[3:5] for command in task.commands} == {("--expect", version("segfit"))}
    assert task.commands[2][-1] == "--planned"
    assert not project.folder.fingerprint.exists()  # nothing is read where nothing is trained
    with pytest.raises(StageError, match="no plan"):
        submit(project, CLUSTER, planned=True)
    other = Project.create(tmp_path / "p", volumes, settings=[*tiny, "seed=7"])
    assert submit(other, CLUSTER) == 1
    assert cancel_tasks(project.folder, SILENT) == 2 * ["check, plan and preprocessing"]
    assert submit(other, CLUSTER) == 1


def test_a_plan_of_another_machine_is_made_where_it_is_trained(
    tmp_path: Path, volumes: Path, tiny: list[str], listed: Listed
) -> None:
    project = sized(tmp_path / "p", volumes, tiny)
    assert scripts_of(project, CLUSTER) == ["p-plan after ", "p-train after ", "p-select after TRAIN"]
    assert not list(project.folder.runs.glob("*"))
    submit(project, CLUSTER, planned=True)
    assert scripts_of(project, CLUSTER) == ["p-train after ", "p-select after TRAIN"]
    project.hardware  # noqa: B018 - looked at
    elsewhere = Project.open(tmp_path / "p")
    elsewhere._resolved["hardware"] = type(project.hardware)(
        device="cpu", name="another", threads=64, free_memory_gb=500.0, fast_bf16=True
    )
    assert elsewhere.size().machine == project.hardware.machine  # what is submitted is not planned anew


def test_the_cascade_waits_for_its_first_stage_and_selection_for_all(
    tmp_path: Path, volumes: Path, tiny: list[str], listed: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = sized(tmp_path / "p", volumes, tiny)
    known = submission.trainings_of(project)
    second = type("Second", (submission.Training,), {"is_second_stage": True})
    fields = {name: getattr(known[1], name) for name in known[1].__slots__}
    monkeypatch.setattr(submission, "trainings_of", lambda _: [known[0], second(**fields)])
    assert submit(project, CLUSTER, planned=True) == 3
    assert [(job.name, job.after) for job in listed.jobs] == [
        ("p-train", ()),
        ("p-cascade", ("1_0",)),
        ("p-select", ("1_0", "2_0")),
    ]
    assert submit(project, CLUSTER) == 0
    listed.ended.append("1_0")  # it failed, and those that wait for it are in the queue yet
    assert submit(project, CLUSTER) == 3
    assert listed.ended == ["1_0", "2_0", "3_0"]
    assert [job.after for job in listed.jobs[3:]] == [(), ("4_0",), ("4_0", "5_0")]


def test_a_task_that_failed_is_submitted_beside_those_at_work(
    tmp_path: Path, volumes: Path, tiny: list[str], listed: Listed
) -> None:
    project = sized(tmp_path / "p", volumes, tiny)
    assert submit(project, CLUSTER, planned=True) == 3
    listed.ended.append("1_1")
    assert submit(project, CLUSTER) == 2
    (task,) = listed.jobs[2].tasks
    assert task.commands[0][5:] == (
        "train",
        str(project.folder.root),
        *("--folds", "1", "--configurations", "3d_fullres", "--validate"),
    )
    assert listed.jobs[3].after == ("3_0", "1_0")
    assert "2_0" in listed.ended


def test_selection_begins_when_no_task_is_at_work_on_a_training_and_none_has_failed(
    tmp_path: Path, volumes: Path, tiny: list[str], listed: Listed, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "p")
    submit(sized(tmp_path / "p", volumes, tiny), CLUSTER, planned=True)
    (last,) = listed.jobs[1].tasks
    look = list(last.commands[0][5:])
    assert look == ["train", out, "--trained"]
    assert [command[5] for command in last.commands] == ["train", "run"]
    assert run(look) == AGAIN_LATER  # both wait yet, whatever the scheduler thought
    listed.ended.append("1_1")
    assert run(look) == 1
    assert "training 3d_fullres, fold 1" in " ".join(capsys.readouterr().err.split())
    assert run(["train", out, "--folds", "1"]) == 0  # it is there, whatever became of its task
    assert run(look) == AGAIN_LATER
    assert run(["train", out]) == 0
    assert run(look) == 0


def test_trainings_alone_are_submitted_with_no_selection(
    tmp_path: Path, volumes: Path, tiny: list[str], listed: Listed
) -> None:
    asked = ["--folds", "1", "--executor", "slurm"]
    new = Project.create(tmp_path / "new", volumes, settings=tiny)
    assert run(["train", str(tmp_path / "new"), *asked]) == 0
    (task,) = listed.jobs.pop().tasks
    assert task.commands[2][5:] == ("train", str(new.folder.root), *asked, "--planned")
    project = sized(tmp_path / "p", volumes, tiny)
    assert run(["train", str(tmp_path / "p"), *asked, "--planned"]) == 0
    assert [(job.name, [task.title for task in job.tasks]) for job in listed.jobs] == [
        ("p-train", ["training 3d_fullres, fold 1"])
    ]
    assert submit(project, CLUSTER) == 2  # the other one and selection; that one is at work
    assert run(["train", str(tmp_path / "p"), "--folds", "7", "--executor", "slurm"]) == 2
    listed.ended += ["1_0", "2_0", "3_0"]
    project.train(folds=[1])
    assert run(["train", str(tmp_path / "p"), *asked, "--json"]) == 0  # there is nothing to do
    assert len(listed.jobs) == 3


def test_a_machine_with_another_version_does_nothing(
    tmp_path: Path, volumes: Path, tiny: list[str], listed: Listed, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project.create(tmp_path / "p", volumes, settings=tiny)
    submit(project, CLUSTER)
    command = listed.jobs[0].tasks[0].commands[0]
    assert run(["--expect", "0.0.1", *command[5:]]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert version("segfit") in told
    assert "0.0.1" in told
    assert not project.folder.fingerprint.exists()


@pytest.mark.parametrize("fault", ["full", "torn"])
def test_a_full_disk_leaves_nothing_submitted_twice(
    tmp_path: Path, volumes: Path, tiny: list[str], listed: Listed, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    project = Project.create(tmp_path / "p", volumes, settings=tiny)

    def full(folder: ProjectFolder, items: list[submission.Submitted]) -> None:
        if fault == "torn":
            (folder.tasks / "submitted.jsonl").write_text('{"id": "1_')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.tasks / "submitted.jsonl"))

    with monkeypatch.context() as patched:
        patched.setattr(submission, "note", full)
        assert run(["run", str(tmp_path / "p"), "--executor", "slurm"]) == 1
    assert listed.ended == ["1_0"]  # what cannot be written down is taken back
    assert submit(project, CLUSTER) == 1
    assert submit(project, CLUSTER) == 0
    assert [item.id for item in tasks_of(project.folder)] == ["2_0"]


def test_nothing_is_left_of_what_is_refused(tmp_path: Path, volumes: Path, tiny: list[str], listed: Listed) -> None:
    project = sized(tmp_path / "p", volumes, tiny)
    listed.refused = "select"
    with pytest.raises(InputError, match="p-select is refused"):
        submit(project, CLUSTER, planned=True)
    assert sorted(listed.ended) == ["1_0", "1_1"]


def test_lines_of_strangers_reach_no_command(tmp_path: Path, volumes: Path, tiny: list[str], listed: Listed) -> None:
    project = Project.create(tmp_path / "p", volumes, settings=tiny)
    submit(project, CLUSTER)
    path = project.folder.tasks / "submitted.jsonl"
    line = json.loads(path.read_text())
    for change in ({"id": "--user=me"}, {"id": "1;ls"}, {"executor": "a b"}, {"training": ["../..", 0]}):
        with path.open("a") as handle:
            handle.write(json.dumps({**line, "title": str(change), **change}) + "\n")
    assert [item.id for item in tasks_of(project.folder)] == ["1_0"]


def test_where_the_scheduler_is_not_there_the_state_is_unknown(
    tmp_path: Path, volumes: Path, tiny: list[str], listed: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project.create(tmp_path / "p", volumes, settings=tiny)
    submit(project, CLUSTER)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    path = project.folder.tasks / "submitted.jsonl"
    line = json.loads(path.read_text())
    with path.open("a") as handle:
        handle.write(json.dumps({**line, "title": "another", "executor": "nobody:grid"}) + "\n")
    found = [(item.state, item.is_at_work, bool(item.detail)) for item in tasks_of(project.folder)]
    assert found == 2 * [("unknown", True, True)]
    assert run(["status", str(tmp_path / "p")]) == 0
    assert run(["stop", str(tmp_path / "p")]) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dry-run"], "give --executor slurm"),
        (["--wait"], "give --executor slurm"),
        (["--cluster", "c.yaml"], "give --executor slurm"),
        (["--executor", "pbs"], "got 'pbs'"),
        (["--executor", "nobody:pbs"], "install the package nobody"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    tmp_path: Path, volumes: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert run(["run", str(volumes), "--out", str(tmp_path / "p"), *arguments]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "p").exists()


def test_an_option_that_is_not_known_is_told_with_its_file(
    tmp_path: Path, volumes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("yaml")
    file = tmp_path / "c.yaml"
    file.write_text("partitoin: gpu\n")
    given = ["run", str(volumes), "--out", str(tmp_path / "p"), "--executor", "slurm", "--cluster", str(file)]
    assert run(given) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "c.yaml: the option partitoin is not known (did you mean 'partition'?)" in told
    assert not (tmp_path / "p").exists()


def test_stop_ends_what_was_submitted(
    tmp_path: Path, volumes: Path, tiny: list[str], listed: Listed, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project.create(tmp_path / "p", volumes, settings=tiny)
    submit(project, CLUSTER)
    assert run(["status", str(tmp_path / "p")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"next: segfit stop {tmp_path}/p")
    assert run(["stop", str(tmp_path / "p"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"cancelled": ["check, plan and preprocessing"]}
    assert listed.ended == ["1_0"]
    assert project.folder.stop.exists()
    assert run(["status", str(tmp_path / "p")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: segfit run {tmp_path}/p --executor slurm"
    assert run(["stop", str(tmp_path)]) == 2


def test_ctrl_c_while_it_waits_ends_the_tasks(
    tmp_path: Path, volumes: Path, tiny: list[str], listed: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", pressed)
    given = [part for setting in tiny for part in ("--set", setting)]
    assert run(["run", str(volumes), "--out", str(tmp_path / "p"), *given, "--executor", "slurm", "--wait"]) == 130
    assert listed.ended == ["1_0"]
