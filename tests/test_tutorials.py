"""The tutorials can be followed: their commands and programs are run, on phantoms and for a few steps.

Of what a page says that a command printed, the first line is compared, but for its numbers.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from segfit.cli.main import run
from segfit.dataset.phantom import make_phantom
from segfit.images.formats import read_image, read_label, write_labels
from segfit.images.image import LabelMap
from series_builder import write_series

PAGES = Path(__file__).parents[1] / "docs" / "tutorials"
TINY = ["training.steps=4", "planning.base_features=4", "planning.batch_size=2", "planning.folds=0"]


def phantoms(folder: Path, labels: tuple[str, str], *channels: str, **how: Any) -> Path:
    """Make a small dataset with the classes and channels of a real one."""
    make_phantom(folder, **{"cases": 5, "test_cases": 2, "shape": (12, 24, 24)} | how)
    path = folder / "dataset.json"
    declared = json.loads(path.read_text())
    declared["labels"] = {"background": 0, labels[0]: 1, labels[1]: 2}
    declared["channel_names"] = {str(number): name for number, name in enumerate(channels)}
    path.write_text(json.dumps(declared))
    return folder


def published(folder: Path) -> None:
    """Make what the tutorial of the hippocampus begins with: the data, and a part of them as it was found."""
    phantoms(folder / "Dataset004_Hippocampus", ("Anterior", "Posterior"), "MRI")
    found = folder / "hippocampus_as_found"
    for part in ("images", "labels"):
        shutil.copytree(folder / "Dataset004_Hippocampus" / f"{part}Tr", found / part)
    for path in (found / "images").glob("*"):
        path.rename(path.with_name(path.name.replace("_0000", "")))
    (found / "labels" / "phantom_tr_004.nii.gz").unlink()


def microscopy(folder: Path) -> None:
    """Make pictures of nuclei, and new ones."""
    dataset = phantoms(
        folder / "Dataset120_Nuclei",
        ("interior", "boundary"),
        "R",
        "G",
        "B",
        kind="picture",
        shape=(64, 64),
        test_cases=0,
    )
    (folder / "new_images").mkdir()
    shutil.copy(dataset / "imagesTr" / "phantom_tr_000_0000.png", folder / "new_images" / "nuclei_000_0000.png")


def scans(folder: Path, **how: Any) -> None:
    """Make DICOM series with labels, and new ones, of phantoms."""
    source = phantoms(folder / "phantoms", ("organ", "lesion"), "CT", **how)
    for path in sorted((source / "imagesTr").iterdir()):
        number = int(path.name.split("_")[2])
        series = as_series(path, folder / "Scans" / "images" / f"scan{number:02}")
        label = read_label(source / "labelsTr" / path.name.replace("_0000", "")).array[0]
        (folder / "Scans" / "labels").mkdir(exist_ok=True)
        write_labels(folder / "Scans" / "labels" / f"scan{number:02}.nii.gz", LabelMap(label, read_image(series).grid))
    for path in sorted((source / "imagesTs").iterdir()):
        as_series(path, folder / "new_scans" / f"scan{90 + int(path.name.split('_')[2])}")
    shutil.rmtree(source)


def as_series(path: Path, folder: Path) -> Path:
    """Write a volume as a scanner exports it."""
    image = read_image(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write_series(folder, image.array[0], image.grid.spacing_mm)


def finished(folder: Path) -> None:
    """Make a model."""
    phantoms(folder / "MyDataset", ("organ", "lesion"), "MRI")
    follow("segfit run MyDataset --time 1m")


PREPARED: dict[str, Callable[[Path], None]] = {
    "hippocampus": published,
    "microscopy": microscopy,
    "dicom": scans,
    "../in-process": finished,
}


def blocks(name: str) -> Iterator[tuple[str, str]]:
    """Yield the fenced blocks of a page: what stands behind the fence, and the text."""
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield match[1], match[2]


def follow(line: str) -> None:
    """Run a command of a page with tiny settings; a comment names the exit code where it is not 0."""
    command, _, comment = line.partition("#")
    program, verb, *given = shlex.split(command)
    assert program == "segfit"
    if verb == "run":
        at = given.index("--time")
        given[at : at + 2] = [part for setting in TINY for part in ("--set", setting)]
    wanted = re.search(r"exit code (\d)", comment)
    code = run([verb, *given])
    assert code in ((0, 3) if verb == "run" else (int(wanted[1]) if wanted else 0,)), line


def plain(text: str) -> set[str]:
    """Return the lines of a text without their numbers and the width of their columns."""
    return {re.sub(r"\s+", " ", re.sub(r"[\d.]+", "N", line)).strip() for line in text.splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("name", PREPARED)
def test_a_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    PREPARED[name](tmp_path)
    printed, compared, names = "", 0, {}
    for language, text in blocks(name):
        if language == "sh":
            for line in text.splitlines():
                follow(line)
            captured = capsys.readouterr()
            printed = captured.out + captured.err
        elif language == "python":
            exec(compile(text, f"{name}.md", "exec"), names)
            printed = capsys.readouterr().out
        elif title := re.fullmatch(r'json title="([^"]+)"', language):
            (tmp_path / title[1]).write_text(text)
        elif language != "text":
            assert language == "", f"nothing tests blocks of {language}"
            assert plain(text.splitlines()[0]) <= plain(printed), printed
            compared += 1
    assert compared + len(names) > 2


@pytest.mark.real_data("hippocampus_as_found")
def test_the_check_of_what_was_found_is_what_the_page_says(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert run(["check", str(data / "hippocampus_as_found")]) == 2
    assert capsys.readouterr().out in [text for _, text in blocks("hippocampus")]


@pytest.mark.slow
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((PAGES / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for asked, tiny in (
        ('"Phantoms")', f'"Phantoms", settings={TINY})'),
        ("cases=12, test_cases=3", "cases=5, test_cases=1, shape=(12, 24, 24)"),
        ('time="2m"', ""),
    ):
        assert asked in program
        program = program.replace(asked, tiny)
    names: dict[str, Any] = {}
    exec(compile(program, "notebook.ipynb", "exec"), names)
    assert names["result"].labels.shape == names["image"].array.shape[1:]
    assert Path("project/report.html").is_file()
