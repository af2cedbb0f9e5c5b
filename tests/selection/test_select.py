"""The winner, ties, candidates without a value, and the document."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segfit.errors import InputError, StageError
from segfit.evaluation.metrics import Metrics
from segfit.evaluation.pairs import Pair
from segfit.evaluation.summary import CaseMetrics, Summary, summarize
from segfit.execution.execution import Execution
from segfit.labels import LabelScheme
from segfit.selection.select import Candidate, Selection, select, select_winner

ONE = LabelScheme.from_declaration({"background": 0, "a": 1})


def summary_of(*percent: int | None) -> Summary:
    """Cases x, y, z with these Dice values."""
    cases = []
    for name, value in zip("xyz", percent, strict=False):
        scores = Metrics.from_counts(tp=value or 0, fp=2 * (100 - value) if value is not None else 0, fn=0, tn=9)
        cases.append(CaseMetrics(case=name, prediction_file="", reference_file="", metrics={"a": scores}))
    return summarize(cases, ONE.classes)


def candidate(name: str, *percent: int | None) -> Candidate:
    return Candidate(tuple(name.split("+")), summary_of(*percent))


def test_the_highest_mean_dice_wins() -> None:
    choice = select_winner([candidate("2d", 50, 60), candidate("3d", 80, 70), candidate("2d+3d", 70, 70)])
    assert choice.winner.name == "3d"
    assert all(part in choice.reason for part in ("3d ", "0.7500", "2d + 3d", "0.7000"))
    assert choice.notes == ()


def test_ties_go_to_the_first_and_to_single_configurations() -> None:
    choice = select_winner([candidate("2d+3d", 80), candidate("3d", 80), candidate("2d", 80)])
    assert choice.winner.name == "3d"
    assert choice.reason.startswith("3d and 2d share ")


def test_a_candidate_without_a_value_is_left_out() -> None:
    choice = select_winner([candidate("2d", None), candidate("3d", 10)])
    assert choice.winner.name == "3d"
    assert "0.1000" in choice.reason
    assert [note.partition(" ")[0] for note in choice.notes] == ["2d"]
    with pytest.raises(StageError, match="no candidate has a Dice"):
        select_winner([candidate("2d", None)])


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="train at least one"):
        select_winner([])
    with pytest.raises(InputError, match="2d was validated on 1 case"):
        select_winner([candidate("2d", 50), candidate("3d", 50, 60)])


def test_the_document_tells_scores_folds_and_steps(tmp_path: Path) -> None:
    labels, prediction = np.array([[1, 1, 0, 0]]), np.array([[1, 1, 0, 1]])
    candidates = [candidate("2d", 50, 60, None), candidate("3d", 80, 70, 90)]
    asked: list[str] = []

    def pairs_of(winner: Candidate) -> list[Pair]:
        asked.append(winner.name)
        return [Pair("x", lambda: prediction, lambda: labels)]

    selection, final = select(candidates, ONE, {1: ["y", "z"], 0: ["x"]}, pairs_of, execution=Execution(workers=1))
    assert asked == ["3d"]
    assert selection.winner == ("3d",)
    assert selection.folds == (0, 1)
    first, second = selection.candidates
    assert first.per_fold == pytest.approx({0: 0.5, 1: 0.6})
    assert second.per_class == pytest.approx({"a": 0.8})
    assert second.per_fold == pytest.approx({0: 0.8, 1: 0.8})
    assert [step.values for step in selection.steps] == [(1,)]
    assert (selection.dice_before_steps, selection.dice_after_steps) == (0.8, 1.0)
    assert final.mean_dice == 1.0
    selection.save(tmp_path / "selection.json")
    assert Selection.load(tmp_path / "selection.json") == selection
    old = (tmp_path / "selection.json").read_text().replace('"per_class"', '"per_target"')
    (tmp_path / "selection.json").write_text(old)
    assert Selection.load(tmp_path / "selection.json") == selection
