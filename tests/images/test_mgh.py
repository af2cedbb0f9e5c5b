"""FreeSurfer volumes: what nibabel writes we read, as NIfTI of the same array; what we write it reads."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.freesurfer.mghformat import MGHHeader, MGHImage

from segfit.geometry import Grid, canonical_map
from segfit.images.formats import check, read_case, read_grid, read_image, read_label, write_labels
from segfit.images.image import FileError, LabelMap

AFFINE = np.array([[-0.9, 0.1, 0, 30], [0, 0, 3.0, 5], [0.1, 0.9, 0, -20], [0, 0, 0, 1]])
DTYPES = [np.uint8, np.int16, np.int32, np.float32]


def save(path: Path, array: np.ndarray, affine: Any = AFFINE) -> Path:
    """Write (x, y, z) voxels with nibabel."""
    nibabel.save(MGHImage(array, affine), path)
    return path


def loaded(path: Path) -> Any:
    """Return an image as nibabel reads it, whole, so that its file is closed."""
    return MGHImage.from_bytes(gzip.decompress(path.read_bytes()) if path.suffix == ".mgz" else path.read_bytes())


def patched(path: Path, **fields: Any) -> Path:
    """Change raw header fields of a plain file, whatever they do to it."""
    content = path.read_bytes()
    header = MGHHeader(content[:284], check=False)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock[:90] + content[90:])
    return path


@pytest.mark.parametrize("ending", [".mgz", ".mgh", ".MGZ"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_nibabel_writes_as_nifti_of_the_same_array(tmp_path: Path, dtype: Any, ending: str) -> None:
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(dtype)
    image = read_image(save(tmp_path / f"a{ending}", array))
    nibabel.Nifti1Image(array, AFFINE).to_filename(tmp_path / "a.nii.gz")
    same = read_image(tmp_path / "a.nii.gz")
    assert np.array_equal(image.array, same.array)
    assert image.array.dtype == np.dtype(dtype)
    assert image.array.dtype.isnative
    assert image.array.flags.writeable
    assert same.grid.corner_distance(image.grid).mm < 1e-5
    np.testing.assert_allclose(image.grid.spacing_mm, same.grid.spacing_mm, rtol=1e-6)
    assert canonical_map(image.grid) == canonical_map(same.grid)
    assert read_grid(tmp_path / f"a{ending}") == image.grid
    assert image.grid.affine.dtype == np.float64  # type: ignore[union-attr]


@st.composite
def _affines(draw: st.DrawFn) -> np.ndarray:
    turns = draw(st.lists(st.floats(-3, 3), min_size=9, max_size=9).filter(lambda x: abs(_det(x)) > 0.1))
    axes, _ = np.linalg.qr(np.reshape(turns, (3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = axes * draw(st.lists(st.floats(0.1, 5), min_size=3, max_size=3))
    affine[:3, 3] = draw(st.lists(st.floats(-300, 300), min_size=3, max_size=3))
    return affine


def _det(values: list[float]) -> float:
    return float(np.linalg.det(np.reshape(values, (3, 3))))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    affine=_affines(),
    highest=st.sampled_from([1, 254, 255, 70000]),
    ending=st.sampled_from([".mgz", ".mgh"]),
)
def test_labels_go_round_as_through_nifti(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], affine: np.ndarray, highest: int, ending: str
) -> None:
    folder = tmp_path_factory.mktemp("labels")
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0)[::-1].tolist())
    labels = np.random.default_rng(0).integers(0, highest, shape, endpoint=True)
    for name in ("a.nii.gz", f"a{ending}"):
        write_labels(folder / name, LabelMap(labels, Grid(shape, spacing, affine)))
    ours, nifti = read_label(folder / f"a{ending}"), read_label(folder / "a.nii.gz")
    assert np.array_equal(ours.array, nifti.array)
    assert ours.array.dtype == nifti.array.dtype
    assert nifti.grid.mismatch(ours.grid) == ""
    assert nifti.grid.corner_distance(ours.grid).mm < 1e-3
    written = loaded(folder / f"a{ending}")
    assert np.array_equal(np.asarray(written.dataobj), labels.T)
    np.testing.assert_allclose(written.affine, affine, atol=1e-3)


def test_the_geometry_of_a_source_is_written_back_bit_for_bit(tmp_path: Path) -> None:
    source = save(tmp_path / "a.mgz", np.zeros((5, 4, 3), np.float32))
    labels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    for name in ("b.mgz", "c.mgz"):
        write_labels(tmp_path / name, LabelMap(labels, read_grid(source)))
    written, before = loaded(tmp_path / "b.mgz"), loaded(source)
    assert np.array_equal(np.asarray(written.dataobj), labels.T)
    for field in ("goodRASFlag", "delta", "Mdc", "Pxyz_c"):
        assert np.array_equal(written.header[field], before.header[field]), field
    assert (tmp_path / "b.mgz").read_bytes() == (tmp_path / "c.mgz").read_bytes()
    write_labels(tmp_path / "d.nii.gz", LabelMap(labels, read_grid(source)))
    np.testing.assert_allclose(nibabel.load(tmp_path / "d.nii.gz").affine, before.affine, atol=1e-5)


def test_frames_are_channels(tmp_path: Path) -> None:
    array = np.arange(72, dtype=np.int16).reshape(4, 3, 2, 3)
    path = save(tmp_path / "a.mgz", array)
    assert np.array_equal(read_case([path]).array, array.T)
    with pytest.raises(FileError, match="has 3 channels"):
        read_label(path)


def test_a_file_that_does_not_say_where_it_lies(tmp_path: Path) -> None:
    path = patched(save(tmp_path / "a.mgh", np.zeros((4, 3, 2), np.uint8)), goodRASFlag=0)
    image = read_image(path)
    assert image.grid == Grid((2, 3, 4), (1.0, 1.0, 1.0), spacing_known=False)
    assert [remark.problem for remark in check(path, image)] == ["has no voxel size; 1 mm is assumed"]
    assert read_grid(path, (2.0,)).spacing_mm == (2.0, 2.0, 2.0)
    write_labels(tmp_path / "b.mgz", LabelMap(np.ones((2, 3, 4), np.uint8), image.grid))
    assert read_grid(tmp_path / "b.mgz") == image.grid
    write_labels(tmp_path / "c.mgz", LabelMap(np.ones((2, 3, 4), np.uint8), Grid((2, 3, 4), (3.0, 2.0, 1.0))))
    assert read_grid(tmp_path / "c.mgz").spacing_mm == (3.0, 2.0, 1.0)


def test_files_that_say_what_they_are_meant_for_are_read(tmp_path: Path) -> None:
    path = patched(save(tmp_path / "a.mgh", np.ones((4, 3, 2), np.uint8)), version=1 | 2 << 8)
    assert read_image(path).array.all()


def broken(folder: Path, what: str) -> Path:
    plain = save(folder / "a.mgh", np.zeros((6, 5, 4), np.int16))
    packed = save(folder / "a.mgz", np.random.default_rng(0).integers(0, 99, (16, 15, 14), np.int16))
    content = packed.read_bytes()
    match what:
        case "missing":
            return folder / "none.mgz"
        case "empty":
            packed.write_bytes(b"")
        case "cut":
            packed.write_bytes(content[:2000])
        case "bit":
            packed.write_bytes(content[:1500] + bytes([content[1500] ^ 0xFF]) + content[1501:])
        case "text":
            packed.write_text("subject,age\n" * 50)
        case "packed text":
            packed.write_bytes(gzip.compress(b"subject,age\n" * 50))
        case "packed twice":
            packed.write_bytes(gzip.compress(content))
        case "nifti":
            nibabel.Nifti1Image(np.zeros((6, 5, 4), np.int16), AFFINE).to_filename(folder / "b.nii.gz")
            (folder / "b.nii.gz").rename(packed)
        case "tail":
            packed.write_bytes(content + b"tail" * 9)
        case "packed cut":
            packed.write_bytes(gzip.compress(gzip.decompress(content)[:-2000]))
        case "plain cut":
            plain.write_bytes(plain.read_bytes()[:-27])
            return plain
        case "header cut":
            plain.write_bytes(plain.read_bytes()[:200])
            return plain
        case "zero spacing":
            return patched(plain, delta=(1, 0, 1))
        case "nan spacing":
            return patched(plain, delta=(1, np.nan, 1))
        case "singular":
            return patched(plain, Mdc=np.ones((3, 3)))
        case "no place":
            return patched(plain, Pxyz_c=(np.inf, 0, 0))
        case "type":
            return patched(plain, type=9)
        case "no voxels":
            return patched(plain, dims=(6, 0, 4, 1))
        case "negative":
            return patched(plain, dims=(6, 5, 4, -1))
        case "huge":
            return patched(plain, dims=(2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1))
    return packed


@pytest.mark.parametrize(
    ("what", "problem", "action"),
    [
        ("missing", "is missing", "add the file"),
        ("empty", "is empty", "copy or export it again"),
        ("cut", "cannot be read (Compressed file ended", "copy or export it again"),
        ("bit", "cannot be read (", "copy or export it again"),
        ("text", "is not a FreeSurfer volume", "export it as .mgz"),
        ("packed text", "is not a FreeSurfer volume", "export it as .mgz"),
        ("packed twice", "is not a FreeSurfer volume (it is gzipped twice)", "unpack it once"),
        ("nifti", "is a NIfTI file, not a FreeSurfer volume", "correct its ending"),
        ("tail", "has trailing data after the gzip stream", "copy it again"),
        ("packed cut", "is truncated (4740 of 6720 bytes of voxels)", "copy or export it again"),
        ("plain cut", "is truncated (233 of 240 bytes of voxels)", "copy or export it again"),
        ("header cut", "is truncated (its header is incomplete)", "copy or export it again"),
        ("zero spacing", "has the voxel size (1.0, 0.0, 1.0) mm (x, y, z)", "write the true positive sizes"),
        ("nan spacing", "has the voxel size (1.0, nan, 1.0) mm (x, y, z)", "write the true positive sizes"),
        ("singular", "has a singular orientation matrix", "copy or export it again"),
        ("no place", "has a singular orientation matrix", "copy or export it again"),
        ("type", "holds voxels of type 9, which is not supported", "export it with another type"),
        ("no voxels", "has no voxels (dimensions [6, 0, 4, 1])", "export it again"),
        ("negative", "has no voxels (dimensions [6, 5, 4, -1])", "export it again"),
        ("huge", "is truncated (it cannot hold 4253", "copy or export it again"),
    ],
)
def test_broken_files_are_explained(tmp_path: Path, what: str, problem: str, action: str) -> None:
    path = broken(tmp_path, what)
    with pytest.raises(FileError) as caught:
        read_image(path)
    assert caught.value.problem.startswith(problem)
    assert caught.value.action.startswith(action)


def test_pictures_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot hold a 2D label map"):
        write_labels(tmp_path / "a.mgz", LabelMap(np.zeros((3, 4), np.uint8), Grid((3, 4), (1.0, 1.0))))
    assert not list(tmp_path.iterdir())
