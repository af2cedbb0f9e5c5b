"""The pages: each one HTML file that opens offline, made from `ReportData` or from the scores of predictions."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources as package_files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from segfit.evaluation.summary import Summary
from segfit.files import new_folder, write_text
from segfit.report import results, sections
from segfit.report.data import Overlay, ReportData, choose_examples
from segfit.report.examples import examples, page_key, shown_of
from segfit.selection.verdict import Verdict
from segfit.text import count, dice, duration, listing

__all__ = ["fragment_of", "page_of", "render", "render_case", "render_scores", "write_case_pages", "write_report"]

_SCRIPTS = ("tables.js", "viewer.js")


def write_report(data: ReportData, path: Path) -> None:
    """Write the page atomically as UTF-8."""
    write_text(path, render(data))


def render(data: ReportData) -> str:
    """Return the page. All text from users is escaped; nothing outside the file is referred to but `data.pages`."""
    pictures = examples(data.overlays, data.label_names, data.pages)
    flags = {one.case: one.rank for one in data.overlays if one.rank}
    return page_of(
        "project.html.j2",
        f"{data.dataset} – report",
        dataset=data.dataset,
        verdict=data.verdict,
        actions=[item.action for item in data.verdict.findings if item.action] if data.verdict else [],
        tiles=_tiles(data),
        summary=_summary(data),
        warnings=_warnings(data),
        asked=sections.asked(data.options),
        measured=sections.measured(data.fingerprint, data.label_names),
        derived=sections.derived(data.plan),
        found=results.found(data),
        training=results.training(data.trainings),
        validation=results.scores(data.validation, data.folds, shown_of(pictures, "validation"), flags),
        test=results.scores(data.test, {}, shown_of(pictures, "test"), flags),
        pictures=pictures,
        no_images=data.no_images,
        resources=results.resources(data.resources),
        provenance=_provenance(data),
        use=_use(data),
    )


def render_case(overlay: Overlay, names: Mapping[int, str]) -> str:
    """Return a page that shows one case whole."""
    return page_of("case.html.j2", overlay.case, pictures=examples([overlay], names), case=overlay.case)


def write_case_pages(overlays: Sequence[Overlay], names: Mapping[int, str], folder: Path) -> dict[str, str]:
    """Write a page for each case into a folder that takes the place of what was there.

    Return the addresses of the pages by `page_key`, as seen from beside the folder.
    """
    found = {}
    with new_folder(folder) as new:
        for one in overlays:
            name = f"{one.kind}-{one.case}.html"
            write_text(new / name, render_case(one, names))
            found[page_key(one)] = quote(f"{folder.name}/{name}")
    return found


def render_scores(
    summary: Summary,
    title: str,
    overlays: Sequence[Overlay] = (),
    names: Mapping[int, str] | None = None,
    *,
    no_images: bool = False,
) -> str:
    """Return the page of an evaluation: the scores of predictions, and pictures of some where they are given."""
    flags = {one.case: one.rank for one in overlays if one.rank}
    interval = _interval(summary)
    remark = count(len(summary.cases), "case")
    pictures = examples(overlays, names or {})
    return page_of(
        "evaluation.html.j2",
        f"{title} – evaluation",
        name=title,
        tile=("Mean Dice", dice(summary.mean_dice), remark + _spread(interval)),
        extremes=_extremes(summary) if summary.mean_dice is not None else [],
        warnings=[str(item) for item in summary.warnings],
        scores=results.scores(summary, shown=shown_of(pictures, "evaluation"), flags=flags),
        slices=results.slices(summary),
        pictures=pictures,
        no_images=no_images,
    )


def page_of(template: str, title: str, scripts: Sequence[str] = _SCRIPTS, *, live: bool = False, **values: Any) -> str:
    """Return a page of the package; its content policy lets in the scripts named here, by their hashes, and nothing.

    `live`: it may ask the server that it came from.
    """
    return fragment_of(
        template,
        style=Markup(_package_text("style.css")),
        scripts=[_script(name) for name in scripts],
        connect=Markup("connect-src 'self'; " if live else ""),
        title=title,
        **values,
    )


def fragment_of(template: str, **values: Any) -> Markup:
    """Return a part of a page."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_package_text),
    )
    return Markup(environment.get_template(template).render(**values))


def _script(name: str) -> dict[str, Markup]:
    text = _package_text(name)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": Markup(text), "hash": Markup(f"sha256-{digest}")}


def _package_text(name: str) -> str:
    return package_files.files("segfit.report").joinpath(name).read_text(encoding="utf-8")


def _tiles(data: ReportData) -> list[tuple[str, str, str]]:
    """Return the headline as (label, value, remark)."""
    return [
        ("Cross-validated Dice", *_dice_tile(data.validation, "not validated yet")),
        ("Test Dice", *_dice_tile(data.test, "no labelled test cases predicted")),
        ("Training cases", *_cases_tile(data)),
        ("Time", *_time_tile(data)),
    ]


def _dice_tile(summary: Summary | None, missing: str) -> tuple[str, str]:
    if summary is None or summary.mean_dice is None:
        return "–", missing
    return dice(summary.mean_dice), count(len(summary.cases), "case") + _spread(_interval(summary))


def _spread(interval: tuple[float, float] | None) -> str:
    return f"\n95 % interval {dice(interval[0])}–{dice(interval[1])}" if interval else ""


def _cases_tile(data: ReportData) -> tuple[str, str]:
    if data.fingerprint is None:
        return "–", "not measured yet"
    classes = len(data.label_names)
    remark = f"{data.fingerprint.ndim}D, {count(len(data.fingerprint.channel_names), 'channel')}"
    return str(len(data.fingerprint.cases)), remark + (f", {count(classes, 'class', 'classes')}" if classes else "")


