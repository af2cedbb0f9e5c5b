"""Folds: every case validates once, groups stay together, kinds are spread, equal wherever they are made."""

from __future__ import annotations

import os
import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Literal

import hypothesis.strategies as st
import pytest
from dataset_builder import build
from hypothesis import given, settings

from segfit.dataset.layouts import inspect_dataset, open_dataset
from segfit.dataset.manifest import Case
from segfit.dataset.splits import (
    Fold,
    Splits,
    balanced_splits,
    covering,
    fallback_split,
    faults_of,
    make_splits,
    nnunet_splits,
    read_splits,
    splits_problems,
    with_copies,
)
from segfit.errors import InputError
from segfit.files import write_json


def names(count: int) -> list[str]:
    return [f"c{i:02d}" for i in range(count)]


def test_five_folds_of_twelve_cases() -> None:
    folds = nnunet_splits(names(12)).folds
    validation = [[int(name[1:]) for name in fold.validation] for fold in folds]
    assert validation == [[0, 3, 8], [7, 10, 11], [6, 9], [1, 4], [2, 5]]  # the reference's


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(2, 7))
def test_every_case_validates_once(count: int, num_folds: int) -> None:
    splits = nnunet_splits(names(count), num_folds)
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
    splits = nnunet_splits(names(count))
    assert len(splits.folds) == count
    assert all(len(fold.validation) == 1 for fold in splits.folds)


def test_one_case_and_none_like_the_reference() -> None:
    assert nnunet_splits(["only"]).folds == (Fold(train=("only",), validation=("only",)),)
    with pytest.raises(InputError, match="at least one case"):
        nnunet_splits([])


def test_order_of_cases_does_not_matter() -> None:
    assert nnunet_splits(names(9)[::-1]) == nnunet_splits(names(9))
    assert nnunet_splits(names(9), seed=1) != nnunet_splits(names(9))


def test_fallback_is_four_to_one() -> None:
    fold = fallback_split(names(10), 7)
    assert len(fold.train) == 8
    assert sorted((*fold.train, *fold.validation)) == names(10)
    assert fold != fallback_split(names(10), 8)


def test_files_of_both_kinds(tmp_path: Path) -> None:
    splits = nnunet_splits(names(7))
    splits.save(tmp_path / "splits.json")
    assert Splits.load(tmp_path / "splits.json") == splits
    write_json(tmp_path / "splits_final.json", splits.to_nnunet())
    assert read_splits(tmp_path / "splits_final.json", names(7)) == splits


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
            "fold 1 of .* names the case 'c99', which is not in",
        ),
    ],
)
def test_wrong_reference_splits_are_explained(tmp_path: Path, content: object, message: str) -> None:
    write_json(tmp_path / "splits_final.json", content)
    with pytest.raises(InputError, match=message):
        read_splits(tmp_path / "splits_final.json", names(3))


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("c01.nii.gz", "write the names of cases without channel and ending: 'c01'"),
        ("c01_0000", "write the names of cases without channel and ending: 'c01'"),
        ("c01_0000.nii.gz", "write the names of cases without channel and ending: 'c01'"),
        ("c10", "correct the name, remove it, or delete the file (did you mean 'c01'?)"),
    ],
)
def test_a_file_name_in_place_of_a_case_is_told(tmp_path: Path, name: str, action: str) -> None:
    write_json(tmp_path / "splits_final.json", [{"train": ["c00"], "val": [name]}])
    with pytest.raises(InputError) as raised:
        read_splits(tmp_path / "splits_final.json", names(2))
    assert raised.value.action == action


def case(name: str, group: str | None = None, site: str | None = None) -> Case:
    return Case(id=name, images=(Path(f"{name}.nii.gz"),), group=group, site=site)


def parts(splits: Splits) -> list[tuple[str, ...]]:
    return [fold.validation for fold in splits.folds]


@st.composite
def datasets(draw: st.DrawFn, grouped: bool = True) -> tuple[list[Case], dict[str, list[int]]]:
    """Up to 30 cases with groups, sites and classes; the groups are named like cases to confuse."""
    count = draw(st.integers(1, 30))
    groups = st.none() | st.sampled_from(names(8)) if grouped else st.none()
    sites = st.none() | st.sampled_from(["A", "B", "C"])
    cases = [case(name, draw(groups), draw(sites)) for name in names(count)]
    return cases, {name: draw(st.lists(st.integers(1, 4), unique=True)) for name in names(count)}


def groups_of(cases: list[Case]) -> Counter[tuple[str, str]]:
    return Counter(("case", case.id) if case.group is None else ("group", case.group) for case in cases)


