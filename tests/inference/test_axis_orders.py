"""One asymmetric case in all 48 orders of its axes: the same voxels everywhere inside, its own place outside.

The files are written and read, so that headers in single precision and their way back are part of what is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest

from segfit.bundle.bundle import Member
from segfit.dataset.annotation import read_labels
from segfit.dataset.manifest import Case, Dataset
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.fingerprint.measure import measure
from segfit.geometry import AxisMap, Grid, canonical_map
from segfit.images.formats import read_case, read_label
from segfit.images.image import Image
from segfit.inference.model import Model
from segfit.labels import LabelScheme
from segfit.preprocessing.dataset import preprocess_dataset
from segfit.preprocessing.pipeline import preprocess
from segfit.preprocessing.store import CaseStore
from segfit.specs import Configuration

MAPS = [AxisMap(order, flip) for order in permutations(range(3)) for flip in product((False, True), repeat=3)]
SHAPE = (9, 14, 12)
SPACING = (2.25, 0.75, 1.5)  # and places, too, are exact in single precision
SCHEME = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})
_FORMS = ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d")
_FIELDS = (*_FORMS, "qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units")


def straight() -> np.ndarray:
    affine = np.diag([*SPACING[::-1], 1.0])
    affine[:3, 3] = (-12.5, 40.25, 7.75)
    return affine


def oblique() -> np.ndarray:
    """Turn about z by the angle of a triangle with sides 3, 4, 5, after a small tilt."""
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, 0.96, -0.28], [0, 0.28, 0.96]]
    )
    affine = straight()
    affine[:3, :3] = turn @ affine[:3, :3]
    return affine


def asymmetric() -> tuple[np.ndarray, np.ndarray]:
    """Return an image whose borders are empty to a different depth on all six sides, and its labels."""
    random = np.random.default_rng(0)
    image, labels = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.uint8)
    inside = (slice(1, -2), slice(0, -4), slice(3, -1))
    image[inside] = random.normal(100, 20, image[inside].shape)
    labels[2:5, 1:6, 4:9], labels[4:6, 5:9, 3:6] = 1, 2
    return image, labels


@pytest.fixture(scope="module", params=[straight, oblique])
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """The case on disk in the order of `MAPS`."""
    folder = tmp_path_factory.mktemp("orders")
    grid = Grid(SHAPE, SPACING, request.param())
    found = []
    for number, axes in enumerate(MAPS):
        affine = axes.apply_grid(grid).affine
        case = Case(id=f"c{number:02d}", images=(folder / f"{number}_0000.nii.gz",), label=folder / f"{number}.nii.gz")
        for path, array in zip((*case.images, case.label), asymmetric(), strict=True):
            file = nibabel.Nifti1Image(np.ascontiguousarray(axes.apply(array)).T, affine)
            file.set_qform(affine, 1)
            file.header.set_xyzt_units("mm")
            nibabel.save(file, path)
        found.append(case)
    return found


@pytest.fixture
def chosen(configuration: Callable[..., Configuration]) -> Configuration:
    return configuration(orientation="canonical", spacing=(2.0, 1.0, 1.0))


def same_bits(written: Path, source: Path) -> None:
    ours, theirs = nibabel.load(written).header, nibabel.load(source).header
    for field in _FIELDS:
        assert np.array_equal(ours[field], theirs[field]), field
    assert np.array_equal(ours["pixdim"][:4], theirs["pixdim"][:4])
    assert np.array_equal(nibabel.load(written).affine, nibabel.load(source).affine)


def test_reading_gives_the_same_voxels(cases: list[Case]) -> None:
    image, labels = asymmetric()
    for case in cases:
        assert case.label is not None
        for found, expected in ((read_case(case.images), image), (read_label(case.label), labels)):
            axes = canonical_map(found.grid)
            turned = found.reoriented(axes)
            first = read_case(cases[0].images).grid
            assert np.array_equal(turned.array[0], expected)
            assert turned.grid.spacing_mm == first.spacing_mm
            np.testing.assert_allclose(turned.grid.affine, first.affine, atol=1e-4)


def test_measurements_and_preprocessed_arrays_are_the_same(
    cases: list[Case], chosen: Configuration, tmp_path: Path
) -> None:
    dataset = Dataset(
        name="orders", root=tmp_path, layout="test", channel_names=("x",), labels=SCHEME, file_ending=".nii.gz",
        num_training=len(cases), training=tuple(cases),
    )  # fmt: skip
    found: Fingerprint = measure(dataset, "canonical")
    blank = {"case": "", "content": ""}
    assert {case.model_copy(update=blank).model_dump_json() for case in found.cases} == {
        found.cases[0].model_copy(update=blank).model_dump_json()
    }
    store = CaseStore(tmp_path / "cases")
    keys = preprocess_dataset(cases, chosen.preprocessing, SCHEME, store)
    first = store.open(keys["c00"])
    assert first.properties.crop_box == ((1, 7), (0, 10), (3, 11))
    expected = first.labels()
    assert expected is not None
    assert set(np.unique(expected)) == {0, 1, 2}
    for case in cases[1:]:
        stored = store.open(keys[case.id])
        assert np.array_equal(stored.image(), first.image())
        assert np.array_equal(stored.labels(), expected)
        assert stored.annotation is not None
        given = read_labels(case, SCHEME)
        assert np.array_equal(stored.annotation(), given.array[0])
        assert stored.properties.grid.mismatch(given.grid) == ""
        assert stored.locations.keys() == first.locations.keys()
        for name, rows in first.locations.items():
            assert np.array_equal(stored.locations[name], rows), name


def test_predictions_are_the_same_and_lie_where_their_image_does(
    cases: list[Case],
    chosen: Configuration,
    member: Callable[..., Member],
    make_model: Callable[..., Model],
    tmp_path: Path,
) -> None:
    model = make_model(member(chosen))
    expected = model.predict(cases[0].images[0]).labels
    assert len(np.unique(expected)) == 3
    for case, axes in zip(cases, MAPS, strict=True):
        prediction = model.predict(case.images[0])
        prediction.save(tmp_path / "out.nii.gz")
        written = read_label(tmp_path / "out.nii.gz")
        assert np.array_equal(written.array[0], axes.apply(MAPS[0].inverse().apply(expected)))
        assert np.array_equal(canonical_map(written.grid).apply(written.array), canonical_map(
            read_case(cases[0].images).grid).apply(expected[None]))  # fmt: skip
        same_bits(tmp_path / "out.nii.gz", case.images[0])


@pytest.mark.parametrize("noise", [1e-9, 1e-3])
def test_noisy_directions_change_no_voxel(noise: float, chosen: Configuration) -> None:
    """The axes decide by what they are closest to; voxels are not interpolated to straighten them."""
    image, labels = asymmetric()
    affine = oblique()
    turned = affine.copy()
    turned[:3, :3] += noise * np.array([[0, 1, -1], [1, 0, 1], [-1, 1, 0]])
    straightened = []
    for one in (affine, turned):
        grid = Grid(SHAPE, SPACING, one)
        done = preprocess(Image(image[None], grid), Image(labels[None], grid), chosen.preprocessing, SCHEME)
        straightened.append(done)
    assert np.array_equal(straightened[0].image, straightened[1].image)
    first, second = (done.labels for done in straightened)
    assert first is not None
    assert second is not None
    assert np.array_equal(first, second)
