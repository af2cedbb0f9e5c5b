"""What is handed over beside the code: the wheel, the container file, the citation."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ALONE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_CONFIG_FILE": os.devnull}  # 0: without isolation


def checkout(folder: Path, names: list[str]) -> Path:
    """Copy these parts of the checkout."""
    for name in names:
        source = ROOT / name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def environment(folder: Path) -> Path:
    """Make an empty environment that finds the installed dependencies, and not segfit; return its programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    libraries = subprocess.run([folder / "bin" / "python", "-c", program], capture_output=True, text=True, check=True)
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    found = [place for place in sys.path if place in places or Path(place).name == "site-packages"]
    Path(libraries.stdout.strip(), "dependencies.pth").write_text("\n".join(found), encoding="utf-8")
    return folder / "bin"


def run(command: list[str], folder: Path, **variables: str) -> str:
    """Run a command without PYTHONPATH and return what it prints."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=kept | ALONE | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="environments have other folders")
def test_the_wheel_has_all_files_and_runs_in_an_empty_environment(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="needs segfit[test]")
    source = checkout(tmp_path / "source", ["pyproject.toml", "README.md", "LICENSE", "src"])
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), "."], source)
    (wheel,) = tmp_path.glob("*.whl")
    files = {path.relative_to(source / "src").as_posix() for path in (source / "src").rglob("*") if path.is_file()}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("segfit/")} == files
    shutil.rmtree(source)
    programs = environment(tmp_path / "environment")
    run([str(programs / "python"), "-m", "pip", "install", "--no-deps", str(wheel)], tmp_path)
    assert PROJECT["version"] in run([str(programs / "segfit"), "--version"], tmp_path)
    made = "from segfit.dataset.phantom import make_phantom; make_phantom('data', cases=5, shape=(12, 24, 24))"
    run([str(programs / "python"), "-c", made], tmp_path)
    assert '"training_cases": 5' in run([str(programs / "segfit"), "check", "data", "--json"], tmp_path)


def steps() -> list[tuple[str, str]]:
    """Return the instructions of the container file in order."""
    text = (ROOT / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [
        (word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word not in ("", "#")
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a POSIX shell")
def test_the_steps_of_the_container_file(tmp_path: Path) -> None:
    """Do them as a script in a folder of its own; the packages are those that are installed here."""
    pytest.importorskip("editables", reason="needs segfit[test]")
    known = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT"}
    assert {word for word, _ in steps()} <= known
    environment(tmp_path / ".venv")
    variables = {"HOME": str(tmp_path)}
    printed = ""
    for word, rest in steps():
        rest = rest.replace("/opt/segfit", str(tmp_path)).replace("$PATH", os.environ["PATH"])
        if word in ("ARG", "ENV"):
            variables |= dict(part.split("=", 1) for part in shlex.split(rest))
        elif word == "COPY":
            checkout(tmp_path, shlex.split(rest)[:-1])
        elif word == "RUN":
            printed = run(["sh", "-c", rest], tmp_path, **variables)
    assert "good" in printed  # doctor
    assert variables["SEGFIT_TORCH"] == "cpu"
    assert steps()[-1] == ("ENTRYPOINT", '["segfit"]')


def test_the_context_of_the_container_has_what_is_copied_and_no_more() -> None:
    copied = {name for word, rest in steps() if word == "COPY" for name in shlex.split(rest)[:-1]}
    allowed = re.findall("^!(.*)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert copied == set(allowed)
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "constraints.txt"} <= copied


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type"} <= set(citation)
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    for work in (citation, *citation["references"]):
        assert work["title"]
        assert all(
            {"name"} == set(author) or {"family-names", "given-names"} <= set(author) for author in work["authors"]
        )
    assert [work["doi"] for work in citation["references"]] == ["10.1038/s41592-020-01008-z"]
