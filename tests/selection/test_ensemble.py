"""Averages of probabilities and cross-validated scores of every two members."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from segfit.errors import InputError
from segfit.evaluation.evaluate import evaluate
from segfit.evaluation.pairs import Pair
from segfit.execution.execution import Execution
from segfit.geometry import Grid
from segfit.images.formats import write_labels
from segfit.images.image import LabelMap
from segfit.labels import LabelScheme
from segfit.selection import ensemble
from segfit.selection.ensemble import (
    EnsembleMember,
    StoredProbabilities,
    average_probabilities,
    evaluate_ensembles,
    merge_labels,
    merged_pairs,
)
from segfit.selection.postprocess import decide_postprocessing

ONE = LabelScheme.from_declaration({"background": 0, "a": 1})
REGIONS = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])


def of_foreground(*values: float) -> np.ndarray:
    """Probabilities (2, n, 1) of background and foreground."""
    foreground = np.array(values, np.float16)[:, None]
    return np.stack([1 - foreground, foreground])


def member(name: str, cases: Mapping[str, np.ndarray]) -> EnsembleMember:
    return EnsembleMember(name, {case: (lambda array=array: array) for case, array in cases.items()})


def reference(case: str, *values: int) -> Pair:
    labels = np.array(values, np.uint8)[:, None]
    return Pair(case, lambda: labels, lambda: labels, "p", f"r/{case}")


def test_the_mean_is_float32() -> None:
    mean = average_probabilities([of_foreground(0.25, 1.0), of_foreground(0.75, 0.5), of_foreground(0.5, 0.0)])
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean[1, :, 0], [0.5, 0.5], rtol=1e-7)
    with pytest.raises(InputError, match="equal shapes"):
        average_probabilities([of_foreground(0.5), of_foreground(0.5, 0.5)])


def test_ties_go_to_the_first_label_and_to_no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = merge_labels([of_foreground(0.25, 1.0), of_foreground(0.75, 0.5)], ONE)
    assert merged[:, 0].tolist() == [0, 1]
    regions = [np.array([[[0.5], [0.75]], [[0.25], [0.5]]]), np.array([[[0.5], [0.75]], [[0.25], [0.75]]])]
    assert merge_labels(regions, REGIONS)[:, 0].tolist() == [0, 2]
    monkeypatch.setattr(ensemble, "_SLAB", 1)  # one slab per slice
    assert merge_labels(regions, REGIONS)[:, 0].tolist() == [0, 2]


A = member("a", {"x": of_foreground(0.75, 0.75, 0), "y": of_foreground(1, 0, 0)})
B = member("b", {"x": of_foreground(0.5, 0, 0), "y": of_foreground(0, 1, 0)})
C = member("c", {"x": of_foreground(1, 1, 1), "y": of_foreground(1, 1, 1)})
REFERENCES = [reference("x", 1, 0, 0), reference("y", 1, 1, 0)]


def test_every_two_members_are_scored() -> None:
    summaries = evaluate_ensembles([A, B, C], REFERENCES, ONE, execution=Execution(workers=1))
    assert list(summaries) == [("a", "b"), ("a", "c"), ("b", "c")]
    scores = {names: [case.metrics["a"].dice for case in s.cases] for names, s in summaries.items()}
    # a + b: x (.625, .375, 0) -> 1 of 1; y (.5, .5, 0) -> ties are background
    # a + c: x (.875, .875, .5) -> 2 of 1; y (1, .5, .5) -> 1 of 2; b + c: x (.75, .5, .5); y (.5, 1, .5)
    assert scores == {("a", "b"): [1.0, 0.0], ("a", "c"): [2 / 3, 2 / 3], ("b", "c"): [1.0, 2 / 3]}
    first = summaries["a", "b"].cases[0]
    assert (first.case, first.prediction_file, first.reference_file) == ("x", "", "r/x")


def test_merged_pairs_predict_when_they_are_loaded() -> None:
    pairs = merged_pairs([A, C], REFERENCES, ONE)
    prediction, expected = pairs[0].load()
    assert prediction[:, 0].tolist() == [1, 1, 0]
    assert expected[:, 0].tolist() == [1, 0, 0]


def test_a_member_without_a_case_is_named() -> None:
    partial = member("part", {"x": of_foreground(1, 1, 1)})
    with pytest.raises(InputError, match=r"part has no probabilities of 1 case, first y"):
        evaluate_ensembles([A, partial], REFERENCES, ONE)
    with pytest.raises(InputError, match="part has no probabilities"):
        merged_pairs([A, partial], REFERENCES, ONE)


def test_probabilities_on_another_grid_are_named() -> None:
    wrong = member("wrong", {"x": of_foreground(1, 1), "y": of_foreground(1, 1)})
    with pytest.raises(InputError, match=r"case x: the probabilities of wrong have shape \(2, 2, 1\), expected"):
        evaluate_ensembles([A, wrong], REFERENCES, ONE, execution=Execution(workers=1))


def stored(folder: Path, member: EnsembleMember) -> EnsembleMember:
    """The same member with its probabilities in files."""
    for case, load in member.probabilities.items():
        np.save(folder / f"{member.name}-{case}.npy", load()[:, None])
    return EnsembleMember(
        member.name,
        {case: StoredProbabilities(folder / f"{member.name}-{case}.npy") for case in member.probabilities},
    )


@pytest.fixture
def references(tmp_path: Path) -> list[Pair]:
    """The references in files."""
    pairs = []
    for pair in REFERENCES:
        file = tmp_path / f"{pair.case}.nii.gz"
        write_labels(file, LabelMap(pair.load_reference()[None], Grid((1, 3, 1), (1.0, 1.0, 1.0))))
        pairs.append(Pair.of_files(pair.case, file, file))
    return pairs


def test_processes_score_the_same_ensembles(
    tmp_path: Path, references: list[Pair], request: pytest.FixtureRequest
) -> None:
    members = [stored(tmp_path, member) for member in (A, B, C)]
    by_threads = evaluate_ensembles(members, references, ONE, execution=Execution(workers=2))
    scores = {names: [case.metrics["a"].dice for case in s.cases] for names, s in by_threads.items()}
    assert scores == {("a", "b"): [1.0, 0.0], ("a", "c"): [2 / 3, 2 / 3], ("b", "c"): [1.0, 2 / 3]}
    elsewhere = request.getfixturevalue("elsewhere")
    far = Execution(engine=lambda *_: elsewhere)
    assert evaluate_ensembles(members, references, ONE, execution=far) == by_threads
    assert elsewhere.modules == {"segfit.selection.ensemble"}
    cases = request.getfixturevalue("done_by_processes")
    assert evaluate_ensembles(members, references, ONE, execution=Execution(workers=2)) == by_threads
    assert sorted(cases) == ["x", "y"]
    in_memory = evaluate_ensembles([A, B, C], REFERENCES, ONE, execution=Execution(workers=2))  # stays in this process
    assert {names: s.mean_dice for names, s in in_memory.items()} == {n: s.mean_dice for n, s in by_threads.items()}
    assert len(cases) == 2


def test_processes_merge_score_and_postprocess_the_same(
    tmp_path: Path, references: list[Pair], request: pytest.FixtureRequest
) -> None:
    pairs = merged_pairs([stored(tmp_path, A), stored(tmp_path, C)], references, ONE)
    assert pairs[0].load_prediction()[0, :, 0].tolist() == [1, 1, 0]
    two = Execution(workers=2)
    by_threads = evaluate(pairs, ONE, execution=two), decide_postprocessing(pairs, ONE, execution=two)
    assert [case.metrics["a"].dice for case in by_threads[0].cases] == [2 / 3, 2 / 3]
    cases = request.getfixturevalue("done_by_processes")
    assert (evaluate(pairs, ONE, execution=two), decide_postprocessing(pairs, ONE, execution=two)) == by_threads
    assert sorted(cases) == ["x", "x", "y", "y"]
    mixed = merged_pairs([stored(tmp_path, A), C], REFERENCES, ONE)
    assert [pair.predicted_bytes() for pair in mixed] == [0, 0]


def test_what_an_ensemble_takes_is_told_by_its_files(tmp_path: Path, references: list[Pair]) -> None:
    member = stored(tmp_path, A)
    size = (tmp_path / "a-x.npy").stat().st_size
    (pair, _) = merged_pairs([member, member], references, ONE)
    assert pair.predicted_bytes() == 3 * size + 3 * 8  # both members and the label map, and the reference
