"""What is submitted to SLURM, and what its script does when the command is told to stop, is killed, or fails."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from segfit.errors import InputError, StageError
from segfit.execution import slurm
from segfit.execution.scheduler import Job, JobTask, open_scheduler, read_cluster_file
from segfit.execution.slurm import Slurm

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
_PATIENCE_S = 300.0
TWO = Job("p-train", (JobTask("one", (("a", "b c"), ("d",))), JobTask("two", (("e",),))), after=("7_0", "7_1"))


def facts_of(script: str) -> dict[str, str]:
    """Return the options that a script gives to sbatch."""
    pairs = [line.removeprefix("#SBATCH --").partition("=") for line in script.splitlines() if "#SBATCH" in line]
    return {name: value for name, _, value in pairs}


def test_a_script_says_what_its_job_needs(tmp_path: Path) -> None:
    folder = tmp_path / "of a project"
    options = {"partition": "gpu", "gpus_per_node": "a100:2", "time": "12:00:00", "exclusive": "true"}
    script = Slurm({**options, "tasks_at_once": "3"}, folder).script(TWO)
    assert facts_of(script) == {
        "job-name": "p-train",
        "array": "0-1%3",
        "partition": "gpu",
        "gpus-per-node": "a100:2",
        "time": "12:00:00",
        "exclusive": "",
        "chdir": f'"{folder}"',
        "output": f'"{folder}/%A_%a.log"',
        "open-mode": "append",
        "requeue": "",
        "signal": "B:USR1@120",
        "dependency": "afterany:7_0:7_1",
    }
    assert script.startswith("#!/bin/bash\n")
    assert [line.strip() for line in script.splitlines() if line.startswith("    run ")] == [
        "run a 'b c'",
        "run d",
        "run e",
    ]
    alone = facts_of(Slurm({}, folder).script(Job("p", TWO.tasks[:1])))
    assert alone["array"] == "0-0"
    assert "dependency" not in alone


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"partitions": "gpu"}, "partitions is not known (did you mean 'partition'?)"),
        ({"dependency": "afterok:1"}, "dependency of sbatch is set by segfit itself"),
        ({"wrap": "rm"}, "wrap is not known"),
        ({"partition": "a b"}, "partition is 'a b'"),
        ({"partition": "a\n#SBATCH --uid=0"}, "expected one word"),
        ({"comment": "$(id)"}, "expected one word"),
        ({"tasks_at_once": "0"}, "expected a number from 1"),
    ],
)
def test_options_that_are_not_known_are_refused_by_name(tmp_path: Path, options: dict[str, str], told: str) -> None:
    with pytest.raises(InputError) as refused:
        Slurm(options, tmp_path)
    assert told in str(refused.value)


def test_folders_that_slurm_would_misread_are_refused(tmp_path: Path) -> None:
    for name in ("50%", 'a"b'):
        with pytest.raises(InputError, match="misread"):
            Slurm({}, tmp_path / name)


def test_values_are_taken_as_they_are_written(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    file = tmp_path / "c.yaml"
    file.write_text("partition: gpu\ngpus-per-node: 1\ntime: 12:00:00\nexclusive: true\nnice: 010\n")
    found = {"partition": "gpu", "gpus_per_node": "1", "time": "12:00:00", "exclusive": "true", "nice": "010"}
    assert read_cluster_file(file) == found
    file.write_text("")
    assert read_cluster_file(file) == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("partition: [a, b]", "line 1"),
        ("a: 1\ntrain:\n  b: 2", "line 2"),
        ("just words", "line 1"),
        ("- a", "line 1"),
        ("a: 1\na: 2", "a twice"),
        ("a-b: 1\na_b: 2", "a_b twice"),
        ("a: 'b", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "line 1"),
        (f"a: {'b' * 70_000}", "more than"),
        ("\xff", "something else"),
    ],
)
def test_files_that_are_no_options_are_refused(tmp_path: Path, text: str, told: str) -> None:
    pytest.importorskip("yaml")
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as refused:
        read_cluster_file(file)
    assert told in str(refused.value)
    assert str(file) in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    with pytest.raises(InputError, match="cannot be read"):
        read_cluster_file(tmp_path / "none.yaml")


def test_other_schedulers_are_asked_for_by_package(tmp_path: Path, plugin_package: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="PACKAGE:NAME"):
        open_scheduler("pbs", {}, tmp_path)
    plugin_package("cases = object()", executors=["cases"])
    with pytest.raises(InputError, match="does no tasks"):
        open_scheduler("own-things:cases", {}, tmp_path)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands of SLURM that write down what they are given; say what they answer with `answer`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in ("sbatch", "squeue", "scancel", "scontrol"):
        answer(folder, name, "")
    return folder


def answer(folder: Path, name: str, words: str, code: int = 0, *, stream: int = 1) -> None:
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$*" >>{folder}/{name}.told\ncat >&{stream} <<"E"\n{words}\nE\nexit {code}\n')
    path.chmod(0o755)


def told_to(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.told"
    return path.read_text().splitlines() if path.exists() else []


def test_tasks_have_the_number_of_their_job(tmp_path: Path, commands: Path) -> None:
    answer(commands, "sbatch", "41;cluster")
    assert Slurm({}, tmp_path).submit(TWO) == ["41_0", "41_1"]
    answer(commands, "sbatch", "what?")
    with pytest.raises(StageError, match="instead of the number"):
        Slurm({}, tmp_path).submit(TWO)


def test_states_are_those_of_the_tasks_asked_for(tmp_path: Path, commands: Path) -> None:
    lines = ["41_0|RUNNING|n1|None", "41_1|PENDING||Dependency", "41_2|FAILED|n2|NonZeroExitCode"]
    lines += ["42_0|COMPLETED|n2|None", "43_0|COMPLETING|n3|None", "44_0|CANCELLED||Priority"]
    answer(commands, "squeue", "\n".join(lines))
    found = Slurm({}, tmp_path).states(["41_0", "41_1", "41_2", "42_0", "43_0", "50_0"])
    assert {task: (item.state, item.where) for task, item in found.items()} == {
        "41_0": ("running", "n1"),
        "41_1": ("waiting", ""),
        "41_2": ("ended", "n2"),
        "42_0": ("done", "n2"),
        "43_0": ("running", "n3"),
    }
    assert told_to(commands, "squeue")[0].endswith("--jobs=41,42,43,50")
    answer(commands, "squeue", "slurm_load_jobs error: Invalid job id specified", 1, stream=2)
    (tmp_path / "41_1.done").touch()
    found = Slurm({}, tmp_path).states(["41_0", "41_1"])
    assert {task: item.state for task, item in found.items()} == {"41_1": "done"}
    with pytest.raises(InputError, match="no task"):
        Slurm({}, tmp_path).cancel(["--user=me"])
    assert told_to(commands, "scancel") == []


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("sbatch: error: invalid partition specified: gpus", InputError),
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
            StageError,
        ),
    ],
)
def test_what_sbatch_says_is_told(tmp_path: Path, commands: Path, words: str, kind: type[Exception]) -> None:
    answer(commands, "sbatch", words, 1, stream=2)
    with pytest.raises(kind) as told:
        Slurm({}, tmp_path).submit(TWO)
    assert words.rpartition("error: ")[2] in str(told.value)


def test_a_machine_without_slurm_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="sbatch is not on this machine"):
        Slurm({}, tmp_path).submit(TWO)


def test_jobs_do_not_get_the_threads_of_this_machine(
    tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = commands / "sbatch"
    path.write_text(f'#!/bin/sh\necho "$OMP_NUM_THREADS" >>{commands}/threads\necho 1\n')
    monkeypatch.setattr(slurm, "available_workers", lambda: 2)
    for there, threads in ((8, "2"), (8, "3"), (2, "2")):  # taken by the command line; set by the user, twice
        monkeypatch.setattr(slurm, "affinity", lambda there=there: there)
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        Slurm({}, tmp_path).submit(TWO)
    assert (commands / "threads").read_text().split("\n") == ["", "3", "2", ""]


STOPS = """
import signal, sys, time
def stop(number, frame):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("begun", flush=True)
time.sleep(1000)
"""


def started(folder: Path, commands: Path, *parts: tuple[str, ...], starts: int = 0) -> subprocess.Popen[bytes]:
    """Start the script of a job as SLURM does."""
    script = folder / "job.sh"
    script.write_text(Slurm({}, folder).script(Job("p", (JobTask("one", parts),))))
    own = {
        "told": "x",
        "SLURM_ARRAY_TASK_ID": "0",
        "SLURM_JOB_ID": "9",
        "SLURM_ARRAY_JOB_ID": "8",
        "SLURM_RESTART_COUNT": str(starts),
    }
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(["bash", str(script)], cwd=folder, env=os.environ | own, stdout=log, stderr=log)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "state", "starts", "again"),
    [
        (signal.SIGUSR1, "RUNNING", 0, True),  # its time is nearly over
        (signal.SIGUSR1, "RUNNING", 100, False),  # and was so too often
        (signal.SIGUSR1, "COMPLETING", 0, False),  # and it is cancelled meanwhile
    ],
)
def test_a_command_is_told_and_begun_again(
    tmp_path: Path, commands: Path, number: int, state: str, starts: int, again: bool
) -> None:
    answer(commands, "squeue", state)
    process = started(
        tmp_path, commands, (sys.executable, "-c", STOPS), ("touch", str(tmp_path / "next")), starts=starts
    )
    wait_for(lambda: "begun" in (tmp_path / "log").read_text())
    process.send_signal(number)
    assert process.wait(_PATIENCE_S) == 143
    assert "saved" in (tmp_path / "log").read_text()
    assert told_to(commands, "scontrol") == (["requeue 9"] if again else [])
    assert not (tmp_path / "next").exists()


def test_what_follows_a_command_that_was_told_waits_for_the_next_start(tmp_path: Path, commands: Path) -> None:
    answer(commands, "squeue", "RUNNING")
    done = STOPS.replace("exit(143)", "exit(0)")
    process = started(tmp_path, commands, (sys.executable, "-c", done), ("touch", str(tmp_path / "next")))
    wait_for(lambda: "begun" in (tmp_path / "log").read_text())
    process.send_signal(signal.SIGUSR1)
    assert process.wait(_PATIENCE_S) == 143
    assert told_to(commands, "scontrol") == ["requeue 9"]
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize(
    ("code", "starts", "ends", "again"),
    [
        ("exit 143", 0, 143, False),  # stopped by a stop file
        ("kill -KILL $$", 0, 137, True),
        ("kill -KILL $$", 3, 137, False),
        ("exit 2", 0, 2, False),
        ("exit 0", 0, 0, False),
        ("exit 3", 0, 0, False),
        ("exit 75", 0, 75, True),  # what it needs is at work yet
        ("exit 75", 100, 75, False),
    ],
)
def test_a_command_that_is_killed_is_begun_again_a_few_times(
    tmp_path: Path, commands: Path, code: str, starts: int, ends: int, again: bool
) -> None:
    answer(commands, "squeue", "RUNNING")
    after = tmp_path / "next"
    process = started(tmp_path, commands, ("sh", "-c", code), ("touch", str(after)), starts=starts)
    assert process.wait(_PATIENCE_S) == ends
    assert told_to(commands, "scontrol") == (["requeue 9"] if again else [])
    assert after.exists() == (tmp_path / "8_0.done").exists() == (ends == 0)
