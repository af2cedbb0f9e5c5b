from __future__ import annotations

import numpy as np
import pytest

from segfit.preprocessing.coarsening import kept_dice, mean_kept_dice


def test_the_same_grid_keeps_everything() -> None:
    labels = np.random.default_rng(0).integers(-1, 4, (5, 12, 9)).astype(np.int16)
    assert kept_dice(labels, labels.shape) == {1: 1.0, 2: 1.0, 3: 1.0}


def test_blocks_survive_a_grid_that_they_lie_on() -> None:
    labels = np.zeros((32, 32), np.int16)
    labels[8:24, 8:24] = 1
    assert kept_dice(labels, (16, 16))[1] == 1.0  # 9/16 of a corner voxel's share comes from inside


def test_thin_structures_are_lost() -> None:
    labels = np.zeros((64, 64), np.int16)
    labels[:, 31] = 1
    labels[10:50, 40:60] = 2
    kept = kept_dice(labels, (16, 16))
    assert kept[1] == 0.0
    assert kept[2] > 0.95


def test_slices_may_stay_as_they_are() -> None:
    labels = np.zeros((3, 16, 16), np.int16)
    labels[1, 4:12, 4:12] = 1
    assert kept_dice(labels, (3, 8, 8))[1] > 0.9
    assert kept_dice(labels, (1, 16, 16))[1] == 0.0


def test_structures_count_alike_however_many_cases_have_them() -> None:
    assert mean_kept_dice([{1: 1.0}, {1: 0.5}, {1: 0.0, 2: 1.0}]) == pytest.approx(0.75)
    assert mean_kept_dice([]) == 1.0
