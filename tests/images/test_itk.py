"""NRRD and MetaImage beside ITK: the same space, channels, and the source's grid bit for bit on the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from segfit.geometry import Grid
from segfit.images import nifti
from segfit.images.formats import find_format, read_grid, read_image
from segfit.images.image import FileError, LabelMap

ENDINGS = [".nrrd", ".nhdr", ".mha", ".mhd"]
ARRAY = np.random.default_rng(0).integers(-1000, 1000, (3, 4, 5), np.int16)
SPACING, ORIGIN = (0.1, 1 / 3, 2.7), (1 / 7, -3.3, 1000 / 3)


def turned(seed: int) -> NDArray[np.float64]:
    """Return an oblique direction matrix, mirrored for odd seeds."""
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return matrix * np.sign(np.linalg.det(matrix)) * (-1 if seed % 2 else 1)


def save(path: Path, array: Any = ARRAY, seed: int = 0, *, components: bool = False) -> Path:
    image = sitk.GetImageFromArray(array, isVector=components)
    if image.GetDimension() == 3:
        image.SetSpacing(SPACING)
        image.SetOrigin(ORIGIN)
        image.SetDirection(turned(seed).ravel())
    sitk.WriteImage(image, str(path), path.suffix != ".mha")
    return path


def write(path: Path, array: Any, grid: Grid) -> None:
    writer = find_format(path).write
    assert writer is not None
    writer(path, LabelMap(array, grid))


def placement(path: Path) -> list[tuple[float, ...]]:
    image = sitk.ReadImage(str(path))
    return [image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("seed", range(4))
def test_the_same_volume_as_nifti_lies_at_the_same_place(tmp_path: Path, ending: str, seed: int) -> None:
    image = read_image(save(tmp_path / f"a{ending}", seed=seed))
    twin = nifti.read(save(tmp_path / "a.nii.gz", seed=seed))
    assert image.array.dtype == np.int16
    assert np.array_equal(image.array, ARRAY[None])
    assert np.array_equal(image.array, twin.array)
    assert image.grid.affine is not None
    assert twin.grid.affine is not None
    np.testing.assert_allclose(image.grid.affine, twin.grid.affine, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(image.grid.spacing_mm, SPACING[::-1], rtol=1e-12)
    assert image.grid.mismatch(twin.grid) == ""
    assert read_grid(tmp_path / f"a{ending}") == image.grid
    # the definition: ITK's own place of a voxel, x and y turned round
    source = sitk.ReadImage(str(tmp_path / f"a{ending}"))
    for index in ((0, 0, 0), (4, 3, 2), (1, 2, 0)):
        x, y, z = source.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((image.grid.affine @ [*index, 1])[:3], (-x, -y, z), atol=1e-9)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_written_labels_have_the_grid_of_the_source(tmp_path: Path, ending: str, seed: int) -> None:
    source = save(tmp_path / f"a{ending}", seed=seed)
    grid = read_grid(source)
    labels = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)
    write(tmp_path / f"b{ending}", labels, grid)
    assert np.array_equal(read_image(tmp_path / f"b{ending}").array, labels[None])
    before, after = placement(source), placement(tmp_path / f"b{ending}")
    if ending in (".mha", ".mhd"):
        assert after == before
    else:  # NRRD stores spacing times direction, which ITK divides again
        for one, other in zip(before, after, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-15)
    assert read_grid(tmp_path / f"b{ending}") == grid
    names = {path.name for path in tmp_path.iterdir() if path.name.startswith("b")}
    assert len(names) == (2 if ending in (".nhdr", ".mhd") else 1)
    assert f"b{ending}" in names


@pytest.mark.parametrize("ending", ENDINGS)
@given(
    spacing=st.tuples(*[st.floats(1e-3, 1e3)] * 3),
    origin=st.tuples(*[st.floats(-1e4, 1e4)] * 3),
    seed=st.integers(0, 1000),
)
def test_the_grid_survives_any_number_of_rounds(
    tmp_path_factory: pytest.TempPathFactory,
    ending: str,
    spacing: tuple[float, float, float],
    origin: tuple[float, float, float],
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("rounds")
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turned(seed) * spacing, origin
    write(folder / f"a{ending}", ARRAY, Grid(ARRAY.shape, spacing[::-1], affine))
    first = read_grid(folder / f"a{ending}")
    np.testing.assert_allclose(first.affine, affine, rtol=1e-12, atol=1e-9)  # type: ignore[arg-type]
    write(folder / f"b{ending}", ARRAY, first)
    assert read_grid(folder / f"b{ending}") == first


def test_other_spaces_are_turned_into_ours(tmp_path: Path) -> None:
    header = "NRRD0004\ntype: uchar\ndimension: 3\nspace: {space}\nsizes: 2 1 1\nencoding: raw\n"
    header += "space directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (10,20,30)\n\n"
    for space, signs in (("right-anterior-superior", (1, 1, 1)), ("left-posterior-superior", (-1, -1, 1))):
        (tmp_path / "a.nrrd").write_bytes(header.format(space=space).encode() + b"\1\2")
        affine = read_grid(tmp_path / "a.nrrd").affine
        expected = np.diag([2.0, 3, 4, 1])
        expected[:3, 3] = (10, 20, 30)
        np.testing.assert_allclose(affine, np.diag([*signs, 1]) @ expected)  # type: ignore[arg-type]
    plain = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 1 1\nspacings: 2 3 4\nencoding: raw\n\n"
    (tmp_path / "b.nrrd").write_bytes(plain.encode() + b"\1\2")
    assert read_image(tmp_path / "b.nrrd").grid == Grid((1, 1, 2), (4.0, 3.0, 2.0))  # no space: place unknown


@pytest.mark.parametrize("ending", ENDINGS)
def test_components_and_the_fourth_axis_are_channels(tmp_path: Path, ending: str) -> None:
    channels = np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(np.float32)
    image = read_image(save(tmp_path / f"a{ending}", np.moveaxis(channels, 0, -1), components=True))
    assert image.array.dtype == np.float32
    assert np.array_equal(image.array, channels)
    assert read_grid(tmp_path / f"a{ending}") == image.grid
    assert read_grid(save(tmp_path / f"b{ending}")) == image.grid
    times = read_image(save(tmp_path / f"c{ending}", channels))
    assert np.array_equal(times.array, channels)
    assert times.grid.shape == (3, 4, 5)


@pytest.mark.parametrize("ending", ENDINGS)
def test_flat_images(tmp_path: Path, ending: str) -> None:
    flat = sitk.GetImageFromArray(ARRAY[0])
    flat.SetSpacing((0.5, 2.0))
    sitk.WriteImage(flat, str(tmp_path / f"a{ending}"))
    image = read_image(tmp_path / f"a{ending}")
    assert np.array_equal(image.array, ARRAY[:1])
    assert image.grid == Grid((4, 5), (2.0, 0.5))
    write(tmp_path / f"b{ending}", ARRAY[0], image.grid)
    assert read_grid(tmp_path / f"b{ending}") == image.grid


def test_the_grid_of_another_format_is_kept(tmp_path: Path) -> None:
    grid = nifti.read_grid(save(tmp_path / "a.nii.gz", seed=3))
    for ending in ENDINGS:
        write(tmp_path / f"b{ending}", ARRAY, grid)
        np.testing.assert_allclose(read_grid(tmp_path / f"b{ending}").affine, grid.affine, atol=1e-9)  # type: ignore
    back = read_grid(tmp_path / "b.mha")
    nifti.write(tmp_path / "c.nii.gz", ARRAY, back)
    np.testing.assert_allclose(nifti.read_grid(tmp_path / "c.nii.gz").affine, grid.affine, rtol=1e-6)  # type: ignore


def broken(folder: Path, what: str) -> Path:
    path = save(folder / "a.nrrd")
    match what:
        case "missing":
            return folder / "none.nrrd"
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("subject,age\n1,50\n")
        case "cut":
            path.write_bytes(path.read_bytes()[:-20])
        case "raw cut":
            path = save(folder / "a.mha")
            path.write_bytes(path.read_bytes()[:-7])
        case "another format":
            path.write_bytes(save(folder / "a.mha").read_bytes())
        case "lost voxels":
            path = save(folder / "a.mhd")
            (folder / "a.zraw").unlink()
        case "lost detached voxels":
            path = save(folder / "a.nhdr")
            (folder / "a.raw.gz").unlink()
        case "list":
            path = save(folder / "a.mhd")
            path.write_text(path.read_text().replace("a.zraw", "LIST\na.zraw"))
        case "complex":
            return save(folder / "c.nrrd", ARRAY.astype(np.complex64))
        case "5D":
            return save(folder / "t.mha", np.zeros((2, 3, 4, 5, 2), np.float32), components=True)
    return path


@pytest.mark.parametrize(
    ("what", "problem", "action"),
    [
        ("missing", "is missing", "add the file"),
        ("empty", "is empty", "copy or export it again"),
        ("text", "is not an NRRD file", "export it as NRRD or correct its ending"),
        ("cut", "is truncated (the end of its compressed voxels is missing)", "copy or export it again"),
        ("raw cut", "is truncated (113 of 120 bytes of voxels: 5 x 4 x 3 of type int16)", "copy or export it again"),
        ("another format", "is not an NRRD file", "export it as NRRD or correct its ending"),
        ("lost voxels", "keeps its voxels in a.zraw, which is missing", "copy both files"),
        ("lost detached voxels", "keeps its voxels in a.raw.gz, which is missing", "copy both files"),
        ("list", "keeps its voxels in several files", "save it as one .nrrd or .mha"),
        ("complex", "holds complex values", "export real numbers"),
        ("5D", "is 4D (5x4x3x2, 2 channels)", "split it into one file per channel"),
    ],
)
def test_broken_files_are_explained(tmp_path: Path, what: str, problem: str, action: str) -> None:
    with pytest.raises(FileError) as caught:
        read_image(broken(tmp_path, what))
    assert caught.value.problem.startswith(problem)
    assert "\n" not in caught.value.problem
    assert caught.value.action.startswith(action)
