"""Scores, report and model are of the prediction that is handed over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray

from segfit.bundle.bundle import open_bundle
from segfit.connected_components import PostprocessingStep, apply_steps
from segfit.evaluation.evaluate import evaluate
from segfit.evaluation.pairs import Pair
from segfit.evaluation.summary import Summary
from segfit.execution.execution import Execution
from segfit.inference.model import load_model
from segfit.labels import LabelScheme
from segfit.project import Project
from segfit.selection import select as select_module
from segfit.selection.postprocess import PostprocessingDecision
from segfit.selection.select import Candidate, Choice


def after_step(pair: Pair, step: PostprocessingStep) -> NDArray[Any]:
    return apply_steps(pair.load_prediction(), [step])


def test_scores_pictures_and_model_are_of_one_prediction(
    tmp_path: Path, volumes: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ensemble after its post-processing: taken whatever it is worth."""

    def ensemble(candidates: Sequence[Candidate], *_: Any) -> Choice:
        return Choice(max(candidates, key=lambda item: len(item.members)), "it was asked for", ())

    def largest(pairs: Sequence[Pair], labels: LabelScheme, **_: Any) -> PostprocessingDecision:
        step = PostprocessingStep.largest_of("all", labels.foreground_values)
        cleaned = [replace(pair, load_prediction=partial(after_step, pair, step)) for pair in pairs]
        before, after = (evaluate(items, labels, execution=Execution(workers=1)) for items in (pairs, cleaned))
        return PostprocessingDecision((step,), before, after)

    monkeypatch.setattr(select_module, "select_winner", ensemble)
    monkeypatch.setattr(select_module, "decide_postprocessing", largest)
    settings = [*tiny, "planning.configurations=3d_fullres,2d", "selection.rule=nnunet"]
    project = Project.create(tmp_path / "p", volumes, settings=settings)
    selection = project.select()
    found = project.findings().selected
    assert found is not None

    def scored() -> Summary:
        labels, ending = project.dataset.labels, project.dataset.file_ending
        files = {case: folder / f"{case}{ending}" for case, folder in found.validated().items()}
        pairs = [Pair.of_case(project.dataset.case(case), path, labels) for case, path in files.items()]
        return evaluate(pairs, labels, execution=Execution(workers=1))

    assert [case.metrics for case in scored().cases] == [case.metrics for case in found.summary.cases]
    assert selection.dice_after_steps == found.summary.mean_dice
    manifest = open_bundle(project.folder.model).manifest
    assert manifest.dice == {name: one.dice for name, one in found.summary.mean.items()}
    cases = len(found.summary.cases)
    assert {name: margin["volume"].groups for name, margin in manifest.margins.items()} == dict.fromkeys(
        manifest.dice, cases
    )
    (predicted, *_) = project.dataset.test
    measured = load_model(project.folder.model).predict(list(predicted.images)).measurements
    assert [(item.name, item.kind, item.confidence) for item in measured] == [
        (name, "volume", None) for name in manifest.dice
    ]
    assert found.own is not None
    next(found.own.glob("*.nii.gz")).write_bytes(b"damaged")
    assert Project.open(tmp_path / "p").select() == selection
    assert [case.metrics for case in scored().cases] == [case.metrics for case in found.summary.cases]
    assert not list(project.folder.runs.rglob("*.npy"))
