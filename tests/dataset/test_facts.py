"""Tables beside folders: facts about cases that the folders hold, and the size of pixels that no picture tells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from dataset_builder import build, write_volume
from PIL import Image as Picture

from segfit.dataset.annotation import read_labels
from segfit.dataset.checks import check_dataset
from segfit.dataset.contents import FileHashes
from segfit.dataset.layouts import describe, find_cases, inspect_dataset, open_dataset
from segfit.dataset.splits import balanced_splits
from segfit.errors import DatasetError, InputError
from segfit.fingerprint.measure import measure
from segfit.images.formats import read_case, read_grid

NAMES = "abcdef"


def pictures(root: Path, text: str, *, layout: str = "nnunet", name: str = "cases.csv") -> Path:
    """Write six training pictures and two test pictures x and y, 6 x 8 pixels, with a table beside."""
    images, labels, mark = {"nnunet": ("imagesTr", "labelsTr", "_0000"), "paired": ("images", "labels", "")}[layout]
    for number, case in enumerate(NAMES):
        pixels = np.arange(48, dtype=np.uint8).reshape(6, 8) + number
        write_picture(root / images / f"{case}{mark}.png", pixels)
        write_picture(root / labels / f"{case}.png", (pixels > 20 + number).astype(np.uint8))
    if layout == "nnunet":
        for number, case in enumerate("xy"):
            write_picture(
                root / "imagesTs" / f"{case}_0000.png", np.arange(48, dtype=np.uint8).reshape(6, 8) * 2 + number
            )
        content = {"channel_names": {"0": "us"}, "labels": {"background": 0, "head": 1}, "file_ending": ".png"}
        (root / "dataset.json").write_text(json.dumps(content | {"numTraining": 6}))
    (root / name).write_text(text, encoding="utf-8")
    return root


def write_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Picture.fromarray(pixels).save(path)


def rows(*columns: str, cases: str = NAMES) -> str:
    """Return a table with a column per text, such as ``pixel_mm=0.1``; ``{n}`` stands for the number of the case."""
    names, values = zip(*(column.split("=") for column in columns), strict=True)
    lines = [",".join(("case", *names))]
    lines += [",".join((case, *(value.format(n=n, pair=n // 2) for value in values))) for n, case in enumerate(cases)]
    return "\n".join(lines) + "\n"


FULL = rows("group=p{pair}", "site=s", "weight={n}", "pixel_mm=0.{n}1", "age=4{n}", f"note={300 * 'x'}")


@pytest.mark.parametrize("layout", ["nnunet", "paired"])
def test_facts_reach_the_cases_of_folders(tmp_path: Path, layout: str) -> None:
    dataset = open_dataset(pictures(tmp_path, FULL, layout=layout))
    assert dataset.layout == {"nnunet": "nnunet-v2", "paired": "paired"}[layout]
    case = dataset.case("d")
    assert (case.group, case.site, case.weight, case.spacing_mm) == ("p1", "s", 3.0, (0.31,))
    assert "3 groups" in describe(dataset)[0]
    assert [problem for problem in check_dataset(dataset.root) if problem.fatal] == []


def test_facts_reach_the_decathlon_layout(tmp_path: Path) -> None:
    root = build(tmp_path, channels=1)
    listed = [{"image": f"imagesTr/{case}.nii.gz", "label": f"labelsTr/{case}.nii.gz"} for case in "abcde"]
    for path in (root / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace("_0000", "")))
    content = {"modality": {"0": "T1"}, "labels": {"0": "background", "1": "a", "2": "b"}, "training": listed}
    (root / "dataset.json").write_text(json.dumps(content | {"numTraining": 5}))
    (root / "cases.json").write_text(
        json.dumps([{"case": case, "group": "p", "spacing_mm": [1, 1, 1]} for case in "abcde"])
    )
    dataset = open_dataset(root)
    assert (dataset.layout, {case.group for case in dataset.training}) == ("decathlon", {"p"})
    assert dataset.training[0].spacing_mm == (1.0, 1.0, 1.0)


def test_test_cases_may_be_in_the_table(tmp_path: Path) -> None:
    dataset, problems = inspect_dataset(pictures(tmp_path, rows("pixel_mm=0.1", cases=f"{NAMES}x")))
    assert dataset is not None
    assert [case.spacing_mm for case in dataset.test] == [(0.1,), None]
    assert problems == ()


def test_a_table_that_names_images_stays_a_layout(tmp_path: Path) -> None:
    text = "case,us,label,pixel_mm\n" + "".join(f"{c},imagesTr/{c}_0000.png,labelsTr/{c}.png,0.2 0.3\n" for c in NAMES)
    dataset = open_dataset(pictures(tmp_path, text))
    assert (dataset.layout, dataset.channel_names) == ("table", ("us",))
    assert dataset.case("a").spacing_mm == (0.2, 0.3)


@pytest.mark.parametrize(
    ("text", "case", "problem", "fatal"),
    [
        (rows("group=p", cases="abcdefz"), "dataset", "lists 1 case not in the dataset: z", False),
        (rows("group=p", cases="abcde"), "dataset", "f; each is its own group", False),
        (rows("group=p", cases="abcdeF"), "F", "but not in the dataset", False),
        (rows("group=p{n}", cases="abcdefa"), "a", "is listed twice in cases.csv with different values", True),
        (rows("pixel_mm=0.{n}", cases=NAMES), "a", "has the pixel_mm '0.0'", True),
        (rows("pixel_mm=wide"), "a", "has the pixel_mm 'wide'", True),
        (rows("pixel_mm=0.1", "spacing_mm=0.2"), "a", "has different pixel_mm and spacing_mm", True),
        (rows("weight=-1"), "a", "has the weight '-1'", True),
        (rows("weight=0"), "dataset", "fewer than two training cases have a weight above 0", True),
        (rows("set=test"), "dataset", 'has a column "set"', False),
        ("patient,age\na,4\n", "dataset", 'no column "case"', True),
        ("case,age\n,4\n", "dataset", "row 1 of cases.csv has the case", True),
        ("case,age,age\na,4,4\n", "dataset", "two columns called", True),
    ],
)  # fmt: skip
def test_faults_of_the_table(tmp_path: Path, text: str, case: str, problem: str, fatal: bool) -> None:
    told = [item for item in inspect_dataset(pictures(tmp_path, text))[1] if problem in item.problem]
    assert (told[0].case, told[0].fatal) == (case, fatal)
    assert told[0].action


def test_an_unreadable_table_is_refused(tmp_path: Path) -> None:
    root = pictures(tmp_path, "")
    (root / "cases.csv").write_bytes(b"case,group\na,\xff\n")
    assert [(item.case, item.fatal) for item in inspect_dataset(root)[1]] == [("dataset", True)]


def test_equal_rows_of_a_case_are_one(tmp_path: Path) -> None:
    assert inspect_dataset(pictures(tmp_path, rows("group=p", cases="abcdefa")))[1] == ()


def test_names_are_equal_however_accents_are_stored(tmp_path: Path) -> None:
    root = pictures(tmp_path, rows("group=p").replace("a,p", "e\u0301,p"))
    for path in (root / "imagesTr" / "a_0000.png", root / "labelsTr" / "a.png"):
        path.rename(path.with_name(path.name.replace("a", "\u00e9", 1)))
    dataset, problems = inspect_dataset(root)
    assert dataset is not None
    assert (dataset.case("\u00e9").group, problems) == ("p", ())


# ── voxel sizes ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_size_is_that_of_image_label_and_fingerprint(tmp_path: Path) -> None:
    root = pictures(tmp_path, rows("pixel_mm=0.{n}1"))
    dataset = open_dataset(root)
    case = dataset.case("c")
    assert read_case(case.images, case.spacing_mm).grid.spacing_mm == (0.21, 0.21)
    assert read_labels(case, dataset.labels).grid.spacing_mm == (0.21, 0.21)
    spacings = [record.spacing_mm for record in measure(dataset, "canonical").cases]
    assert spacings == [(float(f"0.{n}1"),) * 2 for n in range(6)]


def test_caches_follow_the_table(tmp_path: Path) -> None:
    root = pictures(tmp_path, rows("pixel_mm=0.1"))
    before = open_dataset(root)
    contents = FileHashes().dataset(before)
    (root / "cases.csv").write_text(rows("pixel_mm=0.25"))
    after = open_dataset(root)
    assert FileHashes().dataset(after) != contents
    assert FileHashes().case(after.case("a")) != FileHashes().case(before.case("a"))


def test_a_file_that_says_another_size_is_refused(tmp_path: Path) -> None:
    root = build(tmp_path, channels=1)
    write_volume(root / "imagesTr" / "b_0000.nii.gz", spacing=1.009)
    write_volume(root / "labelsTr" / "b.nii.gz", np.eye(4, dtype=np.uint8)[None, :3].repeat(2, 0), spacing=1.009)
    write_volume(root / "imagesTr" / "c_0000.nii.gz", spacing=1.02)
    (root / "cases.csv").write_text(rows("spacing_mm=1", cases="abcd") + "e,1 1\n")
    fatal = [(item.case, item.problem) for item in check_dataset(root) if item.fatal and "was given" in item.problem]
    assert fatal == [
        ("c", "c_0000.nii.gz has voxels of (1.02, 1.02, 1.02) mm (array order) but was given (1, 1, 1) mm"),
        ("e", "e_0000.nii.gz has 3 axes but was given the voxel size (1, 1) mm"),
    ]


def test_a_case_without_a_size_among_others_is_refused(tmp_path: Path) -> None:
    root = pictures(tmp_path, rows("pixel_mm=0.1").replace("d,0.1", "d,"))
    assert [item.case for item in check_dataset(root) if item.fatal] == ["d"]


@pytest.mark.parametrize("inside", [True, False])
def test_the_table_of_a_folder_to_predict(tmp_path: Path, inside: bool) -> None:
    root = pictures(tmp_path, rows("pixel_mm=0.5", cases="x"))
    if inside:
        (root / "cases.csv").rename(root / "imagesTs" / "cases.csv")
    found = {case.id: case for case in find_cases(root / "imagesTs", ".png", 1)}
    assert [found[name].spacing_mm for name in "xy"] == [(0.5,), None]
    assert read_grid(found["x"].images[0], found["x"].spacing_mm).spacing_mm == (0.5, 0.5)


def test_a_table_of_a_folder_to_predict_is_understood_or_not_ours(tmp_path: Path) -> None:
    root = pictures(tmp_path, rows("pixel_mm=none", cases="x"))
    with pytest.raises(DatasetError, match="x: has the pixel_mm 'none'"):
        find_cases(root / "imagesTs", ".png", 1)
    (root / "cases.csv").write_text("patient,age\nx,4\n")
    assert [case.spacing_mm for case in find_cases(root / "imagesTs", ".png", 1)] == [None, None]


def test_a_size_needs_as_many_numbers_as_axes(tmp_path: Path) -> None:
    path = pictures(tmp_path, "") / "imagesTs" / "x_0000.png"
    assert read_grid(path, (0.2, 0.3)).spacing_mm == (0.2, 0.3)
    with pytest.raises(InputError, match='write one number, or "y x" separated by blanks'):
        read_grid(path, (1.0, 0.2, 0.3))


@pytest.mark.real_data
def test_real_ultrasound(data: Path) -> None:
    dataset = open_dataset(data / "Dataset201_FetalHead")
    groups = {case.id: case.group for case in dataset.training}
    assert (len(groups), len(set(groups.values()))) == (98, 82)
    assert dataset.case("exam010_2").spacing_mm == (0.079927246,)
    assert check_dataset(dataset) == ()
    for fold in balanced_splits(dataset.training, {}).folds:
        assert not {groups[case] for case in fold.train} & {groups[case] for case in fold.validation}
