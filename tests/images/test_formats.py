"""One way in and out for all formats."""

from __future__ import annotations

import os
import pickle
import sys
from math import prod
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image as Pillow

from segfit.errors import InputError
from segfit.geometry import AxisMap, Grid
from segfit.images import nifti
from segfit.images.formats import (
    ENDINGS,
    FOLDER,
    files_of,
    find_format,
    is_image_folder,
    label_ending,
    num_voxels,
    read_case,
    read_grid,
    read_image,
    read_label,
    split_ending,
    write_labels,
)
from segfit.images.image import FileError, Image, LabelMap, mm_per_unit, reading

GRID = Grid((2, 3, 4), (3.0, 1.0, 1.0), np.diag([1.0, 1.0, 3.0, 1.0]))
ARRAY = np.arange(24, dtype=np.int16).reshape(2, 3, 4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.nii.gz", ("a", ".nii.gz")),
        ("a.b_0000.nii", ("a.b_0000", ".nii")),
        ("A.PNG", ("A", ".PNG")),
        ("a.tiff", ("a", ".tiff")),
        ("a.ome.zarr", ("a", ".ome.zarr")),
        ("a.zarr", ("a", ".zarr")),
        ("1.2.840/", ("1.2.840", "/")),
    ],
)
def test_endings(name: str, expected: tuple[str, str]) -> None:
    assert split_ending(name) == expected


@pytest.mark.parametrize("name", ["a.minc", "a", ".nii.gz", "a.nii.g", "/"])
def test_unknown_endings_name_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match=r"is not known.*; known are \.nii\.gz, \.nii, \.png"):
        split_ending(name)
    with pytest.raises(InputError, match=r"did you mean '\.tiff'"):
        split_ending("a.tif2f")


def test_channels_are_stacked_as_float32(tmp_path: Path) -> None:
    nifti.write(tmp_path / "a_0000.nii.gz", ARRAY, GRID)
    nifti.write(tmp_path / "a_0001.nii.gz", (ARRAY / 2).astype(np.float64), GRID)
    image = read_case([tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz"])
    assert image.array.dtype == np.float32
    assert np.array_equal(image.array, np.stack([ARRAY, ARRAY / 2]))
    assert image.grid == read_grid(tmp_path / "a_0000.nii.gz")
    assert read_image(tmp_path / "a_0000.nii.gz").array.dtype == np.int16


def test_channels_must_share_a_grid(tmp_path: Path) -> None:
    first, second = tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz"
    nifti.write(first, ARRAY, GRID)
    nifti.write(second, ARRAY[:, :, :3], Grid((2, 3, 3), GRID.spacing_mm, GRID.affine))
    with pytest.raises(InputError) as caught:
        read_case([first, second])
    assert str(caught.value) == (
        f"{second} does not fit a_0000.nii.gz: its shape is (2, 3, 3), expected (2, 3, 4) (array order); "
        "resample it to that file's grid"
    )
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    affine[2, 3] = 6
    nifti.write(second, ARRAY, Grid(GRID.shape, GRID.spacing_mm, affine))
    with pytest.raises(InputError, match=r"does not fit a_0000\.nii\.gz: it lies 2\.0 voxels away \(6 mm\)"):
        read_case([first, second])


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.uint8, (0, 255), np.int16),
        (np.uint16, (0, 40000), np.int32),
        (np.int16, (-1, 3), np.int16),
        (np.float32, (0.0, 2.0), np.int16),
        (np.float64, (0.0, 1e6), np.int32),
    ],
)
def test_labels_are_integers(tmp_path: Path, dtype: Any, values: tuple[float, float], expected: Any) -> None:
    array = np.zeros(GRID.shape, dtype)
    array[0, 0, :2] = values
    nifti.write(tmp_path / "a.nii.gz", array, GRID)
    label = read_label(tmp_path / "a.nii.gz")
    assert label.array.dtype == expected
    assert label.array.shape == (1, *GRID.shape)
    assert label.array[0, 0, 0, :3].tolist() == [*values, 0]


