"""Names of image and label that mean the same case, or probably do."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from dataset_builder import build, write_volume

from segfit.dataset.checks import check_dataset
from segfit.dataset.layouts import names, open_dataset
from segfit.dataset.layouts.names import likely_partners
from segfit.errors import Problem


def rename(root: Path, folder: str, old: str, new: str) -> None:
    for path in sorted((root / folder).glob(f"{old}*.nii.gz")):
        path.rename(path.with_name(new + path.name.removeprefix(old)))


@pytest.mark.parametrize("image", ["NFC", "NFD"])
def test_accents_stored_in_two_ways_are_one_name(tmp_path: Path, image: str) -> None:
    root, label = build(tmp_path), "NFD" if image == "NFC" else "NFC"
    rename(root, "imagesTr", "b", unicodedata.normalize(image, "Müller"))  # type: ignore[arg-type]
    rename(root, "labelsTr", "b", unicodedata.normalize(label, "Müller"))  # type: ignore[arg-type]
    second = sorted(root.glob("imagesTr/M*_0001.nii.gz"))[0]
    second.rename(second.with_name(unicodedata.normalize(label, second.name)))  # type: ignore[arg-type]
    assert check_dataset(root) == ()
    case = next(case for case in open_dataset(root).training if len(case.id) == 6)
    assert case.id == unicodedata.normalize("NFC", "Müller")
    (root / "imagesTr").rename(root / "images")
    (root / "labelsTr").rename(root / "labels")
    (root / "dataset.json").unlink()
    assert check_dataset(root) == ()


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("Case_01", "case_01"),
        ("case_1", "case_001"),
        ("case 01", "case_01"),
        ("case-01", "case_01"),
        ("case01", "case_01"),
        ("Größe", "Grosse"),
        ("case_01", "case_01_seg"),
        ("case_01", "case_01-label"),
        ("case_01", "case_01_mask"),
        ("case_01", "case_01_0000"),
    ],
)
def test_the_probable_partner_is_named(tmp_path: Path, image: str, label: str) -> None:
    root = build(tmp_path)
    rename(root, "imagesTr", "b", image)
    rename(root, "labelsTr", "b", label)
    problem = f"its label labelsTr/{image}.nii.gz is missing"
    assert check_dataset(root) == (Problem(image, problem, f"rename labelsTr/{label}.nii.gz to {image}.nii.gz"),)


@pytest.mark.parametrize(
    ("image", "label"), [("case_01", "case_02"), ("case_1_23", "case_12_3"), ("case_1", "case_1b"), ("a_10", "a_1")]
)
def test_other_names_are_no_partners(image: str, label: str) -> None:
    assert likely_partners([image], [label]) == likely_partners([label], [image]) == {}


def test_two_candidates_are_none(tmp_path: Path) -> None:
    root = build(tmp_path)
    rename(root, "imagesTr", "b", "case_1")
    rename(root, "labelsTr", "b", "case_01")
    write_volume(root / "labelsTr" / "case_001.nii.gz")
    (first, *others) = check_dataset(root)
    assert first.action == "add labelsTr/case_1.nii.gz or remove the case"
    assert len(others) == 2


def test_paired_folders_name_the_partner_too(tmp_path: Path) -> None:
    root = build(tmp_path, channels=1)
    for path in root.glob("imagesTr/*.nii.gz"):
        path.rename(path.with_name(path.name.replace("_0000", "")))
    rename(root, "imagesTr", "b", "Case-1")
    rename(root, "labelsTr", "b", "case_01_seg")
    (root / "imagesTr").rename(root / "images")
    (root / "labelsTr").rename(root / "labels")
    (root / "dataset.json").unlink()
    told = [item for item in check_dataset(root) if item.case in ("Case-1", "case_01")]
    assert told == [Problem("Case-1", "its label labels/Case-1 is missing", "rename case_01 to it")]


def test_two_labels_of_one_name(tmp_path: Path) -> None:
    root = build(tmp_path)
    rename(root, "imagesTr", "b", "Müller")
    rename(root, "labelsTr", "b", unicodedata.normalize("NFC", "Müller"))
    label = root / "labelsTr" / unicodedata.normalize("NFC", "Müller.nii.gz")
    label.with_name(unicodedata.normalize("NFD", label.name)).write_bytes(label.read_bytes())
    problem = "appears twice in labelsTr (Unicode NFC and NFD)"
    assert check_dataset(root) == (Problem("Müller.nii.gz", problem, "remove one of the two", True),)


def test_names_are_compared_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    monkeypatch.setattr(names, "_essence", lambda name: (compared.append(name), name.casefold())[1])
    wanted, others = [f"Case{number}" for number in range(50)], [f"case{number}" for number in range(50, 0, -1)]
    found = likely_partners(wanted, others)
    assert found == {f"Case{number}": f"case{number}" for number in range(1, 50)}
    assert len(compared) == len(wanted) + len(others)
    assert likely_partners([], others) == {}
    assert len(compared) == len(wanted) + len(others)
