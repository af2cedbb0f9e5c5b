"""Metrics, summaries and post-processing steps against the reference's files."""

from __future__ import annotations

import json
from ast import literal_eval
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segfit.connected_components import PostprocessingStep, apply_steps
from segfit.evaluation.evaluate import evaluate_folder
from segfit.evaluation.pairs import Pair
from segfit.evaluation.score_files import write_scores
from segfit.images.formats import read_label
from segfit.labels import LabelClass, LabelScheme
from segfit.selection.postprocess import decide_postprocessing

pytestmark = pytest.mark.golden("evaluation")


def scheme_of(targets: list[str], ignore: int | None) -> LabelScheme:
    """Build a scheme from the keys of a summary, also with gaps between its values, which a dataset may not have."""
    values = [literal_eval(target) for target in targets]
    return LabelScheme(
        labels=tuple(
            LabelClass(name=str(value), values=value if isinstance(value, tuple) else (value,))
            for value in [0, *values]
        ),
        region_order=tuple(range(1, len(values) + 1)) if any(isinstance(v, tuple) for v in values) else None,
        ignore_value=ignore,
    )


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


@pytest.mark.golden_each("evaluation/metrics/*.json")
def test_summaries_equal_the_reference(path: Path) -> None:
    theirs = json.loads(path.read_text())
    references = Path(theirs["metric_per_case"][0]["reference_file"]).parent.name
    ignore = int(references.rpartition("_")[2]) if "ignore" in references else None
    scheme = scheme_of(list(theirs["mean"]), ignore)
    ours = evaluate_folder(path.with_name("pred"), path.with_name(references), scheme, ending=".nii.gz").to_nnunet()
    assert_same_scores(ours["mean"], theirs["mean"])
    assert_same_scores(ours["foreground_mean"], theirs["foreground_mean"])
    assert len(ours["metric_per_case"]) == len(theirs["metric_per_case"])
    for one, other in zip(ours["metric_per_case"], theirs["metric_per_case"], strict=True):
        assert_same_scores(one["metrics"], other["metrics"])
        for key in ("prediction_file", "reference_file"):
            assert Path(one[key]).name == Path(other[key]).name


@pytest.mark.golden_each("evaluation/metrics/*.json")
def test_a_summary_file_is_laid_out_like_the_references(path: Path, tmp_path: Path) -> None:
    """The same lines but for the last digits of ratios and the folders of the files."""
    theirs = json.loads(path.read_text())
    references = Path(theirs["metric_per_case"][0]["reference_file"]).parent.name
    ignore = int(references.rpartition("_")[2]) if "ignore" in references else None
    scheme = scheme_of(list(theirs["mean"]), ignore)
    found = evaluate_folder(path.with_name("pred"), path.with_name(references), scheme, ending=".nii.gz")
    write_scores(found, tmp_path / "summary.json", "nnunet")
    lines = [text.read_text().splitlines() for text in (tmp_path / "summary.json", path)]
    assert len(lines[0]) == len(lines[1])
    for ours, other in zip(*lines, strict=True):
        key, _, value = other.partition(": ")
        assert ours.startswith(key)
        if "_file" in key:
            assert Path(ours.split('"')[-2]).name == Path(value.strip('",')).name
        elif value and value[0] not in "{[":
            assert float(ours.partition(": ")[2].rstrip(",")) == pytest.approx(
                float(value.rstrip(",")), rel=1e-12, abs=0, nan_ok=True
            )
            assert ("." in ours) == ("." in other)
        else:
            assert ours == other


@pytest.mark.golden_each("evaluation/postprocessing/*/")
def test_postprocessing_decisions_equal_the_reference(path: Path) -> None:
    dataset = json.loads((path / "dataset.json").read_text())
    scheme = LabelScheme.from_declaration(dataset["labels"], dataset.get("regions_class_order"))
    files = sorted((path / "pred").glob("*.nii.gz"))
    decision = decide_postprocessing([Pair.of_files(f.name, f, path / "ref" / f.name) for f in files], scheme)

    theirs = json.loads((path / "pred" / "postprocessing.json").read_text())
    values = [np.atleast_1d(item["labels_or_regions"]).tolist() for item in theirs["postprocessing_kwargs"]]
    assert [list(step.values) for step in decision.steps] == values
    for ours, key in ((decision.before, "input_folder"), (decision.after, "postprocessed")):
        form = ours.to_nnunet()
        assert_same_scores(form["mean"], theirs[key]["mean"])
        assert_same_scores(form["foreground_mean"], theirs[key]["foreground_mean"])

    for file in files:
        assert_applied(file, path / "pred" / "postprocessed" / file.name, decision.steps)
    for file in sorted((path / "apply_in").glob("*.nii.gz")):
        assert_applied(file, path / "apply_out" / file.name, decision.steps)


def assert_applied(before: Path, after: Path, steps: tuple[PostprocessingStep, ...]) -> None:
    expected = read_label(after).array[0]
    np.testing.assert_array_equal(apply_steps(read_label(before).array[0], steps), expected, err_msg=before.name)
