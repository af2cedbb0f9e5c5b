"""A run on a real SLURM of one node: told before its time ends, queued again, cancelled, and the result is the same."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from segfit.cli.main import run
from segfit.execution.scheduler import Job, JobTask
from segfit.execution.slurm import Slurm
from segfit.project import Project
from segfit.project.folder import ProjectFolder
from segfit.project.submitted import tasks_of

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm"
SETTINGS = [
    "training.steps=150",
    "training.checkpoint_seconds=0.2",
    "training.precision=fp32",
    "training.channels_last=true",
    "planning.base_features=4",
    "planning.batch_size=2",
    "planning.folds=0,1",
    "planning.configurations=3d_fullres",
]
_PATIENCE_S = 900.0  # for what takes seconds on an idle machine


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start a SLURM; its configuration."""
    folder = tmp_path_factory.mktemp("slurm")
    done = subprocess.run(["sh", str(SCRIPT), "start", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    yield folder / "slurm.conf"
    subprocess.run(["sh", str(SCRIPT), "stop", str(folder)], check=True)


@pytest.fixture(autouse=True)
def found(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def told(*command: str) -> None:
    subprocess.run(command, check=True)


def test_slurm_does_tasks_in_order_and_again(tmp_path: Path) -> None:
    slurm = Slurm({"partition": "low", "time": "10"}, tmp_path)
    killed = ("sh", "-c", "echo begun; kill -KILL $$")
    killed_once = ("sh", "-c", f"[ -e {tmp_path}/once ] || {{ touch {tmp_path}/once; kill -KILL $$; }}")
    first = Job("first", (JobTask("good", (killed_once, ("echo", "two  words"))), JobTask("bad", (("false",),))))
    good, bad = slurm.submit(first)
    look = ("test", "-e", f"{tmp_path}/{good}.done")  # it has ended once before, and was queued again
    (after,) = slurm.submit(Job("after", (JobTask("after", (look,)),), after=(good,)))
    (both,) = slurm.submit(Job("both", (JobTask("both", (look,)),), after=(good, bad)))
    ids = [good, bad, after, both]
    wait_for(lambda: all(item.state in ("done", "ended") for item in slurm.states(ids).values()))
    assert [slurm.states(ids)[one].state for one in ids] == ["done", "ended", "done", "done"]
    assert "two  words" in slurm.log(good).read_text()
    assert {path.stem for path in tmp_path.glob("*.done")} == {good, after, both}
    (hopeless,) = slurm.submit(Job("hopeless", (JobTask("hopeless", (killed,)),)))
    slurm.cancel([hopeless, good])
    wait_for(lambda: all(item.state == "ended" for item in slurm.states([hopeless]).values()))  # one may be forgotten
    assert slurm.states(["999999_0"]) == {}


def test_a_run_that_is_stopped_in_every_way_gives_the_same_weights(
    tmp_path: Path, volumes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Project.create(tmp_path / "here", volumes, settings=SETTINGS)
    here.run()
    (tmp_path / "cluster.yaml").write_text("partition: low\ntime: 00:30:00\ncpus-per-task: 1\n")
    out = tmp_path / "there"
    folder = ProjectFolder(out)
    given = [part for setting in SETTINGS for part in ("--set", setting)]
    command = ["run", str(volumes), "--out", str(out), *given, "--executor", "slurm"]
    command += ["--cluster", str(tmp_path / "cluster.yaml")]

    def states(fold: int) -> int:
        return len(list(out.glob(f"runs/3d_fullres/fold-{fold}/*/state/*")))

    def number(fold: int) -> str:
        return next(item.id for item in tasks_of(folder) if item.title.endswith(f"fold {fold}"))

    def said(fold: int) -> str:
        log = out / "tasks" / f"{number(fold)}.log"
        return log.read_text() if log.exists() else ""

    assert run(command) == 0
    wait_for(lambda: states(0) > 0)
    told("scancel", "--signal=USR1", "--batch", number(0))  # as SLURM does before the time ends
    wait_for(lambda: states(1) > 0)
    told("scontrol", "requeue", number(1))
    wait_for(lambda: "resuming from step" in said(0))
    told("scancel", number(0))
    wait_for(lambda: all(item.state != "waiting" for item in tasks_of(folder) if "selection" in item.title))
    assert not folder.report.exists()
    assert run([*command, "--wait"]) in (0, 3), capsys.readouterr()
    for fold in (0, 1):
        assert "resuming from step" in said(fold)
    for weights in (here.folder.root / "model").glob("*.safetensors"):
        assert (out / "model" / weights.name).read_bytes() == weights.read_bytes()
    assert {item.where for item in tasks_of(folder)} == {os.uname().nodename.split(".")[0]}


def test_what_slurm_refuses_leaves_nothing(
    tmp_path: Path, volumes: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cluster.yaml").write_text("partition: none\n")
    out = tmp_path / "p"
    command = ["run", str(volumes), "--out", str(out), "--executor", "slurm"]
    assert run([*command, "--cluster", str(tmp_path / "cluster.yaml")]) == 2
    assert "invalid partition specified: none" in " ".join(capsys.readouterr().err.split())
    assert tasks_of(ProjectFolder(out)) == []
