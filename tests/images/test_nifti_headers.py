"""Headers as scanners and converters leave them: read as the standard says, refused in one sentence, or remarked on."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from segfit.errors import InputError
from segfit.images import nifti
from segfit.images.formats import read_grid, read_image, split_ending
from segfit.images.image import FileError

AFFINE = np.array([[-0.75, 0, 0, 30], [0, 0.75, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
VOXELS = np.arange(120, dtype=np.int16).reshape(6, 5, 4)


def write(path: Path, voxels: np.ndarray = VOXELS, kind: Any = nibabel.Nifti1Image, **fields: Any) -> Path:
    """Write a file with both forms; a dict as a field changes single entries of it."""
    image = kind(voxels, AFFINE)
    image.set_qform(AFFINE, 1)
    image.set_sform(AFFINE, 1)
    content = image.to_bytes()
    header = kind.header_class(content[: kind.header_class.sizeof_hdr], check=False)
    for name, value in fields.items():
        if isinstance(value, dict):
            for index, one in value.items():
                header[name][index] = one
        else:
            header[name] = value
    path.write_bytes(gzip.compress(header.binaryblock + content[header.sizeof_hdr :], 1))
    return path


def affine(path: Path) -> np.ndarray:
    found = read_grid(path).affine
    assert found is not None
    return found


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("length", [0, 16, 400, 5000])
def test_voxels_begin_behind_header_and_extensions(tmp_path: Path, kind: Any, length: int) -> None:
    image = kind(VOXELS, AFFINE)
    if length:
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"x" * length))
    for ending in (".nii", ".nii.gz"):
        path = tmp_path / f"a{ending}"
        path.write_bytes(image.to_bytes() if ending == ".nii" else gzip.compress(image.to_bytes()))
        assert np.array_equal(nifti.read(path).array[0], VOXELS.T)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_foreign_byte_order(tmp_path: Path, kind: Any) -> None:
    header = kind(VOXELS, AFFINE).header.as_byteswapped(">")
    header["vox_offset"] = header.sizeof_hdr + 4
    path = tmp_path / "a.nii"
    path.write_bytes(header.binaryblock + bytes(4) + VOXELS.astype(">i2").tobytes("F"))
    image = nifti.read(path)
    assert np.array_equal(image.array[0], VOXELS.T)
    assert image.array.dtype == np.int16
    np.testing.assert_array_equal(image.grid.affine, AFFINE)  # type: ignore[arg-type]
    nifti.write(tmp_path / "b.nii", image.array[0], image.grid)
    assert affine(tmp_path / "b.nii").tolist() == AFFINE.tolist()


@pytest.mark.parametrize(("qfac", "z"), [(1, 3.0), (-1, -3.0), (0, 3.0), (5, 3.0), (np.nan, 3.0)])
def test_a_third_axis_counts_as_right_handed_unless_said_otherwise(tmp_path: Path, qfac: float, z: float) -> None:
    path = write(tmp_path / "a.nii.gz", sform_code=0, pixdim={0: qfac}, quatern_b=0, quatern_c=0, quatern_d=0)
    np.testing.assert_allclose(np.diag(affine(path)), [0.75, 0.75, z, 1])
    nifti.write(tmp_path / "b.nii.gz", VOXELS.T, read_grid(path))
    written = nibabel.Nifti1Header(gzip.decompress((tmp_path / "b.nii.gz").read_bytes())[:348], check=False)
    assert np.array_equal(written["pixdim"][:1], np.float32([qfac]), equal_nan=True)


def test_signs_of_voxel_sizes_mean_nothing(tmp_path: Path) -> None:
    expected = affine(write(tmp_path / "a.nii.gz", sform_code=0))
    path = write(tmp_path / "b.nii.gz", sform_code=0, pixdim={1: -0.75, 3: -3})
    assert affine(path).tolist() == expected.tolist()
    assert read_grid(path).spacing_mm == (3.0, 0.75, 0.75)


@pytest.mark.parametrize("quaternion", [2.0, np.nan, np.inf])
def test_a_quaternion_that_is_none(tmp_path: Path, quaternion: float) -> None:
    path = write(tmp_path / "a.nii.gz", quatern_b=quaternion)
    assert affine(path).tolist() == AFFINE.tolist()
    assert nifti.remarks(path) == (("has a singular qform; its sform is used", "fix the qform in its header"),)
    with pytest.raises(FileError, match="has a singular orientation matrix; export it again with a valid sform"):
        read_grid(write(path, quatern_b=quaternion, sform_code=0))


def test_contradicting_forms_are_told(tmp_path: Path) -> None:
    assert nifti.remarks(write(tmp_path / "a.nii.gz")) == ()
    for near in (1e-3, 0.3):  # within half a voxel it is the same grid
        assert nifti.remarks(write(tmp_path / "a.nii.gz", qoffset_x=30 + near)) == ()
    ((problem, action),) = nifti.remarks(write(tmp_path / "a.nii.gz", qoffset_x=42.5, sform_code=2))
    assert problem == (
        "has an sform and a qform (codes 2 and 1) that lie up to 12.5 mm apart; the sform is used, other programs "
        "(ITK-SNAP, Slicer) may show it by its qform"
    )
    assert action == "check the overlay; if it is misaligned, set sform and qform to the same matrix"
    ((problem, _),) = nifti.remarks(write(tmp_path / "a.nii.gz", srow_x=(0.75, 0, 0, 26.25)))
    assert "that lie up to 4.5 mm apart, along other axes; the sform is used" in problem
    for unused in ({"qform_code": 0}, {"sform_code": 0}):
        assert nifti.remarks(write(tmp_path / "a.nii.gz", qoffset_x=42.5, **unused)) == ()


def test_the_scaling_is_the_standards(tmp_path: Path) -> None:
    for fields in ({"scl_slope": 0}, {"scl_slope": np.nan, "scl_inter": np.nan}, {"scl_slope": np.inf}):
        path = write(tmp_path / "a.nii.gz", **fields)
        assert np.array_equal(read_image(path).array[0], VOXELS.T)
        assert nifti.remarks(path) == ()
    path = write(tmp_path / "a.nii.gz", scl_slope=0, scl_inter=-1024)
    assert np.array_equal(read_image(path).array[0], VOXELS.T)
    assert nifti.remarks(path) == (
        (
            "has scl_slope 0 and scl_inter -1024; its values are used as stored",
            "set scl_slope to 1 if the offset is meant",
        ),
    )
    with pytest.raises(FileError, match=r"scales its voxels by 2 and adds nan \(scl_slope, scl_inter\); correct its"):
        read_image(write(path, scl_slope=2, scl_inter=np.nan))


def test_axes_beyond_the_third_without_extent(tmp_path: Path) -> None:
    for dim in ((4, 6, 5, 4, 0, 1, 1, 1), (4, 6, 5, 4, 1, 1, 1, 1), (3, 6, 5, 4, 0, 0, 0, 0)):
        assert np.array_equal(read_image(write(tmp_path / "a.nii.gz", dim=dim)).array[0], VOXELS.T)
    vectors = np.arange(360, dtype=np.int16).reshape(6, 5, 4, 1, 3)
    image = read_image(write(tmp_path / "a.nii.gz", vectors, intent_code=1007))
    assert np.array_equal(image.array, vectors[:, :, :, 0].T)


def test_endings_that_lie_about_gzip(tmp_path: Path) -> None:
    packed = write(tmp_path / "a.nii.gz").read_bytes()
    for name, content in (("b.nii", packed), ("b.nii.gz", gzip.decompress(packed)), ("c.nii.gz", packed + bytes(512))):
        (tmp_path / name).write_bytes(content)
        assert np.array_equal(read_image(tmp_path / name).array[0], VOXELS.T)
    (tmp_path / "d.nii.gz").write_bytes(gzip.compress(packed))
    with pytest.raises(FileError, match=r"is not a NIfTI file \(it is gzipped twice\); unpack it once"):
        read_image(tmp_path / "d.nii.gz")
    (tmp_path / "e.nii.gz").write_bytes(packed + b"404 not found")
    with pytest.raises(FileError, match="has trailing data after the gzip stream; copy it again, or unpack"):
        read_image(tmp_path / "e.nii.gz")


def test_pairs_of_files_are_named() -> None:
    for name in ("a.hdr", "a.IMG"):
        with pytest.raises(InputError, match=rf"^{name} is half of an Analyze or NIfTI pair \(\.hdr and \.img\);"):
            split_ending(name)