def _time_tile(data: ReportData) -> tuple[str, str]:
    used = [stage.used_s for stage in data.resources if stage.used_s is not None]
    return duration(sum(used)) if used else "–", data.environment.get("machine", "")


def _interval(summary: Summary) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of the foreground mean over cases; None below five cases or without one."""
    cases = len(summary.cases)
    if cases < 5 or summary.mean_dice is None:
        return None
    table = np.array([[case.metrics[name].dice for name in summary.mean] for case in summary.cases], dtype=float)
    known = np.isfinite(table)
    filled = np.where(known, table, 0.0)
    rng = np.random.default_rng(0)
    # How often each case is drawn, instead of the drawn cases themselves: one matrix product does the rest.
    draws = rng.multinomial(cases, np.full(cases, 1 / cases), size=1000).astype(float)
    weight = draws @ known
    means = np.divide(draws @ filled, weight, out=np.full(weight.shape, np.nan), where=weight > 0)
    usable = np.isfinite(means)
    totals = np.where(usable, means, 0.0).sum(1)[usable.any(1)] / usable.sum(1)[usable.any(1)]
    low, high = np.percentile(totals, [2.5, 97.5])
    return float(low), float(high)


def _summary(data: ReportData) -> list[str]:
    """Return the report in a few plain sentences."""
    sentences = []
    classes = f" to outline {listing(list(data.label_names.values()))}" if data.label_names else ""
    if data.trainings:
        folds: dict[str, int] = {}
        for curve in data.trainings:
            folds[curve.configuration] = folds.get(curve.configuration, 0) + 1
        networks = listing([f"{count(n, 'network')} of the configuration {name}" for name, n in folds.items()])
        sentences.append(f"segfit trained {networks} on {data.dataset}{classes}.")
    elif data.plan is not None:
        sentences.append(f"segfit has planned a model for {data.dataset}{classes}; nothing has been trained yet.")
    else:
        sentences.append(f"segfit has not planned a model for {data.dataset} yet.")
    if data.selection is not None:
        sentences.append(f"The model handed over is {' + '.join(data.selection.winner)}.")
    if (found := data.validation) is not None and found.mean_dice is not None:
        sentences.append(
            f"In cross-validation, where every case is predicted by a network that never saw it, the predictions reach "
            f"a mean Dice of {dice(found.mean_dice)} over {count(len(found.cases), 'case')} (1 means identical to the "
            f"reference, 0 means no overlap)."
        )
        sentences += _extremes(found)
    if (test := data.test) is not None and test.mean_dice is not None:
        sentences.append(
            f"On {count(len(test.cases), 'test case')} kept apart from training it is {dice(test.mean_dice)}."
        )
    return sentences


def _extremes(summary: Summary) -> list[str]:
    means = {name: one.dice for name, one in summary.mean.items() if one.dice is not None}
    worst = [*choose_examples(summary).values()][-1]
    hardest = min(means, key=lambda name: means[name])
    case = f"the hardest case is {worst.case} ({dice(worst.mean_dice)})."
    if len(means) == 1:
        return [case[0].upper() + case[1:]]
    return [f"The hardest class is {hardest} ({dice(means[hardest])}), {case}"]


def _warnings(data: ReportData) -> list[str]:
    """Return what the reader should look at: warnings that came with the data, then those the numbers show."""
    given = (*(data.plan.warnings if data.plan else ()), *data.warnings)
    found = [*map(str, given), *_missed(data)]
    told = data.verdict is not None and any(item.code == "skipped_steps" for item in data.verdict.findings)
    for curve in data.trainings:
        if curve.skipped and not told:
            found.append(
                f"{count(curve.skipped, 'step')} of {curve.configuration} fold {curve.fold} had no finite gradient and "
                "did not count; a few are harmless, many call for a lower learning rate or precision fp32."
            )
    return list(dict.fromkeys(found))


def _missed(data: ReportData) -> list[str]:
    """Return where a class was missed that the model otherwise finds; labels are doubted if the training is not."""
    verdict = data.verdict or Verdict(level="good", doubts_training=True)
    if verdict.level == "failed":
        return []
    unlearned = verdict.classes("not_learned")
    why = "" if verdict.doubts_training else " Look at these cases first; a wrong reference label is a common cause."
    found = []
    for kind, summary in (("cross-validation", data.validation), ("the test set", data.test)):
        missed = [
            case.case
            for case in (summary.cases if summary else ())
            if any(one.dice == 0 for name, one in case.metrics.items() if name not in unlearned)
        ]
        if missed:
            found.append(
                f"In {kind} at least one class was missed completely (Dice 0) in {count(len(missed), 'case')}: "
                f"{listing(missed, 4)}.{why}"
            )
    return found


def _provenance(data: ReportData) -> list[tuple[str, str]]:
    rows = list(data.environment.items())
    if data.plan is not None:
        rows += [("plan hash", data.plan.content_hash()), ("data hash", data.plan.fingerprint_hash)]
    elif data.fingerprint is not None:
        rows += [("data hash", data.fingerprint.content_hash())]
    return rows


def _use(data: ReportData) -> dict[str, Any] | None:
    """Return the lines that predict with the model, for a shell and for Python."""
    if not data.model_path:
        return None
    image = f"image{data.image_ending or data.file_ending}"
    return {
        "shell": f"segfit predict --model {shlex.quote(data.model_path)} -i IMAGES_FOLDER -o OUTPUT_FOLDER",
        "python": (
            "import segfit\n\n"
            f"model = segfit.load_model({data.model_path!r})\n"
            f"result = model.predict({image!r})\n"
            f"result.save({'segmentation' + data.file_ending!r})\n"
        ),
        "channels": list(data.plan.channel_names) if data.plan else [],
    }
