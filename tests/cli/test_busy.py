"""Threads, processors and busy machines; looked at in fresh processes, since torch reads the environment once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from segfit.cli import machine, main, projects
from segfit.cli.main import run
from segfit.dataset.phantom import make_phantom
from segfit.execution.workers import WorkerPool
from segfit.options import parse_seconds
from segfit.project import Project

_SET_BY_USERS = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MKL_NUM_THREADS")
_SPIN = """
import os, sys, time
end = time.monotonic() + 120
while time.monotonic() < end and os.getppid() == int(sys.argv[1]):
    for _ in range(10**5):
        pass
"""

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to processors"
)


def started(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with nothing said about threads but what is given."""
    kept = {name: value for name, value in os.environ.items() if name not in _SET_BY_USERS}
    return subprocess.run([sys.executable, *command], env=kept | environment, capture_output=True, text=True)


def fresh(*command: str, **environment: str) -> str:
    """Run Python as `started` does, to its end; return what it printed."""
    done = started(*command, **environment)
    assert done.returncode in (0, 3), done.stderr  # however little it learned there
    return done.stdout


@pytest.fixture
def busy_neighbour() -> Iterator[None]:
    """A process that never waits."""
    with subprocess.Popen([sys.executable, "-c", _SPIN, str(os.getpid())]) as process:
        try:
            yield
        finally:
            process.kill()


# Runs a verb that loads torch, and tells at last the policy as it was when the imports that read it began.
_DOCTOR = """
import json, os, sys
found = {}
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "numpy", "scipy"):
            found[name] = os.environ.get("OMP_WAIT_POLICY")
sys.meta_path.insert(0, Watch())
from segfit.cli import main
assert not found, "importing the command line loads nothing"
sys.argv[1:] = ["doctor", "--device", "cpu", "--json"]
try:
    main.main()
except SystemExit:
    print(json.dumps(found))
"""


def doctor(**environment: str) -> tuple[dict[str, str], tuple[str, str]]:
    """Return the policy at each import and what doctor says of it."""
    rows, _, found = fresh("-c", _DOCTOR, **environment).strip().rpartition("\n")
    told = {row["what"]: (row["state"], row["found"]) for row in json.loads(rows)}
    return json.loads(found), told["waiting threads"]


def test_threads_sleep_and_that_is_set_before_what_reads_it_is_imported() -> None:
    at_import, told = doctor()
    assert at_import["torch"] == at_import["numpy"] == "passive"
    assert told == ("good", "sleep (OMP_WAIT_POLICY=passive)")


def test_what_the_user_set_stays_and_is_told() -> None:
    at_import, told = doctor(OMP_WAIT_POLICY="active", KMP_BLOCKTIME="200")
    assert at_import["torch"] == "active"
    spins = "may spin (OMP_WAIT_POLICY=active, KMP_BLOCKTIME=200); slow beside other busy processes"
    assert told == ("note", spins)


def test_doctor_tells_when_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _SET_BY_USERS:
        monkeypatch.delenv(name, raising=False)
    told = "may spin (OMP_WAIT_POLICY is not set); slow beside other busy processes"
    assert machine._waiting() == ("waiting threads", "note", told)


def test_the_library_leaves_the_environment_alone() -> None:
    code = "import os; before = dict(os.environ); import segfit; segfit.Project; print(before == dict(os.environ))"
    assert fresh("-c", code) == "True\n"


def test_workers_inherit_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    with WorkerPool(1) as pool:
        assert pool.submit(os.getenv, "OMP_WAIT_POLICY").result() == "passive"


