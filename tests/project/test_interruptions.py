"""Killed at any moment, the same command goes on and ends with the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from segfit.files import partial_folder
from segfit.project import Project

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
    assert "Traceback" not in errors
    assert not any(out.glob("runs/3d_fullres/fold-0/*/training.json"))
