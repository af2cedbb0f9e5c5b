"""A corpus of datasets as they come: each has one fault, which the check must name, in its case, with what to do."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_builder import SHAPE, a_label, build, edit, write_volume

from segfit.dataset.checks import check_dataset
from segfit.dataset.layouts import describe, open_dataset

FATAL, WARNING = True, False
Spoil = Callable[[Path], object]


def ramp(*values: float, dtype: Any = np.float32) -> np.ndarray:
    array = np.arange(24, dtype=dtype).reshape(SHAPE) * 3 + 1
    array.flat[: len(values)] = values
    return array


def move(old: str, new: str) -> Spoil:
    return lambda root: (root / old).rename(root / new)


def copy(old: str, new: str) -> Spoil:
    return lambda root: shutil.copy(root / old, root / new)


def drop(name: str) -> Spoil:
    return lambda root: (root / name).unlink()


def put(name: str, array: np.ndarray, **geometry: float) -> Spoil:
    return lambda root: write_volume(root / name, array, **geometry)


def raw(name: str, content: bytes) -> Spoil:
    return lambda root: (root / name).write_bytes(content)


def declare(**changes: Any) -> Spoil:
    return lambda root: edit(root, **changes)


def cut(name: str) -> Spoil:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-20])


def both(*steps: Spoil) -> Spoil:
    return lambda root: [step(root) for step in steps]


def same_voxels_otherwise_packed(root: Path) -> None:
    for channel in range(2):
        content = gzip.decompress((root / "imagesTr" / f"a_000{channel}.nii.gz").read_bytes())
        (root / "imagesTr" / f"c_000{channel}.nii.gz").write_bytes(gzip.compress(content, 9))


def visits(root: Path) -> None:
    for old, new in (("a", "p1_v1"), ("b", "p1_v2"), ("c", "p2-ses-01"), ("d", "p2-ses-02")):
        for channel in range(2):
            (root / "imagesTr" / f"{old}_000{channel}.nii.gz").rename(root / "imagesTr" / f"{new}_000{channel}.nii.gz")
        (root / "labelsTr" / f"{old}.nii.gz").rename(root / "labelsTr" / f"{new}.nii.gz")


def a_flat_case(root: Path) -> None:
    for name in ("imagesTr/e_0000", "imagesTr/e_0001", "labelsTr/e"):
        array = (np.arange(12) % (2 if "labels" in name else 99)).reshape(3, 4)
        write_volume(root / f"{name}.nii.gz", array.astype(np.uint8))


def v1_keys(root: Path) -> None:
    labels = {"0": "background", "1": "organ", "2": "lesion"}
    edit(root, channel_names=None, modality={"0": "T1", "1": "T2"}, labels=labels, file_ending=None)


CORPUS: dict[str, tuple[Spoil, str, str, str, bool]] = {
    "suffix twice": (
        move("imagesTr/a_0000.nii.gz", "imagesTr/a_0000.nii.gz.nii.gz"),
        *("a_0000.nii.gz.nii.gz", "carries its ending twice", "rename it to a_0000.nii.gz", FATAL),
    ),
    "hidden files": (
        raw("imagesTr/._a_0000.nii.gz", b"Mac OS X"),
        *("dataset", "1 hidden file left by a system: imagesTr/._a_0000.nii.gz", "nothing, hidden", WARNING),
    ),
    "one channel missing": (
        drop("imagesTr/b_0001.nii.gz"),
        *("b", "expected 2 channel files, missing b_0001", "add the missing file or remove the case", FATAL),
    ),
    "v1 keys in v2": (
        v1_keys,
        *("dataset", "dataset.json maps label values to names", 'turn it round: declare {"background": 0', FATAL),
    ),
    "label 255": (
        put("labelsTr/b.nii.gz", a_label(1, 255)),
        *("b", "b.nii.gz holds the undeclared value 255; declared are 0, 1, 2", "correct the label or declare", FATAL),
    ),
    "label with fractions": (
        put("labelsTr/b.nii.gz", a_label(1).astype(np.float32) * 0.9),
        *("b", "b.nii.gz holds 0.9 where labels must be integers", "round it or export it again", FATAL),
    ),
    "empty label": (
        put("labelsTr/b.nii.gz", a_label()),
        *("b", "b.nii.gz is empty: no structure is labelled", "nothing if that is right; label the case", WARNING),
    ),
    "constant image": (
        put("imagesTr/b_0000.nii.gz", np.full(SHAPE, 3, np.int16)),
        *("b", "b_0000.nii.gz is constant: every voxel is 3", "look at the image; remove the case", WARNING),
    ),
    "NaN": (
        put("imagesTr/b_0000.nii.gz", ramp(np.nan, np.nan)),
        *("b", "b_0000.nii.gz has 2 NaN or infinite voxels", "replace them by a value such as 0", FATAL),
    ),
    "infinity": (
        put("imagesTr/b_0000.nii.gz", ramp(-np.inf)),
        *("b", "b_0000.nii.gz has 1 NaN or infinite voxel", "replace them by a value such as 0", FATAL),
    ),
    "wrong ending declared": (
        declare(file_ending=".nii"),
        *("dataset", "imagesTr holds no .nii image (found 10 .nii.gz)", 'add images or correct "file_ending"', FATAL),
    ),
    "another ending": (
        both(put("imagesTr/f.nii.gz", ramp()), move("imagesTr/f.nii.gz", "imagesTr/f_0000.nii")),
        *("f_0000.nii", "lies in imagesTr but does not end in .nii.gz; it is not used", "convert it", WARNING),
    ),
    "not what its ending says": (
        raw("imagesTr/b_0000.nii.gz", b"\x89PNG\r\n" * 100),
        *("b", "b_0000.nii.gz is not a NIfTI file", "export it as NIfTI or correct its ending", FATAL),
    ),
    "duplicate under two names": (
        same_voxels_otherwise_packed,
        *("c", "the images of this training case are those of training case a", "remove one; the same image", WARNING),
    ),
    "training image among the tests": (
        both(
            lambda root: (root / "imagesTs").mkdir(),
            copy("imagesTr/b_0000.nii.gz", "imagesTs/x_0000.nii.gz"),
            copy("imagesTr/b_0001.nii.gz", "imagesTs/x_0001.nii.gz"),
        ),
        *("x", "the images of this test case are those of training case b", "remove one; the same image", WARNING),
    ),
    "the same patient twice": (
        visits,
        "dataset",
        "the cases p1_v1, p1_v2 look like visits of one patient and 1 more patient",
        'if they are, give the patient in a column "group"',
        WARNING,
    ),
    "image without label": (
        drop("labelsTr/d.nii.gz"),
        *("d", "its label labelsTr/d.nii.gz is missing", "add labelsTr/d.nii.gz or remove the case", FATAL),
    ),
    "label without image": (
        put("labelsTr/x.nii.gz", a_label(1)),
        *("x", "labelsTr/x.nii.gz has no image in imagesTr", "add the image; without it", WARNING),
    ),
    "truncated image": (
        cut("imagesTr/b_0000.nii.gz"),
        *("b", "b_0000.nii.gz cannot be read (Compressed file ended", "copy or export it again, or remove", FATAL),
    ),
    "truncated label": (
        cut("labelsTr/b.nii.gz"),
        *("b", "b.nii.gz cannot be read (Compressed file ended", "copy or export it again, or remove", FATAL),
    ),
    "zero bytes": (
        raw("imagesTr/b_0000.nii.gz", b""),
        *("b", "b_0000.nii.gz is empty", "copy or export it again, or remove the case", FATAL),
    ),
    "trailing comma": (
        raw("dataset.json", b'{"labels": {"background": 0, "organ": 1,},\n}'),
        *("dataset", "dataset.json is not valid JSON", "correct it in an editor", FATAL),
    ),
    "labels from 1": (
        declare(labels={"background": 1, "organ": 2}),
        *("dataset", 'in dataset.json, "labels" must contain "background": 0', "correct dataset.json", FATAL),
    ),
    "no background": (
        declare(labels={"organ": 1, "lesion": 2}),
        *("dataset", 'in dataset.json, "labels" must contain "background": 0', "correct dataset.json", FATAL),
    ),
    "labels as text": (
        declare(labels={"background": 0, "organ": "1"}),
        *("dataset", 'in dataset.json, label "organ" must be an integer or a list of', "correct dataset.json", FATAL),
    ),
    "two names for a value": (
        declare(labels={"background": 0, "organ": 1, "lesion": 1}),
        *("dataset", 'in dataset.json, labels "organ" and "lesion" share the value 1', "correct dataset.json", FATAL),
    ),
    "label of another shape": (
        put("labelsTr/b.nii.gz", np.ones((3, 3, 4), np.uint8)),
        *("b", "b.nii.gz does not fit b_0000.nii.gz: its shape is (3, 3, 4), expected", "resample it to that", FATAL),
    ),
    "label on another grid": (
        put("labelsTr/b.nii.gz", a_label(1), shift=40.0),
        *("b", "b.nii.gz does not fit b_0000.nii.gz: it lies 40.0 voxels away", "resample it to that image", FATAL),
    ),
    "channels on two grids": (
        put("imagesTr/b_0001.nii.gz", ramp(), spacing=2.0),
        *("b", "b_0001.nii.gz does not fit b_0000.nii.gz: its spacing is", "resample it to that image", FATAL),
    ),
    "2D among 3D": (
        a_flat_case,
        *("dataset", "1 cases are 2D and 4 are 3D (first 2D case: e)", "make a dataset of each kind", FATAL),
    ),
    "channels without numbers": (
        declare(channel_names={"T1": "0", "T2": "1"}),
        *("dataset", '"channel_names" must be numbered 0, 1, ... in order, got T1, T2', 'declare "channel_n', FATAL),
    ),
    "one channel too many": (
        copy("imagesTr/b_0001.nii.gz", "imagesTr/b_0002.nii.gz"),
        *("b", "expected 2 channel files, found also b_0002.nii.gz", "remove the file or declare its", FATAL),
    ),
    "image without number": (
        move("imagesTr/b_0000.nii.gz", "imagesTr/b.nii.gz"),
        *("b.nii.gz", "has no channel number in its name", "rename it to b_0000.nii.gz (first channel)", FATAL),
    ),
    "label with a number": (
        move("labelsTr/b.nii.gz", "labelsTr/b_0000.nii.gz"),
        *("b", "its label labelsTr/b.nii.gz is missing", "rename labelsTr/b_0000.nii.gz to b.nii.gz", FATAL),
    ),
    "structure in no label": (
        declare(labels={"background": 0, "organ": 1, "lesion": 2, "vessel": 3}),
        *("dataset", 'the structure "vessel" occurs in no label file', "correct its value in", WARNING),
    ),
    "wrong count": (
        declare(numTraining=50),
        *("dataset", 'dataset.json says "numTraining": 50, found 5 training cases', "correct the number", WARNING),
    ),
}


@pytest.mark.parametrize("fault", CORPUS)
def test_every_fault_is_named(tmp_path: Path, fault: str) -> None:
    spoil, case, problem, action, fatal = CORPUS[fault]
    root = build(tmp_path)
    spoil(root)
    problems = check_dataset(root)
    told = [item for item in problems if item.case == case and item.problem.startswith(problem)]
    assert len(told) == 1, problems
    assert told[0].action.startswith(action)
    assert told[0].fatal == fatal
    if not fatal:  # a warning stops nobody
        assert not [item for item in problems if item.fatal], problems


def test_the_corpus_is_large_enough() -> None:
    assert len(CORPUS) >= 25


def test_several_faults_are_told_in_one_run(tmp_path: Path) -> None:
    root = build(tmp_path)
    chosen = ["hidden files", "label 255", "zero bytes", "image without label", "wrong count", "label without image"]
    put("imagesTr/a_0001.nii.gz", ramp(np.nan))(root)
    for fault in chosen:
        CORPUS[fault][0](root)
    problems = check_dataset(root)
    for fault in chosen:
        _, case, problem, _, fatal = CORPUS[fault]
        assert any(p.case == case and p.problem.startswith(problem) and p.fatal == fatal for p in problems), fault
    assert any(p.case == "a" and "1 NaN" in p.problem for p in problems)
    assert len(problems) == len(chosen) + 1


def test_whole_numbers_as_floats_are_labels(tmp_path: Path) -> None:
    root = build(tmp_path)
    write_volume(root / "labelsTr" / "b.nii.gz", a_label(1, 2).astype(np.float32))
    assert check_dataset(root) == ()


def test_labels_with_gaps_are_labels(tmp_path: Path) -> None:
    root = build(tmp_path)
    edit(root, labels={"background": 0, "organ": 7, "lesion": 500})
    for case in "abcde":
        write_volume(root / "labelsTr" / f"{case}.nii.gz", a_label(7, 500))
    assert check_dataset(root) == ()
    write_volume(root / "labelsTr" / "b.nii.gz", a_label(7, 501))
    write_volume(root / "labelsTr" / "c.nii.gz", a_label())
    assert [(item.case, item.problem) for item in check_dataset(root)] == [
        ("b", "b.nii.gz holds the undeclared value 501; declared are 0, 7, 500"),
        ("c", "c.nii.gz is empty: no structure is labelled"),
    ]


def test_spaces_and_other_letters_in_names(tmp_path: Path) -> None:
    root = build(tmp_path)
    for folder in ("imagesTr", "labelsTr"):
        for path in sorted((root / folder).iterdir()):
            path.rename(path.with_name(f"Fall Nº1 Größe {path.name}"))
    moved = tmp_path / "Daten für Größen (neu) 数据"
    root.rename(moved)
    dataset = open_dataset(moved)
    assert dataset.training[0].id == "Fall Nº1 Größe a"
    assert check_dataset(moved) == ()
    assert describe(dataset)[0] == "nnU-Net v2 folder: 5 training cases, 0 test cases"


def test_visits_with_groups_need_no_warning(tmp_path: Path) -> None:
    root = build(tmp_path)
    visits(root)
    cases = [path.name.removesuffix(".nii.gz") for path in sorted((root / "labelsTr").iterdir())]
    rows = [
        {"case": c, "T1": f"imagesTr/{c}_0000.nii.gz", "label": f"labelsTr/{c}.nii.gz", "group": c[:2]} for c in cases
    ]
    assert any("look like visits" in item.problem for item in check_dataset(root))
    (root / "cases.json").write_text(json.dumps(rows))
    assert check_dataset(root) == ()
