"""How often a run opens the files of its dataset, and reads the documents of its project.

Everything is counted in a process of its own and in those that it starts: an audit hook, installed by a
``sitecustomize`` module, appends what it sees to a file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from segfit.images.formats import read_image, read_label, write_labels
from segfit.images.image import LabelMap
from series_builder import write_series

_HOOK = """
import os, sys

_log = os.open(os.environ["OPENS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_dataset, _project = os.environ["OPENS_DATASET"] + os.sep, os.environ["OPENS_PROJECT"] + os.sep


def _note(kind, path):
    os.write(_log, f"{kind}\\t{path}\\n".encode(errors="surrogateescape"))


def _hook(event, arguments):
    if event != "open" or not isinstance(arguments[0], (str, bytes)):
        return
    path = os.fsdecode(arguments[0])
    if path.startswith(_dataset):
        _note("open", path)
    elif path.startswith(_project) and path.endswith(".json") and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        _note("parse", path)


sys.addaudithook(_hook)
"""
_TINY = ["training.steps=6", "planning.base_features=4", "planning.batch_size=2", "planning.folds=0"]
_UNTRUSTED = 3  # a few steps teach nothing

Counts = dict[str, Counter[str]]  # by kind (open, parse), then by path


@pytest.fixture(scope="module")
def counted(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Counts, Counts]:
    """What a run with nothing cached and the same run again did."""
    folder = tmp_path_factory.mktemp("opens")
    return _run(volumes, folder / "p", folder / "fresh"), _run(volumes, folder / "p", folder / "again")


def _run(dataset: Path, project: Path, log: Path) -> Counts:
    hook = log.with_suffix(".hook")
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(_HOOK)
    paths = [str(hook), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OPENS_LOG": str(log),
        "OPENS_DATASET": str(dataset),
        "OPENS_PROJECT": str(project),
    }
    settings = [part for setting in _TINY for part in ("--set", setting)]
    command = [sys.executable, "-m", "segfit", "run", str(dataset), "--out", str(project), *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == _UNTRUSTED, done.stderr
    counts: Counts = {"open": Counter(), "parse": Counter()}
    for line in log.read_text(errors="surrogateescape").splitlines():
        kind, path = line.split("\t")
        counts[kind][path] += 1
    return counts


_FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")


@pytest.mark.parametrize("folder", _FOLDERS)
def test_files_of_the_dataset_are_opened_three_times_and_not_again(counted: tuple[Counts, Counts], folder: str) -> None:
    fresh, again = ({p: n for p, n in one["open"].items() if Path(p).parent.name == folder} for one in counted)
    assert len(fresh) == (5 if folder.endswith("Tr") else 2)
    assert max(fresh.values()) <= (3 if folder.startswith("images") else 2), fresh
    assert again == {}


def test_the_declaration_of_the_dataset_is_opened_twice_and_once_again(counted: tuple[Counts, Counts]) -> None:
    opens = [counts["open"] for counts in counted]
    assert [max(n for path, n in one.items() if path.endswith(".json")) for one in opens] == [2, 1]


def test_slices_of_series_are_opened_three_times_and_not_again(volumes: Path, tmp_path: Path) -> None:
    dataset = _as_series(volumes, tmp_path / "Dataset003_Series")
    fresh, again = (_run(dataset, tmp_path / "p", tmp_path / name)["open"] for name in ("fresh", "again"))
    slices = {path: number for path, number in fresh.items() if Path(path).name.startswith("slice")}
    assert len(slices) == len(list(dataset.rglob("slice*")))
    *others, second, most = sorted(slices.values())
    assert max(others) <= 3
    # One slice of imagesTr and one of imagesTs tell that these folders hold series, each time that a dataset is opened.
    assert (most, second) <= (6, 4)
    assert len([path for path in again if path in slices]) == 2


def _as_series(volumes: Path, root: Path) -> Path:
    """Write volumes as DICOM series, with NIfTI labels on their grids."""
    for source in volumes.glob("images*/*.nii.gz"):
        image, case = read_image(source), source.name.removesuffix(".nii.gz")
        folder = write_series(root / source.parent.name / case, image.array[0], image.grid.spacing_mm)
        name = f"{source.parent.name.replace('images', 'labels')}/{case.removesuffix('_0000')}.nii.gz"
        write_labels(root / name, LabelMap(read_label(volumes / name).array[0], read_image(folder).grid))
    declared = json.loads((volumes / "dataset.json").read_text())
    del declared["file_ending"]
    (root / "dataset.json").write_text(json.dumps(declared))
    return root


def test_documents_are_parsed_twice_at_most(counted: tuple[Counts, Counts]) -> None:
    for counts in counted:
        assert max(counts["parse"].values()) <= 2, counts["parse"]