@settings(max_examples=200, deadline=None)
@given(datasets())
def test_balanced_folds_keep_groups_together(dataset: tuple[list[Case], dict[str, list[int]]]) -> None:
    cases, classes = dataset
    splits, ids = balanced_splits(cases, classes), sorted(case.id for case in cases)
    sizes = groups_of(cases)
    assert len(splits.folds) == min(5, len(sizes))
    assert sorted(name for part in parts(splits) for name in part) == ids
    if len(sizes) == 1:
        assert splits.folds == (Fold(train=tuple(ids), validation=tuple(ids)),)
        return
    for fold in splits.folds:
        assert fold.train
        assert fold.validation
        assert sorted((*fold.train, *fold.validation)) == ids
        assert list(fold.train) == sorted(fold.train)
        assert list(fold.validation) == sorted(fold.validation)
        inside, outside = ([case for case in cases if case.id in part] for part in (fold.validation, fold.train))
        assert not groups_of(inside).keys() & groups_of(outside).keys()
    lengths = [len(part) for part in parts(splits)]
    assert max(lengths) - min(lengths) <= max(sizes.values())
    assert faults_of(splits, cases) == ()


@settings(max_examples=200, deadline=None)
@given(datasets(), st.randoms(use_true_random=False))
def test_balanced_folds_do_not_depend_on_the_order(dataset: tuple[list[Case], dict[str, list[int]]], random) -> None:  # type: ignore[no-untyped-def]
    cases, classes = dataset
    shuffled, keys = list(cases), list(classes)
    random.shuffle(shuffled)
    random.shuffle(keys)
    again = balanced_splits(shuffled, {key: classes[key][::-1] for key in keys})
    assert again == balanced_splits(cases, classes)


@settings(max_examples=200, deadline=None)
@given(datasets(grouped=False))
def test_the_rarest_kind_is_spread_as_evenly_as_possible(dataset: tuple[list[Case], dict[str, list[int]]]) -> None:
    cases, classes = dataset
    kinds = {case.id: [*map(str, classes[case.id]), *([case.site] if case.site else [])] for case in cases}
    totals = Counter(kind for found in kinds.values() for kind in found)
    splits = balanced_splits(cases, classes)
    lengths = [len(part) for part in parts(splits)]
    assert max(lengths) - min(lengths) <= 1
    if totals:
        fewest = min(totals.values())
        rarest = [kind for kind, total in totals.items() if total == fewest]
        counts = {kind: [sum(kind in kinds[name] for name in part) for part in parts(splits)] for kind in rarest}
        assert any(max(found) - min(found) <= 1 for found in counts.values())


def test_two_rare_structures_and_two_sites() -> None:
    """20 cases; structure 2 in five of them, 3 in two, of which one has both; 4 of 20 from another site."""
    cases = [case(name, site="B" if number % 5 == 0 else "A") for number, name in enumerate(names(20))]
    classes = {name: [1] for name in names(20)}
    for number in (1, 2, 3, 4, 6):
        classes[names(20)[number]] = [1, 2]
    classes["c06"], classes["c07"] = [1, 2, 3], [1, 3]
    splits = balanced_splits(cases, classes)

    def counts(wanted: set[str]) -> list[int]:
        return sorted(len(wanted & set(part)) for part in parts(splits))

    assert counts(set(names(20))) == [4] * 5
    assert counts({"c01", "c02", "c03", "c04", "c06"}) == [1] * 5
    assert counts({"c06", "c07"}) == [0, 0, 0, 1, 1]
    assert counts({"c00", "c05", "c10", "c15"}) == [0, 1, 1, 1, 1]


