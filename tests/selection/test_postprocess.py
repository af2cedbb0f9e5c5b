"""The post-processing decision on rows of voxels, and against rewriting every prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from segfit.connected_components import PostprocessingStep, apply_steps, keep_largest
from segfit.evaluation.evaluate import evaluate
from segfit.evaluation.pairs import Pair
from segfit.evaluation.summary import Summary
from segfit.execution import pool
from segfit.execution.execution import Execution
from segfit.geometry import Grid
from segfit.images.formats import write_labels
from segfit.images.image import LabelMap
from segfit.labels import LabelScheme
from segfit.selection.postprocess import decide_postprocessing

ONE = LabelScheme.from_declaration({"background": 0, "a": 1})
TWO = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})
IGNORE = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2, "ignore": 3})
NESTED = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
MIXED = LabelScheme.from_declaration(
    {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "c": 1, "d": 3}, [1, 2, 1, 3]
)


def row(text: str) -> np.ndarray:
    return np.array([[int(letter) for letter in text.replace(".", "0")]], np.uint8)


def pair(case: str, prediction: str, reference: str) -> Pair:
    return Pair(case, lambda: row(prediction), lambda: row(reference))


def values(steps: Sequence[PostprocessingStep]) -> list[tuple[int, ...]]:
    return [step.values for step in steps]


def test_a_stray_component_is_removed() -> None:
    decision = decide_postprocessing([pair("x", "11.1", "11..")], ONE)
    assert values(decision.steps) == [(1,)]
    assert decision.steps[0].text == "keep only the largest connected component of the foreground"
    assert decision.before.mean_dice == 0.8
    assert decision.after.mean_dice == 1.0
    assert decision.after.cases[0].metrics["a"].tn == 2


def test_a_true_second_component_is_kept() -> None:
    decision = decide_postprocessing([pair("x", "11.1", "11.1")], ONE)
    assert decision.steps == ()
    assert decision.after == decision.before


def test_foreground_must_not_harm_any_structure() -> None:
    # Together: in case x a gains and b is lost. Alone: a gains.
    pairs = [pair("x", "11..1.2", "11....2"), pair("y", "11...22", "11...22")]
    decision = decide_postprocessing(pairs, TWO)
    assert values(decision.steps) == [(1,)]
    assert decision.steps[0].text == "keep only the largest connected component of a"
    assert decision.after.mean["a"].dice == 1.0


def test_foreground_first_then_a_structure_on_top() -> None:
    # The lone 2 goes with the foreground; the 1 behind it touches the large component and goes with its own step.
    decision = decide_postprocessing([pair("x", "112212..2", "1122.2...")], TWO)
    assert values(decision.steps) == [(1, 2), (1,)]


def test_a_structure_that_never_occurs_refuses_the_foreground_step() -> None:
    scheme = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})
    decision = decide_postprocessing([pair("x", "11.1", "11..")], scheme)
    assert values(decision.steps) == [(1,)]
    assert decision.steps[0].text.endswith("component of a")
    assert decision.after.foreground_mean.dice is None


def test_ignored_voxels_do_not_count() -> None:
    assert decide_postprocessing([pair("x", "11.1", "11.3")], IGNORE).steps == ()


def by_rewriting(pairs: Sequence[Pair], scheme: LabelScheme) -> tuple[list[tuple[int, ...]], Summary]:
    """The rule told again with rewritten predictions and full evaluations."""

    def scored(predictions: Sequence[np.ndarray]) -> Summary:
        made = [Pair(p.case, lambda a=a: a, p.load_reference) for p, a in zip(pairs, predictions, strict=True)]
        return evaluate(made, scheme, execution=Execution(workers=1))

    def number(value: float | None) -> float:
        return np.nan if value is None else value

    current = [p.load_prediction() for p in pairs]
    best, accepted = scored(current), []
    foreground = [keep_largest(a, scheme.foreground_values) for a in current]
    summary = scored(foreground)
    better = number(summary.foreground_mean.dice) > number(best.foreground_mean.dice)
    if better and not any(number(summary.mean[n].dice) < number(best.mean[n].dice) for n in best.mean):
        current, best = foreground, summary
        accepted.append(scheme.foreground_values)
    for target in scheme.classes if len(scheme.classes) > 1 else ():
        alone = [keep_largest(a, target.values) for a in current]
        summary = scored(alone)
        if number(summary.mean[target.name].dice) > number(best.mean[target.name].dice):
            current, best = alone, summary
            accepted.append(target.values)
    return accepted, best


@pytest.mark.parametrize("scheme", [ONE, TWO, IGNORE, NESTED, MIXED], ids=["one", "two", "ignore", "nested", "mixed"])
def test_equals_rewriting_the_predictions(scheme: LabelScheme) -> None:
    rng = np.random.default_rng(3)
    top = max(scheme.all_values)
    taken = 0
    for _ in range(12):
        pairs = []
        for case in "xyz":
            reference = np.repeat(rng.integers(0, (scheme.ignore_value or top) + 1, (3, 4)), 3, axis=1).astype(np.uint8)
            noise = rng.random(reference.shape) < 0.25
            prediction = np.where(noise | (reference > top), rng.integers(0, top + 1, reference.shape), reference)
            pairs.append(Pair(case, lambda a=prediction: a, lambda a=reference: a))
        decision = decide_postprocessing(pairs, scheme, execution=Execution(workers=1))
        expected, summary = by_rewriting(pairs, scheme)
        assert values(decision.steps) == expected
        assert decision.after == summary
        cleaned = [apply_steps(p.load_prediction(), decision.steps) for p in pairs]
        applied = [Pair(p.case, lambda a=a: a, p.load_reference) for p, a in zip(pairs, cleaned, strict=True)]
        assert evaluate(applied, scheme, execution=Execution(workers=1)) == decision.after
        taken += len(expected)
    assert taken > 0


def test_processes_decide_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = []
    for case, (prediction, reference) in {"x": ("11.1.22", "11...22"), "y": ("11...2.", "11...2.")}.items():
        files = [tmp_path / f"{case}-{kind}.nii.gz" for kind in ("prediction", "reference")]
        for file, text in zip(files, (prediction, reference), strict=True):
            write_labels(file, LabelMap(row(text)[None], Grid((1, 1, len(text)), (1.0, 1.0, 1.0))))
        pairs.append(Pair.of_files(case, *files))
    expected = decide_postprocessing(pairs, TWO)
    assert values(expected.steps) == [(1,)]
    monkeypatch.setattr(pool, "_PROCESSES_FROM", 1)
    assert decide_postprocessing(pairs, TWO, execution=Execution(workers=2)) == expected
