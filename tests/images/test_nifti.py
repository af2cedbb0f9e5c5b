"""NIfTI files: what nibabel writes we read, what we write carries the source's geometry bit for bit."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from segfit.geometry import Grid
from segfit.images import nifti
from segfit.images.image import FileError

AFFINE = np.array([[-0.9, 0.1, 0, 30], [0.1, 0.9, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
DTYPES = [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64, ">i2", ">f4"]


def save(path: Path, array: np.ndarray, affine: Any = AFFINE, kind: Any = nibabel.Nifti1Image, **header: Any) -> Path:
    """Write (x, y, z) voxels with nibabel, then set raw header fields."""
    image = kind(array, affine)
    for name, value in header.items():
        image.header[name] = value
    path.write_bytes(gzip.compress(image.to_bytes()) if path.name.endswith(".gz") else image.to_bytes())
    return path


def patch(path: Path, **fields: Any) -> Path:
    """Change raw header fields of a plain file, whatever they do to it."""
    content = path.read_bytes()
    header = nibabel.Nifti1Header(content[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + content[348:])
    return path


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_nibabel_writes(tmp_path: Path, dtype: Any, ending: str) -> None:
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(dtype)
    image = nifti.read(save(tmp_path / f"a{ending}", array))
    assert np.array_equal(image.array, array.T[None])
    assert image.array.dtype == np.dtype(dtype).newbyteorder("=")
    assert image.array.flags.writeable
    assert image.grid.shape == (4, 3, 2)
    np.testing.assert_allclose(image.grid.spacing_mm, (3.0, np.hypot(0.9, 0.1), np.hypot(0.9, 0.1)), rtol=1e-6)
    np.testing.assert_allclose(image.grid.affine, AFFINE, rtol=1e-6)
    assert nifti.read_grid(tmp_path / f"a{ending}") == image.grid


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_round_trip_keeps_the_header_geometry(tmp_path: Path, kind: Any) -> None:
    source = save(tmp_path / "a.nii.gz", np.zeros((5, 4, 3), np.int16), kind=kind, descrip=b"name of somebody")
    before = nibabel.load(source)
    before.header.set_qform(np.diag([2.0, 2.0, 2.0, 1.0]), code=2)  # forms that disagree must survive, too
    before.header.set_sform(AFFINE, code=4)
    before.header.set_xyzt_units("mm", "sec")
    before.header["pixdim"][1:4] = (0.7, -0.8, 2.9)
    source.write_bytes(gzip.compress(kind(np.zeros((5, 4, 3), np.int16), None, before.header).to_bytes()))
    stored = nibabel.load(source).header
    grid = nifti.read_grid(source)
    assert grid.spacing_mm == pytest.approx((2.9, 0.8, 0.7))
    labels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    nifti.write(tmp_path / "b.nii.gz", labels, grid)
    written = nibabel.load(tmp_path / "b.nii.gz")
    assert isinstance(written, kind)
    assert np.array_equal(np.asarray(written.dataobj), labels.T)
    for field in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d"):
        assert np.array_equal(written.header[field], stored[field]), field
    for field in ("qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units"):
        assert written.header[field] == stored[field], field
    assert np.array_equal(written.header["pixdim"][:4], stored["pixdim"][:4])
    assert written.header["descrip"].item() == b""  # texts may name somebody
    assert nifti.read_grid(tmp_path / "b.nii.gz").affine.tolist() == grid.affine.tolist()  # type: ignore[union-attr]


def test_grids_without_a_source_header_are_written_from_the_affine(tmp_path: Path) -> None:
    grid = Grid((3, 4, 5), (3.0, np.hypot(0.9, 0.1), np.hypot(0.9, 0.1)), AFFINE)
    nifti.write(tmp_path / "a.nii", np.zeros((3, 4, 5), np.uint16), grid)
    written = nibabel.load(tmp_path / "a.nii")
    np.testing.assert_allclose(written.affine, AFFINE, atol=1e-6)
    np.testing.assert_allclose(written.get_qform(), AFFINE, atol=1e-5)
    assert written.header.get_xyzt_units()[0] == "mm"
    assert nifti.read_grid(tmp_path / "a.nii").mismatch(grid) == ""


def test_unknown_place_stays_unknown(tmp_path: Path) -> None:
    source = patch(save(tmp_path / "a.nii", np.zeros((2, 3, 4), np.uint8)), sform_code=0, qform_code=0)
    grid = nifti.read_grid(source)
    assert grid.affine is None
    nifti.write(tmp_path / "b.nii", np.zeros((4, 3, 2), np.uint8), Grid(grid.shape, grid.spacing_mm))
    assert nifti.read_grid(tmp_path / "b.nii").affine is None
    assert nifti.read_grid(tmp_path / "b.nii").spacing_mm == grid.spacing_mm


def test_equal_labels_give_equal_files(tmp_path: Path) -> None:
    grid = Grid((2, 3, 4), (1.0, 1.0, 1.0), np.eye(4))
    for name in ("a.nii.gz", "b.nii.gz"):
        nifti.write(tmp_path / name, np.ones((2, 3, 4), np.uint8), grid)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_scaling_of_the_header_is_applied(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path = patch(save(tmp_path / "a.nii", array), scl_slope=0.5, scl_inter=-1024)
    image = nifti.read(path)
    assert image.array.dtype == np.float32
    assert np.array_equal(image.array, (array.T * 0.5 - 1024)[None].astype(np.float32))
    for slope in (0, np.nan):  # the standard: no scaling
        assert np.array_equal(nifti.read(patch(path, scl_slope=slope)).array, array.T[None])


def test_qform_is_used_where_sform_is_not(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.zeros((2, 3, 4), np.uint8), np.diag([-2.0, 1.0, 3.0, 1.0]))
    for fields in ({"sform_code": 0, "qform_code": 1}, {"sform_code": 1, "srow_x": (0, 0, 0, 0)}):
        affine = nifti.read_grid(patch(path, **fields)).affine
        np.testing.assert_allclose(affine, np.diag([-2.0, 1.0, 3.0, 1.0]), atol=1e-6)


@pytest.mark.parametrize(("code", "factor"), [(1, 1000.0), (2, 1.0), (3, 0.001), (0, 1.0)])
def test_units_become_mm(tmp_path: Path, code: int, factor: float) -> None:
    path = save(tmp_path / "a.nii", np.zeros((2, 3, 4), np.uint8), np.diag([2.0, 2.0, 5.0, 1.0]), xyzt_units=code)
    grid = nifti.read_grid(path)
    assert grid.spacing_mm == pytest.approx((5 * factor, 2 * factor, 2 * factor))
    np.testing.assert_allclose(np.diag(grid.affine)[:3], np.array([2, 2, 5]) * factor)  # type: ignore[arg-type]
    nifti.write(tmp_path / "b.nii", np.zeros((4, 3, 2), np.uint8), grid)
    assert nifti.read_grid(tmp_path / "b.nii").spacing_mm == grid.spacing_mm


def test_dimensions(tmp_path: Path) -> None:
    one_slice = nifti.read(save(tmp_path / "a.nii", np.zeros((6, 5, 1), np.uint8)))
    assert one_slice.array.shape == (1, 1, 5, 6)
    volumes = np.arange(360, dtype=np.int16).reshape(6, 5, 4, 3)
    times = nifti.read(save(tmp_path / "t.nii.gz", volumes))
    assert np.array_equal(times.array, volumes.T)
    assert nifti.read_grid(tmp_path / "t.nii.gz") == times.grid
    assert times.grid.shape == (4, 5, 6)
    vectors = nifti.read(save(tmp_path / "v.nii", volumes[:, :, :, None]))  # components in the fifth axis, as ITK does
    assert np.array_equal(vectors.array, volumes.T)
    one_time = nifti.read(save(tmp_path / "b.nii", np.zeros((6, 5, 2, 1), np.uint8)))
    assert one_time.array.shape == (1, 2, 5, 6)
    flat = nifti.read(save(tmp_path / "c.nii", np.arange(30, dtype=np.uint8).reshape(6, 5)))
    assert flat.array.shape == (1, 5, 6)
    assert flat.grid.affine is None
    nifti.write(tmp_path / "d.nii", flat.array[0], flat.grid)
    assert np.array_equal(nifti.read(tmp_path / "d.nii").array, flat.array)
    assert nibabel.load(tmp_path / "d.nii").shape == (6, 5)


def test_files_packed_in_parts_are_read_whole(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(-999, 999, (70, 60, 50), np.int16)
    content = nibabel.Nifti1Image(voxels, AFFINE).to_bytes()
    cuts = [0, 200, 1000, 2**18 + 5, len(content)]  # as bgzip writes them; one ends within the header
    parts = [gzip.compress(content[start:stop]) for start, stop in itertools.pairwise(cuts)]
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"".join(parts))
    assert np.array_equal(nifti.read(path).array[0], voxels.T)
    assert nifti.read_grid(path).shape == (50, 60, 70)
    path.write_bytes(gzip.compress(content + b"more"))  # what follows the voxels does not count
    assert np.array_equal(nifti.read(path).array[0], voxels.T)
    path.write_bytes(b"".join(parts)[:-5] + bytes(5))  # all voxels are there, the last part's checksum is wrong
    with pytest.raises(FileError, match="cannot be read"):
        nifti.read(path)


def broken(folder: Path, what: str) -> Path:
    plain = save(folder / "a.nii", np.zeros((6, 5, 4), np.int16))
    packed = save(folder / "a.nii.gz", np.random.default_rng(0).integers(0, 99, (16, 15, 14), np.int16))
    match what:
        case "missing":
            return folder / "none.nii.gz"
        case "empty":
            packed.write_bytes(b"")
        case "cut":
            packed.write_bytes(packed.read_bytes()[:2000])
        case "bit":
            content = bytearray(packed.read_bytes())
            content[1500] ^= 0xFF
            packed.write_bytes(content)
        case "text":
            packed.write_text("subject,age\n1,50\n" * 50)
        case "packed text":
            packed.write_bytes(gzip.compress(b"subject,age\n1,50\n" * 50))
        case "plain cut":
            plain.write_bytes(plain.read_bytes()[:-7])
            return plain
        case "header cut":
            plain.write_bytes(plain.read_bytes()[:200])
            return plain
        case "zero spacing":
            return patch(plain, pixdim=(1, 1, 0, 1, 1, 1, 1, 1))
        case "nan spacing":
            return patch(plain, pixdim=(1, 1, np.nan, 1, 1, 1, 1, 1))
        case "5D":
            return save(folder / "b.nii", np.zeros((6, 5, 4, 3, 2), np.int16))
        case "complex":
            return save(folder / "b.nii", np.zeros((6, 5, 4), np.complex64))
        case "colour":
            return save(folder / "b.nii", np.zeros((6, 5, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]))
        case "singular":
            return patch(plain, srow_x=(0, 0, 0, 0), qform_code=0)
        case "type":
            return patch(plain, datatype=4242)
        case "no voxels":
            return patch(plain, dim=(3, 6, 0, 4, 1, 1, 1, 1))
        case "one axis":
            return patch(plain, dim=(1, 6, 1, 1, 1, 1, 1, 1))
        case "huge":
            return patch(plain, dim=(3, 32767, 32767, 32767, 1, 1, 1, 1))
    return packed


@pytest.mark.parametrize(
    ("what", "problem", "action"),
    [
        ("missing", "is missing", "add the file"),
        ("empty", "is empty", "copy or export it again"),
        ("cut", "cannot be read (Compressed file ended", "copy or export it again"),
        ("bit", "cannot be read (", "copy or export it again"),
        ("text", "is not a NIfTI file", "export it as NIfTI"),
        ("packed text", "is not a NIfTI file", "export it as NIfTI"),
        ("plain cut", "is truncated (233 of 240 bytes of voxels)", "copy or export it again"),
        ("header cut", "is truncated (its header is incomplete)", "copy or export it again"),
        ("zero spacing", "has the voxel size (1.0, 0.0, 1.0) mm (x, y, z)", "write the true positive sizes"),
        ("nan spacing", "has the voxel size (1.0, nan, 1.0) mm (x, y, z)", "write the true positive sizes"),
        ("5D", "is 5D (6x5x4x3x2)", "split it into one file per channel"),
        ("complex", "holds voxels of type complex64", "export each colour or component"),
        ("colour", "holds voxels of type [('R', 'u1')", "export each colour or component"),
        ("singular", "has a singular orientation matrix", "export it again with a valid sform"),
        ("type", "cannot be read (", "copy or export it again"),
        ("no voxels", "has no voxels (dimensions [6, 0, 4])", "export it again"),
        ("one axis", "has no voxels (dimensions [6])", "export it again"),
        ("huge", "is truncated (it cannot hold 70362", "copy or export it again"),
    ],
)
def test_broken_files_are_explained(tmp_path: Path, what: str, problem: str, action: str) -> None:
    path = broken(tmp_path, what)
    with pytest.raises(FileError) as caught:
        nifti.read(path)
    assert caught.value.problem.startswith(problem)
    assert caught.value.action.startswith(action)
    assert str(caught.value) == f"{path} {caught.value.problem}; {caught.value.action}"
