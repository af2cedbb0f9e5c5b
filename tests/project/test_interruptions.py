"""Killed at any moment, the same command goes on and ends with the same weights."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from segfit.bundle.bundle import open_bundle, weights_name
from segfit.cli.main import run
from segfit.errors import InputError, Problem, StoppedError
from segfit.execution.execution import Execution
from segfit.files import partial_folder
from segfit.inference.model import load_model
from segfit.project import Project, so_far
from segfit.project.selecting import Selected

_PATIENCE_S = 600.0  # for what takes ten seconds on an idle machine

SETTINGS = [
    "training.steps=60",
    "training.checkpoint_seconds=0.2",
    "planning.base_features=4",
    "planning.batch_size=2",
    "planning.folds=0",
    "training.precision=fp32",
    "training.channels_last=true",
]


def command(out: Path, dataset: Path) -> list[str]:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return [sys.executable, "-m", "segfit", "run", str(dataset), "--out", str(out), *settings]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_kill_9_in_three_stages_changes_nothing(tmp_path: Path, volumes: Path) -> None:
    whole = Project.create(tmp_path / "whole", volumes, settings=SETTINGS)
    whole.run()
    out = tmp_path / "killed"
    moments = [
        lambda: (out / "cases").is_dir(),
        lambda: any(out.glob("runs/*/fold-0/*/state/*")),
        lambda: any(out.glob("runs/*/fold-0/*/validation-*/*.nii.gz")),
    ]
    (tmp_path / "partial").mkdir()
    living = partial_folder(tmp_path / "partial").name
    for moment in moments:
        process = subprocess.Popen(command(out, volumes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(moment, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        for folder in (out, out / "cases"):
            for number in (process.pid, os.getpid()):
                (folder / living.replace(str(os.getpid()), str(number))).mkdir(exist_ok=True)
    done = subprocess.run(command(out, volumes), capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stderr  # so few steps need not teach anything
    assert "report:" in done.stdout
    assert sorted(out.rglob(".partial-*")) == [out / living, out / "cases" / living]
    name = "model/weights-3d_fullres-0.safetensors"
    assert (out / name).read_bytes() == (whole.folder.root / name).read_bytes()
    for path in (whole.folder.predictions).glob("*.nii.gz"):
        assert (out / "predictions" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "commands"), [("locks", 1), ("leases", 2)])
def test_kills_at_random_moments_lose_nothing(tmp_path: Path, pictures: Path, how: str, commands: int) -> None:
    script, seed = Path(__file__).with_name("run_tasks.py"), 7
    arguments = [str(pictures), str(tmp_path), "6", how, str(commands), str(seed)]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills, attempts, _ = (int(number) for number in re.findall(r"\d+", done.stdout))
    assert 6 <= kills <= attempts


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path: Path, volumes: Path) -> None:
    out = tmp_path / "p"
    process = subprocess.Popen(
        [*command(out, volumes), "--set", "training.steps=100000"], stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: any(out.glob("runs/*/fold-0/*/state/*")), process)  # type: ignore[arg-type]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=_PATIENCE_S)
    assert process.returncode == 130
    assert "the same command goes on" in errors
    assert f"segfit select {out} --so-far" in " ".join(errors.split())
    assert "Traceback" not in errors
    assert not any(out.glob("runs/3d_fullres/fold-0/*/training.json"))


class _Counting:
    """Progress that calls `react` at the fifth report of a training: after its fourth step."""

    def __init__(self, react: Callable[[], object]) -> None:
        self.react: Callable[[], object] = react
        self.told: list[str] = []
        self._title, self._count = "", 0

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[_Counting]:
        self._title, self._count = description, 0
        yield self

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        self._count += 1
        if self._title.startswith("training") and self._count == 5:
            self.react()

    def note(self, message: str) -> None:
        self.told.append(message)

    def warn(self, warning: Problem) -> None:
        pass


def test_a_stopped_run_leaves_the_model_and_its_state_and_goes_on(
    tmp_path: Path, pictures: Path, tiny: list[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    tiny += ["training.precision=fp32", "training.channels_last=true"]
    Project.create(out, pictures, settings=tiny).run()
    before = (out / "model/model.json").read_bytes()
    more = [*tiny, "training.steps=12", "training.checkpoint_seconds=1000"]
    Project.create(whole, pictures, settings=more).run()

    progress = _Counting(lambda: Project.open(out).stop())  # as another process does
    project = Project.create(out, pictures, settings=more, execution=Execution(progress=progress))
    with pytest.raises(StoppedError):
        project.run()
    assert [path.name for path in out.glob("runs/*/fold-0/*/state/*")] == [
        "step-000000007.safetensors"
    ]  # it goes on from before the cool-down, step 3
    assert (out / "model/model.json").read_bytes() == before
    assert load_model(out / "model").name
    progress.react = lambda: None
    project.run()  # the file that is there stops nothing any more
    assert "resuming from step 7" in progress.told
    (first,), (second,) = (list(folder.glob("model/weights-*.safetensors")) for folder in (whole, out))
    assert first.read_bytes() == second.read_bytes()


def _stop_in_the_first_training(out: Path, dataset: Path, settings: list[str]) -> Project:
    project = Project.create(
        out, dataset, settings=settings, execution=Execution(progress=_Counting(lambda: project.stop()))
    )
    with pytest.raises(StoppedError):
        project.run()
    assert not (out / "model").exists()
    return Project.open(out)


def _files(folder: Path) -> dict[str, bytes]:
    """The files of trainings, without what is handed over before they end."""
    paths = [path for path in folder.glob("runs/*/*/*/**/*") if path.is_file()]
    return {str(path): path.read_bytes() for path in paths if "so-far-" not in str(path)}


def test_a_first_training_that_was_stopped_gives_a_model_and_goes_on(
    tmp_path: Path, pictures: Path, tiny: list[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    tiny += ["training.precision=fp32", "training.channels_last=true", "training.steps=12"]
    Project.create(whole, pictures, settings=tiny).run()
    project = _stop_in_the_first_training(out, pictures, tiny)
    before = _files(out)
    selection = project.select(so_far=True)
    assert (selection.winner, selection.folds) == (("2d",), (0,))
    manifest = open_bundle(out / "model").manifest
    assert manifest.training["steps"] == [4]
    assert manifest.verdict["level"] != "good"
    assert load_model(out / "model").name
    assert _files(out) == before
    [state] = out.glob("runs/*/*/*/state/*")
    with (
        safe_open(state, framework="pt") as saved,
        safe_open(out / "model" / weights_name("2d", 0), framework="pt") as given,
    ):
        for name in given.keys():  # noqa: SIM118 - not a mapping
            assert torch.equal(given.get_tensor(name), saved.get_tensor(f"network/{name}"))
    model = (out / "model" / weights_name("2d", 0)).read_bytes()
    assert project.select(so_far=True) == selection
    assert (out / "model" / weights_name("2d", 0)).read_bytes() == model

    assert project.status().trained != 1.0
    Project.open(out).run()
    name = f"model/{weights_name('2d', 0)}"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert open_bundle(out / "model").manifest.training["steps"] == [12]
    assert Project.open(out).select(so_far=True) == Project.open(out).select()  # all is trained


def test_a_training_that_ends_meanwhile_has_its_own_model(
    tmp_path: Path, pictures: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = _stop_in_the_first_training(tmp_path / "p", pictures, tiny)
    select, ended = so_far.select_model, list[Project]()

    def late(*arguments: Any) -> Selected:
        if not ended:
            ended.append(Project.open(tmp_path / "p"))
            ended[0].run()
        return select(*arguments)

    monkeypatch.setattr(so_far, "select_model", late)
    selection = project.select(so_far=True)
    assert open_bundle(tmp_path / "p" / "model").manifest.training["steps"] == [6]
    assert ended[0].findings().selected is not None
    assert selection == Project.open(tmp_path / "p").select()


def test_what_has_not_begun_is_left_out_of_what_is_there_so_far(
    tmp_path: Path, pictures: Path, tiny: list[str]
) -> None:
    project = _stop_in_the_first_training(tmp_path / "p", pictures, [*tiny, "planning.folds=2,0"])
    assert project.select(so_far=True).folds == (2,)
    assert [item.name for item in (tmp_path / "p" / "model").glob("weights*")] == [weights_name("2d", 2)]


def test_nothing_is_handed_over_where_nothing_is_trained(tmp_path: Path, pictures: Path, tiny: list[str]) -> None:
    project = Project.create(tmp_path / "p", pictures, settings=tiny)
    with pytest.raises(InputError):
        project.select(so_far=True)
    project.size()
    with pytest.raises(InputError):
        project.select(so_far=True)
    assert not project.folder.runs.exists()


def test_the_verdict_says_that_the_training_has_not_ended(
    tmp_path: Path, pictures: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p"
    _stop_in_the_first_training(out, pictures, tiny)
    assert run(["select", str(out), "--so-far"]) == 0
    told = capsys.readouterr().out
    manifest = open_bundle(out / "model").manifest
    assert manifest.verdict["headline"] in told
    assert any("4 of about 6 steps" in text for text in manifest.verdict["findings"])


def test_touching_the_stop_file_ends_a_command_with_a_code_to_resume_on(
    tmp_path: Path,
    pictures: Path,
    tiny: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    out = tmp_path / "stopped"
    settings = [part for setting in tiny for part in ("--set", setting)]
    progress = _Counting((out / "stop").touch)
    monkeypatch.setattr("segfit.cli.common.console_progress", lambda *_: progress)
    arguments = ["train", str(pictures), "--out", str(out), *settings]
    assert run(arguments) == 143
    assert f"segfit select {out} --so-far" in capsys.readouterr().err
    progress.react = lambda: None
    assert run(arguments) == 0
    assert "resuming from step 4" in progress.told
