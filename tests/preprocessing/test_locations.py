from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from segfit.labels import LabelScheme
from segfit.preprocessing import locations
from segfit.preprocessing.locations import ANNOTATED, class_locations

_PLAIN = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})
_IGNORE = LabelScheme.from_declaration({"background": 0, "a": 1, "ignore": 2})
_REGIONS = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": [2]}, [1, 2])


def _reference(labels: np.ndarray, items: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The rule written down plainly: all voxels in a list, then a permutation."""
    generator = np.random.RandomState(1234)
    result = []
    for values in items:
        voxels = np.concatenate([np.argwhere(labels == value) for value in values])
        size = max(min(10_000, len(voxels)), int(np.ceil(0.01 * len(voxels))))
        if len(voxels):
            voxels = voxels[generator.choice(len(voxels), size, replace=False)]
        result.append(voxels)
    return result


@pytest.mark.parametrize("slab", [1 << 20, 50])
def test_equals_the_plain_rule(monkeypatch: pytest.MonkeyPatch, slab: int) -> None:
    monkeypatch.setattr(locations, "_SLAB", slab)
    labels = np.random.default_rng(0).integers(-1, 3, (24, 30, 33)).astype(np.int16)
    labels[:5] = 0
    cases = [(_PLAIN, [(1,), (2,)]), (_IGNORE, [(1,), (-1, 0, 1)]), (_REGIONS, [(1, 2), (2,)])]
    for scheme, items in cases:
        result = class_locations(labels, scheme)
        names = [target.name for target in scheme.classes] + ([ANNOTATED] if scheme.ignore_value else [])
        assert list(result) == names
        for found, expected in zip(result.values(), _reference(labels, items), strict=True):
            assert found.dtype == np.int32
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(20, 21, 22), (30, 31)])
@pytest.mark.parametrize(("highest", "far"), [(0, 0), (0, 1), (1, 2), (9, 12), (9, 30000)])
def test_boxes_are_those_of_scipy(shape: tuple[int, ...], highest: int, far: int) -> None:
    labels = np.zeros(shape, np.int16)
    labels[3:9, 4:15] = np.random.default_rng(0).integers(-1, highest, (6, 11, *shape[2:]), endpoint=True)
    labels[labels == 3] = 0
    labels[0] = -1
    labels[5, 7] = far
    found = ndimage.find_objects(labels)
    expected = {value: box for value, box in enumerate(found, start=1) if box is not None}
    assert locations._boxes(labels) == expected


def test_absent_structure_and_2d() -> None:
    labels = np.zeros((6, 7), np.int16)
    labels[2, 3] = 1
    result = class_locations(labels, _PLAIN)
    assert result["a"].tolist() == [[2, 3]]
    assert result["b"].shape == (0, 2)


def test_large_structures_are_drawn_without_a_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "_SMALL", 100)
    monkeypatch.setattr(locations, "_AT_LEAST", 200)
    labels = np.random.default_rng(0).integers(0, 2, (20, 20, 20)).astype(np.int16)
    found = class_locations(labels, _PLAIN)["a"]
    assert len(found) == 200
    assert len(np.unique(found, axis=0)) == 200
    assert (labels[tuple(found.T)] == 1).all()
    np.testing.assert_array_equal(found, class_locations(labels, _PLAIN)["a"])