@pytest.mark.parametrize("value", [0.9999999, 1.0005, 0.9995])
def test_labels_may_be_off_by_rounding(tmp_path: Path, value: float) -> None:
    nifti.write(tmp_path / "a.nii.gz", np.full(GRID.shape, value, dtype=np.float32), GRID)
    assert np.unique(read_label(tmp_path / "a.nii.gz").array).tolist() == [1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, "has the value 0.5, labels must be integers; round"),
        (1.002, "has the value 1.002, labels must be integers; round"),
        (np.nan, "has the value nan, labels must be integers"),
        (np.inf, "has the value inf, labels must be integers"),
        (1e12, "has the label value 1000000000000, which exceeds 32 bits; number labels from 0"),
    ],
)
def test_other_numbers_are_no_labels(tmp_path: Path, value: float, message: str) -> None:
    array = np.ones(GRID.shape)
    array[1, 2, 3] = value
    nifti.write(tmp_path / "a.nii.gz", array, GRID)
    with pytest.raises(InputError, match=message):
        read_label(tmp_path / "a.nii.gz")


def test_labels_have_one_channel_and_no_loss(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        Pillow.fromarray(np.arange(90, dtype=np.uint8).reshape(5, 6, 3) % 2).save(tmp_path / name)
    with pytest.raises(InputError, match=r"a.png is a colour image \(2 colours\), expected label values"):
        read_label(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a.jpg is JPEG, which changes label values; export labels as .png"):
        read_label(tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"b.jpg would be JPEG, which changes label values; write .png instead"):
        write_labels(tmp_path / "b.jpg", LabelMap(np.zeros((5, 6), np.uint8), Grid((5, 6), (1.0, 1.0))))


@pytest.mark.parametrize("ending", [ending for ending, format_ in ENDINGS.items() if format_.write])
@pytest.mark.parametrize(
    ("highest", "dtype"), [(254, np.uint8), (255, np.uint16), (65535, np.uint16), (70000, np.int32)]
)
@pytest.mark.parametrize("ndim", [2, 3])
def test_written_labels_come_back(tmp_path: Path, ending: str, highest: int, dtype: Any, ndim: int) -> None:
    grid = GRID if ndim == 3 else Grid((3, 4), (1.0, 1.0))
    labels = np.zeros(grid.shape, np.int64)
    labels.flat[:2] = (highest, 1)
    path = tmp_path / f"case{ending}"
    if (
        (ending in (".png", ".bmp") and ndim == 3)
        or (ending == ".bmp" and highest > 254)
        or (ending == ".png" and highest > 65535)
        or (ending in (".mgz", ".mgh") and ndim == 2)
    ):
        with pytest.raises(InputError, match="cannot hold"):
            write_labels(path, LabelMap(labels, grid))
        assert not path.exists()
        return
    write_labels(path, LabelMap(labels, grid))
    assert np.array_equal(read_label(path).array, labels[None])
    stored = np.int32 if ending in (".mgz", ".mgh") and dtype == np.uint16 else dtype
    assert read_image(path).array.dtype == stored
    assert read_grid(path).mismatch(grid) == ""


def test_a_4d_file_is_a_whole_case_and_no_label(tmp_path: Path) -> None:
    array = np.arange(72, dtype=np.int16).reshape(4, 3, 2, 3)  # (x, y, z, t)
    nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 3.0, 1.0])).to_filename(tmp_path / "a.nii")
    image = read_case([tmp_path / "a.nii"])
    assert np.array_equal(image.array, array.T)
    assert image.grid.mismatch(GRID) == ""
    with pytest.raises(InputError, match=r"a\.nii has 3 channels; save labels as one channel of label values"):
        read_label(tmp_path / "a.nii")
    write_labels(tmp_path / "b.nii", LabelMap(array.T[1], image.grid))
    assert nibabel.load(tmp_path / "b.nii").shape == (4, 3, 2)
    nibabel.Nifti1Image(array[..., :1], np.eye(4)).to_filename(tmp_path / "c.nii")
    assert np.array_equal(read_label(tmp_path / "c.nii").array, array.T[:1])


