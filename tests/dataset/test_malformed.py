"""A corpus of datasets as they come: each has one fault, which the check must name, in its case, with what to do."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
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


def text(name: str, content: str, encoding: str = "utf-8") -> Spoil:
    return lambda root: (root / name).write_text(content, encoding=encoding)


def said_in_json(old: str, new: str) -> Spoil:
    return lambda root: (root / "dataset.json").write_text((root / "dataset.json").read_text().replace(old, new))


def link(name: str, target: str) -> Spoil:
    return lambda root: [(root / name).unlink(missing_ok=True), (root / name).symlink_to(target)]


def header(name: str, **fields: Any) -> Spoil:
    """Change fields of a NIfTI header; an index may follow a name: ``pixdim_3``."""

    def change(root: Path) -> None:
        content = gzip.decompress((root / name).read_bytes())
        changed = nibabel.Nifti1Header(content[:348], check=False)
        for field, value in fields.items():
            key, _, index = field.rpartition("_")
            if index.isdigit():
                changed[key][int(index)] = value
            else:
                changed[field] = value
        (root / name).write_bytes(gzip.compress(changed.binaryblock + content[348:], 1))

    return change


def every(folder: str, array: np.ndarray) -> Spoil:
    return lambda root: [write_volume(path, array) for path in sorted((root / folder).iterdir())]


def listed(entries: dict[str, tuple[list[str], str]]) -> Spoil:
    return declare(dataset={case: {"images": images, "label": label} for case, (images, label) in entries.items()})


def files(case: str, label: str = "") -> tuple[list[str], str]:
    return [f"imagesTr/{case}_000{channel}.nii.gz" for channel in range(2)], f"labelsTr/{label or case}.nii.gz"


WHOLE_AND_CORE = {"background": 0, "whole": [1, 2], "core": [2]}

CORPUS: dict[str, tuple[Spoil, str, str, str, bool]] = {
    "suffix twice": (
        move("imagesTr/a_0000.nii.gz", "imagesTr/a_0000.nii.gz.nii.gz"),
        *("a_0000.nii.gz.nii.gz", "has its ending twice", "rename it to a_0000.nii.gz", FATAL),
    ),
    "hidden files": (
        raw("imagesTr/._a_0000.nii.gz", b"Mac OS X"),
        *("dataset", "1 hidden file: imagesTr/._a_0000.nii.gz", "none needed, hidden files are ignored", WARNING),
    ),
    "one channel missing": (
        drop("imagesTr/b_0001.nii.gz"),
        *("b", "expected 2 channel files, missing b_0001", "add the missing file or remove the case", FATAL),
    ),
    "v1 keys in v2": (
        v1_keys,
        *(
            "dataset",
            "dataset.json maps label values to names",
            'keys and values are swapped; write {"background": 0',
            FATAL,
        ),
    ),
    "label 255": (
        put("labelsTr/b.nii.gz", a_label(1, 255)),
        *("b", "b.nii.gz has the undeclared value 255; declared are 0, 1, 2", "correct the label or declare", FATAL),
    ),
    "label with fractions": (
        put("labelsTr/b.nii.gz", a_label(1).astype(np.float32) * 0.9),
        *("b", "b.nii.gz has the value 0.9, labels must be integers", "round or export it again", FATAL),
    ),
    "empty label": (
        put("labelsTr/b.nii.gz", a_label()),
        *("b", "b.nii.gz is empty: it labels no class", "label the case or remove it", WARNING),
    ),
    "constant image": (
        put("imagesTr/b_0000.nii.gz", np.full(SHAPE, 3, np.int16)),
        *(
            "b",
            "b_0000.nii.gz is constant: every voxel is 3",
            "check the image; remove the case if it is empty",
            WARNING,
        ),
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
        *("f_0000.nii", "is in imagesTr but does not end in .nii.gz; it is ignored", "convert it", WARNING),
    ),
    "not what its ending says": (
        raw("imagesTr/b_0000.nii.gz", b"\x89PNG\r\n" * 100),
        *("b", "b_0000.nii.gz is a PNG image, not a NIfTI file", "correct its ending or export it again", FATAL),
    ),
    "duplicate under two names": (
        same_voxels_otherwise_packed,
        *(
            "c",
            "the images of this training case are those of training case a",
            "remove one; the same image on both sides of a split makes the Dice too high",
            WARNING,
        ),
    ),
    "training image among the tests": (
        both(
            lambda root: (root / "imagesTs").mkdir(),
            copy("imagesTr/b_0000.nii.gz", "imagesTs/x_0000.nii.gz"),
            copy("imagesTr/b_0001.nii.gz", "imagesTs/x_0001.nii.gz"),
        ),
        *(
            "x",
            "the images of this test case are those of training case b",
            "remove one; the same image on both sides of a split makes the Dice too high",
            WARNING,
        ),
    ),
    "the same patient twice": (
        visits,
        "dataset",
        "the cases p1_v1, p1_v2 look like visits of one patient and 1 more patient",
        'if they are, name the patient in the column "group" of a table of cases, so that no split divides them',
        WARNING,
    ),
    "image without label": (
        drop("labelsTr/d.nii.gz"),
        *("d", "its label labelsTr/d.nii.gz is missing", "add labelsTr/d.nii.gz or remove the case", FATAL),
    ),
    "label without image": (
        put("labelsTr/x.nii.gz", a_label(1)),
        *("x", "labelsTr/x.nii.gz has no image in imagesTr", "add the image; the label is ignored without it", WARNING),
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
        *("dataset", 'in dataset.json, "labels" must contain "background": 0', 'write 0 for "background"', FATAL),
    ),
    "no background": (
        declare(labels={"organ": 1, "lesion": 2}),
        *("dataset", 'in dataset.json, "labels" must contain "background": 0', 'write "background": 0 into', FATAL),
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
        *("dataset", "1 case is 2D and 4 3D (first 2D case: e)", "make one dataset of each", FATAL),
    ),
    "channels without numbers": (
        declare(channel_names={"T1": "0", "T2": "1"}),
        *("dataset", '"channel_names" must be numbered 0, 1, ... in order, got T1, T2', 'declare "channel_n', FATAL),
    ),
    "one channel too many": (
        copy("imagesTr/b_0001.nii.gz", "imagesTr/b_0002.nii.gz"),
        *("b", "expected 2 channel files, also found b_0002.nii.gz", "remove the file or declare its", FATAL),
    ),
    "image without number": (
        move("imagesTr/b_0000.nii.gz", "imagesTr/b.nii.gz"),
        *("b.nii.gz", "has no channel number in its name", "rename it to b_0000.nii.gz (first channel)", FATAL),
    ),
    "a dot before the channel": (
        move("imagesTr/b_0000.nii.gz", "imagesTr/b.0000.nii.gz"),
        *("b.0000.nii.gz", "has its channel number behind another sign", "rename it to b_0000.nii.gz", FATAL),
    ),
    "label with a number": (
        move("labelsTr/b.nii.gz", "labelsTr/b_0000.nii.gz"),
        *("b", "its label labelsTr/b.nii.gz is missing", "rename labelsTr/b_0000.nii.gz to b.nii.gz", FATAL),
    ),
    "class in no label": (
        declare(labels={"background": 0, "organ": 1, "lesion": 2, "vessel": 3}),
        *("dataset", 'the class "vessel" occurs in no label file', "correct its value in", WARNING),
    ),
    "UTF-16": (
        text("dataset.json", "{}", "utf-16"),
        *("dataset", "dataset.json is not valid JSON (it is no UTF-8 text)", "correct it in an editor", FATAL),
    ),
    "nested without end": (
        text("dataset.json", "[" * 100_000),
        *("dataset", "dataset.json is not valid JSON (too deeply nested)", "correct it in an editor", FATAL),
    ),
    "a number of 5000 digits": (
        text("dataset.json", '{"numTraining": ' + "1" * 5000 + "}"),
        *("dataset", "dataset.json is not valid JSON (Exceeds the limit", "correct it in an editor", FATAL),
    ),
    "a name twice": (
        said_in_json('"lesion": 2', '"organ": 2'),
        *("dataset", 'dataset.json is not valid JSON (an object has the key "organ" twice)', "correct it", FATAL),
    ),
    "region order is a number": (
        declare(labels=WHOLE_AND_CORE, regions_class_order=1),
        *("dataset", 'in dataset.json, "regions_class_order" must be a list of label values, got 1', "correct", FATAL),
    ),
    "region order holds lists": (
        declare(labels=WHOLE_AND_CORE, regions_class_order=[[1], 2]),
        *(
            "dataset",
            'in dataset.json, "regions_class_order" must list declared label values other than 0, got [1]',
            "c",
            FATAL,
        ),
    ),
    "large region over small one": (
        declare(labels={"background": 0, "core": [2], "whole": [1, 2]}, regions_class_order=[2, 1]),
        "dataset",
        'with this "regions_class_order" predictions turn label 2 into 1',
        'declare the regions in the order whole, core, and write "regions_class_order": [1, 2]',
        WARNING,
    ),
    "nameless channel": (
        declare(channel_names={"0": "", "1": "T2"}),
        *("dataset", '"channel_names" in dataset.json must map numbers to names', 'declare "channel_names"', FATAL),
    ),
    "folders as ending": (
        declare(file_ending="/"),
        *("dataset", "imagesTr holds no DICOM series (found 10 .nii.gz)", "add images or correct", FATAL),
    ),
    "case without a name": (
        listed({"": files("a"), "b": files("b")}),
        *("", "its name is empty", "give the case another name", FATAL),
    ),
    "case called ..": (
        listed({"..": files("a"), "b": files("b")}),
        *("..", "its name is a path or would be a hidden file", "give the case another name", FATAL),
    ),
    "case with a line break": (
        listed({"a\nb": files("a"), "b": files("b")}),
        *(r"a\nb", "its name has control characters or is not UTF-8 text", "give the case another name", FATAL),
    ),
    "case with a name of 201 letters": (
        listed({"e" * 201: files("a"), "b": files("b")}),
        *("e" * 200, "its name is longer than 200 bytes", "give the case another name", FATAL),
    ),
    "capitals alone differ": (
        listed({"b": files("b"), "B": files("c")}),
        *(
            "B",
            "differs from the case b only in case or Unicode normalisation",
            "rename one; on some file systems their results overwrite each other",
            WARNING,
        ),
    ),
    "accents alone differ": (
        listed({"\u00fc": files("b"), "u\u0308": files("c")}),
        *("u\u0308", "differs from the case \u00fc only in case or Unicode normalisation", "rename one", WARNING),
    ),
    "path longer than any name": (
        listed({"a": (files("a")[0], "x" * 300 + ".nii.gz"), "b": files("b")}),
        *("a", "the listed file ", "add it or correct its path", FATAL),
    ),
    "one label for two cases": (
        listed({"a": files("a"), "b": files("b", label="a")}),
        *("b", "a.nii.gz is also the label of the case a", "correct one of them unless that is right", WARNING),
    ),
    "one file for two channels": (
        listed({"a": files("a"), "b": (["imagesTr/b_0000.nii.gz"] * 2, "labelsTr/b.nii.gz")}),
        *("b", "b_0000.nii.gz is listed for two channels", "correct one of them", FATAL),
    ),
    "the image as label": (
        listed({"a": files("a"), "b": (files("b")[0], "imagesTr/b_0000.nii.gz")}),
        *("b", "b_0000.nii.gz is both its image and its label", "correct one of them", FATAL),
    ),
    "a link to nothing": (
        link("imagesTr/b_0000.nii.gz", "/nowhere/b.nii.gz"),
        *(
            "b",
            "b_0000.nii.gz is a link to /nowhere/b.nii.gz, which is missing",
            "restore that file or the link",
            FATAL,
        ),
    ),
    "a link to itself": (
        link("labelsTr/b.nii.gz", "b.nii.gz"),
        *("b", "b.nii.gz cannot be read ", "copy or export it again, or remove the case", FATAL),
    ),
    "a folder called like a file": (
        both(drop("imagesTr/b_0000.nii.gz"), lambda root: (root / "imagesTr/b_0000.nii.gz").mkdir()),
        *("b", "b_0000.nii.gz cannot be read (Is a directory)", "copy or export it again", FATAL),
    ),
    "a page of the web": (
        raw("imagesTr/b_0000.nii.gz", b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20),
        *("b", "b_0000.nii.gz is a web page or another text file, not a NIfTI file", "download the file itself", FATAL),
    ),
    "packed twice": (
        lambda root: (root / "labelsTr/b.nii.gz").write_bytes(gzip.compress((root / "labelsTr/b.nii.gz").read_bytes())),
        *("b", "b.nii.gz is not a NIfTI file", "unpack it once", FATAL),
    ),
    "terabytes in a small file": (
        header("imagesTr/b_0000.nii.gz", dim_1=32000, dim_2=32000, dim_3=32000),
        *("b", "b_0000.nii.gz is truncated (it cannot hold 65536000000000 bytes)", "copy or export it", FATAL),
    ),
    "NaN in the orientation": (
        header("labelsTr/b.nii.gz", srow_x=np.nan, qform_code=0),
        *("b", "b.nii.gz has a singular orientation matrix", "export it again with a valid sform", FATAL),
    ),
    "no voxel size": (
        header("imagesTr/b_0000.nii.gz", pixdim_2=0),
        *("b", "b_0000.nii.gz has the voxel size (1.0, 0.0, 1.0) mm", "write the true positive sizes", FATAL),
    ),
    "two voxel sizes in one header": (
        header("imagesTr/b_0000.nii.gz", pixdim_3=5),
        "b",
        "b_0000.nii.gz has voxels of (5, 1, 1) mm, but its orientation matrix says (1, 1, 1) mm",
        "correct its header; the voxel size is used",
        WARNING,
    ),
    "metres taken for millimetres": (
        both(
            *(put(f"imagesTr/b_000{channel}.nii.gz", ramp() + channel, spacing=1000.0) for channel in range(2)),
            put("labelsTr/b.nii.gz", a_label(1, 2), spacing=1000.0),
        ),
        "b",
        "its voxel size is (1000, 1000, 1000) mm, the median of the dataset (1, 1, 1) mm",
        "correct the voxel size in its header",
        WARNING,
    ),
    "a scale that overflows": (
        header("imagesTr/b_0000.nii.gz", scl_slope=3e38, scl_inter=0),
        *("b", "b_0000.nii.gz has 24 NaN or infinite voxels", "replace them by a value such as 0", FATAL),
    ),
    "a mark of missing values": (
        put("imagesTr/b_0000.nii.gz", ramp(-3.4e38)),
        *(
            "b",
            "b_0000.nii.gz has values from -3.4e+38 to 70, too large for single precision",
            "replace them (they often mark missing values), or scale the image",
            FATAL,
        ),
    ),
    "numbers beyond single precision": (
        put("imagesTr/b_0000.nii.gz", ramp(1e300, dtype=np.float64)),
        *(
            "b",
            "b_0000.nii.gz has values from 4 to 1e+300, too large for single precision",
            "replace them (they often mark missing values), or scale the image",
            FATAL,
        ),
    ),
    "nearly an integer": (
        put("labelsTr/b.nii.gz", a_label(1).astype(np.float32) * np.float32(1.01)),
        *("b", "b.nii.gz has the value 1.01, labels must be integers", "round or export it again", FATAL),
    ),
    "a label of 300 digits": (
        put("labelsTr/b.nii.gz", a_label(1).astype(np.float64) * 1e300),
        *("b", "b.nii.gz has the label value 1e+300, which exceeds 32 bits", "number labels from 0", FATAL),
    ),
    "negative label": (
        put("labelsTr/b.nii.gz", -a_label(1).astype(np.int16)),
        *("b", "b.nii.gz has the undeclared value -1; declared are 0, 1, 2", "correct the label", FATAL),
    ),
    "a channel per class": (
        put("labelsTr/b.nii.gz", np.stack([a_label(), a_label(1), a_label(0, 1)])),
        *("b", "b.nii.gz has 3 channels", "save labels as one channel of label values", FATAL),
    ),
    "the image copied over the label": (
        copy("imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz"),
        *("b", "b.nii.gz has the undeclared values 98, 99, 100, 101, 102, 103, 104, 105, ...;", "correct", FATAL),
    ),
    "nothing is labelled": (
        every("labelsTr", a_label()),
        *("dataset", "no label file has any class: organ, lesion occur nowhere", "label some cases", FATAL),
    ),
    "complex numbers": (
        put("imagesTr/b_0000.nii.gz", ramp(dtype=np.complex64)),
        *("b", "b_0000.nii.gz holds voxels of type complex64", "export each colour or component", FATAL),
    ),
    "five axes": (
        put("imagesTr/b_0000.nii.gz", np.zeros((2, 3, *SHAPE), np.int16)),
        *("b", "b_0000.nii.gz is 5D (4x3x2x3x2)", "split it into one file per channel", FATAL),
    ),
    "wrong count": (
        declare(numTraining=50),
        *(
            "dataset",
            'dataset.json says "numTraining": 50, found 5 training cases',
            "correct the number (the batch size depends on it) or add the missing cases",
            WARNING,
        ),
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
    assert len(CORPUS) >= 75


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    root = build(tmp_path)
    raw("dataset.json", b"\xef\xbb\xbf" + (root / "dataset.json").read_bytes())(root)
    assert check_dataset(root) == ()


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
        ("b", "b.nii.gz has the undeclared value 501; declared are 0, 7, 500"),
        ("c", "c.nii.gz is empty: it labels no class"),
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