@pytest.mark.parametrize(("granted", "number"), [(3, "3"), (8, None)])
def test_no_more_threads_than_a_control_group_grants(
    granted: int, number: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in _SET_BY_USERS:
        monkeypatch.setenv(name, "")  # or what is set now would stay after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(main, "affinity", lambda: 8)
    monkeypatch.setattr(main, "available_workers", lambda: granted)
    main._share_processors()
    assert os.environ.get("OMP_NUM_THREADS") == number


@needs_affinity
def test_threads_heed_the_affinity() -> None:
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from segfit.cli.main import _share_processors
_share_processors()
import torch
before = len(os.listdir("/proc/self/task"))
torch.randn(512, 512) @ torch.randn(512, 512)
torch.nn.functional.conv2d(torch.randn(4, 16, 128, 128), torch.randn(16, 16, 3, 3)).sum()
print(torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before)
"""
    assert fresh("-c", code) == "1 0\n"


class _Recorder:
    """A clock that a run advances, and what the run was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, took: float) -> None:
        self.now, self.named = 0.0, {}

        def fake_run(project: Project, **named: bool) -> None:
            self.named = named
            self.now += took

        monkeypatch.setattr(Project, "run", fake_run)
        monkeypatch.setattr(projects, "perf_counter", lambda: self.now)
        monkeypatch.setattr(projects, "print_outcome", lambda project, as_json: None)


@pytest.mark.parametrize(
    ("took", "arguments", "told"),
    [
        (299.0, [], ""),
        (372.0, [], "the demo took 6 min: this machine is busy\n"),
        (372.0, ["--seconds", "600"], ""),
    ],
)
def test_the_demo_overruns_and_says_so(
    took: float,
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_phantom(tmp_path / "Dataset000_Phantom", cases=2, shape=(8, 8, 8))
    recorder = _Recorder(monkeypatch, took)
    assert run(["demo", "--out", str(tmp_path), *arguments]) == 0
    assert recorder.named == {"overrun": True}
    assert capsys.readouterr().err == told


@pytest.mark.slow
def test_a_run_beside_a_busy_process(busy_neighbour: None, tmp_path: Path) -> None:
    data = make_phantom(tmp_path / "Dataset001_Volumes", cases=5, test_cases=2, shape=(12, 24, 24))
    settings = ("training.steps=4", "planning.base_features=4", "planning.batch_size=2", "planning.folds=0")
    given = [part for setting in settings for part in ("--set", setting)]
    out = tmp_path / "p"
    assert "test (2 cases)" in fresh("-m", "segfit", "run", str(data), "--out", str(out), "--device", "cpu", *given)
    assert (out / "report.html").is_file()


_LIMITED = """
import os, resource, sys
if sys.argv.pop(1) == "memory":
    resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))
else:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from segfit.cli.main import main
main()
"""


@needs_affinity
@pytest.mark.slow
@pytest.mark.parametrize("limited", ["memory", "processors"])
def test_a_timed_run_within_limits(limited: str, tmp_path: Path) -> None:
    """With 2 GiB of memory, and on one processor: there is a model, and training took the time it had.

    Where 30 s are too short on a machine with much other work, the time that the refusal names suffices.
    """
    data = make_phantom(tmp_path / "Dataset001_Volumes", cases=5, test_cases=2, shape=(12, 24, 24))
    out = tmp_path / "p"
    command = ("-c", _LIMITED, limited, "run", str(data), "--out", str(out), "--device", "cpu", "--json", "--time")
    refused = re.search(r"works here is --time (\w+)", started(*command, "30s").stderr)
    budget = parse_seconds(refused[1]) if refused else 30.0
    assert budget <= 600
    fresh(*command, f"{budget:g}s")
    run = json.loads((out / "plan.json").read_text())["run"]
    [trained] = [json.loads(path.read_text()) for path in out.glob("runs/*/fold-*/*/training.json")]
    own_steps = trained["steps"] - trained["first_step"]
    assert trained["seconds"] <= 1.1 * run["seconds_per_training"] or own_steps == 100  # those it goes on for
    assert run["seconds_per_training"] < budget
    assert run["forecast"]["train"]["seconds"] <= budget
    assert trained["steps"] >= 100
    if limited == "memory":
        assert trained["peak_memory_gb"] < 2
    assert (out / "model").is_dir()