def test_folders_are_images_by_name_or_content(tmp_path: Path) -> None:
    series, other = tmp_path / "1.2.840.10008", tmp_path / "images"
    for folder in (series, other, tmp_path / "a.ome.zarr"):
        folder.mkdir()
    (series / "slice").write_bytes(bytes(128) + b"DICM")
    (other / "a.txt").write_text("DICM")
    assert split_ending(series) == ("1.2.840.10008", FOLDER)
    assert split_ending(tmp_path / "a.ome.zarr") == ("a", ".ome.zarr")
    assert find_format(series).name == "a DICOM series"
    assert [is_image_folder(tmp_path / n) for n in ("1.2.840.10008", "a.ome.zarr", "images")] == [True, True, False]
    assert not is_image_folder(other / "a.txt")
    with pytest.raises(InputError, match=r"is a DICOM series, which cannot hold labels; save labels as \.nii\.gz"):
        read_label(series)


def test_every_format_has_an_ending_for_labels() -> None:
    assert {ending: label_ending(ending) for ending in ENDINGS if label_ending(ending) != ending} == {
        ".jpg": ".png",
        ".jpeg": ".png",
        FOLDER: ".nii.gz",
    }
    assert label_ending(".PNG") == ".PNG"
    assert all(ENDINGS[label_ending(ending)].write is not None for ending in ENDINGS)


def test_files_of_an_image(tmp_path: Path) -> None:
    write_labels(tmp_path / "a.mhd", LabelMap(ARRAY, GRID))
    assert files_of(tmp_path / "a.mhd") == (tmp_path / "a.mhd", tmp_path / "a.zraw")
    assert files_of(tmp_path / "b.nii.gz") == (tmp_path / "b.nii.gz",)
    (tmp_path / "s.zarr" / "t").mkdir(parents=True)
    for name in ("2", "1", "t/3"):
        (tmp_path / "s.zarr" / name).touch()
    assert files_of(tmp_path / "s.zarr") == tuple(tmp_path / "s.zarr" / name for name in ("1", "2", "t/3"))


@pytest.mark.parametrize(("ending", "module", "extra"), [(".zarr", "zarr", "zarr"), ("", "pydicom", "dicom")])
def test_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, module: str, extra: str
) -> None:
    path = tmp_path / f"a{ending}"
    path.mkdir()
    monkeypatch.setitem(sys.modules, module, None)
    for read in (read_image, read_grid):
        with pytest.raises(InputError) as caught:
            read(path)
        assert str(caught.value) == f'{path} needs {module}, which is not installed; pip install "segfit[{extra}]"'


@pytest.mark.parametrize(
    ("name", "factor"),
    [("micrometer", 1e-3), ("Micrometre", 1e-3), ("µm", 1e-3), ("\u03bcm", 1e-3), ("micron", 1e-3), ("nm", 1e-6),
     ("angstrom", 1e-7), ("Å", 1e-7), ("millimeter", 1.0), ("cm", 10.0), ("meter", 1e3), ("inch", 25.4)],
)  # fmt: skip
def test_units_of_length(name: str, factor: float) -> None:
    assert mm_per_unit(name) == factor


@pytest.mark.parametrize("name", ["pixel", "", "second"])
def test_other_units_are_none(name: str) -> None:
    assert mm_per_unit(name) is None


def test_images_know_their_grid() -> None:
    with pytest.raises(ValueError, match="does not fit its grid"):
        Image(np.zeros((1, 2, 3)), Grid((2, 4), (1.0, 1.0)))
    image = Image(ARRAY[None], GRID)
    assert image.reoriented(AxisMap.identity(3)) is image
    turned = image.reoriented(AxisMap((2, 1, 0), (True, False, False)))
    assert np.array_equal(turned.array, ARRAY.transpose(2, 1, 0)[None, ::-1])
    assert turned.grid.spacing_mm == (1.0, 1.0, 3.0)


