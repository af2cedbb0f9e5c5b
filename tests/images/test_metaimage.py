"""MetaImage headers by hand: all that is valid is read, all that is not is explained."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from segfit.geometry import Grid
from segfit.images import metaimage
from segfit.images.image import FileError

ARRAY = np.random.default_rng(0).integers(-1000, 1000, (3, 4, 5), np.int16)
RAW = ARRAY.astype("<i2").tobytes()
PACKED = zlib.compress(RAW)
FIELDS = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "0 1 0 -1 0 0 0 0 1",
    "Offset": "1 2 3",
    "ElementSpacing": "0.5 0.75 2",
    "DimSize": "5 4 3",
    "ElementType": "MET_SHORT",
}
AFFINE = np.array([[0, 0.75, 0, -1], [-0.5, 0, 0, -2], [0, 0, 2, 3], [0, 0, 0, 1]])
AGAIN, CORRECT = "copy or export it again, or remove the case", "correct it or export it again"
LONGER = "correct sizes and type in its header, or export it again"
WRITE = "write the true positive sizes into it"


def save(path: Path, voxels: bytes = RAW, data: str | None = "LOCAL", **changed: str | None) -> Path:
    """Write a file with some fields changed, None for those that are left out."""
    fields = FIELDS | changed | {"ElementDataFile": data}
    lines = "".join(f"{name} = {value}\n" for name, value in fields.items() if value is not None)
    path.write_bytes(lines.encode() + voxels)
    return path


@pytest.mark.parametrize(
    ("voxels", "changed"),
    [
        (RAW, {}),
        (RAW, {"Offset": None, "Position": "1 2 3", "TransformMatrix": None, "Orientation": "0 1 0 -1 0 0 0 0 1"}),
        (RAW, {"ElementSpacing": None, "ElementSize": "0.5 0.75 2", "BinaryData": None, "ObjectType": None}),
        (ARRAY.astype(">i2").tobytes(), {"BinaryDataByteOrderMSB": "True"}),
        (ARRAY.astype(">i2").tobytes(), {"BinaryDataByteOrderMSB": None, "ElementByteOrderMSB": "True"}),
        (PACKED, {"CompressedData": "True", "CompressedDataSize": str(len(PACKED))}),
        (PACKED, {"CompressedData": "True"}),
        (gzip.compress(RAW), {"CompressedData": "True"}),
        (" ".join(map(str, ARRAY.ravel())).encode(), {"BinaryData": "False"}),
        (bytes(9) + RAW, {"HeaderSize": "-1"}),
        (RAW, {"DistanceUnits": "um", "ElementSpacing": "500 750 2000", "Offset": "1000 2000 3000"}),
    ],
)
def test_ways_to_write_one_volume(tmp_path: Path, voxels: bytes, changed: dict[str, str | None]) -> None:
    image = metaimage.read(save(tmp_path / "a.mha", voxels, **changed))
    assert image.array.dtype == np.dtype(np.int16)
    assert np.array_equal(image.array, ARRAY[None])
    np.testing.assert_allclose(image.grid.affine, AFFINE, rtol=1e-15)  # type: ignore[arg-type]
    np.testing.assert_allclose(image.grid.spacing_mm, (2, 0.75, 0.5), rtol=1e-15)
    assert metaimage.read_grid(tmp_path / "a.mha") == image.grid


def test_the_place_is_that_of_itk(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mha")
    source, affine = sitk.ReadImage(str(path)), metaimage.read_grid(path).affine
    assert affine is not None
    for index in ((0, 0, 0), (4, 3, 2), (1, 2, 0)):
        x, y, z = source.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((affine @ [*index, 1])[:3], (-x, -y, z), atol=1e-12)


def test_voxels_in_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "b.raw").write_bytes(bytes(16) + RAW)
    for name in ("a.mhd", "a.mha"):
        for data in ("b.raw", str(tmp_path / "b.raw")):
            path = save(tmp_path / name, b"", data, HeaderSize="16")
            assert np.array_equal(metaimage.read(path).array, ARRAY[None])
            assert metaimage.companions(path) == (tmp_path / "b.raw",)


def test_what_is_not_said_is_unknown(tmp_path: Path) -> None:
    assert metaimage.read_grid(save(tmp_path / "a.mha", ElementSpacing=None)) == Grid((3, 4, 5), (1.0, 1.0, 1.0))
    upright = metaimage.read_grid(save(tmp_path / "a.mha", TransformMatrix=None, Offset=None))
    assert np.array_equal(np.diag([-0.5, -0.75, 2, 1]), upright.affine)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("voxels", "changed", "problem", "action"),
    [
        (RAW[:-10], {}, "is truncated (110 of 120 bytes of voxels: 5 x 4 x 3 of type int16)", AGAIN),
        (RAW + b"\0", {}, "has more bytes of voxels than the 120 declared in its header (5 x 4 x 3 of type int16)",
         LONGER),
        (RAW, {"ElementType": "MET_UCHAR"},
         "has more bytes of voxels than the 60 declared in its header (5 x 4 x 3 of type uint8)", LONGER),
        (RAW, {"ElementNumberOfChannels": "2"},
         "is truncated (120 of 240 bytes of voxels: 2 x 5 x 4 x 3 of type int16)", AGAIN),
        (RAW, {"HeaderSize": "40"}, "has more bytes of voxels than the 120 declared in its header (5 x 4 x 3 of "
         "type int16)", LONGER),
        (PACKED[:-20], {"CompressedData": "True", "CompressedDataSize": str(len(PACKED) - 20)},
         "is truncated (the end of its compressed voxels is missing)", AGAIN),
        (PACKED[:-1] + bytes([PACKED[-1] ^ 1]), {"CompressedData": "True"},
         "is damaged: its compressed voxels cannot be unpacked (Error -6 Incorrect checksum found)", AGAIN),
        (zlib.compress(RAW[:-2]), {"CompressedData": "True"},
         "is truncated (118 of 120 bytes of voxels: 5 x 4 x 3 of type int16)", AGAIN),
        (b"1 2", {"BinaryData": "False"}, "is truncated (2 of 60 numbers: 5 x 4 x 3 of type int16)", AGAIN),
        (RAW, {"NDims": None}, 'has no "NDims" in its header', "export it again, or write it into the header"),
        (RAW, {"DimSize": None}, 'has no "DimSize" in its header', "export it again, or write it into the header"),
        (RAW, {"ElementType": None}, 'has no "ElementType" in its header', "export it again"),
        (RAW, {"ElementType": "MET_STRING"}, "has the ElementType MET_STRING, which is not supported", "export it"),
        (RAW, {"NDims": "2"}, "has \"DimSize\" '5 4 3' in its header, expected 2 numbers", CORRECT),
        (RAW, {"NDims": "4"}, "has \"DimSize\" '5 4 3' in its header, expected 4 numbers", CORRECT),
        (RAW, {"NDims": "5", "DimSize": "5 4 3 1 1"}, "is 5D (5x4x3x1x1)", "split it"),
        (RAW, {"DimSize": "5 4 0"}, "has \"DimSize\" '5 4 0' in its header, expected whole numbers of 1 or more",
         CORRECT),
        (RAW, {"DimSize": "5.5 4 3"}, "has \"DimSize\" '5.5 4 3' in its header, expected whole numbers of 1 or more",
         CORRECT),
        (RAW, {"ElementSpacing": "0,5 0,75 2"},
         "has \"ElementSpacing\" '0,5 0,75 2' in its header, expected 3 numbers", CORRECT),
        (RAW, {"ElementSpacing": "0.5 0 2"}, "has the voxel size (0.5, 0, 2) mm (x, y, z)", WRITE),
        (RAW, {"ElementSpacing": "0.5 -1 2"}, "has the voxel size (0.5, -1, 2) mm (x, y, z)", WRITE),
        (RAW, {"ElementSpacing": "0.5 nan 2"}, "has the voxel size (0.5, nan, 2) mm (x, y, z)", WRITE),
        (RAW, {"Offset": "nan 0 0"}, "lies at (nan, 0, 0) mm (x, y, z)", "write its true offset into it"),
        (RAW, {"TransformMatrix": "1 0 0 1 0 0 0 0 1"},
         "has a singular orientation matrix (1 0 0 1 0 0 0 0 1)", "export it again with a valid direction"),
        (RAW, {"TransformMatrix": "1 0 0 0 nan 0 0 0 1"},
         "has a singular orientation matrix (1 0 0 0 nan 0 0 0 1)", "export it again with a valid direction"),
        (RAW, {"TransformMatrix": "1 0 0 0"}, "has \"TransformMatrix\" '1 0 0 0' in its header, expected 9 numbers",
         CORRECT),
    ],
)  # fmt: skip
def test_faults_are_explained(
    tmp_path: Path, voxels: bytes, changed: dict[str, str | None], problem: str, action: str
) -> None:
    path = save(tmp_path / "a.mha", voxels, **changed)
    with pytest.raises(FileError) as caught:
        metaimage.read(path)
    assert (caught.value.path, caught.value.problem) == (path, problem)
    assert caught.value.action.startswith(action)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("b.raw", "keeps its voxels in b.raw, which is missing"),
        ("C:\\data\\b.raw", "keeps its voxels in C:\\data\\b.raw, which is missing"),
        ("LIST", "keeps its voxels in several files"),
        ("b%02d.raw 1 3 1", "keeps its voxels in several files"),
        ("folder", "keeps its voxels in folder, which is a folder"),
        ("a.mhd", "has more bytes of voxels than the 120 declared in its header (5 x 4 x 3 of type int16)"),
        ("", 'has no "ElementDataFile" in its header'),
        (None, 'has no "ElementDataFile" in its header'),
    ],
)
def test_where_the_voxels_are_not(tmp_path: Path, data: str | None, problem: str) -> None:
    (tmp_path / "folder").mkdir()
    path = save(tmp_path / "a.mhd", b"", data)
    with pytest.raises(FileError) as caught:
        metaimage.read(path)
    assert caught.value.problem == problem


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"<html>404</html>", "is a web page or another text file, not a MetaImage file"),
        (bytes(900), "is not a MetaImage file"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.mha").write_bytes(content)
    for read in (metaimage.read, metaimage.read_grid, metaimage.companions):
        with pytest.raises(FileError) as caught:
            read(tmp_path / "a.mha")
        assert caught.value.problem == problem
