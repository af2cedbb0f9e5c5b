"""Folds: every case validates once, and the number of folds follows the number of cases."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from segfit.dataset.splits import Fold, Splits, fallback_split, make_splits, read_reference_splits
from segfit.errors import InputError
from segfit.files import write_json


def names(count: int) -> list[str]:
    return [f"c{i:02d}" for i in range(count)]


def test_five_folds_of_twelve_cases() -> None:
    folds = make_splits(names(12)).folds
    validation = [[int(name[1:]) for name in fold.validation] for fold in folds]
    assert validation == [[0, 3, 8], [7, 10, 11], [6, 9], [1, 4], [2, 5]]  # the reference's


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(2, 7))
def test_every_case_validates_once(count: int, num_folds: int) -> None:
    splits = make_splits(names(count), num_folds)
    assert len(splits.folds) == min(count, num_folds)
    assert sorted(name for fold in splits.folds for name in fold.validation) == names(count)
    for fold in splits.folds:
        assert sorted((*fold.train, *fold.validation)) == names(count)
        assert list(fold.train) == sorted(fold.train)
        assert list(fold.validation) == sorted(fold.validation)
    sizes = [len(fold.validation) for fold in splits.folds]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_cases_are_left_out_one_by_one(count: int) -> None:
    splits = make_splits(names(count))
    assert len(splits.folds) == count
    assert all(len(fold.validation) == 1 for fold in splits.folds)


def test_one_case_and_none() -> None:
    assert make_splits(["only"]).folds == (Fold(train=("only",), validation=("only",)),)
    with pytest.raises(InputError, match="at least one case"):
        make_splits([])


def test_order_of_cases_does_not_matter() -> None:
    assert make_splits(names(9)[::-1]) == make_splits(names(9))
    assert make_splits(names(9), seed=1) != make_splits(names(9))


def test_fallback_is_four_to_one() -> None:
    fold = fallback_split(names(10), 7)
    assert len(fold.train) == 8
    assert sorted((*fold.train, *fold.validation)) == names(10)
    assert fold != fallback_split(names(10), 8)


def test_files_of_both_kinds(tmp_path: Path) -> None:
    splits = make_splits(names(7))
    splits.save(tmp_path / "splits.json")
    assert Splits.load(tmp_path / "splits.json") == splits
    write_json(tmp_path / "splits_final.json", splits.to_reference())
    assert read_reference_splits(tmp_path / "splits_final.json", names(7)) == splits


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "must hold folds like"),
        ([], "must hold folds like"),
        ([{"train": ["c00"]}], "fold 0 of .* must be like"),
        ([{"train": ["c00"], "val": []}], "fold 0 of .* must be like"),
        ([{"train": ["c00"], "val": [1]}], "fold 0 of .* must be like"),
        (["c00"], "fold 0 of .* must be like"),
        (
            [{"train": ["c00"], "val": ["c01"]}, {"train": ["c00"], "val": ["c99"]}],
            "fold 1 of .* names the case 'c99', which the dataset lacks",
        ),
    ],
)
def test_wrong_reference_splits_are_explained(tmp_path: Path, content: object, message: str) -> None:
    write_json(tmp_path / "splits_final.json", content)
    with pytest.raises(InputError, match=message):
        read_reference_splits(tmp_path / "splits_final.json", names(3))
