"""Layouts other than nnU-Net v2: what is understood of them, and what is said where they are broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from dataset_builder import SHAPE, a_label, write_volume
from PIL import Image as Pillow

from segfit.dataset.annotation import read_labels
from segfit.dataset.checks import OVERLAP, check_dataset
from segfit.dataset.layouts import LAYOUTS, describe, inspect_dataset, leave_out, open_dataset, recognised
from segfit.dataset.manifest import Mask
from segfit.errors import DatasetError
from segfit.options import DatasetOptions

CASES = "abcde"


def ramp(start: int) -> np.ndarray:
    return np.arange(24, dtype=np.int16).reshape(SHAPE) + start


def found(root: Path) -> list[tuple[str, str, bool]]:
    return [(item.case, item.problem, item.fatal) for item in check_dataset(root)]


# ── Decathlon and nnU-Net v1 ─────────────────────────────────────────────────────────────────────────────────────────


def decathlon(folder: Path, **changes: Any) -> Path:
    root = folder / "Task04_Test"
    for case in CASES:
        write_volume(root / "imagesTr" / f"{case}.nii.gz", ramp(ord(case)))
        write_volume(root / "labelsTr" / f"{case}.nii.gz", a_label(1, 2))
    write_volume(root / "imagesTs" / "z.nii.gz", ramp(0))
    content = {
        "name": "Test",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {"0": "Background", "1": "Anterior", "2": "Posterior"},
        "numTraining": 5,
        "numTest": 1,
        "training": [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in CASES],
        "test": ["./imagesTs/z.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}))
    return root


def test_decathlon(tmp_path: Path) -> None:
    root = decathlon(tmp_path)
    dataset = open_dataset(root)
    assert (dataset.layout, dataset.name, dataset.file_ending) == ("decathlon", "Task04_Test", ".nii.gz")
    assert dataset.channel_names == ("MRI",)
    assert [(target.name, target.values) for target in dataset.labels.labels] == [
        ("background", (0,)),
        ("Anterior", (1,)),
        ("Posterior", (2,)),
    ]
    assert [case.id for case in dataset.training] == list(CASES)
    assert dataset.case("b").images == (root / "imagesTr" / "b.nii.gz",)
    assert dataset.case("b").label == root / "labelsTr" / "b.nii.gz"
    assert [(case.id, case.label_files) for case in dataset.test] == [("z", ())]
    assert check_dataset(dataset) == ()
    assert describe(dataset) == (
        "Decathlon / nnU-Net v1 folder: 5 training cases, 1 test case",
        "1 channel: MRI; labels (.nii.gz): Anterior = 1 and Posterior = 2",
    )


def test_a_decathlon_file_may_hold_several_channels(tmp_path: Path) -> None:
    names = []
    for case in CASES:
        names.append({"image": f"imagesTr/{case}.tif", "label": f"labelsTr/{case}.tif"})
        for entry, pixels in zip(names[-1].values(), (np.stack([ramp(ord(case)), ramp(0)]), a_label(1)), strict=True):
            (tmp_path / entry).parent.mkdir(exist_ok=True)
            axes = "CZYX"[-pixels.ndim :]
            tifffile.imwrite(tmp_path / entry, pixels, metadata={"axes": axes}, photometric="minisblack")
            (tmp_path / entry).with_suffix(".json").write_text('{"spacing": [2, 1, 1]}')
    content = {"modality": {"0": "FLAIR", "1": "T1w"}, "labels": {"0": "none", "1": "x"}, "numTraining": 5}
    (tmp_path / "dataset.json").write_text(json.dumps(content | {"training": names}))
    assert open_dataset(tmp_path).channel_names == ("FLAIR", "T1w")
    assert found(tmp_path) == []
    (tmp_path / "dataset.json").write_text(json.dumps(content | {"training": names, "modality": {"0": "FLAIR"}}))
    assert found(tmp_path)[0] == ("a", "a.tif: 2 channels, the dataset has 1", True)


def test_nnunet_v1_has_a_file_per_channel_behind_the_listed_name(tmp_path: Path) -> None:
    root = decathlon(tmp_path, modality={"0": "T1", "1": "T2"})
    for path in [*(root / "imagesTr").iterdir(), *(root / "imagesTs").iterdir()]:
        stem = path.name.removesuffix(".nii.gz")
        write_volume(path.with_name(f"{stem}_0001.nii.gz"), ramp(2 * ord(stem)))
        path.rename(path.with_name(f"{stem}_0000.nii.gz"))
    dataset = open_dataset(root)
    assert [path.name for path in dataset.case("c").images] == ["c_0000.nii.gz", "c_0001.nii.gz"]
    assert [path.name for path in dataset.test[0].images] == ["z_0000.nii.gz", "z_0001.nii.gz"]
    assert check_dataset(dataset) == ()
    (root / "imagesTr" / "c_0001.nii.gz").unlink()
    assert found(root) == [("c", "expected 2 channel files, missing c_0001", True)]


@pytest.mark.parametrize(
    ("changes", "case", "problem"),
    [
        ({"labels": None}, "dataset", '"labels" in dataset.json must map values to names, got None'),
        ({"labels": {"background": 0}}, "dataset", "must map values to names, got {'background': 0}"),
        ({"labels": {"1": "x"}}, "dataset", '"labels" in dataset.json has no "0", the background'),
        ({"labels": {"0": "b", "1": "x", "2": "x"}}, "dataset", 'two values have the same name in "labels"'),
        ({"modality": None}, "dataset", 'dataset.json has no "channel_names"'),
        ({"training": []}, "dataset", 'the "training" list in dataset.json is empty or not a list'),
        (
            {"training": ["imagesTr/a.nii.gz"]},
            "dataset",
            'entry 0 of "training" in dataset.json is invalid: \'im',
        ),
        ({"training": [{"image": "no/q.nii.gz", "label": "labelsTr/a.nii.gz"}]}, "q", "the listed file no/q.nii.gz is"),
        ({"training": [{"image": "imagesTr/a.nii.gz", "label": "q.nii.gz"}]}, "a", "its label q.nii.gz is missing"),
        (
            {"training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}] * 2},
            "a",
            "is listed twice in dataset.json",
        ),
    ],
)
def test_broken_decathlon_folders(tmp_path: Path, changes: dict[str, Any], case: str, problem: str) -> None:
    root = decathlon(tmp_path, **changes)
    told = [item for item in inspect_dataset(root)[1] if item.fatal and problem in item.problem]
    assert [item.case for item in told] == [case], inspect_dataset(root)[1]
    assert told[0].action
    with pytest.raises(DatasetError):
        open_dataset(root)


# ── paired folders ───────────────────────────────────────────────────────────────────────────────────────────────────


def paired(root: Path, images: str = "images", labels: str = "labels") -> Path:
    for case in CASES:
        write_volume(root / images.format(case), ramp(ord(case)))
        write_volume(root / labels.format(case), a_label(7, 500) if case < "c" else a_label(7))
    return root


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("images/{}.nii.gz", "labels/{}.nii.gz"),
        ("Images/{}.nii.gz", "Masks/{}.nii.gz"),
        ("imgs/{}_0000.nii.gz", "segmentations/{}.nii.gz"),
        ("images/{}_image.nii.gz", "annotations/{}_seg.nii.gz"),
        ("img/{}.nii.gz", "gt/{}-mask.nii.gz"),
        ("imagesTr/{}.nii.gz", "labelsTr/{}.nii.gz"),
    ],
)
def test_paired_folders(tmp_path: Path, images: str, labels: str) -> None:
    root = paired(tmp_path / "Bilder mit Ümlaut", images, labels)
    write_volume(root / images.split("/")[0] / "._a.nii.gz")
    dataset = open_dataset(root)
    assert (dataset.layout, dataset.name, dataset.channel_names) == ("paired", "Bilder mit Ümlaut", ("image",))
    assert [case.id for case in dataset.training] == list(CASES)
    assert dataset.num_training == 5
    assert dataset.case("a").images == (root / images.format("a"),)
    assert dataset.case("a").label == root / labels.format("a")
    assert [target.name for target in dataset.labels.classes] == ["label 7", "label 500"]
    assert dataset.labels.stored_values == (0, 7, 500)
    assert found(root) == [("dataset", f"1 hidden file: {images.split('/')[0]}/._a.nii.gz", False)]


def test_paired_channels_have_numbers(tmp_path: Path) -> None:
    root = paired(tmp_path, "images/{}_0000.nii.gz", "labels/{}.nii.gz")
    for case in CASES:
        write_volume(root / "images" / f"{case}_0001.nii.gz", ramp(2 * ord(case)))
    dataset = open_dataset(root)
    assert dataset.channel_names == ("channel 0", "channel 1")
    assert [path.name for path in dataset.case("e").images] == ["e_0000.nii.gz", "e_0001.nii.gz"]
    assert check_dataset(dataset) == ()


def test_paired_pictures_may_differ_in_their_endings(tmp_path: Path) -> None:
    for number, case in enumerate(CASES):
        for folder, shape, ending in (("images", (4, 5, 3), ".jpg"), ("masks", (4, 5), ".png")):
            (tmp_path / folder).mkdir(exist_ok=True)
            pixels = np.full(shape, 255 * (number % 2), np.uint8)
            pixels[: 1 + number] = 100
            Pillow.fromarray(pixels).save(tmp_path / folder / f"{case}{ending}")
    dataset = open_dataset(tmp_path)
    assert dataset.channel_names == ("R", "G", "B")
    assert dataset.file_ending == ".png"
    assert dataset.labels.stored_values == (0, 100, 255)
    assert [item for item in check_dataset(dataset) if item.fatal] == []


def test_paired_folders_may_declare_names(tmp_path: Path) -> None:
    root = paired(tmp_path, "images/{}.nii.gz", "labels/{}.nii.gz")
    labels = {"background": 0, "kidney": 7, "stone": 500}
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "channel_names": {"0": "CT"}}))
    dataset = open_dataset(root)
    assert (dataset.layout, dataset.channel_names) == ("paired", ("CT",))
    assert describe(dataset)[1] == "1 channel: CT; labels (.nii.gz): kidney = 7 and stone = 500"


def drop(*names: str) -> Callable[[Path], None]:
    return lambda root: [(root / name).unlink() for name in names] and None


def put(name: str, array: np.ndarray | None = None) -> Callable[[Path], None]:
    return lambda root: write_volume(root / name, array)


@pytest.mark.parametrize(
    ("spoil", "case", "problem", "fatal"),
    [
        (drop("labels/b.nii.gz"), "b", "its label labels/b is missing", True),
        (drop("images/b.nii.gz"), "b", "has a label in labels but no image in images", False),
        (put("labels/b_seg.nii.gz"), "b", "has two label files in labels: b_seg.nii.gz is the second", True),
        (
            drop(*(f"images/{case}.nii.gz" for case in CASES)),
            "dataset",
            "images has no readable image",
            True,
        ),
    ],
)
def test_broken_paired_folders(
    tmp_path: Path, spoil: Callable[[Path], None], case: str, problem: str, fatal: bool
) -> None:
    root = paired(tmp_path, "images/{}.nii.gz", "labels/{}.nii.gz")
    spoil(root)
    assert (case, problem, fatal) in found(root)


def test_paired_labels_without_structures(tmp_path: Path) -> None:
    root = paired(tmp_path, "images/{}.nii.gz", "labels/{}.nii.gz")
    for case in CASES:
        write_volume(root / "labels" / f"{case}.nii.gz", a_label())
    assert found(root) == [("dataset", "no label file has a value other than 0", True)]
    for case in CASES:
        write_volume(root / "labels" / f"{case}.nii.gz", a_label(1).astype(np.int16) - 1)
    assert found(root) == []
    assert open_dataset(root).labels.stored_values == (0, -1)


# ── one label file per structure ─────────────────────────────────────────────────────────────────────────────────────


def test_masks_are_painted_in_the_declared_order(tmp_path: Path) -> None:
    for case in CASES:
        write_volume(tmp_path / "images" / f"{case}.nii.gz", ramp(ord(case)))
        write_volume(tmp_path / "labels" / case / "liver.nii.gz", a_label(1, 1, 1))
        write_volume(tmp_path / "labels" / case / "tumour.nii.gz", a_label(0, 255, 0, 255))
    (tmp_path / "labels" / "c" / "liver.nii.gz").unlink()  # absent in this case
    dataset = open_dataset(tmp_path)
    assert [(target.name, target.values) for target in dataset.labels.classes] == [("liver", (1,)), ("tumour", (2,))]
    case = dataset.case("a")
    assert case.label is None
    assert case.masks == (
        Mask(path=tmp_path / "labels" / "a" / "liver.nii.gz", value=1),
        Mask(path=tmp_path / "labels" / "a" / "tumour.nii.gz", value=2),
    )
    assert read_labels(case, dataset.labels).array.ravel()[:6].tolist() == [1, 2, 1, 2, 0, 0]
    assert read_labels(dataset.case("c"), dataset.labels).array.ravel()[:6].tolist() == [0, 2, 0, 2, 0, 0]
    (told,) = check_dataset(dataset)  # 8 of the 12 voxels of all livers are left
    assert (told.code, told.fatal) == (OVERLAP, True)
    assert 'masks of "tumour" cover 4 voxels of "liver" (33.33% of all, 33% in e)' in told.problem
    assert "--labels exclusive" in told.action
    assert check_dataset(dataset.taken(DatasetOptions(labels="exclusive"))) == ()
    assert describe(dataset)[0].endswith("one label file per class, later ones over earlier ones")

    declared = {"background": 0, "tumour": 7, "liver": 500}  # now the liver comes last
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": declared}))
    dataset = open_dataset(tmp_path)
    labels = read_labels(dataset.case("a"), dataset.labels)
    assert dataset.labels.to_stored(labels.array.astype(np.uint8)).ravel()[:6].tolist() == [500, 500, 500, 7, 0, 0]
    assert [(item.code, "(40.00% of all" in item.problem) for item in check_dataset(dataset)] == [(OVERLAP, True)]

    write_volume(tmp_path / "labels" / "b" / "spleen.nii.gz", a_label(1))
    write_volume(tmp_path / "labels" / "d" / "liver.nii.gz", np.ones((2, 3, 5), np.uint8))
    told = [item for item in found(tmp_path) if item[0] != "dataset"]
    assert told[0] == ("b", 'spleen.nii.gz is a mask of the class "spleen", which is not declared', True)
    assert told[1][0] == "d"
    assert told[1][1].startswith("liver.nii.gz does not fit tumour.nii.gz: its shape is (2, 3, 5)")


def test_a_small_overlap_of_masks_is_a_warning(tmp_path: Path) -> None:
    for case in CASES:
        write_volume(tmp_path / "images" / f"{case}.nii.gz", ramp(ord(case)))
        write_volume(tmp_path / "labels" / case / "liver.nii.gz", a_label(*[1] * 20))
        write_volume(tmp_path / "labels" / case / "spleen.nii.gz", a_label(*[0] * (19 if case in "ab" else 20), 1))
    (told,) = check_dataset(open_dataset(tmp_path))
    assert (told.case, told.code, told.fatal) == ("dataset", OVERLAP, False)
    assert 'cover 2 voxels of "liver" (2.00% of all, 5% in b)' in told.problem


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(root: Path, text: str, name: str = "cases.csv") -> Path:
    for case in CASES:
        for channel in range(2):
            write_volume(root / "scans" / f"{case}{channel}.nii.gz", ramp(100 * channel + ord(case)))
        write_volume(root / "truth" / f"{case}.nii.gz", a_label(7, 9))
    (root / name).write_text(text, encoding="utf-8")
    return root


HEADER = "case,FLAIR,T1,label,group,site,weight\n"
ROWS = [f"{c},scans/{c}0.nii.gz,scans/{c}1.nii.gz,truth/{c}.nii.gz,p{n // 2},Zürich,{n}\n" for n, c in enumerate(CASES)]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("as_file", [False, True])
def test_tables(tmp_path: Path, separator: str, as_file: bool) -> None:
    text = "\ufeff" + (HEADER + "".join(ROWS)).replace(",", separator)
    root = table(tmp_path, text, "study.csv" if as_file else "cases.csv")
    dataset = open_dataset(root / "study.csv" if as_file else root)
    assert (dataset.layout, dataset.file_ending) == ("table", ".nii.gz")
    assert dataset.name == ("study" if as_file else tmp_path.name)
    assert dataset.root == (root / "study.csv" if as_file else root)
    assert dataset.channel_names == ("FLAIR", "T1")
    assert [case.id for case in dataset.training] == list(CASES)
    case = dataset.case("d")
    assert case.images == (root / "scans" / "d0.nii.gz", root / "scans" / "d1.nii.gz")
    assert case.label == root / "truth" / "d.nii.gz"
    assert (case.group, case.site, case.weight) == ("p1", "Zürich", 3.0)
    assert dataset.labels.stored_values == (0, 7, 9)
    assert check_dataset(dataset) == ()
    assert describe(dataset)[0] == "table of cases: 5 training cases, 0 test cases; 3 groups; 1 site"


def test_a_table_in_json_with_names_and_test_cases(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"case": c, "CT": f"scans/{c}0.nii.gz", "label": str(tmp_path / "truth" / f"{c}.nii.gz")} for c in CASES
    ]
    cases[4] |= {"set": "test", "label": None}
    content = {"cases": cases, "labels": {"background": 0, "kidney": 7, "stone": 9}}
    root = table(tmp_path, json.dumps(content), "cases.json")
    dataset = open_dataset(root)
    assert [target.name for target in dataset.labels.classes] == ["kidney", "stone"]
    assert [case.id for case in dataset.training] == list("abcd")
    assert [(case.id, case.group, case.site, case.weight) for case in dataset.test] == [("e", None, None, 1.0)]
    assert found(root) == [("dataset", "4 training cases, five folds need 5 or more", False)]
    root = table(tmp_path, json.dumps(cases), "list.json")
    assert [target.name for target in open_dataset(root / "list.json").labels.classes] == ["label 7", "label 9"]


def test_a_table_with_one_column_per_structure(tmp_path: Path) -> None:
    rows = [f"{c},scans/{c}0.nii.gz,truth/{c}.nii.gz,{'' if c == 'a' else f'scans/{c}1.nii.gz'}\n" for c in CASES]
    dataset = open_dataset(table(tmp_path, "case,CT,label:wide,label:narrow\n" + "".join(rows)))
    assert [(target.name, target.values) for target in dataset.labels.classes] == [("wide", (1,)), ("narrow", (2,))]
    assert [mask.value for mask in dataset.case("a").masks] == [1]
    assert [mask.value for mask in dataset.case("b").masks] == [1, 2]


@pytest.mark.parametrize(
    ("text", "case", "problem"),
    [
        (HEADER, "dataset", "cases.csv lists no case"),
        ("name,CT,label\nx,scans/a0.nii.gz,truth/a.nii.gz\n", "dataset", 'but no column "case"'),
        ("case,label\na,truth/a.nii.gz\n", "dataset", "has the columns case, label, but none of a channel"),
        ("case,CT\na,scans/a0.nii.gz\n", "dataset", 'has the columns case, CT, but no column "label"'),
        (HEADER + ROWS[0] + ROWS[0], "a", "is listed twice in cases.csv"),
        (
            HEADER + ROWS[0].replace("a,", "a/b,", 1),
            "dataset",
            'row 1 of cases.csv has the case "a/b", which is not a valid',
        ),
        (HEADER + ROWS[0].replace("a1.nii", "q1.nii"), "a", "the listed file scans/q1.nii.gz is missing"),
        (HEADER + ROWS[0].replace("scans/a1.nii.gz", ""), "a", 'has no file in the column "T1" of cases.csv'),
        (HEADER + ROWS[0].replace("truth/a.nii.gz", ""), "a", 'has no file in the column "label" of cases.csv'),
        (HEADER + ROWS[0].replace(",0\n", ",much\n"), "a", "has the weight 'much' in cases.csv"),
        (HEADER + ROWS[0].replace(",0\n", ",-1\n"), "a", "has the weight '-1' in cases.csv"),
    ],
)
def test_broken_tables(tmp_path: Path, text: str, case: str, problem: str) -> None:
    told = [item for item in inspect_dataset(table(tmp_path, text))[1] if problem in item.problem]
    assert [(item.case, item.fatal) for item in told] == [(case, True)]


def test_a_json_table_that_is_none(tmp_path: Path) -> None:
    for content, problem in (("[1]", "cases.json does not list cases"), ("[{},]", "cases.json is not valid JSON")):
        root = table(tmp_path, content, "cases.json")
        assert any(problem in item.problem for item in inspect_dataset(root)[1])


# ── leaving cases out ────────────────────────────────────────────────────────────────────────────────────────────────


def test_incomplete_cases_are_left_out(tmp_path: Path) -> None:
    root = paired(tmp_path, "images/{}.nii.gz", "labels/{}.nii.gz")
    (root / "labels" / "b.nii.gz").unlink()
    (root / "images" / "d.nii.gz").write_bytes(b"")
    with pytest.raises(DatasetError, match="its label labels/b is missing"):
        open_dataset(root)
    dataset = open_dataset(root, skip_incomplete=True)
    assert [case.id for case in dataset.training] == list("acde")
    assert dataset.num_training == 4
    kept, problems = leave_out(dataset, check_dataset(root))
    assert [case.id for case in kept.training] == list("ace")
    assert kept.num_training == 3
    assert [(item.case, item.problem.split(" ")[0:2], item.fatal) for item in problems] == [
        ("b", ["left", "out:"], False),
        ("d", ["left", "out:"], False),
    ]


def test_not_every_case_can_be_left_out(tmp_path: Path) -> None:
    root = paired(tmp_path, "images/{}.nii.gz", "labels/{}.nii.gz")
    dataset = open_dataset(root)
    for case in CASES:
        (root / "images" / f"{case}.nii.gz").write_bytes(b"")
    kept, problems = leave_out(dataset, check_dataset(dataset))
    assert kept.training == ()
    assert [(item.problem, item.fatal) for item in problems if item.fatal] == [("no usable case", True)]


def test_problems_of_the_whole_dataset_stay_fatal(tmp_path: Path) -> None:
    root = decathlon(tmp_path, training=[])
    with pytest.raises(DatasetError, match='the "training" list'):
        open_dataset(root, skip_incomplete=True)


def test_every_layout_has_a_description() -> None:
    assert list(LAYOUTS) == ["table", "decathlon", "paired", "nnunet-v2"]
    assert all(layout.title for layout in LAYOUTS.values())


# ── pairs of files in one folder ─────────────────────────────────────────────────────────────────────────────────────


def pairs(root: Path, image: str = "{}_img.nii.gz", label: str = "{}_masks.nii.gz") -> Path:
    for case in CASES:
        write_volume(root / image.format(case), ramp(ord(case)))
        write_volume(root / label.format(case), a_label(1))
    return root


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("{}_img.nii.gz", "{}_masks.nii.gz"),
        ("{}.nii.gz", "{}_masks.nii.gz"),
        ("{}_img.nii.gz", "{}_img_cp_masks.nii.gz"),
        ("{}.nii.gz", "{}_seg.nii.gz"),
    ],
)
def test_pairs_of_files_in_one_folder(tmp_path: Path, image: str, label: str) -> None:
    root = pairs(tmp_path, image, label)
    write_volume(root / "a_img_flows.nii.gz", ramp(0))
    (root / "a_seg.npy").touch()
    write_volume(root / "test" / "z.nii.gz", ramp(0))
    dataset = open_dataset(root)
    assert dataset.layout == "paired"
    assert [(case.id, case.images, case.label) for case in dataset.training] == [
        (case, (root / image.format(case),), root / label.format(case)) for case in CASES
    ]
    assert check_dataset(dataset) == ()


def test_what_lacks_in_pairs_of_one_folder_is_told(tmp_path: Path) -> None:
    root = pairs(tmp_path)
    (root / "b_masks.nii.gz").unlink()
    (root / "c_img.nii.gz").unlink()
    found = [(item.case, item.fatal) for item in inspect_dataset(root)[1]]
    assert found == [("b", True), ("c", False)]


def test_images_alone_are_no_pairs(tmp_path: Path) -> None:
    pairs(tmp_path, label="other_{}_masks.nii.gz")
    assert recognised(tmp_path) == []
