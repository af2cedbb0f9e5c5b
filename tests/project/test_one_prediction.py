"""Scores, report and model are of the prediction that is handed over; its pictures are whole or not."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segfit.bundle.bundle import open_bundle
from segfit.connected_components import PostprocessingStep, apply_steps
from segfit.evaluation.metrics import case_metrics
from segfit.evaluation.summary import summarize
from segfit.images.formats import read_label
from segfit.inference.model import load_model
from segfit.project import Project
from segfit.project.reporting import overlays_of
from segfit.project.selecting import Selected
from segfit.selection import select
from segfit.selection.postprocess import PostprocessingDecision, decide_postprocessing


@pytest.fixture
def ensemble(volumes: Path, tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project that selected both of its configurations and keeps the largest component of the first class."""
    ours = [item for item in tiny if not item.startswith("training.steps")]
    settings = [*ours, "training.steps=12", "planning.configurations=2d,3d_fullres"]
    project = Project.create(tmp_path / "p", volumes, settings=settings)

    def both(candidates: Any, *_: Any) -> select.Choice:
        winner = next(one for one in candidates if len(one.members) == 2)
        return select.Choice(winner, "as the test wants it", ())

    def always(pairs: Any, scheme: Any, **how: Any) -> PostprocessingDecision:
        found = decide_postprocessing(pairs, scheme, **how)
        steps = (PostprocessingStep.largest_of("a", (1,)),)
        cases = []
        for pair in pairs:
            prediction, reference = pair.load()
            cases.append(pair.with_metrics(case_metrics(apply_steps(prediction, steps), reference, scheme)))
        return PostprocessingDecision(steps, found.before, summarize(cases, scheme.classes))

    monkeypatch.setattr(select, "select_winner", both)
    monkeypatch.setattr(select, "decide_postprocessing", always)
    project.select()
    return project


def _shown(page: str) -> list[dict[str, Any]]:
    found = re.findall(r'<script type="application/json" id="case-\d+">(.*?)</script>', page)
    return [json.loads(text) for text in found]


def _require_scored(project: Project, found: Selected) -> None:
    """Check that the summary is that of the files."""
    labels = project.dataset.labels
    for case in found.summary.cases:
        prediction = labels.to_inner(read_label(found.validated()[case.case] / f"{case.case}.nii.gz").array)[0]
        (file,) = project.dataset.case(case.case).label_files
        assert case_metrics(prediction, labels.to_inner(read_label(file).array)[0], labels) == case.metrics


def test_an_ensemble_after_post_processing(ensemble: Project) -> None:
    found = ensemble.findings()
    assert found.selected is not None
    assert found.selected.own is not None
    labels = ensemble.dataset.labels
    assert found.validated == dict.fromkeys(found.validated, found.selected.own)
    _require_scored(ensemble, found.selected)
    overlays = overlays_of(ensemble.folder, ensemble.dataset, found, ensemble.hashes, ensemble.execution)
    shown = {one.case: one for one in overlays if one.kind == "validation"}
    assert shown.keys() == {case.case for case in found.selected.summary.cases}
    for case, one in shown.items():
        predicted = labels.to_inner(read_label(found.selected.own / f"{case}.nii.gz").array)[0]
        assert one.view.scene is not None
        expected = one.view.scene.cut(one.view.axes.apply(predicted[None])[0])
        assert one.volume is not None
        assert np.array_equal(one.volume, expected)
    assert found.selected.selection.dice_after_steps == found.selected.summary.mean_dice
    manifest = open_bundle(ensemble.folder.model).manifest
    assert manifest.dice == {name: one.dice for name, one in found.selected.summary.mean.items()}
    margins = {name: margin["volume"].groups for name, margin in manifest.margins.items()}
    assert margins == dict.fromkeys(manifest.dice, len(found.selected.summary.cases))
    (predicted, *_) = ensemble.dataset.test
    measured = load_model(ensemble.folder.model).predict(list(predicted.images)).measurements
    assert [(item.name, item.kind, item.confidence) for item in measured] == [
        (name, "volume", None) for name in manifest.dice
    ]


def test_predictions_that_were_damaged_are_made_again(ensemble: Project) -> None:
    found = ensemble.findings().selected
    assert found is not None
    assert found.own is not None
    next(found.own.glob("*.nii.gz")).write_bytes(b"damaged")
    assert Project.open(ensemble.folder.root).select() == found.selection
    _require_scored(ensemble, found)
    assert not list(ensemble.folder.runs.rglob("*.npy"))


def test_the_report_with_all_cases_whole_and_without_pictures(ensemble: Project) -> None:
    folder = ensemble.folder
    shown = _shown(ensemble.report(full=True).read_text(encoding="utf-8"))
    pages = {path.name: _shown(path.read_text(encoding="utf-8")) for path in folder.report_cases.iterdir()}
    assert {facts["page"] for facts in shown} == {f"report-cases/{name}" for name in pages}
    for facts in shown:
        (whole,) = pages[facts["page"].split("/")[1]]
        assert whole["case"] == facts["case"]
        assert whole["volume"]
        size = len(gzip.decompress(base64.b64decode(whole["labels"])))
        assert size == 2 * np.prod(whole["shape"])
    page = ensemble.report(images=False).read_text(encoding="utf-8")
    assert _shown(page) == []
    assert "data:image" not in page
    assert not folder.report_cases.exists()
