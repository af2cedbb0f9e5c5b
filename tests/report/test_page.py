from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from segfit.errors import warning
from segfit.planning.explain import explain
from segfit.planning.plan import Decision
from segfit.report import examples
from segfit.report.data import (
    ReportData,
    StageUse,
    TrainingCurve,
    choose_examples,
    flagged,
    ranked,
)
from segfit.report.page import render, write_report
from segfit.report.sections import derived
from segfit.report.viewer import as_json
from segfit.selection.select import Selection
from segfit.selection.verdict import Finding, Verdict
from segfit.specs import TrainingSpec
from summaries import make_candidate, make_summary

EMPTY = ReportData(dataset="Dataset001_New")


class _Reader(HTMLParser):
    """Collects the text, the references and the ids, and checks that tags are closed."""

    VOID = {"meta", "br", "link", "img", "hr", "input"}

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._attributes(attrs)

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src", "xlink:href"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def _text(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(_read(page).words))


@pytest.fixture(scope="session")
def page(complete: ReportData) -> str:
    return render(complete)


def test_headline_says_the_numbers(page: str, complete: ReportData) -> None:
    text = _text(page)
    assert "Cross-validated Dice 0.864" in text
    assert f"a mean Dice of {complete.validation.mean_dice:.3f} over 62 cases" in text
    assert "62 cases 95 % interval 0.8" in text
    assert f"Test Dice {complete.test.mean_dice:.3f} 20 cases" in text
    assert "1 h 58 min" in text
    assert "Xeon Platinum 8488C" in text
    assert "3 networks of the configuration 3d_fullres and 1 network of the configuration 2d" in text
    assert "the hardest case is hippocampus_<017> (0.206)" in text


def test_warnings_of_plan_data_and_numbers(page: str) -> None:
    text = _text(page)
    assert "mirroring stays on for all axes" in text
    assert "Only 3 of 5 folds were trained" in text
    assert "missed completely (Dice 0) in 1 case: hippocampus_<017>." in text
    assert "1 step of 3d_fullres fold 2 had no finite gradient" in text


def test_text_of_users_is_escaped(page: str) -> None:
    assert "hippocampus_&lt;017&gt;" in page
    assert "hippocampus_<017>" not in page
    assert "Hippocampus &amp; friends" in page
    evil = '<script>alert("x")</script>'
    options = {"device": evil}
    data = replace(
        EMPTY,
        dataset=evil,
        options=options,
        validation=make_summary({evil: {evil: 0.5}}),
        warnings=(warning("", evil),),
        environment={evil: evil},
        model_path=evil,
    )
    page = render(data)
    assert "<script>alert" not in page
    assert evil in "".join(_read(page).words)


def test_only_the_scripts_of_the_page_may_run(page: str) -> None:
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    allowed = policy[1].split("script-src")[1].split()
    assert len(scripts) == 2
    assert [f"'sha256-{digest}'" for digest in digests] == allowed
    assert "default-src 'none'" in policy[1]
    assert page.count("<script") == len(scripts) + page.count('<script type="application/json"')


def test_names_cannot_leave_the_data_of_the_viewer() -> None:
    evil = "</script><script>alert(1)</script>"
    assert "<" not in as_json({"case": evil})
    assert json.loads(as_json({"case": evil})) == {"case": evil}


def test_nothing_outside_the_file(page: str) -> None:
    reader = _read(page)
    assert reader.references
    assert all(reference.startswith(("#", "data:image/")) for reference in reader.references)
    assert "url(http" not in page
    assert "@import" not in page
    assert not re.findall(r"https?://(?!www\.w3\.org/(?:2000/svg|1999/xlink))", page)
    assert len(page.encode()) < 3_000_000


def test_ids_are_unique_and_references_lead_somewhere(page: str) -> None:
    reader = _read(page)
    assert len(reader.ids) == len(set(reader.ids))
    inside = {reference[1:] for reference in reader.references if reference.startswith("#")}
    inside |= set(re.findall(r"url\(#([^)]*)\)", page))
    assert inside <= set(reader.ids)


def test_the_same_data_gives_the_same_page(complete: ReportData) -> None:
    small = replace(complete, overlays=(), trainings=complete.trainings[:1])
    assert render(small) == render(small)


def test_asked_measured_derived_found(page: str) -> None:
    text = _text(page)
    assert "memory_gb 8 memory target in GB" in text
    assert "preset = auto, device = auto, seed = 0" in text
    assert re.search(r"Left to the plan: \d+ options workers, dataset.groups, planning.target_spacing_mm", text)
    assert "Posterior 2" in text
    assert "119 of 120" in text
    assert "The spacing is the same in all cases." in text
    assert "22 360" in text
    assert "40 × 56 × 40 voxels = 40 × 56 × 40 mm" in text
    assert "patch_size 40x56x40 as much context as possible: a volume of" in text
    assert "bound: at most 5% of the dataset's voxels" in text
    assert "with 240 training cases it would be 18" in text
    assert "median shape: 36x50x35; memory (GB): 8" in text
    assert "bottleneck 5 × 7 × 5 256 2 × 2 × 2 3 × 3 × 3 2 –" in text
    assert "Measured step, 3d_fullres 420 ms" in text
    assert "3d_fullres was chosen. The ensemble gains less than 0.001 Dice" in text
    assert text.index("2d + 3d_fullres 0.884") < text.index("2d 0.861 0.868 0.854")
    assert "0.884 without, 0.886 with it" in text


