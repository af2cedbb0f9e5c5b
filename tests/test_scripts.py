"""What setting up the environment says and installs, with a Python that only writes down what it is told."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
echo "$*" >>"$TOLD"
case "$*" in "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;; esac
"""

pytestmark = pytest.mark.skipif(shutil.which("sh") is None, reason="needs a POSIX shell")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a checkout without its sources, with that Python and a `uname` that says Linux."""
    for name in ("pyproject.toml", "constraints.txt", "scripts/environment"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in (("python", PYTHON), ("uname", "#!/bin/sh\necho Linux\n")):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    return tmp_path


def set_up(copy: Path, **environment: str) -> tuple[int, list[str], list[list[str]]]:
    """Run the script; return its exit code, the lines that it says, and what pip is given each time."""
    told = copy / "told"
    told.write_text("")
    own = {"PATH": f"{copy / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHON": "python", "TOLD": str(told)}
    command = ["sh", str(copy / "scripts/environment"), "all"]
    done = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=False)
    given = [line.split() for line in told.read_text().splitlines() if line.startswith("-m pip install")]
    return done.returncode, done.stderr.splitlines(), given


def test_each_step_is_said_before_it_is_done(copy: Path) -> None:
    code, said, given = set_up(copy)
    assert (code, len(said)) == (0, 3)
    assert "5 GB" in said[1]
    assert "SEGFIT_TORCH=cpu" in said[1]
    assert [item[-1] for item in given] == [pinned(copy), ".[all]"]
    assert set_up(copy) == (0, [], [])  # all is there


def test_the_build_without_cuda_is_remembered(copy: Path) -> None:
    set_up(copy)
    code, said, given = set_up(copy, SEGFIT_TORCH="cpu")
    assert (code, len(said)) == (0, 2)
    assert "5 GB" not in said[0]
    assert given[0][-3:] == ["--extra-index-url", "https://download.pytorch.org/whl/cpu", f"{pinned(copy)}+cpu"]
    assert set_up(copy) == (0, [], [])


def test_other_builds_are_refused(copy: Path) -> None:
    code, said, given = set_up(copy, SEGFIT_TORCH="cu99")
    assert (code, len(said), given) == (2, 1, [])
    assert "SEGFIT_TORCH is cu99, expected cpu" in said[0]


def pinned(copy: Path) -> str:
    """Return torch as it is pinned."""
    lines = (copy / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))
