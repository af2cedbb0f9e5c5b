"""What is kept of a case for the report is what its files would show."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image as Picture

from segfit.dataset.annotation import read_labels
from segfit.dataset.checks import check_dataset
from segfit.dataset.contents import FileHashes
from segfit.dataset.manifest import Case, Dataset
from segfit.images.formats import read_case
from segfit.labels import LabelScheme
from segfit.report.views import View, kept_view, look_to_show

_LABELS = LabelScheme.from_declaration({"background": 0, "a": 7, "b": 9})


def _dataset(root: Path, case: Case, test: tuple[Case, ...] = ()) -> Dataset:
    return Dataset(
        name="Dataset",
        root=root,
        layout="nnunet-v2",
        channel_names=("x",) if test or len(case.images) == 1 else ("x", "y", "z"),
        labels=_LABELS,
        file_ending=".nii.gz",
        num_training=1,
        training=(case,),
        test=test,
    )


def _volume(folder: Path, name: str, label: np.ndarray, *, turned: bool = False) -> Case:
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    paths = folder / f"{name}_0000.nii.gz", folder / f"{name}.nii.gz"
    voxels = np.random.default_rng(0).normal(100, 20, label.shape).astype(np.float32)
    for path, array in zip(paths, (voxels, label), strict=True):
        image = nibabel.Nifti1Image(array, affine)
        nibabel.save(image.as_reoriented(np.array([[1, -1], [2, 1], [0, 1]])) if turned else image, path)
    return Case(id=name, images=paths[:1], label=paths[1])


def _picture(folder: Path) -> Case:
    pixels = np.random.default_rng(0).integers(0, 255, (900, 30, 3)).astype(np.uint8)
    Picture.fromarray(pixels).save(folder / "p_0000.png")
    Picture.fromarray(((pixels[..., 0] > 100) * 7).astype(np.uint8)).save(folder / "p.png")
    return Case(id="p", images=(folder / "p_0000.png",), label=folder / "p.png")


def _some() -> np.ndarray:
    label = np.zeros((8, 7, 6), np.uint8)
    label[2:5, 3:6, 1:4] = 7
    label[3, 3, 4] = 9
    return label


def _same(view: View | None, other: View) -> bool:
    assert view is not None
    facts = ("shape", "spacing_mm", "canonical", "values", "axes")
    assert [getattr(view, name) for name in facts] == [getattr(other, name) for name in facts]
    assert [(one.axis, one.index) for one in view.slices] == [(one.axis, one.index) for one in other.slices]
    assert view.scene is not None
    assert other.scene is not None
    for name in ("box", "step", "flipped", "sheet", "columns", "window"):
        assert getattr(view.scene, name) == getattr(other.scene, name), name
    assert np.array_equal(view.scene.reference, other.scene.reference)
    return all(
        np.array_equal(one.pixels, two.pixels) and np.array_equal(one.reference, two.reference)
        for one, two in zip(view.slices, other.slices, strict=True)
    )


@pytest.mark.parametrize("kind", ["plain", "turned", "picture"])
def test_a_view_is_kept_while_a_case_is_checked(tmp_path: Path, kind: str) -> None:
    case = _picture(tmp_path) if kind == "picture" else _volume(tmp_path, kind, _some(), turned=kind == "turned")
    dataset, cache, hashes = _dataset(tmp_path, case), tmp_path / "cache", FileHashes()
    if kind == "picture":
        dataset = dataset.model_copy(update={"channel_names": ("red", "green", "blue")})
    check_dataset(dataset, hashes=hashes, looks=[look_to_show(_LABELS, cache)])
    image = read_case(case.images)
    expected = View.of_image(image, read_labels(case, _LABELS, image.grid).array[0], scene=True)
    assert _same(kept_view(_LABELS, cache, hashes.case(case)), expected)
    assert expected.canonical == (kind != "picture")
    assert expected.values == ((1,) if kind == "picture" else (1, 2))
    assert max(expected.slices[0].pixels.shape[:2]) <= 448
    other = LabelScheme.from_declaration({"background": 0, "a": 9, "b": 7})
    assert kept_view(other, cache, hashes.case(case)) is None


def test_views_of_labelled_test_cases_are_kept_too(tmp_path: Path) -> None:
    first, test = _volume(tmp_path, "a", _some()), _volume(tmp_path, "t", _some())
    bare = test.model_copy(update={"id": "bare", "label": None})
    empty = _volume(tmp_path, "empty", np.zeros((8, 7, 6), np.uint8))
    dataset, cache, hashes = _dataset(tmp_path, first, (test, bare, empty)), tmp_path / "cache", FileHashes()
    check_dataset(dataset, hashes=hashes, looks=[look_to_show(_LABELS, cache)])
    kept = {case.id for case in (first, *dataset.test) if kept_view(_LABELS, cache, hashes.case(case)) is not None}
    assert kept == {"a", "t"}  # where nothing is labelled the prediction says what is worth to be seen


def test_a_damaged_view_is_none(tmp_path: Path) -> None:
    case = _volume(tmp_path, "a", _some())
    cache, hashes = tmp_path / "cache", FileHashes()
    check_dataset(_dataset(tmp_path, case), hashes=hashes, looks=[look_to_show(_LABELS, cache)])
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    for content in (b"", whole[:100], json.dumps([]).encode(), whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert kept_view(_LABELS, cache, hashes.case(case)) is None
