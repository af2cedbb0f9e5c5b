"""Phantoms: valid datasets, equal for equal seeds, and structures where they are said to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from segfit.dataset.checks import check_dataset
from segfit.dataset.layouts import open_dataset
from segfit.dataset.phantom import make_phantom
from segfit.errors import InputError
from segfit.images.formats import read_case, read_label


def test_volumes_are_a_good_dataset(tmp_path: Path) -> None:
    root = make_phantom(tmp_path / "Dataset001_Phantom", cases=5, test_cases=1)
    dataset = open_dataset(root)
    assert check_dataset(dataset) == ()
    assert len(dataset.training) == 5
    assert len(dataset.test) == 1
    assert dataset.test[0].label is not None
    spacings = set()
    for case in dataset.training:
        image, label = read_case(case.images), read_label(case.label)  # type: ignore[arg-type]
        assert image.array.shape[0] == 1
        assert all(abs(n - typical) <= typical / 12 for n, typical in zip(image.grid.shape, (20, 48, 48), strict=True))
        spacings.add(image.grid.spacing_mm)
        assert np.bincount(label.array.ravel()).shape == (3,)
        organ, lesion = label.array[0] == 1, label.array[0] == 2
        assert lesion.sum() > 40
        assert (ndimage.binary_dilation(organ) & lesion).any()  # the lesion touches the organ
        air, tissue = image.array[0][0, 0, 0], image.array[0]
        assert air < 250
        assert np.median(tissue[lesion]) > np.median(tissue[organ]) > np.median(tissue[label.array[0] == 0])
    assert len(spacings) == 5


def test_pictures_are_a_good_dataset(tmp_path: Path) -> None:
    dataset = open_dataset(make_phantom(tmp_path / "p", cases=5, test_cases=0, kind="picture"))
    assert check_dataset(dataset) == ()
    assert dataset.channel_names == ("red", "green", "blue")
    assert read_case(dataset.training[0].images).array.shape[0] == 3


def test_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    roots = [make_phantom(tmp_path / str(i), cases=count, test_cases=1) for i, count in enumerate((2, 3))]
    other = make_phantom(tmp_path / "other", cases=2, test_cases=1, seed=1)
    for path in sorted(roots[0].rglob("*.nii.gz")):
        relative = path.relative_to(roots[0])
        assert path.read_bytes() == (roots[1] / relative).read_bytes()
        assert path.read_bytes() != (other / relative).read_bytes()


def test_a_folder_with_something_in_it_is_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not lose me")
    with pytest.raises(InputError, match="is not empty; give a new folder"):
        make_phantom(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
