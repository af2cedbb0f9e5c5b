"""How the command begins and ends, whatever is around it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from segfit.cli.main import run
from segfit.dataset.phantom import make_phantom


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantom(tmp_path_factory.mktemp("data") / "volumes", cases=5, test_cases=0, shape=(8, 16, 16))


def command_that(does: str) -> list[str]:
    """Return a program like segfit, with the verb ``act`` alone, which `does` something and tidies up."""
    program = f"""
import os, signal, sys
from segfit.cli import main
@main.app.command()
def act():
    try:
        {does}
        print("done")
    finally:
        print("tidied up")
sys.argv = ["segfit", "act"]
main.main()
"""
    return [sys.executable, "-c", program]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_end_lets_the_work_tidy_up(name: str) -> None:
    command = command_that(f"os.kill(os.getpid(), signal.{name})")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.Signals[name], "tidied up\n")
    assert done.stderr == "\nstopped; the same command goes on where it was\n"


def test_libraries_that_read_and_draw_print_nothing_by_themselves() -> None:
    does = (
        "import logging, warnings; logging.getLogger('matplotlib.font_manager').warning('building'); "
        "warnings.warn_explicit('odd', UserWarning, 'x.py', 1, module='PIL.TiffImagePlugin'); "
        "warnings.warn_explicit('kept', UserWarning, 'x.py', 1, module='another')"
    )
    around = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(command_that(does), capture_output=True, text=True, check=False, env=around)
    assert (done.returncode, done.stderr) == (0, "x.py:1: UserWarning: kept\n")


def test_a_second_signal_does_not_wait() -> None:
    twice = "signal.raise_signal(signal.SIGTERM)\n        finally:\n            signal.raise_signal(signal.SIGTERM)"
    command = command_that(f"try:\n            {twice}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    command = command_that("os.kill(os.getpid(), signal.SIGHUP)")
    done = subprocess.run(["nohup", *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\ntidied up\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(dataset: Path, closed: str) -> None:
    command = ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-m", "segfit", "info", str(dataset)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("volumes" in done.stdout) == (">&-" not in closed.split())


@pytest.mark.parametrize("settings", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_errors_that_cannot_be_printed_still_have_their_exit_code(tmp_path: Path, settings: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | settings
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "segfit", "info", tmp_path]
        done = subprocess.run(command, stderr=full, env=environment, check=False)
    assert done.returncode == 2


@pytest.mark.parametrize("settings", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_results_that_cannot_be_printed_are_a_failure(dataset: Path, settings: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | settings
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "segfit", "info", str(dataset)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, check=False)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


def test_folders_whose_names_are_no_text(dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / os.fsdecode(b"Gef\xe4\xdfe")
    data.symlink_to(dataset)
    out = tmp_path / os.fsdecode(b"Gef\xe4\xdfprojekt")
    results = [
        subprocess.run(
            [sys.executable, "-m", "segfit", "plan", *given, "--out", out, "--json"], capture_output=True, check=False
        )
        for given in ([data], [data], [])
    ]
    assert [done.returncode for done in results] == [0, 0, 0], results
    assert results[0].stdout == results[1].stdout == results[2].stdout
    assert json.loads(results[0].stdout)["dataset"] == data.name


def test_a_number_of_workers_below_one(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(dataset), "--workers", "-1"]) == 2
    assert "Invalid value for '--workers'" in capsys.readouterr().err


def test_all_problems_of_a_refusal_as_json(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = dataset / "labelsTr"
    copy = tmp_path / "d"
    shutil.copytree(dataset, copy, ignore=lambda folder, names: names if Path(folder) == labels else [])
    assert run(["plan", str(copy), "--out", str(tmp_path / "p"), "--json"]) == 2
    out, error = capsys.readouterr()
    told = json.loads(out)["problems"]
    assert {item["case"] for item in told if item["fatal"]} >= {
        path.name.partition(".")[0] for path in labels.iterdir()
    }
    assert error.splitlines()[-1] == f"--json lists all {len(told)}"
