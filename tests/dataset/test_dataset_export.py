"""What is written for nnU-Net v2 opens as the same cases with the same arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from dataset_builder import a_label, build, edit, write_volume
from PIL import Image as Pillow

from segfit.dataset.annotation import read_labels
from segfit.dataset.checks import check_dataset
from segfit.dataset.layouts import open_dataset
from segfit.dataset.manifest import Dataset
from segfit.errors import InputError
from segfit.images.formats import read_case
from segfit.nnunet.dataset_export import export_nnunet


def assert_same(first: Dataset, second: Dataset) -> None:
    """Same cases, voxels, geometry and inner labels."""
    assert second.layout == "nnunet-v2"
    assert second.channel_names == first.channel_names
    assert [target.name for target in second.labels.classes] == [target.name for target in first.labels.classes]
    assert second.labels.stored is None
    assert second.labels.num_outputs == first.labels.num_outputs
    assert second.num_training == len(first.training)
    for ours, theirs in zip((*first.training, *first.test), (*second.training, *second.test), strict=True):
        assert ours.id == theirs.id
        assert len(theirs.images) == len(first.channel_names)
        one, two = read_case(ours.images), read_case(theirs.images)
        np.testing.assert_array_equal(one.array, two.array)
        assert one.grid.spacing_mm == two.grid.spacing_mm
        assert not one.grid.mismatch(two.grid)
        assert bool(ours.label_files) == bool(theirs.label_files)
        if ours.label_files:
            old, new = read_labels(ours, first.labels), read_labels(theirs, second.labels)
            np.testing.assert_array_equal(old.array, new.array)
            assert not old.grid.mismatch(new.grid)


def test_a_round_trip(tmp_path: Path) -> None:
    root = build(tmp_path)
    labels = {"background": 0, "whole": [7, 500], "core": 500, "ignore": 255}
    edit(root, labels=labels, regions_class_order=[7, 500])
    for case in "abcde":
        write_volume(root / "labelsTr" / f"{case}.nii.gz", a_label(0, 7, 500, 255), spacing=1.0)
    for channel in range(2):
        write_volume(root / "imagesTs" / f"t_000{channel}.nii.gz")
    dataset = open_dataset(root)
    out = export_nnunet(dataset, tmp_path / "out" / "Dataset007_Copy")
    assert json.loads((out / "dataset.json").read_text()) == {
        "name": "Dataset001_Test",
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        "numTraining": 5,
        "file_ending": ".nii.gz",
        "regions_class_order": [1, 2],
    }
    copy = open_dataset(out)
    assert_same(dataset, copy)
    assert copy.labels.ignore_value == 3
    assert read_labels(copy.training[0], copy.labels).array.ravel()[:5].tolist() == [0, 1, 2, 3, 0]
    assert (out / "imagesTr" / "a_0000.nii.gz").read_bytes() == (root / "imagesTr" / "a_0000.nii.gz").read_bytes()
    assert check_dataset(out) == ()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["Dataset007_Copy"]  # nothing half done is left


def test_colours_are_split(tmp_path: Path) -> None:
    for number, case in enumerate("abcde"):
        for folder, shape, ending in (("images", (4, 6, 3), ".bmp"), ("labels", (4, 6), ".png")):
            (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
            pixels = (np.arange(np.prod(shape)).reshape(shape) + number).astype(np.uint8)
            Pillow.fromarray(pixels if folder == "images" else pixels % 2 * 200).save(
                tmp_path / "in" / folder / f"{case}{ending}"
            )
    dataset = open_dataset(tmp_path / "in")
    out = export_nnunet(dataset, tmp_path / "out")
    assert [path.name for path in sorted((out / "imagesTr").iterdir())][:3] == [f"a_000{c}.png" for c in range(3)]
    assert_same(dataset, open_dataset(out))


def test_stacks_keep_their_spacing(tmp_path: Path) -> None:
    for number, case in enumerate("abcde"):
        for folder, channels in (("images", 2), ("labels", 1)):
            path = tmp_path / "in" / folder / f"{case}.tiff"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (np.arange(60 * channels).reshape(channels, 3, 4, 5) + number) % (200 if channels == 2 else 2)
            array = pixels.astype(np.uint8) if channels == 2 else pixels[0].astype(np.uint8)
            tifffile.imwrite(path, array, metadata={"axes": "CZYX"[-array.ndim :]}, photometric="minisblack")
            path.with_suffix(".json").write_text('{"spacing": [2.5, 1, 0.5]}')
    dataset = open_dataset(tmp_path / "in")
    assert dataset.channel_names == ("channel 0", "channel 1")
    out = export_nnunet(dataset, tmp_path / "out")
    assert_same(dataset, open_dataset(out))
    assert read_case(open_dataset(out).training[0].images).grid.spacing_mm == (2.5, 1.0, 0.5)
    assert sorted(path.name for path in (out / "imagesTr").glob("*.json")) == [f"{case}.json" for case in "abcde"]
    assert {item.code for item in check_dataset(out)} == {"same_label"}  # all cases are labelled alike


def test_masks_are_merged(tmp_path: Path) -> None:
    for case in "abcde":
        write_volume(tmp_path / "in" / "images" / f"{case}.nii.gz")
        write_volume(tmp_path / "in" / "labels" / case / "x.nii.gz", a_label(1, 1))
        write_volume(tmp_path / "in" / "labels" / case / "y.nii.gz", a_label(0, 1, 1))
    dataset = open_dataset(tmp_path / "in")
    copy = open_dataset(export_nnunet(dataset, tmp_path / "out"))
    assert_same(dataset, copy)
    assert read_labels(copy.training[0], copy.labels).array.ravel()[:4].tolist() == [1, 2, 2, 0]


def test_nothing_is_overwritten_and_nothing_is_left_half_done(tmp_path: Path) -> None:
    dataset = open_dataset(build(tmp_path))
    with pytest.raises(InputError, match="exists already; choose another folder"):
        export_nnunet(dataset, dataset.root)
    (dataset.root / "labelsTr" / "d.nii.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"d\.nii\.gz is empty"):
        export_nnunet(dataset, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.real_data
def test_real_pictures_make_the_round_trip(data: Path, tmp_path: Path) -> None:
    dataset = open_dataset(data / "Dataset120_Nuclei")
    assert_same(dataset, open_dataset(export_nnunet(dataset, tmp_path / "out")))
