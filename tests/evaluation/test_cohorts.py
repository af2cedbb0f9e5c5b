"""Intervals over groups, slices by a column, and two sets of predictions compared."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from segfit.errors import DatasetError, InputError
from segfit.evaluation.cohorts import column_of, compare, groups_of, slices_behind, with_estimates
from segfit.evaluation.evaluate import evaluate_folder
from segfit.evaluation.metrics import Metrics
from segfit.evaluation.score_files import write_scores
from segfit.evaluation.statistics import FEWEST_GROUPS, difference, estimate, estimate_over
from segfit.evaluation.summary import CaseMetrics, Summary, summarize
from segfit.geometry import Grid
from segfit.images.formats import write_labels
from segfit.images.image import LabelMap
from segfit.labels import LabelClass, LabelScheme

ONE = LabelScheme.from_declaration({"background": 0, "a": 1})


def summary_of(dice: Mapping[str, float | None]) -> Summary:
    cases = [
        CaseMetrics(
            case=case,
            prediction_file="",
            reference_file="",
            metrics={"a": Metrics.from_counts(0, 0, 0, 0).model_copy(update={"dice": value})},
        )
        for case, value in dice.items()
    ]
    return summarize(cases, [LabelClass(name="a", values=(1,))])


def test_a_mean_over_many_groups_has_the_interval_of_a_normal_one() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    found = estimate({f"c{i}": float(value) for i, value in enumerate(values)}, {})
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert (found.cases, found.groups) == (400, 400)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 10)


def test_groups_are_drawn_and_not_images() -> None:
    """Twenty copies of each of eight values say no more than the values do."""
    values = np.random.default_rng(1).normal(0.8, 0.1, 8)
    alone = estimate({f"{group}": float(value) for group, value in enumerate(values)}, {})
    names = {f"{group}_{copy}": group for group in range(8) for copy in range(20)}
    copies = {name: float(values[group]) for name, group in names.items()}
    grouped = estimate(copies, {name: str(group) for name, group in names.items()})
    loose = estimate(copies, {})
    assert (grouped.cases, grouped.groups) == (160, 8)
    assert (grouped.mean, grouped.low, grouped.high) == pytest.approx((alone.mean, alone.low, alone.high))
    assert loose.high - loose.low < (grouped.high - grouped.low) / 3  # type: ignore[operator]


def test_the_mean_over_classes_is_of_classes_and_drawn_by_groups() -> None:
    """One class is in two cases of a group alone: it weighs as much as the one of all cases."""
    common = {f"c{i}": 0.1 * i for i in range(10)}
    rare: dict[str, float | None] = {"c0": 0.2, "c1": 0.4, "c2": None}
    groups = {f"c{i}": str(i // 2) for i in range(10)}
    found = estimate_over([common, rare], groups)
    assert found.mean == pytest.approx((0.45 + 0.3) / 2)
    assert (found.cases, found.groups) == (10, 5)
    assert found.low is not None
    assert found.high is not None
    rng = np.random.default_rng(0)
    means = []
    for _ in range(4000):
        drawn = [case for group in rng.integers(0, 5, 5) for case in (f"c{2 * group}", f"c{2 * group + 1}")]
        some = [rare[case] for case in drawn if rare.get(case) is not None]
        means.append(np.mean([np.mean([common[case] for case in drawn]), *([np.mean(some)] if some else [])]))  # type: ignore[arg-type]
    assert (found.low, found.high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.03)
    assert estimate_over([common], groups) == estimate(common, groups)


def test_few_groups_and_no_value_have_no_interval() -> None:
    names = [f"c{i}" for i in range(FEWEST_GROUPS - 1)]
    few = estimate(dict.fromkeys(names, 0.5) | {"none": None}, {})
    assert (few.mean, few.low, few.high, few.cases) == (0.5, None, None, FEWEST_GROUPS - 1)
    assert estimate({"a": None}, {}).mean is None
    assert difference(dict.fromkeys(names, 0.5), dict.fromkeys(names, 0.4), {}).p_value is None


@given(st.lists(st.floats(0, 1), min_size=FEWEST_GROUPS, max_size=12))
def test_an_interval_holds_within_the_values(values: list[float]) -> None:
    found = estimate({str(i): value for i, value in enumerate(values)}, {})
    assert found.low is not None
    assert found.high is not None
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9


def test_paired_differences() -> None:
    generator = np.random.default_rng(2)
    second = {f"c{i}": float(value) for i, value in enumerate(generator.normal(0.7, 0.2, 30))}
    first = {name: value + 0.02 + 0.01 * generator.normal() for name, value in second.items()}
    found = difference(first | {"only": 0.1}, second, {})
    apart = np.array([first[name] - second[name] for name in second])
    assert found.mean == pytest.approx(apart.mean())
    assert found.cases == 30
    assert found.low is not None
    assert found.low > 0  # though the spread between cases is ten times the difference
    assert found.p_value == pytest.approx(wilcoxon(apart).pvalue)
    same = difference(first, first, {})
    assert (same.mean, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_two_sets_are_compared_over_the_cases_of_both() -> None:
    one = summary_of({f"c{i}": 0.8 + i / 100 for i in range(8)})
    other = summary_of({f"c{i}": 0.7 + i / 90 for i in range(1, 9)})
    found = compare(one, other, {}, ("x", "y"))
    assert found.classes["a"]["dice"].cases == found.mean_dice.cases == 7
    assert found.mean_dice.low is not None
    assert found.mean_dice.low > 0
    assert found.sentence.startswith("x is better than y")
    assert compare(other, one, {}, ("y", "x")).sentence.startswith("x is better than y")
    assert "chance" in compare(one, one, {}, ("x", "y")).sentence
    with pytest.raises(InputError):
        compare(one, summary_of({"z": 0.5}), {}, ("x", "y"))


def test_slices_and_the_one_that_falls_behind() -> None:
    dice: dict[str, float | None] = {f"good{i}": 0.9 + i / 200 for i in range(6)}
    dice |= {f"poor{i}": 0.5 + i / 200 for i in range(6)}
    values = {name: name[:4] for name in dice} | {"elsewhere": "x"}
    found = with_estimates(summary_of(dice | {"lone": 0.7}), {}, "site", values)
    assert [(one.value, one.estimates["a"]["dice"].cases) for one in found.slices] == [
        ("", 1),
        ("good", 6),
        ("poor", 6),
    ]
    assert [one.behind for one in found.slices] == [(), (), ("a",)]
    assert found.slices[1].estimates["a"]["dice"].mean == pytest.approx(0.9125)
    assert Summary.model_validate(found.model_dump()) == found
    alone = with_estimates(summary_of(dice), {}, "site", dict.fromkeys(dice, "all"))
    assert alone.slices[0].behind == ()


def test_cohorts_of_any_column_of_a_table() -> None:
    dice: dict[str, float | None] = {f"good{i}": 0.9 + i / 200 for i in range(6)}
    dice |= {f"poor{i}": 0.5 + i / 200 for i in range(6)}
    rows = {
        name: {"case": name, "group": name, "site": name[:4], "age": str(number), "sex": "fm"[number % 2]}
        for number, name in enumerate([*dice, "more"])
    }
    (found,) = slices_behind(summary_of(dice), {}, rows)
    assert (found.column, found.value, found.cases, found.classes) == ("site", "poor", 6, ("a",))
    assert (found.dice, found.others) == pytest.approx((0.5125, 0.9125))
    assert slices_behind(summary_of(dice), {}, {}) == ()
    assert slices_behind(summary_of(dict.fromkeys(dice, 0.9)), {}, rows) == ()


def test_groups_and_columns_of_a_table() -> None:
    rows = {"a": {"case": "a", "group": "p1", "sex": "f "}, "b": {"case": "b", "group": "", "sex": ""}}
    assert groups_of(["a", "b"], rows) == {"a": "p1"}
    assert column_of(rows, "sex") == {"a": "f", "b": ""}
    with pytest.raises(InputError):
        column_of(rows, "seks")
    with pytest.raises(InputError):
        column_of({}, "sex")
    frames = [f"patient{n:02}_frame{k}" for n in range(6) for k in range(2)]
    assert len(set(groups_of(frames, {}).values())) == 6


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Pictures of a square that was found two pixels aside, with a table above the references."""
    for i in range(6):
        labels = np.zeros((20, 20), np.uint8)
        labels[5:15, 5:15] = 1
        for folder, array in (("p", np.roll(labels, 2, 1)), ("r", labels)):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_labels(
                tmp_path / folder / f"c{i}.png", LabelMap(array, Grid((20, 20), (1.0, 1.0), spacing_known=False))
            )
    return tmp_path / "p", tmp_path / "r"