def test_decisions_read_as_in_the_explanation(complete: ReportData) -> None:
    assert complete.plan is not None
    recipe = TrainingSpec().augmentation.model_dump(mode="json", exclude={"sample_patch", "mirror_axes", "exchange"})
    spacing = {"target_spacing_mm": ["the case's own", 0.75, 0.75]}
    decisions = (
        Decision(key="memory_gb", value=8, rule="r", inputs={"budget_per_sample": 560_000_000}),
        Decision(
            key="2d.resample_image",
            value={"method": "spline", "order": 1},
            rule="r",
            inputs=spacing,
            options=("planning.2d.resample_image.order",),
            by_rule={"method": "spline", "order": 3},
        ),
        Decision(key="2d.augmentation.intensities", value=recipe, rule="r", inputs={}),
    )
    plan = complete.plan.model_copy(update={"decisions": decisions})
    part = derived(plan)
    assert part is not None
    resampling, augmentation = next(item["decisions"] for item in part["configurations"] if item["name"] == "2d")
    assert part["general"][0]["inputs"] == "budget per sample: 560,000,000"
    assert (resampling["brief"], resampling["value"]) == ("method spline; order 1", "")
    assert resampling["inputs"] == "target spacing (mm): the case's own, 0.75, 0.75"
    assert (resampling["rule"], resampling["bound"]) == ("set by you; the rule gives order 3: r", "set by you")
    assert augmentation["brief"] == f"{len(recipe)} values"
    assert "scaling range 0.7 to 1.4; dummy 2d no; noise probability 0.1" in augmentation["value"]
    text = explain(plan.model_copy(update={"run": None}), 10_000)
    for row in (part["general"][0], resampling, augmentation):
        assert f"{row['key']} = {row['value'] or row['brief']}\n" in text
        assert row["inputs"] in text
    page = _text(render(replace(complete, plan=plan)))
    assert f"augmentation.intensities {len(recipe)} values r Value rotation probability 0.2" in page


def test_cases_come_worst_first_and_nan_is_a_dash(page: str) -> None:
    text = _text(page)
    assert "hippocampus_<017> worst 0 0.206 0.000 0.412" in text
    assert "hippocampus_101 1 0.871 0.871 –" in text
    assert "Posterior absent in 1" in text
    table = text[text.index("Every case Dice") : text.index("62 cases, worst first")]
    means = [float(value) for value in re.findall(r"hippocampus_\S+ (?:worst )?\d (\d\.\d{3})", table)]
    assert len(means) == 62
    assert means == sorted(means)


def test_curves_examples_resources_and_use(page: str) -> None:
    text = _text(page)
    assert page.count('class="plot"') == 2 + 2 * 3
    assert "fold 2 1 000 7 min 100 %" in text
    assert page.count('class="overlay"') == 6 * 2
    assert page.count("data:image/jpeg") == 6 * 2 + 2 * 8  # stills; the viewer's and small ones
    assert "Axial slice 18 of 36" in text
    assert "train 3d_fullres 1 h 30 min 1 h 30 min 7.00 GB 6.90 GB – 0.20 GB" in text
    assert "segfit predict --model work/model -i IMAGES_FOLDER -o OUTPUT_FOLDER" in text
    assert "segfit.load_model('work/model')" in text
    assert "data hash a1b2c3d4e5f60718" in text


SENTENCES = (
    "No options have been recorded yet.",
    "The dataset has not been measured yet.",
    "No plan has been made yet.",
    "No model has been selected yet",
    "Nothing has been trained yet.",
    "No case has been validated yet.",
    "There is nothing to list yet.",
    "No labelled test case has been predicted yet.",
    "No example has been drawn yet",
    "No stage has been run yet.",
    "There is no model to predict with yet.",
    "Nothing has been recorded yet.",
)


def test_missing_parts_give_a_sentence(page: str) -> None:
    text = _text(render(EMPTY))
    for sentence in SENTENCES:
        assert sentence in text
        assert sentence not in page
    assert "segfit has not planned a model for Dataset001_New yet." in text


@pytest.mark.parametrize("part", ["fingerprint", "plan", "selection"])
def test_each_document_may_be_missing(complete: ReportData, part: str) -> None:
    small = replace(complete, overlays=(), trainings=())
    assert _text(render(replace(small, **{part: None}))) != _text(render(small))


def test_planned_but_not_trained(complete: ReportData) -> None:
    text = _text(render(replace(EMPTY, plan=complete.plan)))
    assert "segfit has planned a model for Dataset001_New; nothing has been trained yet." in text


