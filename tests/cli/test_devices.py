"""The command line on several devices: started by torchrun, or by itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import SET

from segfit.cli.devices import TEAM
from segfit.cli.main import run
from segfit.training.result import WEIGHTS
from segfit.training.team import Team
from segfit.training.threads import kept_threads

PATIENCE_S = 300


def started(arguments: list[str]) -> list[subprocess.Popen[str]]:
    """Start a command in two processes, with the environment that torchrun gives."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    there = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "segfit", *arguments],
            env={**os.environ, **there, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def newest_state(out: Path) -> int:
    steps = [int(path.stem.removeprefix("step-")) for path in out.glob("runs/*/fold-0/*/state/step-*")]
    return max(steps, default=0)


def wait_for_state(out: Path, after: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while newest_state(out) <= after and time.monotonic() < deadline:
        time.sleep(0.02)


def test_one_of_two_is_killed_and_the_same_command_goes_on(tmp_path: Path, dataset: Path) -> None:
    out = tmp_path / "p"
    settings = ["planning.base_features=4", "planning.batch_size=2", "planning.folds=0", "training.steps=100000"]
    chosen = [part for setting in settings for part in ("--set", setting)]
    command = ["train", str(dataset), "--out", str(out), *chosen, "--set", "training.checkpoint_seconds=0.001"]
    first, second = started(command)
    wait_for_state(out, 0)
    second.kill()
    told, quiet = (process.communicate(timeout=PATIENCE_S) for process in (first, second))
    assert (first.returncode, second.returncode) == (143, -signal.SIGKILL)
    assert "process 1 of 2 has ended" in " ".join(told[1].split())
    reached = newest_state(out)
    first, second = started(command)
    wait_for_state(out, reached)
    second.send_signal(signal.SIGTERM)  # torchrun sends it to all; the first heeds it
    first.send_signal(signal.SIGTERM)
    told, quiet = (process.communicate(timeout=PATIENCE_S) for process in (first, second))
    assert (first.returncode, second.returncode) == (143, 0)
    assert "resuming from step" in told[1]
    assert quiet == ("", "")
    assert newest_state(out) > reached


def test_a_command_starts_the_others_itself(tmp_path: Path, dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    plain = [
        "precision=fp32",
        "optimizer=sgd",
        "channels_last=false",
        "steps=3",
    ]
    command = ["train", str(dataset), *SET, *(part for value in plain for part in ("--set", f"training.{value}"))]
    assert run([*command, "--out", str(tmp_path / "two"), "--devices", "2"]) == 0
    assert torch.get_num_threads() == threads
    with kept_threads(1):
        assert run([*command, "--out", str(tmp_path / "one")]) == 0
    (one,), (two,) = (list(tmp_path.glob(f"{name}/runs/*/fold-0/*/{WEIGHTS}")) for name in ("one", "two"))
    assert one.parent.name == two.parent.name  # the same training, by whatever number
    first, second = load_file(one), load_file(two)
    # Three steps: more enlarge the last digits, which depend on the library for matrices; test_team.py does ten.
    assert max((second[name] - tensor).abs().max().item() for name, tensor in first.items()) < 1e-5
    capfd.readouterr()
    token = TEAM.set(Team())
    try:
        assert run([*command, "--out", str(tmp_path / "two"), "--devices", "2"]) == 2
    finally:
        TEAM.reset(token)
    assert "leave out --devices" in capfd.readouterr().err


def test_a_cluster_is_not_this_machine(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(dataset), "--out", str(tmp_path / "p"), "--executor", "slurm", "--dry-run"]
    assert run([*command, "--devices", "2"]) == 2
    assert "--devices" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
