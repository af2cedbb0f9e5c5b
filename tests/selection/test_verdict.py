"""Each finding from values, none on good runs, and advice that can be typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from segfit.evaluation.cohorts import Behind
from segfit.evaluation.metrics import Metrics
from segfit.evaluation.summary import CaseMetrics, Summary, summarize
from segfit.fingerprint.fingerprint import CaseFingerprint, Fingerprint
from segfit.labels import LabelScheme
from segfit.options import Options, parse_seconds
from segfit.planning.plan import Decision, Initial, Plan, RunSpec, StageForecast
from segfit.selection.evidence import Evidence
from segfit.selection.select import Selection
from segfit.selection.verdict import Finding, Verdict, judge
from segfit.specs import TrainingSpec
from segfit.training.result import TrainingResult, ValidationPoint

DONE = (0.8, 0.88, 0.885, 0.888)  # a curve that is at its end
GOOD = {"RV": [0.88] * 20, "LV": [0.9] * 20}


def summary(scores: Mapping[str, Sequence[float | None]], *, background: bool = False) -> Summary:
    """Metrics by class, one per case; None: the case does not have it."""
    labels = LabelScheme.from_declaration({"background": 0, **{name: i + 1 for i, name in enumerate(scores)}})
    cases = [
        CaseMetrics(
            case=f"case_{number}",
            prediction_file="",
            reference_file="",
            metrics=dict(zip(scores, (_scores(value, background=background) for value in values), strict=True)),
        )
        for number, values in enumerate(zip(*scores.values(), strict=True))
    ]
    return summarize(cases, labels.classes)


def _scores(dice: float | None, *, background: bool) -> Metrics:
    tp = round(1000 * (dice or 0))
    wrong = 0 if dice is None else 1000 - tp
    return Metrics.from_counts(tp=tp, fp=0 if background else wrong, fn=2 * wrong if background else wrong, tn=9000)


def training(steps: int = 3000, curve: Sequence[float] = DONE, **facts: Any) -> TrainingResult:
    """One second per ten steps."""
    points = [
        ValidationPoint(step=i, seconds=0, share=(i + 1) / len(curve), dice={}, mean=mean)
        for i, mean in enumerate(curve)
    ]
    known = {"skipped_steps": 0, "final_loss": -0.7} | facts
    return TrainingResult(
        identity="", configuration="3d_fullres", device="cpu", steps=steps, seconds=steps / 10, seconds_per_step=0.1,
        curve=tuple(points), peak_memory_gb=1, **known,
    )  # fmt: skip


def evidence(
    scores: Summary | Mapping[str, Sequence[float | None]] = GOOD,
    *trainings: TrainingResult,
    steps: int | None = None,
    held: Mapping[int, int] | None = None,
    cases: int = 20,
    expected: int = 3000,
    test: Summary | None = None,
) -> Evidence:
    """What there is of a run on `cases` cases, of which `held` hold a label; one of five folds was trained."""
    found = scores if isinstance(scores, Summary) else summary(scores)
    held = held or {}
    labels = range(1, len(found.classes) + 1)
    run = RunSpec(
        configurations=("3d_fullres",),
        folds=(0,),
        steps=steps,
        expected_steps={"3d_fullres": expected},
        forecast={"train": StageForecast(seconds=900), "validate": StageForecast(seconds=60)},
    )
    return Evidence(
        validation=found,
        selection=Selection(
            candidates=(), winner=("3d_fullres",), reason="", notes=(), steps=(), dice_before_steps=None,
            dice_after_steps=None, folds=(0,),
        ),
        trainings=trainings or [training()],
        plan=Plan.model_construct(
            configurations={"3d_fullres": None, "2d": None},
            training={"3d_fullres": TrainingSpec(learning_rate=0.05, precision="fp16")},
            run=run,
        ),
        fingerprint=Fingerprint.model_construct(
            cases=tuple(
                CaseFingerprint.model_construct(
                    case=f"case_{i}", label_voxels={value: int(i < held.get(value, cases)) for value in labels}
                )
                for i in range(cases)
            )
        ),
        num_folds=5,
        test=test,
    )  # fmt: skip


def found(verdict: Verdict, code: str) -> Finding:
    (finding,) = [item for item in verdict.findings if item.code == code]
    return finding


def codes(verdict: Verdict) -> list[tuple[str, str]]:
    return [(item.code, item.level) for item in verdict.findings]


@pytest.mark.parametrize(
    "scores",
    [
        {"anterior": [0.89] * 20, "posterior": [0.87] * 20},
        {"vessel": [0.78] * 20},
        {"organ": [0.95, 0.9] * 10, "lesion": [0.7, None] * 10},
    ],
    ids=["hippocampus", "retina", "lesion"],
)
def test_nothing_is_said_of_good_runs(scores: dict[str, list[float | None]]) -> None:
    verdict = judge(evidence(scores, training(1600)))
    assert (verdict.level, verdict.findings) == ("good", ())


@pytest.mark.parametrize("boundary", [0.512, 0.454, 0.39])
def test_a_thin_class_is_at_most_a_remark(boundary: float) -> None:
    verdict = judge(evidence({"interior": [0.9] * 20, "boundary": [boundary] * 20}))
    assert verdict.level == "good"
    assert codes(verdict) == ([] if boundary > 0.5 else [("poor", "remark")])


def test_a_structure_that_was_not_learned() -> None:
    verdict = judge(evidence({"RV": [0.05, 0.0] * 10, "LV": [0.3] * 20, "Myo": [0.35] * 20}, training(420)))
    assert verdict.level == "failed"
    finding = found(verdict, "not_learned")
    assert finding.classes == ("RV",)
    assert finding.numbers == {"classes": 1, "of": 3, "cases": 20}
    for part in ("420 steps", "--time 3m", "--set planning.configurations=2d"):  # 1000 steps at 0.1 s, and 60 s beside
        assert part in finding.action
    assert parse_seconds("3m") >= 1000 * 0.1 + 60


def test_many_classes_fail_a_model_and_few_make_it_doubtful() -> None:
    good = {f"s{i}": [0.9] * 20 for i in range(37)}
    few = judge(evidence(good | {"s3": [0.0] * 20}))
    assert codes(few) == [("not_learned", "doubtful")]
    many = judge(evidence(good | {f"s{i}": [0.0] * 20 for i in range(32)}, training(60), steps=60))
    assert many.level == "failed"
    finding = found(many, "not_learned")
    assert finding.classes == tuple(f"s{i}" for i in range(32))
    assert finding.numbers == {"classes": 32, "of": 37, "cases": 20}
    for part in ("60 steps", "--steps 1000", "3 min"):
        assert part in finding.action
    assert [item.code for item in many.findings if item.level != "remark"] == ["not_learned"]


def test_one_case_is_weak_evidence() -> None:
    verdict = judge(evidence({"a": [0.9] * 20, "b": [0.0] + [None] * 19}))
    assert codes(verdict) == [("not_learned", "doubtful")]
    assert verdict.findings[0].numbers == {"classes": 1, "of": 2, "cases": 1}


def test_long_trainings_look_at_cases_and_labels() -> None:
    """Only here a label is doubted; the names of cases do not leave with the model."""
    scores = {"a": [0.9] * 20, "b": [0.02] * 10 + [0.01] * 10}
    verdict = judge(evidence(scores, training(20_000)))
    finding = found(verdict, "not_learned")
    assert finding.cases[:3] == ("case_10", "case_11", "case_12")
    assert "segfit check FOLDER" in finding.action
    assert finding.names_cases
    assert "case_" not in str(verdict.facts())
    assert (
        "Label b in more cases" in found(judge(evidence(scores, training(20_000), held={2: 2})), "not_learned").action
    )


@pytest.mark.parametrize(
    ("facts", "options", "doubted"),
    [
        ({}, (), False),
        ({"steps": 420}, (), True),
        ({"curve": (0.5, 0.6, 0.7, 0.78)}, (), True),
        ({"diverged": True}, (), True),
        ({"skipped_steps": 2000}, (), True),
        ({}, ("training.learning_rate",), True),
        ({}, ("planning.patch_size",), False),
    ],
)
def test_labels_are_doubted_where_the_training_is_not(
    facts: dict[str, Any], options: tuple[str, ...], doubted: bool
) -> None:
    given = evidence({"a": [0.9] * 20, "b": [0.02] * 20}, training(**{"steps": 20_000, **facts}))
    decision = Decision(key="3d_fullres.training", value={}, rule="", options=options)
    verdict = judge(replace(given, plan=given.plan.model_copy(update={"decisions": (decision,)})))
    assert verdict.doubts_training is doubted
    action = found(verdict, "not_learned").action
    assert ("labels" in action) is not doubted
    assert all(option in action for option in options if doubted)


def test_nothing_but_background() -> None:
    verdict = judge(evidence(summary({"a": [0.0] * 20, "b": [0.0] * 20}, background=True), training(300), expected=300))
    assert codes(verdict) == [("only_background", "failed")]
    finding = verdict.findings[0]
    assert (finding.classes, finding.numbers) == (("a", "b"), {"cases": 20})


def test_hardly_any_overlap() -> None:
    verdict = judge(evidence({"a": [0.15] * 20}))
    assert codes(verdict) == [("low_dice", "failed")]


def test_a_poor_class() -> None:
    verdict = judge(evidence({"a": [0.9] * 20, "b": [0.25] * 20}))
    assert codes(verdict) == [("poor", "doubtful")]
    assert (verdict.findings[0].classes, verdict.findings[0].numbers) == (("b",), {"dice": 0.25})


@pytest.mark.parametrize(
    ("steps", "curve", "expected"),
    [
        (300, (0.5, 0.6, 0.7, 0.78), [("too_few_steps", "doubtful")]),
        (300, (0.5, 0.6, 0.8, 0.83), [("too_few_steps", "remark")]),
        (3000, (0.5, 0.6, 0.8, 0.83), []),
        (3000, (0.5, 0.6, 0.7, 0.78), [("too_few_steps", "remark")]),
        (300, DONE, []),
        (300, (), []),
    ],
)
def test_a_curve_that_still_rises(steps: int, curve: tuple[float, ...], expected: list[tuple[str, str]]) -> None:
    verdict = judge(evidence(GOOD, training(steps, curve), expected=steps))
    assert codes(verdict) == expected
    if expected:
        assert f"--time {'3m' if steps == 300 else '15m'}" in verdict.findings[0].action


def test_skipped_steps_and_their_cases() -> None:
    assert judge(evidence(GOOD, training(3000, skipped_steps=150))).level == "good"
    verdict = judge(evidence(GOOD, training(60, (), skipped_steps=8), expected=60))
    assert codes(verdict) == [("skipped_steps", "doubtful")]
    finding = verdict.findings[0]
    assert finding.numbers == {"skipped": 8, "steps": 60}
    assert "--set training.learning_rate=0.01 and --set training.precision=fp32" in finding.action
    Options().with_settings(["training.learning_rate=0.01", "training.precision=fp32"])

    named = training(60, (), skipped_steps=8, skipped_cases={"case_7": 8})
    finding = judge(evidence(GOOD, named, expected=60)).findings[0]
    assert finding.cases == ("case_7",)
    assert finding.names_cases


def test_divergence() -> None:
    verdict = judge(evidence(GOOD, training(final_loss=8e6)))
    assert codes(verdict) == [("diverged", "doubtful")]
    assert verdict.findings[0].numbers == {"loss": 8e6}

    recovered = judge(evidence(GOOD, training(diverged=1)))
    assert codes(recovered) == [("diverged", "doubtful")]
    assert "recovered" in recovered.findings[0].text
    lost = judge(evidence({"a": [0.0] * 20}, training(200, (), final_loss=8e6), expected=200))
    assert codes(lost) == [("not_learned", "failed"), ("diverged", "doubtful")]
    assert "learning_rate=0.01" in lost.findings[0].action
    assert "200 steps" in lost.findings[0].action
    assert lost.findings[1].action == ""  # said already


def test_classes_in_few_cases() -> None:
    assert codes(judge(evidence(held={1: 2}))) == [("few_cases", "doubtful")]
    many = {f"s{i}": [0.9] * 20 for i in range(10)}
    assert codes(judge(evidence(many, held={1: 2}))) == [("few_cases", "remark")]
    assert codes(judge(evidence(held={1: 3}))) == []


def test_a_class_that_no_validated_case_has() -> None:
    scores = {**GOOD, "gallbladder": [None] * 20}
    verdict = judge(evidence(scores))
    assert (verdict.level, codes(verdict)) == ("doubtful", [("not_validated", "doubtful")])
    assert verdict.findings[0].classes == ("gallbladder",)
    assert "planning.folds=0,1,2,3,4" in verdict.findings[0].action
    assert codes(judge(evidence(scores, held={3: 0}))) == []  # the plan says that no training case has it


def test_a_busy_machine() -> None:
    assert codes(judge(evidence(GOOD, training(1400)))) == [("slow_machine", "remark")]
    assert codes(judge(evidence(GOOD, training(1600)))) == []
    assert codes(judge(evidence(GOOD, training(1400), steps=1400))) == []


def test_test_cases_below_the_validation() -> None:
    assert codes(judge(evidence(test=summary({"RV": [0.85] * 5, "LV": [0.88] * 5})))) == []
    assert codes(judge(evidence(test=summary({"RV": [0.8] * 5, "LV": [0.83] * 5})))) == [("test_worse", "remark")]
    worse = judge(evidence(test=summary({"RV": [0.6] * 5, "LV": [0.7] * 5})))
    assert codes(worse) == [("test_worse", "doubtful")]
    assert worse.findings[0].numbers == pytest.approx({"validation": 0.89, "test": 0.65, "cases": 5})
    assert judge(evidence(test=summary({"RV": [0.6] * 2, "LV": [0.7] * 2}))).level == "good"


@pytest.mark.parametrize(("dice", "level"), [(0.7, "doubtful"), (0.85, "remark")])
def test_a_kind_of_cases_that_falls_behind(dice: float, level: str) -> None:
    behind = Behind(column="site", value="St. Elsewhere", cases=6, classes=("RV",), dice=dice, others=0.9)
    verdict = judge(replace(evidence(), behind=(behind,)))
    finding = found(verdict, "falls_behind")
    assert (finding.level, finding.cohort, finding.classes) == (level, "site=St. Elsewhere", ("RV",))
    assert finding.numbers == {"dice": dice, "others": 0.9, "cases": 6}
    assert "St. Elsewhere" in finding.action
    assert "St. Elsewhere" not in str(verdict.facts())  # what the model's bundle tells


def test_part_of_the_cases_is_a_remark() -> None:
    verdict = judge(evidence({"a": [0.9] * 12}, cases=60))
    assert (verdict.level, codes(verdict)) == ("good", [("few_validated", "remark")])
    finding = verdict.findings[0]
    assert finding.numbers == {"validated": 12, "cases": 60}
    # 300 s of training so far, four times that for the other folds, and 960 s of forecast
    assert "--time 40m --set planning.folds=0,1,2,3,4" in finding.action
    few = judge(evidence({"a": [0.9] * 4}, cases=4)).findings[0]
    assert few.numbers == {"validated": 4, "cases": 4}
    assert "rough estimate" in few.text


def test_the_gravest_finding_decides_and_comes_first() -> None:
    verdict = judge(evidence({"a": [0.0] * 12, "b": [0.9] * 12}, training(300, (), skipped_steps=30), cases=60))
    assert [item.level for item in verdict.findings] == ["failed", "doubtful", "remark", "remark"]
    assert verdict.level == verdict.headline.partition(",")[0] == "failed"
    facts = verdict.facts()
    assert (facts["level"], facts["headline"]) == ("failed", verdict.headline)
    assert facts["findings"][0].startswith(verdict.findings[0].text)


@pytest.mark.parametrize(
    ("saw_cases", "level", "headline"), [(False, "remark", "good"), (True, "doubtful", "doubtful")]
)
def test_cases_that_a_model_has_seen_before(saw_cases: bool, level: str, headline: str) -> None:
    known = evidence()
    initial = Initial(identity="", model="hearts", layers=24, fitted=22, saw_cases=saw_cases)
    run = known.run.model_copy(update={"initial": initial})
    verdict = judge(replace(known, plan=known.plan.model_copy(update={"run": run})))
    assert found(verdict, "seen_before").level == level
    assert verdict.level == ("doubtful" if saw_cases else "good")
    assert "hearts" in found(verdict, "seen_before").text