def test_parts_without_any_number() -> None:
    selection = Selection(
        candidates=(make_candidate("2d", None, {}),),
        winner=("2d",),
        reason="",
        notes=(),
        steps=(),
        dice_before_steps=None,
        dice_after_steps=None,
        folds=(0,),
    )
    data = replace(
        EMPTY,
        validation=make_summary({"a": {"x": None}, "b": {"x": None}}),
        trainings=(TrainingCurve(configuration="2d", fold=0), TrainingCurve.from_events("2d", 1, [])),
        selection=selection,
        resources=(StageUse(name="measure"),),
    )
    text = _text(render(data))
    assert "Cross-validated Dice – not validated yet" in text
    assert "measure – –" in text


def test_the_verdict_comes_first_and_clears_the_labels() -> None:
    """A class that was never learned says nothing of its reference labels."""
    scores = make_summary({f"v{i}": {"x": 0.0, "y": 0.9} for i in range(12)})
    data = replace(EMPTY, validation=scores)
    assert "a wrong reference label" in _text(render(replace(data, verdict=Verdict(level="good"))))
    for verdict in (None, Verdict(level="doubtful", doubts_training=True)):
        text = _text(render(replace(data, verdict=verdict)))
        assert "missed completely (Dice 0) in 12 cases" in text
        assert "a wrong reference label" not in text
    finding = Finding(code="not_learned", level="doubtful", classes=("x",), text="x <was> not learned.", action="Wait.")
    for verdict in (Verdict(level="doubtful", findings=(finding,)), Verdict(level="failed", findings=(finding,))):
        text = _text(render(replace(data, verdict=verdict)))
        assert "a wrong reference label" not in text
        places = [text.index(part) for part in ("x <was> not learned.", "Cross-validated Dice", "Wait.")]
        assert places == sorted(places)


def test_many_structures_and_cases_stay_small() -> None:
    names = [f"class {i}" for i in range(60)]
    scores = make_summary({f"c{i}": dict.fromkeys(names, i / 2000) for i in range(1000)})
    curve = TrainingCurve(configuration="2d", fold=0, validation_share=(0.5,), dice=dict.fromkeys(names, (0.1,)))
    text = _text(page := render(replace(EMPTY, validation=scores, trainings=(curve,))))
    assert len(page.encode()) < 3_000_000
    assert "673 better cases are left out" in text
    assert "The 8 hardest classes are drawn; 52 others are not." in text


def test_write_report_writes_one_file(tmp_path: Path) -> None:
    write_report(EMPTY, tmp_path / "out" / "report.html")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == render(EMPTY)


def test_examples_are_the_best_the_median_and_the_worst_case() -> None:
    table = {"a": {"x": 0.5, "y": None}, "b": {"x": 0.7, "y": 0.9}, "c": {"x": 0.9, "y": 0.1}}
    scores = make_summary(table)
    assert scores.mean_dice == pytest.approx(0.6)  # absent classes are skipped
    assert [case.mean_dice for case in scores.cases] == pytest.approx([0.5, 0.8, 0.5])
    picks = choose_examples(scores)
    assert {rank: score.case for rank, score in picks.items()} == {"best": "b", "median": "c", "worst": "a"}
    assert choose_examples(make_summary({"a": {"x": None}})) == {}
    assert list(choose_examples(make_summary({"a": table["a"]}))) == ["best"]


def test_cases_that_need_a_look_are_shown_whole() -> None:
    dice = {f"c{i:02d}": {"x": 0.5 + i / 100, "y": 0.9} for i in range(20)} | {"lost": {"x": 0.0, "y": 0.8}}
    scores = make_summary(dice)
    finding = Finding(code="poor", level="doubtful", cases=("c07", "gone"), text="t", action="a")
    verdict = Verdict(level="doubtful", findings=(finding,))
    assert flagged(scores, verdict) == ["c07", "lost"]
    assert flagged(scores, verdict, 1) == ["c07"]
    order = [(case.case, rank) for case, rank in ranked(scores, verdict, others=3)]
    assert order == [
        ("c19", "best"),
        ("c09", "median"),
        ("lost", "worst"),
        ("c07", "flagged"),
        ("c00", ""),
        ("c01", ""),
        ("c02", ""),
    ]


def test_pictures_without_a_rank_are_left_out_where_a_page_grows_large(
    complete: ReportData, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = complete.overlays
    whole = examples.examples(shown, complete.label_names)
    assert whole is not None
    assert [case["rank"] for case in whole["cases"]] == ["best", "median", "worst"] * 2 + ["", ""]
    monkeypatch.setattr(examples, "_MOST", 0)
    small = examples.examples(shown, complete.label_names)
    assert small is not None
    assert [case["rank"] for case in small["cases"]] == ["best", "median", "worst"] * 2
    assert examples.shown_of(small, "test") == {"hippocampus_best": 3, "hippocampus_median": 4, "hippocampus_<017>": 5}
