"""Metrics, summaries and post-processing steps against the reference's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segfit.components import PostprocessingStep, apply_steps
from segfit.evaluation.summary import Pair, evaluate_folder
from segfit.images.formats import read_label
from segfit.labels import LabelScheme
from segfit.selection.postprocess import decide_postprocessing

pytestmark = pytest.mark.golden

BACKGROUND = {"background": 0}
METRICS = {
    "summary_labels_1_2_3": ("ref", BACKGROUND | {"a": 1, "b": 2, "c": 3}),
    "summary_labels_ignore_4": ("ref_with_ignore_4", BACKGROUND | {"a": 1, "b": 2, "c": 3, "ignore": 4}),
    "summary_regions": ("ref", BACKGROUND | {"whole": [1, 2, 3], "core": [2, 3], "inner": 3}),
    "summary_labels_1_7_label_7_never_present": ("ref", BACKGROUND | {"a": 1, "never": 7}),
}
SCENARIOS = [
    "class_2_only",
    "foreground_then_class_2",
    "largest_foreground",
    "nothing",
    "regions_core_only",
    "regions_nested",
    "single_label",
    "with_ignore",
]


def scheme_of(labels: dict[str, Any]) -> LabelScheme:
    """Build a scheme, also with gaps between its values, which a dataset may not have."""
    if 7 in labels.values():
        complete = LabelScheme.from_declaration(labels | {str(v): v for v in range(2, 7)})
        wanted = [target for target in complete.labels if target.values[0] in (0, 1, 7)]
        return LabelScheme(labels=tuple(wanted))
    order = [1, 2, 3] if any(isinstance(value, list) for value in labels.values()) else None
    return LabelScheme.from_declaration(labels, order)


def assert_same_scores(ours: Any, theirs: Any) -> None:
    """Counts equal, ratios within 1e-12, keys in the same order."""
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        if isinstance(value, dict):
            assert_same_scores(ours[key], value)
        elif isinstance(value, int):
            assert ours[key] == value
        else:
            assert ours[key] == pytest.approx(value, rel=1e-12, abs=0, nan_ok=True)


@pytest.mark.parametrize("name", METRICS)
def test_summaries_equal_the_reference(golden: Path, name: str) -> None:
    folder = golden / "evaluation" / "metrics"
    references, labels = METRICS[name]
    scheme = scheme_of(labels)
    ours = evaluate_folder(folder / "pred", folder / references, scheme, ending=".nii.gz").to_reference()
    theirs = json.loads((folder / f"{name}.json").read_text())
    assert_same_scores(ours["mean"], theirs["mean"])
    assert_same_scores(ours["foreground_mean"], theirs["foreground_mean"])
    assert len(ours["metric_per_case"]) == len(theirs["metric_per_case"])
    for one, other in zip(ours["metric_per_case"], theirs["metric_per_case"], strict=True):
        assert_same_scores(one["metrics"], other["metrics"])
        for key in ("prediction_file", "reference_file"):
            assert Path(one[key]).name == Path(other[key]).name


@pytest.mark.parametrize("name", SCENARIOS)
def test_postprocessing_decisions_equal_the_reference(golden: Path, name: str) -> None:
    folder = golden / "evaluation" / "postprocessing" / name
    dataset = json.loads((folder / "dataset.json").read_text())
    scheme = LabelScheme.from_declaration(dataset["labels"], dataset.get("regions_class_order"))
    files = sorted((folder / "pred").glob("*.nii.gz"))
    decision = decide_postprocessing([Pair.of_files(f.name, f, folder / "ref" / f.name) for f in files], scheme)

    theirs = json.loads((folder / "pred" / "postprocessing.json").read_text())
    values = [np.atleast_1d(item["labels_or_regions"]).tolist() for item in theirs["postprocessing_kwargs"]]
    assert [list(step.values) for step in decision.steps] == values
    for ours, key in ((decision.before, "input_folder"), (decision.after, "postprocessed")):
        form = ours.to_reference()
        assert_same_scores(form["mean"], theirs[key]["mean"])
        assert_same_scores(form["foreground_mean"], theirs[key]["foreground_mean"])

    for file in files:
        assert_applied(file, folder / "pred" / "postprocessed" / file.name, decision.steps)
    for file in sorted((folder / "apply_in").glob("*.nii.gz")):
        assert_applied(file, folder / "apply_out" / file.name, decision.steps)


def assert_applied(before: Path, after: Path, steps: tuple[PostprocessingStep, ...]) -> None:
    expected = read_label(after).array[0]
    np.testing.assert_array_equal(apply_steps(read_label(before).array[0], steps), expected, err_msg=before.name)
