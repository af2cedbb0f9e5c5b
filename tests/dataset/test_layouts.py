"""From folders to cases: what is understood, and a corpus of malformed datasets with what is said about them."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_builder import a_label, build, edit, write_volume
from PIL import Image as Pillow

from segfit.dataset.layouts import cases_from_files, find_cases, inspect_dataset, open_dataset
from segfit.errors import DatasetError, InputError, Problem
from segfit.files import write_json
from segfit.progress import SILENT, KeptWarnings


def test_a_good_dataset(tmp_path: Path) -> None:
    root = build(tmp_path)
    for channel in range(2):
        write_volume(root / "imagesTs" / f"x_{channel:04d}.nii.gz")
        write_volume(root / "imagesTs" / f"y_{channel:04d}.nii.gz")
    write_volume(root / "labelsTs" / "y.nii.gz", a_label(1))
    dataset = open_dataset(str(root))
    assert dataset.name == "Dataset001_Test"
    assert dataset.channel_names == ("T1", "T2")
    assert dataset.file_ending == ".nii.gz"
    assert dataset.num_training == 5
    assert [case.id for case in dataset.training] == ["a", "b", "c", "d", "e"]
    assert [path.name for path in dataset.case("b").images] == ["b_0000.nii.gz", "b_0001.nii.gz"]
    assert dataset.case("b").label == root / "labelsTr" / "b.nii.gz"
    assert [(case.id, case.label) for case in dataset.test] == [("x", None), ("y", root / "labelsTs" / "y.nii.gz")]
    assert inspect_dataset(root) == (dataset, ())
    with pytest.raises(KeyError):
        dataset.case("z")


def test_hidden_and_foreign_files_are_nobodys_images(tmp_path: Path) -> None:
    root = build(tmp_path)
    for name in ("imagesTr/._a_0000.nii.gz", "imagesTr/.DS_Store", "labelsTr/._a.nii.gz", "imagesTr/readme.txt"):
        (root / name).write_text("x")
    assert inspect_dataset(root)[1] == (
        Problem(
            "dataset",
            "3 hidden files: imagesTr/.DS_Store, imagesTr/._a_0000.nii.gz, labelsTr/._a.nii.gz",
            "none needed, hidden files are ignored",
            False,
        ),
    )
    assert len(open_dataset(root).training) == 5


def test_a_declaration_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, read_text = build(tmp_path), Path.read_text

    def forbidden(path: Path, **how: Any) -> str:
        if path.name == "dataset.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_text(path, **how)

    monkeypatch.setattr(Path, "read_text", forbidden)
    problem = "dataset.json cannot be read (Permission denied)"
    assert inspect_dataset(root) == (None, (Problem("dataset", problem, "restore it or its permissions"),))


def test_legacy_modality_key(tmp_path: Path) -> None:
    root = build(tmp_path)
    edit(root, channel_names=None, modality={"0": "FLAIR", "1": "T1w"})
    assert open_dataset(root).channel_names == ("FLAIR", "T1w")


def test_cases_are_sorted_by_bytes(tmp_path: Path) -> None:
    root = build(tmp_path, cases=0, channels=1)
    for case in ("b", "B", "a_0001", "10", "9"):
        write_volume(root / "imagesTr" / f"{case}_0000.nii.gz")
        write_volume(root / "labelsTr" / f"{case}.nii.gz", a_label(1))
    edit(root, numTraining=5)
    assert [case.id for case in open_dataset(root).training] == ["10", "9", "B", "a_0001", "b"]


def test_explicit_file_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = build(tmp_path, cases=0, channels=1)
    write_volume(root / "elsewhere" / "scan.nii.gz")
    write_volume(tmp_path / "outside" / "labels.nii.gz", a_label(1))
    monkeypatch.setenv("SOME_ROOT", str(tmp_path / "outside"))
    entry = {"images": ["elsewhere/scan.nii.gz"], "label": "${SOME_ROOT}/labels.nii.gz"}
    edit(root, numTraining=2, dataset={"z": entry, "a": entry})
    cases = open_dataset(root).training
    assert [case.id for case in cases] == ["z", "a"]  # as listed
    assert cases[0].images == (root / "elsewhere" / "scan.nii.gz",)
    assert cases[0].label == tmp_path / "outside" / "labels.nii.gz"


def test_colour_pictures_hold_all_channels_in_one_file(tmp_path: Path) -> None:
    for case in "abc":
        for folder, name in (("imagesTr", f"{case}_0000.png"), ("labelsTr", f"{case}.png")):
            (tmp_path / folder).mkdir(exist_ok=True)
            Pillow.fromarray(np.zeros((4, 5, 3) if "images" in folder else (4, 5), np.uint8)).save(
                tmp_path / folder / name
            )
    declaration = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "cell": 1},
        "numTraining": 3,
        "file_ending": ".png",
    }
    write_json(tmp_path / "dataset.json", declaration)
    assert [len(case.images) for case in open_dataset(tmp_path).training] == [1, 1, 1]


def remove(*names: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        for name in names:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda root: (root / old).rename(root / new) and None


def add(name: str) -> Callable[[Path], None]:
    return lambda root: write_volume(root / name)


def change(**changes: object) -> Callable[[Path], None]:
    return lambda root: edit(root, **changes)


def content(text: str) -> Callable[[Path], None]:
    return lambda root: (root / "dataset.json").write_text(text) and None


def listed(**entry: object) -> Callable[[Path], None]:
    good = {"images": ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"], "label": "labelsTr/a.nii.gz"}
    return lambda root: edit(root, numTraining=1, dataset={"a": good | entry})


FATAL, WARNING = True, False
MALFORMED: list[tuple[Callable[[Path], None], str, str, str, bool]] = [
    (remove("dataset.json"), "dataset", "Dataset001_Test holds no dataset.json", "expected is a folder with", FATAL),
    (content("{"), "dataset", "dataset.json is not valid JSON (Expecting", "correct it in an editor", FATAL),
    (content("[]"), "dataset", "dataset.json must hold an object", "correct it in an editor", FATAL),
    (change(labels=None), "dataset", 'dataset.json has no "labels"', 'declare {"background": 0', FATAL),
    (change(channel_names=None), "dataset", 'dataset.json has no "channel_names"', 'declare "channel_names"', FATAL),
    (change(file_ending=None), "dataset", 'dataset.json has no "file_ending"', 'set "file_ending" to', FATAL),
    (
        change(labels={"0": "background", "1": "organ"}),
        "dataset",
        "dataset.json maps label values to names",
        'keys and values are swapped; write {"background": 0, NAME: VALUE, ...}',
        FATAL,
    ),
    (
        change(labels={"background": 0, "organ": 2**40}),
        "dataset",
        'in dataset.json, label "organ" must have values from -2147483648 to 2147483647, got 1099511627776',
        "correct dataset.json",
        FATAL,
    ),
    (
        change(channel_names=["T1", "T2"]),
        "dataset",
        "\"channel_names\" in dataset.json must map numbers to names, got ['T1', 'T2']",
        'declare "channel_names": {"0": NAME, "1": NAME, ...}',
        FATAL,
    ),
    (
        change(channel_names={"1": "T2", "0": "T1"}),
        "dataset",
        '"channel_names" must be numbered 0, 1, ... in order, got 1, 0',
        'declare "channel_names": {"0": NAME, "1": NAME, ...}',
        FATAL,
    ),
    (
        change(file_ending=".nii.gx"),
        "dataset",
        "the \"file_ending\" '.nii.gx' in dataset.json is not known (did you mean '.nii.gz'?)",
        'set "file_ending" to the ending of your images; known are .nii.gz, .nii, .png',
        FATAL,
    ),
    (change(file_ending=7), "dataset", 'the "file_ending" 7 in dataset.json is not known', 'set "file_ending"', FATAL),
    (
        change(file_ending=".png"),
        "dataset",
        "imagesTr holds no .png image (found 10 .nii.gz)",
        'add images or correct "file_ending"',
        FATAL,
    ),
    (
        change(file_ending=".jpg"),
        "dataset",
        ".jpg is lossy and changes label values",
        "convert the images to .png and export labels as .png from the annotation tool",
        FATAL,
    ),
    (remove("imagesTr"), "dataset", "the folder imagesTr is missing", "expected is a folder with", FATAL),
    (remove("labelsTr"), "dataset", "the folder labelsTr is missing", "expected is a folder with", FATAL),
    (
        change(numTraining=7),
        "dataset",
        'dataset.json says "numTraining": 7, found 5 training cases',
        "correct the number (the batch size depends on it) or add the missing cases",
        WARNING,
    ),
    (
        change(numTraining=None),
        "dataset",
        '"numTraining" must be the number of cases, got nothing',
        'write "numTraining": 5 into dataset.json',
        WARNING,
    ),
    (
        change(overwrite_image_reader_writer="NibabelIOWithReorient"),
        "dataset",
        "dataset.json asks for the image reader NibabelIOWithReorient, which is ignored",
        "convert",
        WARNING,
    ),
    (
        remove("labelsTr/b.nii.gz"),
        "b",
        "its label labelsTr/b.nii.gz is missing",
        "add labelsTr/b.nii.gz or remove the case",
        FATAL,
    ),
    (
        rename("labelsTr/b.nii.gz", "labelsTr/b_0000.nii.gz"),
        "b",
        "its label labelsTr/b.nii.gz is missing",
        "rename labelsTr/b_0000.nii.gz to b.nii.gz",
        FATAL,
    ),
    (
        add("labelsTr/k.nii.gz"),
        "k",
        "labelsTr/k.nii.gz has no image in imagesTr",
        "add the image; the label is ignored without it",
        WARNING,
    ),
    (
        remove("imagesTr/c_0001.nii.gz"),
        "c",
        "expected 2 channel files, missing c_0001",
        "add the missing file or remove the case",
        FATAL,
    ),
    (
        add("imagesTr/c_0002.nii.gz"),
        "c",
        "expected 2 channel files, also found c_0002.nii.gz",
        "remove the file or declare its channel in dataset.json",
        FATAL,
    ),
    (
        add("imagesTr/n.nii.gz"),
        "n.nii.gz",
        "has no channel number in its name",
        "rename it to n_0000.nii.gz (first channel)",
        FATAL,
    ),
    (
        add("imagesTs/t_0001.nii.gz"),
        "t",
        "test case left out: expected 2 channel files, missing t_0000",
        "add the missing file or remove the case",
        WARNING,
    ),
    (change(dataset={}), "dataset", 'the "dataset" list in dataset.json is empty', 'write "dataset": {CASE:', FATAL),
    (listed(images=[]), "a", "its entry in dataset.json is invalid", 'write "dataset": {CASE:', FATAL),
    (listed(label=None), "a", "its entry in dataset.json is invalid", 'write "dataset": {CASE:', FATAL),
    (
        listed(images=["imagesTr/a_0000.nii.gz"]),
        "a",
        "lists 1 image file, dataset.json names 2 channels",
        "list one file per channel",
        FATAL,
    ),
    (
        listed(label="labelsTr/none.nii.gz"),
        "a",
        "labelsTr/none.nii.gz is missing",
        "add it or correct its path",
        FATAL,
    ),
]


@pytest.mark.parametrize(("spoil", "case", "problem", "action", "fatal"), MALFORMED)
def test_malformed_datasets_are_explained(
    tmp_path: Path, spoil: Callable[[Path], None], case: str, problem: str, action: str, fatal: bool
) -> None:
    root = build(tmp_path)
    spoil(root)
    dataset, problems = inspect_dataset(root)
    found = [item for item in problems if problem in item.problem]
    assert [(item.case, item.fatal) for item in found] == [(case, fatal)], problems
    assert found[0].action.startswith(action)
    if fatal:
        with pytest.raises(DatasetError) as caught:
            open_dataset(root)
        assert found[0] in caught.value.problems
        assert all(item.fatal for item in caught.value.problems)
        assert f"{case}: {found[0].problem}; {found[0].action}" in str(caught.value)
    else:
        assert open_dataset(root) == dataset


def test_everything_is_reported_at_once(tmp_path: Path) -> None:
    root = build(tmp_path)
    edit(root, labels=None, channel_names={"1": "T2", "0": "T1"})
    for name in ("labelsTr/a.nii.gz", "labelsTr/b.nii.gz", "imagesTr/c_0000.nii.gz"):
        (root / name).unlink()
    with pytest.raises(DatasetError) as caught:
        open_dataset(root)
    assert [item.case for item in caught.value.problems] == ["dataset", "dataset", "a", "b", "c"]


def test_incomplete_cases_are_still_seen(tmp_path: Path) -> None:
    root = build(tmp_path)
    (root / "labelsTr" / "a.nii.gz").unlink()
    (root / "imagesTr" / "b_0000.nii.gz").unlink()
    dataset, _ = inspect_dataset(root)
    assert dataset is not None
    assert dataset.case("a").label is None
    assert [path.name for path in dataset.case("b").images] == ["b_0001.nii.gz"]


def test_wrong_paths(tmp_path: Path) -> None:
    root = build(tmp_path)
    with pytest.raises(DatasetError, match=r"the folder .*none does not exist; correct the path"):
        open_dataset(tmp_path / "none")
    with pytest.raises(DatasetError, match="is a file; give the folder of the dataset, or a table"):
        open_dataset(root / "dataset.json")
    with pytest.raises(DatasetError, match="give one of the folders inside that has one: Dataset001_Test"):
        open_dataset(tmp_path)


def test_files_to_predict(tmp_path: Path) -> None:
    for name in ("x_0000.nii.gz", "x_0001.nii.gz", "w_0001.nii.gz", "w_0000.nii.gz", "._w_0000.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    cases = find_cases(tmp_path, ".nii.gz", 2)
    assert [(case.id, [path.name for path in case.images]) for case in cases] == [
        ("w", ["w_0000.nii.gz", "w_0001.nii.gz"]),
        ("x", ["x_0000.nii.gz", "x_0001.nii.gz"]),
    ]
    assert all(case.label is None for case in cases)


@pytest.mark.parametrize(
    ("names", "channels", "expected"),
    [
        (["a.nii.gz", "b_0000.nii.gz", "scan_2021.nii.gz"], 1, ["a", "b", "scan_2021"]),
        (["b.png", "a_0000.png"], 3, ["a", "b"]),  # colour pictures
        (["a_0000.png", "a_0001.png", "a_0002.png"], 3, ["a"]),  # one file per channel
        (["a.nii.gz", "b.nrrd", "c.ome.zarr"], 3, ["a", "b", "c"]),  # whole cases: 4D, components, channel axis
    ],
)
def test_names_of_files_to_predict(tmp_path: Path, names: list[str], channels: int, expected: list[str]) -> None:
    cases = cases_from_files([tmp_path / name for name in names], channels)
    assert [case.id for case in cases] == expected
    assert sum(len(case.images) for case in cases) == len(names)


@pytest.mark.parametrize(
    ("names", "channels", "message"),
    [
        (["a_0000.nii.gz"], 2, "a: expected 2 channel files, missing a_0001; add the missing file"),
        (["a.nii.gz", "a_0000.nii.gz"], 2, "a: a_0000.nii.gz and a.nii.gz are the same channel; remove one of them"),
        (["a_0000.png", "a_0001.png"], 3, "a: expected 3 channel files, missing a_0002"),
        (["a.nii.gz", "a_0000.nii.gz"], 1, "a: a_0000.nii.gz and a.nii.gz are the same channel; remove one of them"),
        (["one/a.nii.gz", "two/a.nii.gz"], 1, "a: is both in one and two; give every case its own name"),
        (
            ["a_0000.png", "a_0001.png", "b_0000.png"],
            1,
            "a: a_0001.png is one more channel of it, but the model takes 1; give images of 1 channel",
        ),
        (["a.minc"], 1, "a.minc: the file ending '.minc' is not known"),
    ],
)
def test_incomplete_files_to_predict(names: list[str], channels: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        cases_from_files(names, channels)
    assert message in str(caught.value)


def test_nothing_to_predict(tmp_path: Path) -> None:
    for name in ("a.mha", "b.nrrd"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"has no \.nii\.gz image \(found 1 \.mha, 1 \.nrrd\); the model reads"):
        find_cases(tmp_path, ".nii.gz", 1)
    with pytest.raises(InputError, match=r"a\.mha is not a folder; give the folder that holds the images"):
        find_cases(tmp_path / "a.mha", ".mha", 1)


@pytest.mark.parametrize(
    ("names", "ending", "taken", "left"),
    [
        (["a.nii.gz", "b.nii", "c.NII.GZ"], ".nii.gz", ["a.nii.gz", "b.nii", "c.NII.GZ"], []),
        (["a.nii.gz", "a.nii"], ".nii.gz", ["a.nii.gz"], ["a.nii"]),
        (["a.tif", "b.tiff", "a.json"], ".tif", ["a.tif", "b.tiff"], []),
        (["a.png", "b.jpg", "c.bmp", "notes.txt", "cases.txt"], ".png", ["a.png", "c.bmp"], ["b.jpg"]),
        (["a.nii"], ".nii.gz", ["a.nii"], []),
    ],
)
def test_no_image_is_dropped_without_a_word(
    names: list[str], ending: str, taken: list[str], left: list[str], tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).touch()
    kept = KeptWarnings(SILENT)
    cases = find_cases(tmp_path, ending, 1, progress=kept)
    assert [path.name for case in cases for path in case.images] == taken
    assert [(item.code, item.file) for item in kept.warnings] == [("not_predicted", str(tmp_path))] * bool(left)
    assert all(name in kept.warnings[0].problem for name in left)


@pytest.mark.parametrize(
    ("names", "ending", "channels", "taken"),
    [
        (["a.tif", "b.tiff", "notes.txt"], ".png", 3, {"a": ["a.tif"], "b": ["b.tiff"]}),
        (["a.tif", "a.tiff", "b.tiff", "c.tiff"], ".png", 1, {"a": ["a.tiff"], "b": ["b.tiff"], "c": ["c.tiff"]}),
        (["a.jpg", "b.JPEG"], ".png", 3, {"a": ["a.jpg"], "b": ["b.JPEG"]}),
        (["a_0000.mha", "a_0001.mha"], ".nii.gz", 2, {"a": ["a_0000.mha", "a_0001.mha"]}),
        (["a.nii"], "/", 1, {"a": ["a.nii"]}),
    ],
)
def test_images_of_one_other_format_are_taken_with_a_sentence(
    names: list[str], ending: str, channels: int, taken: dict[str, list[str]], tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).touch()
    kept = KeptWarnings(SILENT)
    cases = find_cases(tmp_path, ending, channels, progress=kept)
    assert {case.id: [path.name for path in case.images] for case in cases} == taken
    twice = len(names) - names.count("notes.txt") - sum(map(len, taken.values()))
    assert [item.code for item in kept.warnings] == ["other_format", *["not_predicted"] * twice]


@pytest.mark.real_data
def test_real_datasets_open(data: Path) -> None:
    hippocampus = open_dataset(data / "Dataset004_Hippocampus")
    assert (len(hippocampus.training), len(hippocampus.test)) == (200, 20)
    assert all(case.label is not None for case in hippocampus.test)
    nuclei = open_dataset(data / "Dataset120_Nuclei")
    assert len(nuclei.training) == 60
    assert nuclei.channel_names == ("R", "G", "B")
