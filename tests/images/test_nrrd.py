"""NRRD headers by hand: all that is valid is read, all that is not is explained."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from segfit.geometry import Grid
from segfit.images import nrrd
from segfit.images.image import FileError

ARRAY = np.random.default_rng(0).integers(-1000, 1000, (3, 4, 5), np.int16)
RAW = ARRAY.astype("<i2").tobytes()
FIELDS = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "5 4 3",
    "space directions": "(0.5,0,0) (0,0.75,0) (0,0,2)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(1,2,3)",
}
AFFINE = np.array([[-0.5, 0, 0, -1], [0, -0.75, 0, -2], [0, 0, 2, 3], [0, 0, 0, 1]])
GRID = Grid(ARRAY.shape, (2.0, 0.75, 0.5), AFFINE)
NO_PLACE = {"space": None, "space directions": None, "space origin": None}
AGAIN, CORRECT = "copy or export it again, or remove the case", "correct it or export it again"
LONGER = "correct sizes and type in its header, or export it again"


def save(path: Path, voxels: bytes = RAW, **changed: str | None) -> Path:
    """Write a file with some fields changed (``_`` for blanks), None for those that are left out."""
    fields = FIELDS | {name.replace("_", " "): value for name, value in changed.items()}
    lines = "".join(f"{name}: {value}\n" for name, value in fields.items() if value is not None)
    path.write_bytes(f"NRRD0004\n# a comment\nkey:=value\n{lines}\n".encode() + voxels)
    return path


@pytest.mark.parametrize(
    ("voxels", "changed"),
    [
        (RAW, {}),
        (RAW, {"type": "int16_t", "kinds": None}),
        (ARRAY.astype(">i2").tobytes(), {"endian": "big"}),
        (gzip.compress(RAW), {"encoding": "gzip"}),
        (gzip.compress(RAW[:50]) + gzip.compress(RAW[50:]), {"encoding": "gz"}),
        (bz2.compress(RAW), {"encoding": "bzip2"}),
        (" ".join(map(str, ARRAY.ravel())).encode(), {"encoding": "ascii", "endian": None}),
        (RAW.hex().encode(), {"encoding": "hex"}),
        (bytes(7) + RAW, {"byte skip": "7"}),
        (bytes(7) + RAW, {"byteskip": "-1"}),
        (b"one\ntwo\n" + RAW, {"line skip": "2"}),
        (RAW, {"space": "RAS", "space directions": "(-0.5,0,0) (0,-0.75,0) (0,0,2)", "space origin": "(-1,-2,3)"}),
        (RAW, {"space": "left-anterior-superior", "space directions": "(.5,0,0) (0,-.75,0) (0,0,2)",
               "space origin": "(1,-2,3)"}),
        (RAW, {"space directions": "(500,0,0) (0,750,0) (0,0,2000)", "space origin": "(1000,2000,3000)",
               "space units": '"um" "um" "um"'}),
    ],
)  # fmt: skip
def test_ways_to_write_one_volume(tmp_path: Path, voxels: bytes, changed: dict[str, Any]) -> None:
    image = nrrd.read(save(tmp_path / "a.nrrd", voxels, **changed))
    assert image.array.dtype == np.dtype(np.int16)
    assert np.array_equal(image.array, ARRAY[None])
    assert image.grid.shape == GRID.shape
    np.testing.assert_allclose(image.grid.affine, AFFINE, rtol=1e-15)  # type: ignore[arg-type]
    np.testing.assert_allclose(image.grid.spacing_mm, GRID.spacing_mm, rtol=1e-15)
    assert nrrd.read_grid(tmp_path / "a.nrrd") == image.grid


@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr"])
def test_voxels_in_a_file_of_their_own(tmp_path: Path, name: str) -> None:
    (tmp_path / "b.raw").write_bytes(RAW)
    path = save(tmp_path / name, b"", **{"data file": "b.raw"})
    assert np.array_equal(nrrd.read(path).array, ARRAY[None])
    assert nrrd.companions(path) == (tmp_path / "b.raw",)


@pytest.mark.parametrize(
    "changed",
    [
        {"sizes": "2 5 4 3", "kinds": "list domain domain domain", "space_directions": "none (1,0,0) (0,1,0) (0,0,1)"},
        {"sizes": "2 5 4 3", "kinds": None, "space_directions": "none (1,0,0) (0,1,0) (0,0,1)"},
        {"sizes": "2 5 4 3", "kinds": "vector domain domain domain", "spacings": "nan 1 1 1"} | NO_PLACE,
        {"sizes": "5 2 4 3", "kinds": "domain list domain domain", "space_directions": "(1,0,0) none (0,1,0) (0,0,1)"},
        {"sizes": "5 4 3 2", "kinds": "domain domain domain time"} | NO_PLACE,
        {"sizes": "5 4 3 2", "kinds": None} | NO_PLACE,
    ],
)
def test_the_axis_that_lies_in_no_space_is_the_channels(tmp_path: Path, changed: dict[str, str | None]) -> None:
    stored = [int(size) for size in str(changed["sizes"]).split()][::-1]
    array = np.arange(120, dtype=np.int16).reshape(stored)
    image = nrrd.read(save(tmp_path / "a.nrrd", array.astype("<i2").tobytes(), dimension="4", **changed))
    assert np.array_equal(image.array, np.moveaxis(array, stored.index(2), 0))
    assert image.grid.shape == (3, 4, 5)


def test_components_are_those_of_itk(tmp_path: Path) -> None:
    colours = np.random.default_rng(1).integers(0, 255, (3, 4, 5, 3), np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), str(tmp_path / "a.nrrd"))
    assert np.array_equal(nrrd.read(tmp_path / "a.nrrd").array, np.moveaxis(colours, -1, 0))


def test_what_is_not_said_is_unknown(tmp_path: Path) -> None:
    assert nrrd.read_grid(save(tmp_path / "a.nrrd", **NO_PLACE)) == Grid((3, 4, 5), (1.0, 1.0, 1.0))
    spaced = save(tmp_path / "a.nrrd", spacings="0.5 0.75 2", **NO_PLACE)
    assert nrrd.read_grid(spaced) == Grid((3, 4, 5), (2.0, 0.75, 0.5))
    microns = save(tmp_path / "a.nrrd", spacings="500 750 2000", units='"um" "um" "um"', **NO_PLACE)
    assert nrrd.read_grid(microns).spacing_mm == pytest.approx((2.0, 0.75, 0.5), rel=1e-15)


@pytest.mark.parametrize(
    ("voxels", "changed", "problem", "action"),
    [
        (RAW[:-10], {}, "is truncated (110 of 120 bytes of voxels: 5 x 4 x 3 of type int16)", AGAIN),
        (b"", {}, "is truncated (0 of 120 bytes of voxels: 5 x 4 x 3 of type int16)", AGAIN),
        (RAW + b"\0", {}, "has more bytes of voxels than the 120 declared in its header (5 x 4 x 3 of type int16)",
         LONGER),
        (RAW, {"type": "uchar"},
         "has more bytes of voxels than the 60 declared in its header (5 x 4 x 3 of type uint8)", LONGER),
        (RAW, {"sizes": "100000 100000 100000"},
         "is truncated (120 of 2000000000000000 bytes of voxels: 100000 x 100000 x 100000 of type int16)", AGAIN),
        (gzip.compress(RAW)[:-30], {"encoding": "gzip"},
         "is truncated (the end of its compressed voxels is missing)", AGAIN),
        (gzip.compress(RAW)[:-4], {"encoding": "gzip"},
         "is truncated (the end of its compressed voxels is missing)", AGAIN),
        (gzip.compress(RAW[:-2]), {"encoding": "gzip"},
         "is truncated (118 of 120 bytes of voxels: 5 x 4 x 3 of type int16)", AGAIN),
        (gzip.compress(RAW)[:-8] + bytes(8), {"encoding": "gzip"},
         "is damaged: its compressed voxels cannot be unpacked (Error -6 Incorrect checksum found)", AGAIN),
        (RAW, {"encoding": "bzip2"},
         "is damaged: its compressed voxels cannot be unpacked (Invalid data stream)", AGAIN),
        (b"1 2 3", {"encoding": "ascii"}, "is truncated (3 of 60 numbers: 5 x 4 x 3 of type int16)", AGAIN),
        (b"x " * 60, {"encoding": "ascii"}, "has voxels that are not numbers of type int16", AGAIN),
        (b"xyz", {"encoding": "hex"}, "has voxels that are not hexadecimal numbers", AGAIN),
        (RAW, {"encoding": "zrl"}, 'has the encoding "zrl", which is not supported', "export it with another encoding"),
        (RAW, {"type": "block"}, 'has the type "block", which is not supported', "export it with another type"),
        (RAW, {"space": "moon"}, 'has the space "moon", which is not supported', "export it with another space"),
        (RAW, {"endian": None}, 'has no "endian" in its header', "export it again, or write it into the header"),
        (RAW, {"sizes": None}, 'has no "sizes" in its header', "export it again, or write it into the header"),
        (RAW, {"dimension": "4"}, "has \"sizes\" '5 4 3' in its header, expected 4 numbers", CORRECT),
        (RAW, {"sizes": "5 4 0"}, "has \"sizes\" '5 4 0' in its header, expected whole numbers of 1 or more", CORRECT),
        (RAW, {"sizes": "5 4 nan"}, "has \"sizes\" '5 4 nan' in its header, expected whole numbers of 1 or more",
         CORRECT),
        (RAW, {"kinds": "domain domain"}, "has 2 kinds for 3 axes", "correct its header or export it again"),
        (RAW, {"kinds": "complex domain domain"}, "holds complex values", "export real numbers"),
        (RAW, {"kinds": "list vector domain"}, "has 1 axes in space (kinds list vector domain)", "export it again"),
        (RAW, {"space_directions": "(1,0,0) (0,1,0)"},
         "has \"space directions\" '(1,0,0) (0,1,0)' in its header, expected 3 vectors (x,y,z)", CORRECT),
        (RAW, {"space_directions": "1 0 0"},
         "has \"space directions\" '1 0 0' in its header, expected 3 vectors (x,y,z)", CORRECT),
        (RAW, {"space_directions": "(1,0,0) (0,nan,0) (0,0,2)"}, "has the voxel size (1, nan, 2) mm (x, y, z)",
         "write the true positive sizes into it"),
        (RAW, {"space_directions": "(1,0,0) (0,0,0) (0,0,2)"}, "has the voxel size (1, 0, 2) mm (x, y, z)",
         "write the true positive sizes into it"),
        (RAW, {"spacings": "1 nan 2"} | NO_PLACE, "has the voxel size (1, nan, 2) mm (x, y, z)",
         "write the true positive sizes into it"),
        (RAW, {"spacings": "1 -1 2"} | NO_PLACE, "has the voxel size (1, -1, 2) mm (x, y, z)",
         "write the true positive sizes into it"),
        (RAW, {"space_directions": "(1,0,0) (1,0,0) (0,0,2)"},
         "has a singular orientation matrix (space directions (1,0,0) (1,0,0) (0,0,2))", "export it again"),
        (RAW, {"space_origin": "(nan,0,0)"}, "lies at (nan,0,0) (space origin)", "write the true place into it"),
        (b"", {"data_file": "b.raw"}, "keeps its voxels in b.raw, which is missing",
         "copy both files, or correct the name in its header"),
        (b"", {"data_file": "."}, "keeps its voxels in , which is a folder", "copy both files"),
        (b"a.raw\nb.raw", {"data_file": "LIST"}, "keeps its voxels in several files", "save it as one .nrrd or .mha"),
        (b"", {"data_file": "b%02d.raw 1 3 1"}, "keeps its voxels in several files", "save it as one .nrrd or .mha"),
        (RAW, {"dimension": "5", "sizes": "5 4 3 2 2", "kinds": "domain domain domain list list"} | NO_PLACE,
         "is 5D (5x4x3x2x2)", "split it into one file per channel or time point"),
    ],
)  # fmt: skip
def test_faults_are_explained(
    tmp_path: Path, voxels: bytes, changed: dict[str, str | None], problem: str, action: str
) -> None:
    path = save(tmp_path / "a.nrrd", voxels, **changed)
    with pytest.raises(FileError) as caught:
        nrrd.read(path)
    assert caught.value.problem == problem.replace("in , which", f"in {tmp_path.name}, which")
    assert caught.value.action.startswith(action)
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"\x1f\x8b\x08\0garbage", "is gzipped, not an NRRD file"),
        (b"NRRD0004\nnonsense\n", "has a header line that is not a field: 'nonsense'"),
        (b"NRRD0004\n", 'has no "dimension" in its header'),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.nrrd").write_bytes(content)
    for read in (nrrd.read, nrrd.read_grid, nrrd.companions):
        with pytest.raises(FileError) as caught:
            read(tmp_path / "a.nrrd")
        assert caught.value.problem == problem
