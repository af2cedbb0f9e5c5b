"""Channels of a case by name: of every layout, of files that hold several, of files that are missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dataset_builder import a_label, build, write_volume
from PIL import Image as Pillow

from segfit.dataset.contents import FileHashes
from segfit.dataset.layouts import inspect_dataset, open_dataset
from segfit.dataset.manifest import Case, by_number
from segfit.files import write_json


def test_a_file_for_every_channel(tmp_path: Path) -> None:
    root = build(tmp_path)
    for channel in range(2):
        write_volume(root / "imagesTs" / f"x_{channel:04d}.nii.gz")
    dataset = open_dataset(root)
    images = root / "imagesTr"
    assert dataset.case("b").channels == {"T1": images / "b_0000.nii.gz", "T2": images / "b_0001.nii.gz"}
    assert list(dataset.test[0].channels) == ["T1", "T2"]
    assert dataset.named() == dataset


@pytest.mark.parametrize("gone", [0, 1])
def test_a_missing_file_leaves_its_channel_without_one(tmp_path: Path, gone: int) -> None:
    root = build(tmp_path)
    (root / "imagesTr" / f"b_{gone:04d}.nii.gz").unlink()
    dataset, problems = inspect_dataset(root)
    assert dataset is not None
    other = root / "imagesTr" / f"b_{1 - gone:04d}.nii.gz"
    assert list(dataset.case("b").channels.values()) == ([None, other] if gone == 0 else [other, None])
    assert list(dataset.case("b").channels) == ["T1", "T2"]
    assert dataset.case("b").images == (other,)
    assert [item.case for item in problems if item.fatal] == ["b"]


def test_columns_of_a_table(tmp_path: Path) -> None:
    for name in ("a0", "a1", "b1"):
        write_volume(tmp_path / f"{name}.nii.gz")
    write_volume(tmp_path / "label.nii.gz", a_label(1))
    rows = ["case,FLAIR,T1,label", "a,a0.nii.gz,a1.nii.gz,label.nii.gz", "b,,b1.nii.gz,label.nii.gz"]
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    dataset, problems = inspect_dataset(tmp_path)
    assert dataset is not None
    assert dataset.case("a").channels == {"FLAIR": tmp_path / "a0.nii.gz", "T1": tmp_path / "a1.nii.gz"}
    assert dataset.case("b").channels == {"FLAIR": None, "T1": tmp_path / "b1.nii.gz"}
    assert [item.case for item in problems if item.fatal] == ["b"]


def test_a_file_that_holds_all_stands_under_each_name(tmp_path: Path) -> None:
    for folder, shape in (("images", (4, 5, 3)), ("labels", (4, 5))):
        (tmp_path / folder).mkdir()
        Pillow.fromarray(np.ones(shape, np.uint8)).save(tmp_path / folder / "a.png")
    (case,) = open_dataset(tmp_path).training
    file = tmp_path / "images" / "a.png"
    assert (case.channels, case.images) == ({"R": file, "G": file, "B": file}, (file,))


def test_files_of_which_one_holds_several_have_numbers(tmp_path: Path) -> None:
    for channel in range(2):
        write_volume(tmp_path / "images" / f"a_{channel:04d}.nii.gz")
    write_volume(tmp_path / "labels" / "a.nii.gz", a_label(1))
    write_json(tmp_path / "dataset.json", {"channel_names": {"0": "T1", "1": "T2", "2": "FLAIR"}})
    dataset = open_dataset(tmp_path)
    assert dataset.layout == "paired"
    assert list(dataset.case("a").channels) == ["0", "1"]
    assert len(dataset.case("a").images) == 2


def test_images_without_names_have_numbers(tmp_path: Path) -> None:
    files = (tmp_path / "a", tmp_path / "b")
    case = Case(id="a", images=files)
    assert case == Case(id="a", channels={"0": files[0], "1": files[1]})
    assert case.images == files
    assert by_number({1: files[1]}, 3) == {"0": None, "1": files[1], "2": None}


def test_which_channel_is_missing_counts(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"x")
    whole = Case(id="a", images=(file,))
    hashes, names = FileHashes(), ("T1", "T2")
    lacking = [Case(id="a", channels={name: file if name == there else None for name in names}) for there in names]
    assert len({hashes.images(case) for case in (whole, *lacking)}) == 3