def test_every_structure_can_be_learned_in_every_fold() -> None:
    """Each of five classes occurs in two of ten cases: never may both validate together."""
    pairs = {name: [1 + number // 2] for number, name in enumerate(names(10))}
    splits = balanced_splits([case(name) for name in names(10)], pairs)
    for fold, structure in product(splits.folds, range(1, 6)):
        assert any(structure in pairs[name] for name in fold.train)


def test_patients_of_very_different_size() -> None:
    sizes = {"a": 9, "b": 5, "c": 4, "d": 4, "e": 3, "f": 2, "g": 1, "h": 1, "i": 1}
    cases = [case(f"{group}{number}", group) for group, count in sizes.items() for number in range(count)]
    splits = balanced_splits(cases, {})
    patients = sorted("".join(sorted({name[0] for name in part})) for part in parts(splits))
    assert patients == [
        "a",
        "bh",
        "cg",
        "di",
        "ef",
    ]


def test_balanced_folds_are_the_same_everywhere() -> None:
    """Written down once: a machine, an interpreter or a numpy that splits otherwise is found here."""
    cases = [case(f"scan {n}", f"patient {n // 2}" if n < 6 else None, "ÄB"[n % 2]) for n in range(12)]
    splits = balanced_splits(cases, {f"scan {n}": [1, 2][: 1 + (n % 4 == 0)] for n in range(12)})
    numbers = [[int(name[5:]) for name in part] for part in parts(splits)]
    assert numbers == [
        [0, 1, 9],
        [10, 4, 5],
        [2, 3],
        [7, 8],
        [11, 6],
    ]


@pytest.mark.parametrize("count", range(1, 7))
def test_few_cases(count: int) -> None:
    splits = balanced_splits([case(name) for name in names(count)], {})
    assert sorted(map(len, parts(splits))) == [1] * min(4, count) + ([2] if count == 6 else [1] * (count == 5))
    assert bool(faults_of(splits, [case(name) for name in names(count)])) == (count == 1)


def test_no_case_cannot_be_split() -> None:
    with pytest.raises(InputError, match="at least one case"):
        balanced_splits([], {})


def test_doubtful_folds_are_told() -> None:
    cases = [case(name, group="P1" if name in ("c00", "c01") else None) for name in names(9)]
    splits = Splits(
        folds=(Fold(train=("c00", "c02"), validation=("c01", "c02")), Fold(train=("c02",), validation=("c01",)))
    )
    shared, unused = faults_of(splits, cases)
    assert (shared.code, unused.code) == ("group_on_both_sides", "in_no_fold")
    assert "fold 0 trains and validates on c02 and P1" in shared.problem
    assert unused.problem.endswith(" c03, c04, c05 and 3 more")
    assert faults_of(splits, cases[:4])[1].problem.endswith(" c03")
    assert faults_of(nnunet_splits(names(9)), [case(name) for name in names(9)]) == ()


def test_the_check_tells_of_a_file_of_doubtful_folds(tmp_path: Path) -> None:
    root = build(tmp_path)
    folds = [{"train": ["a", "a", "b"], "val": ["c", "d"]}, {"train": ["a", "b", "c"], "val": ["c"]}]
    write_json(root / "splits_final.json", folds)
    problems = splits_problems(None, open_dataset(root))
    assert [(item.code, item.fatal) for item in problems] == [
        ("twice_in_a_fold", False),
        ("group_on_both_sides", False),
        ("in_no_fold", False),
    ]
    assert all(str(root / "splits_final.json") in item.action for item in problems)
    assert splits_problems("balanced", open_dataset(root)) == ()


@pytest.mark.parametrize("name", ["splits_final.json", "dataset.json", "cases.csv", "cases.json"])
def test_a_pipe_in_the_place_of_a_declaration_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    root = build(tmp_path)
    (root / name).unlink(missing_ok=True)
    os.mkfifo(root / name)
    found, problems = inspect_dataset(root)
    if found is not None:
        problems += splits_problems(None, found)
    assert any(item.fatal and f"{name} cannot be read (it is a pipe" in item.problem for item in problems)


def test_a_seal_breaks_when_folds_change(tmp_path: Path) -> None:
    splits = nnunet_splits(names(7)).sealed("nnunet")
    splits.save(tmp_path / "splits.json")
    kept = Splits.load(tmp_path / "splits.json")
    assert kept == splits
    assert kept.intact
    assert not kept.model_copy(update={"folds": kept.folds[:4]}).intact
    assert not nnunet_splits(names(7)).intact
    assert read_splits(tmp_path / "splits.json", names(7)).folds == splits.folds
    with pytest.raises(InputError, match=r"of .*splits\.json names the case 'c00', which is not in"):
        read_splits(tmp_path / "splits.json", [name for name in names(7) if name != "c00"])


def test_folds_of_nnunet_are_known_by_their_old_name() -> None:
    splits = nnunet_splits(names(7)).sealed("nnunet")
    assert Splits.model_validate(splits.model_dump() | {"source": "reference"}) == splits


@given(st.lists(st.sets(st.integers(1, 6)), min_size=1, max_size=12), st.integers(1, 12))
def test_chosen_cases_cover_classes(held: list[set[int]], count: int) -> None:
    cases = names(len(held))
    chosen = covering(cases, dict(zip(cases, held, strict=True)), count)
    assert list(chosen) == [case for case in cases if case in chosen]
    assert len(chosen) == min(count, len(cases))
    covered = set().union(*(held[cases.index(case)] for case in chosen))
    assert len(covered) >= max(map(len, held))
    assert covered == set().union(*held) or count < len(set().union(*held))


def test_cases_that_hold_the_same_are_spread() -> None:
    cases = names(10)
    assert covering(cases, {}, 5) == tuple(cases[::2])
    assert covering(cases, {"c07": [3]}, 2) == ("c00", "c07")


@pytest.mark.parametrize("way", ["balanced", "nnunet"])
def test_a_fold_that_would_draw_no_case_is_refused(way: Literal["balanced", "nnunet"]) -> None:
    cases = [case(name).model_copy(update={"weight": float(name == "c01")}) for name in names(3)]
    with pytest.raises(InputError) as raised:
        make_splits(way, cases, {})
    assert re.fullmatch("no training case of fold [0-2] has a weight above 0", raised.value.problem)
    assert raised.value.action == "give more cases a weight or make other folds"


def test_groups_of_copies() -> None:
    groups = {"a": None, "b": None, "c": "p", "d": "p", "e": "q", "f": None, "g": None}
    cases = [Case(id=name, images=(Path("i"),), group=group) for name, group in groups.items()]
    assert with_copies(cases, []) == {}
    assert with_copies(cases, [("a", "b"), ("x", "c")]) == {"a": "copies of a", "b": "copies of a"}
    assert with_copies(cases, [("f", "g"), ("a", "f")]) == dict.fromkeys("afg", "copies of a")
    assert with_copies(cases, [("a", "d"), ("e", "c"), ("c", "d")]) == {"a": "p", "e": "p"}