def test_a_table_tells_the_size_of_pixels(folders: tuple[Path, Path]) -> None:
    plain = evaluate_folder(*folders, ONE, ending=".png", metrics=["surface"])
    assert plain.unit == "px"
    assert plain.measures is not None
    assert plain.measures.tolerance == 2.0
    assert plain.mean["a"].measures["surface_dice"] == 1.0
    table = folders[1].parent / "cases.csv"
    table.write_text("case,pixel_mm,site\n" + "".join(f"c{i},0.75,{'ab'[i % 2]}\n" for i in range(6)))
    found = evaluate_folder(*folders, ONE, ending=".png", metrics=["surface"], by="site")
    assert found.unit == "mm"
    assert found.measures is not None
    assert found.measures.tolerance == 1.0
    assert found.mean["a"].measures["hd95"] == 1.5
    assert found.mean["a"].measures["surface_dice"] < 1.0  # type: ignore[operator]
    assert [one.estimates["a"]["dice"].cases for one in found.slices] == [3, 3]
    table.write_text("case,pixel_mm\nc0,0.75\n")
    mixed = evaluate_folder(*folders, ONE, ending=".png", metrics=["surface"])
    assert (mixed.unit, [item.code for item in mixed.warnings]) == (None, ["mixed_units"])


def test_a_table_that_contradicts_itself_is_refused(folders: tuple[Path, Path]) -> None:
    (folders[1] / "cases.csv").write_text("case,site\nc0,a\nc0,b\nc1,a\nc1,a\n")
    with pytest.raises(DatasetError) as caught:
        evaluate_folder(*folders, ONE, ending=".png", by="site")
    assert [problem.case for problem in caught.value.problems] == ["c0"]


def test_files_of_metrics(folders: tuple[Path, Path], tmp_path: Path) -> None:
    summary = evaluate_folder(*folders, ONE, ending=".png", metrics=["objects"])
    write_scores(summary, tmp_path / "s.json")
    assert Summary.load(tmp_path / "s.json") == summary
    write_scores(summary, tmp_path / "s.csv")
    rows = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert [(row["case"], row["class"], float(row["dice"]), row["n_ref"]) for row in rows] == [
        (f"c{i}", "a", 0.8, "100") for i in range(6)
    ]
    assert {row["object_sensitivity"] for row in rows} == {"1.0"}
    write_scores(summary, tmp_path / "n.json", "nnunet")
    assert json.loads((tmp_path / "n.json").read_text()) == summary.to_nnunet()
    for name in ("s.xlsx", "s"):
        with pytest.raises(InputError):
            write_scores(summary, tmp_path / name)
    with pytest.raises(InputError):
        write_scores(summary, tmp_path / "s.csv", "nnunet")


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    write_scores(summary_of({"=1+1": None, "plain": 0.5}), tmp_path / "s.csv")
    rows = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert [(row["case"], row["dice"]) for row in rows] == [("'=1+1", ""), ("plain", "0.5")]
