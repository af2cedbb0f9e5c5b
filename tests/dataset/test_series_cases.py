"""DICOM series and OME-Zarr as the images of cases, in all layouts and for prediction."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from segfit.dataset.checks import check_dataset
from segfit.dataset.layouts import describe, find_cases, inspect_dataset, open_dataset
from segfit.dataset.manifest import Dataset
from segfit.errors import DatasetError, InputError
from segfit.execution.execution import Execution
from segfit.geometry import AxisMap
from segfit.images.formats import read_image, read_label, write_labels
from segfit.images.image import LabelMap
from segfit.nnunet.dataset_export import export_nnunet
from series_builder import clutter, write_series

SHAPE = (3, 4, 5)
NAMES = {"labels": {"background": 0, "organ": 1, "lesion": 2}, "channel_names": {"0": "CT"}}
LABELS = np.zeros(SHAPE, np.uint8)
LABELS[0, 0, :2] = 1, 2


def voxels(number: int) -> np.ndarray:
    return np.arange(60, dtype=np.int16).reshape(SHAPE) + 100 * number


def label_of(series: Path, path: Path) -> None:
    write_labels(path, LabelMap(LABELS, read_image(series).grid))


def nnunet(root: Path, channels: int = 1, **declared: object) -> Path:
    """Write five cases a to e as nnU-Net lays them out, d one folder deeper, and a test case."""
    for number, case in enumerate("abcde"):
        for channel in range(channels):
            folder = root / "imagesTr" / f"{case}_{channel:04d}"
            write_series(folder / "1.2.840" if case == "d" else folder, voxels(number) + channel)
            clutter(folder)
        label_of(root / "imagesTr" / f"{case}_0000", root / "labelsTr" / f"{case}.nii.gz")
    for channel in range(channels):
        write_series(root / "imagesTs" / f"t_{channel:04d}", voxels(9) + channel)
    label_of(root / "imagesTs" / "t_0000", root / "labelsTs" / "t.nii.gz")
    names = {"channel_names": {str(number): f"phase {number}" for number in range(channels)}}
    (root / "dataset.json").write_text(json.dumps(NAMES | names | {"numTraining": 5} | declared))
    return root


def paired(root: Path) -> Path:
    for number, case in enumerate("abcde"):
        folder = root / "images" / case
        write_series(folder / "series" if case == "d" else folder, voxels(number))
        label_of(folder, root / "labels" / f"{case}_seg.nii.gz")
    (root / "dataset.json").write_text(json.dumps(NAMES))
    return root


def table(root: Path) -> Path:
    paired(root)
    with (root / "cases.csv").open("w") as handle:
        rows = csv.writer(handle)
        rows.writerow(["case", "CT", "label"])
        rows.writerows([case, f"images/{case}", f"labels/{case}_seg.nii.gz"] for case in "abcde")
    return root


def test_nnunet_folders_may_hold_series(tmp_path: Path) -> None:
    for number, declared in enumerate(({"file_ending": "/"}, {})):
        dataset = open_dataset(nnunet(tmp_path / str(number), 2, **declared))
        assert [case.id for case in dataset.training] == list("abcde")
        assert [path.name for path in dataset.training[3].images] == ["d_0000", "d_0001"]
        assert (dataset.image_ending, dataset.file_ending) == ("/", ".nii.gz")
        assert [(case.id, len(case.images), case.label) for case in dataset.test] == [
            ("t", 2, tmp_path / str(number) / "labelsTs" / "t.nii.gz")
        ]
        assert check_dataset(dataset) == ()
        assert describe(dataset) == (
            "nnU-Net v2 folder: 5 training cases, 1 test case",
            "2 channels: phase 0 and phase 1 (DICOM series); labels (.nii.gz): organ = 1 and lesion = 2",
        )


@pytest.mark.parametrize(("layout", "write"), [("paired", paired), ("table", table)])
def test_other_layouts_may_hold_series(tmp_path: Path, layout: str, write: Callable[[Path], Path]) -> None:
    dataset = open_dataset(write(tmp_path / "data"))
    assert (dataset.layout, dataset.image_ending, dataset.file_ending) == (layout, "/", ".nii.gz")
    assert [case.images for case in dataset.training] == [(tmp_path / "data" / "images" / case,) for case in "abcde"]
    assert check_dataset(dataset) == ()
    assert read_image(dataset.case("d").images[0]).array[0].tolist() == voxels(3).tolist()


def test_listed_series(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "data")
    listed = {case: {"images": [f"imagesTr/{case}_0000"], "label": f"labelsTr/{case}.nii.gz"} for case in "abcde"}
    (root / "dataset.json").write_text(json.dumps(NAMES | {"numTraining": 5, "file_ending": "/", "dataset": listed}))
    dataset = open_dataset(root)
    assert (len(dataset.training), dataset.file_ending) == (5, ".nii.gz")
    assert check_dataset(dataset) == ()


def test_series_of_the_decathlon_list(tmp_path: Path) -> None:
    root = paired(tmp_path / "data")
    listed = [{"image": f"images/{case}", "label": f"labels/{case}_seg.nii.gz"} for case in "abcde"]
    declared = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "organ", "2": "lesion"}}
    (root / "dataset.json").write_text(json.dumps(declared | {"numTraining": 5, "training": listed}))
    dataset = open_dataset(root)
    assert (dataset.layout, dataset.image_ending, dataset.file_ending) == ("decathlon", "/", ".nii.gz")
    assert check_dataset(dataset) == ()


def told(root: Path) -> list[tuple[str, str, str]]:
    return [(item.case, item.problem, item.action) for item in check_dataset(root) if item.fatal]


@pytest.mark.parametrize(("write", "form"), [(nnunet, "imagesTr/{}_0000"), (paired, "images/{}")])
def test_faulty_series_are_named_with_their_case(tmp_path: Path, write: Callable[[Path], Path], form: str) -> None:
    root = write(tmp_path / "data")
    a, b, c, e = (root / form.format(case) for case in "abce")
    (a / "slice999").unlink()  # at an end only the label can tell
    shutil.rmtree(b)
    write_series(b, np.concatenate([voxels(1), voxels(2)]))
    (b / "slice997").unlink()
    shutil.copy(a / "slice998", c / "extra")
    shutil.rmtree(e)
    e.mkdir()
    found = told(root)
    assert [case for case, _, _ in found] == list("abce")
    label = "a.nii.gz" if write is nnunet else "a_seg.nii.gz"
    difference = "its shape is (3, 4, 5), expected (2, 4, 5) (array order)"
    assert found[0][1] == f"{label} does not fit {a.name}: {difference}"
    assert found[1][1:] == (
        f"{b.name} has uneven distances between slices: 4.5 mm after slice 2 of 5 (slice998), "
        "usually 2.25 mm (1 such place)",
        "add the missing slices or convert the series to evenly spaced NIfTI",
    )
    assert found[2][1] in [
        f"{c.name} holds 2 series: CT ({x}), CT ({y})" for x, y in permutations(("1 image", "3 images"))
    ]
    assert found[2][2] == "keep the one that is meant, or give each series its own folder"
    assert found[3][1:] == (
        f"{e.name} holds no DICOM images",
        "give the folder of one complete series, or remove this folder",
    )


def test_a_damaged_slice_is_named_with_its_channel(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "data", channels=2)
    damaged = root / "imagesTr" / "d_0001" / "1.2.840" / "slice997"
    damaged.write_bytes(damaged.read_bytes()[:200])
    (root / "imagesTr" / "a_0000" / "slice997").write_bytes(b"")  # the last one: the rest is even
    again = "copy or export the series again; remove the file if it is not a slice"
    assert told(root) == [
        ("a", "a_0000/slice997 is empty", again),
        ("d", "d_0001/1.2.840/slice997 is truncated or damaged (an image without rows and columns)", again),
    ]


@pytest.mark.parametrize(("ending", "wrong"), [(".nrrd", "sizes: 5 4 2"), (".mha", "DimSize = 5 4 2")])
def test_faulty_headers_are_named_with_their_case(tmp_path: Path, ending: str, wrong: str) -> None:
    images, labels = tmp_path / "imagesTr", tmp_path / "labelsTr"
    grid = read_image(write_series(tmp_path / "series", voxels(0))).grid
    images.mkdir()
    for number, case in enumerate("abcdef"):
        write_labels(images / f"{case}_0000{ending}", LabelMap(voxels(number), grid))
        write_labels(labels / f"{case}{ending}", LabelMap(LABELS, grid))
    (tmp_path / "dataset.json").write_text(json.dumps(NAMES | {"file_ending": ending, "numTraining": 6}))
    files = {case: images / f"{case}_0000{ending}" for case in "abcdef"}
    content = files["a"].read_bytes()
    files["b"].write_bytes(content[:-8])
    files["c"].write_bytes(content.replace(wrong[:-1].encode() + b"3", wrong.encode()))
    files["d"].write_bytes(b"<html>404</html>")
    unplaced = [b"space directions", b"space origin", b"space:", b"ElementSpacing", b"TransformMatrix", b"Offset"]
    for path in (files["e"], labels / f"e{ending}"):
        lines = path.read_bytes().split(b"\n")
        path.write_bytes(b"\n".join(line for line in lines if not line.startswith(tuple(unplaced))))
    found = sorted(
        (item.case, item.problem, item.fatal) for item in check_dataset(tmp_path, execution=Execution(workers=1))
    )
    name = {".nrrd": "an NRRD", ".mha": "a MetaImage"}[ending]
    assert found == [
        ("b", f"b_0000{ending} is truncated (the end of its compressed voxels is missing)", True),
        ("c", f"c_0000{ending} has more bytes of voxels than the 40 declared in its header "
         "(5 x 4 x 2 of type uint8)", True),
        ("d", f"d_0000{ending} is a web page or another text file, not {name} file", True),
        ("e", f"e_0000{ending} has no voxel size; 1 mm is assumed", False),
    ]  # fmt: skip


def test_labels_of_a_converter_are_turned(tmp_path: Path) -> None:
    root = paired(tmp_path / "data")
    for path in (root / "labels").iterdir():
        turned = read_label(path).reoriented(AxisMap((0, 1, 2), (False, True, False)))
        write_labels(path, LabelMap(turned.array[0], turned.grid))
    found = check_dataset(open_dataset(root))
    assert [item.problem for item in found if item.case == "a"] == [
        "a_seg.nii.gz stores its axes in another order or direction than a and is reoriented to it"
    ]
    assert not [item for item in found if item.fatal]


def test_labels_that_are_series_are_refused(tmp_path: Path) -> None:
    root = table(tmp_path / "data")
    text = (root / "cases.csv").read_text()
    for case in "abcde":
        text = text.replace(f"labels/{case}_seg.nii.gz", f"images/{case}")
    (root / "cases.csv").write_text(text)
    _, problems = inspect_dataset(root)
    assert ("dataset", "labels cannot be a DICOM series, which cannot hold labels") in [
        (item.case, item.problem) for item in problems if item.fatal
    ]
    assert "save labels as .nii.gz" in [item.action for item in problems]


def test_series_beside_images_of_another_ending_are_told(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "data", file_ending=".nii.gz")
    for case in "abcde":
        image = read_image(root / "imagesTr" / f"{case}_0000")
        write_labels(root / "imagesTr" / f"{case}_0000.nii.gz", LabelMap(image.array[0].astype(np.int16), image.grid))
    _, problems = inspect_dataset(root)
    assert [item.problem for item in problems if item.case == "b_0000"] == [
        "is in imagesTr but does not end in .nii.gz; it is ignored"
    ]


def test_a_wrong_ending_is_told_with_what_is_there(tmp_path: Path) -> None:
    _, problems = inspect_dataset(nnunet(tmp_path / "one", file_ending=".nii.gz"))
    assert "imagesTr holds no .nii.gz image (found 5 DICOM series)" in [item.problem for item in problems]
    _, problems = inspect_dataset(nnunet(tmp_path / "two", file_ending=".dcm"))
    assert any(item.action.endswith(".ome.zarr, .zarr, / (DICOM series)") for item in problems)


def test_series_are_written_for_nnunet(tmp_path: Path) -> None:
    dataset = open_dataset(nnunet(tmp_path / "data", 2))
    copied: Dataset = open_dataset(export_nnunet(dataset, tmp_path / "Dataset001_Copy", execution=Execution(workers=1)))
    assert (copied.image_ending, copied.file_ending) == (".nii.gz", ".nii.gz")
    for case in dataset.training:
        for source, target in zip(case.images, copied.case(case.id).images, strict=True):
            assert np.array_equal(read_image(source).array, read_image(target).array)
            assert read_image(source).grid.mismatch(read_image(target).grid) == ""


# ── to predict ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ending", ["/", ".nii.gz"])
def test_folders_of_series_to_predict(tmp_path: Path, ending: str) -> None:
    for name in ("b_0000", "b_0001", "a_0000/series", "a_0001/series"):
        write_series(tmp_path / name, voxels(0))
    for folder in (tmp_path, tmp_path / "b_0000"):
        clutter(folder)
    cases = find_cases(tmp_path, ending, 2)
    assert [(case.id, [path.name for path in case.images]) for case in cases] == [
        ("a", ["a_0000", "a_0001"]),
        ("b", ["b_0000", "b_0001"]),
    ]
    shutil.rmtree(tmp_path / "b_0000")
    with pytest.raises(DatasetError, match="b: expected 2 channel files, missing b_0000"):
        find_cases(tmp_path, ending, 2)


@pytest.mark.parametrize("ending", ["/", ".nii.gz"])
def test_a_folder_that_is_a_series_is_one_case(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_series(tmp_path / "scan 1.5", voxels(0))
    clutter(folder)
    assert [(case.id, case.images) for case in find_cases(folder, ending, 1)] == [("scan 1.5", (folder,))]
    monkeypatch.chdir(folder)
    assert [(case.id, case.images) for case in find_cases(".", ending, 1)] == [("scan 1.5", (folder,))]


def test_folders_of_zarr_to_predict(tmp_path: Path) -> None:
    write_series(tmp_path / "series", voxels(0))
    for name in ("a.zarr", "b.ome.zarr"):
        label_of(tmp_path / "series", tmp_path / "in" / name)
    assert [case.id for case in find_cases(tmp_path / "in", ".nii.gz", 1)] == ["a", "b"]
    assert [case.id for case in find_cases(tmp_path / "in" / "a.zarr", ".nii.gz", 1)] == ["a"]


def test_files_of_the_ending_come_first(tmp_path: Path) -> None:
    write_series(tmp_path / "source", voxels(0))
    (tmp_path / "a.nii.gz").touch()
    assert [case.id for case in find_cases(tmp_path, ".nii.gz", 1)] == ["a"]
    assert [case.id for case in find_cases(tmp_path, "/", 1)] == ["source"]


def test_folders_without_images_to_predict(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    clutter(tmp_path / "empty")
    for ending, wanted in (("/", "DICOM series"), (".nii.gz", ".nii.gz image")):
        with pytest.raises(InputError, match=f"empty has no {wanted}"):
            find_cases(tmp_path / "empty", ending, 1)
        with pytest.raises(InputError, match=rf"has no {wanted}; the model reads"):
            find_cases(tmp_path, ending, 1)
