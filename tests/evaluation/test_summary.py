"""Means over cases, and nnU-Net's form of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from segfit.errors import InputError, warning
from segfit.evaluation.metrics import Metrics
from segfit.evaluation.summary import CaseMetrics, Summary, summarize
from segfit.labels import LabelClass, LabelScheme

TWO = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})
REGIONS = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])


def case(name: str, **metrics: Metrics) -> CaseMetrics:
    return CaseMetrics(case=name, prediction_file=f"p/{name}.nii", reference_file=f"r/{name}.nii", metrics=metrics)


HALF = Metrics.from_counts(tp=1, fp=1, fn=1, tn=7)  # Dice 1/2, IoU 1/3
FULL = Metrics.from_counts(tp=4, fp=0, fn=0, tn=6)
NOTHING = Metrics.from_counts(tp=0, fp=0, fn=0, tn=10)


def test_means_skip_cases_without_a_value() -> None:
    summary = summarize([case("x", a=HALF, b=FULL), case("y", a=NOTHING, b=HALF)], TWO.classes)
    assert summary.mean["a"].dice == 0.5
    assert summary.mean["a"].tp == 0.5
    assert summary.mean["b"].dice == 0.75
    assert summary.mean["b"].n_ref == 3.0
    assert summary.foreground_mean.dice == summary.mean_dice == 0.625
    assert summary.foreground_mean.tp == 1.5


def test_a_structure_that_never_occurs() -> None:
    summary = summarize([case("x", a=HALF, b=NOTHING)], TWO.classes)
    assert summary.mean["b"].dice is None
    assert summary.foreground_mean.dice is None
    assert summary.foreground_mean.tn == 8.5
    assert summary.mean_dice == 0.5
    nowhere = summarize([case("x", a=NOTHING, b=NOTHING)], TWO.classes)
    assert nowhere.mean_dice is None


def test_what_a_summary_looks_like() -> None:
    summary = summarize([case("x", a=HALF, b=FULL), case("<y>", a=NOTHING, b=HALF)], TWO.classes)
    assert repr(summary) == str(summary) == "Summary(2 cases, mean Dice 0.625: a 0.500, b 0.750)"
    html = summary.model_copy(update={"warnings": (warning("", "odd"),)})._repr_html_()
    for part in ("mean Dice 0.625", "<th>a</th>", "<td>&lt;y&gt;</td><td>–</td><td>0.500</td>", "<p>odd</p>"):
        assert part in html


def test_a_subset_has_means_of_its_own() -> None:
    summary = summarize([case("x", a=HALF, b=FULL), case("y", a=FULL, b=FULL)], TWO.classes)
    assert summary.subset(["y"]).mean_dice == 1.0
    assert [item.case for item in summary.subset(["y"]).cases] == ["y"]


def test_no_case_and_a_case_twice_are_refused() -> None:
    with pytest.raises(InputError, match="no case"):
        summarize([], TWO.classes)
    with pytest.raises(InputError, match="x occurs twice"):
        summarize([case("x", a=HALF, b=FULL)] * 2, TWO.classes)


def test_a_summary_survives_its_file(tmp_path: Path) -> None:
    summary = summarize([case("x", a=HALF, b=NOTHING)], TWO.classes)
    summary.save(tmp_path / "summary.json")
    assert Summary.load(tmp_path / "summary.json") == summary


def test_the_form_of_the_reference() -> None:
    targets = (LabelClass(name="core", values=(2,)), LabelClass(name="whole", values=(1, 2)))
    form = summarize([case("x", core=NOTHING, whole=HALF)], targets).to_nnunet()
    assert list(form) == ["foreground_mean", "mean", "metric_per_case"]
    assert list(form["mean"]) == ["(1, 2)", "2"]
    assert list(form["mean"]["2"]) == ["Dice", "FN", "FP", "IoU", "TN", "TP", "n_pred", "n_ref"]
    assert math.isnan(form["mean"]["2"]["Dice"])
    assert math.isnan(form["foreground_mean"]["Dice"])
    (first,) = form["metric_per_case"]
    assert (first["prediction_file"], first["reference_file"]) == ("p/x.nii", "r/x.nii")
    assert first["metrics"]["(1, 2)"] == {
        "Dice": 0.5,
        "FN": 1,
        "FP": 1,
        "IoU": 1 / 3,
        "TN": 7,
        "TP": 1,
        "n_pred": 2,
        "n_ref": 2,
    }


def test_summaries_of_earlier_versions_are_read() -> None:
    one = case("a", a=HALF)
    content = one.model_dump()
    content["scores"] = content.pop("metrics")
    assert CaseMetrics.model_validate(content) == one
    summary = summarize([case("x", a=HALF, b=FULL)], TWO.classes)
    content = summary.model_dump()
    content["targets"] = content.pop("classes")
    assert Summary.model_validate(content) == summary