@pytest.mark.real_data
def test_real_pairs_fit(data: Path) -> None:
    root = data / "Dataset004_Hippocampus"
    image = read_case([root / "imagesTr" / "hippocampus_001_0000.nii.gz"])
    label = read_label(root / "labelsTr" / "hippocampus_001.nii.gz")
    assert image.grid.mismatch(label.grid) == ""
    assert image.array.shape == label.array.shape
    assert np.unique(label.array).tolist() == [0, 1, 2]


@pytest.mark.parametrize("ending", [ending for ending, format_ in ENDINGS.items() if format_.write is not None])
def test_voxels_are_counted_without_reading_them(ending: str, tmp_path: Path) -> None:
    flat = find_format(Path(f"a{ending}")).channel_kind is not None
    array, grid = (ARRAY[0], Grid((3, 4), (1.0, 1.0))) if flat else (ARRAY, GRID)
    path = tmp_path / f"a{ending}"
    write_labels(path, LabelMap(array, grid))
    assert num_voxels(path) == array.size == prod(read_grid(path).shape)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (4, 3, 2, 5)])
def test_voxels_of_one_channel_are_counted_in_any_header(
    kind: Any, order: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    header = kind.header_class(endianness=order)
    for name in ("a.nii", "a.nii.gz"):
        kind(np.zeros(shape, np.int16), np.eye(4), header).to_filename(tmp_path / name)
        assert num_voxels(tmp_path / name) == prod(shape[:3]) == prod(read_grid(tmp_path / name).shape)


def test_what_cannot_be_read_counts_as_one_voxel(tmp_path: Path) -> None:
    for name, content in (("a.nii.gz", b"\x1f\x8bx"), ("b.nii", b"x" * 600), ("c.png", b"\x89PNG"), ("d.tif", b"")):
        (tmp_path / name).write_bytes(content)
        assert num_voxels(tmp_path / name) == 1
    for name in ("missing.nii.gz", "missing.png", "unknown.xyz"):
        assert num_voxels(tmp_path / name) == 1


def test_errors_of_files_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(FileError(Path("a.png"), "is empty", "copy it again")))
    assert (error.path, error.problem, error.action) == (Path("a.png"), "is empty", "copy it again")
    assert str(error) == "a.png is empty; copy it again"


_ANNEX = "../.git/annex/objects/aa/bb/SHA256E-s1--x.nii.gz/SHA256E-s1--x.nii.gz"


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mgz", ".mgh", ".nrrd", ".mha", ".png", ".tif"])
def test_content_that_was_not_fetched_says_how_to_fetch_it(tmp_path: Path, ending: str) -> None:
    pointer, link, lfs = (tmp_path / f"{name}{ending}" for name in ("pointer", "link", "lfs"))
    pointer.write_text("/annex/objects/SHA256E-s22--d.nii.gz\n")
    link.symlink_to(_ANNEX)
    lfs.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for path, action in ((pointer, "datalad get"), (link, f"datalad get {link}"), (lfs, "git lfs pull")):
        with pytest.raises(FileError) as refused:
            read_image(path)
        assert action in refused.value.action


@pytest.mark.parametrize("ending", [".nii.gz", ".mgz", ".nrrd", ".mha", ".png", ".tif"])
def test_pipes_and_devices_are_not_read(tmp_path: Path, ending: str) -> None:
    pipe, device, nowhere = (tmp_path / f"{name}{ending}" for name in ("pipe", "device", "nowhere"))
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    nowhere.symlink_to("nothing")
    for path, problem in (
        (pipe, "a pipe, socket or device"),
        (device, "a pipe, socket or device"),
        (nowhere, "is a link to nothing"),
    ):
        with pytest.raises(FileError) as refused:
            read_image(path)
        assert problem in refused.value.problem


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError(9999), "a value that is not known: 9999"),
        (ZeroDivisionError("division by zero"), "impossible numbers"),
        (ValueError("a\n  b"), "a b"),
        (ValueError(), "ValueError"),
    ],
)
def test_reasons_of_decoders_mean_something(error: Exception, reason: str) -> None:
    with pytest.raises(FileError) as refused, reading(Path("a.tif")):
        raise error
    assert reason in refused.value.problem
