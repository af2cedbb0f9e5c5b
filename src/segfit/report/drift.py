"""The page of a drift log: what was found, and every number over the cases."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from segfit.files import write_text
from segfit.inference.drift_log import LoggedCase
from segfit.report.figures import drift_figure
from segfit.selection.drift import Drift, Series, series_of
from segfit.text import printable

__all__ = ["write_drift"]

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Drift</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>Drift</h1>
<p class="summary">{{ sentence }}</p>
<p class="note">Each dot is a case. Shaded: between which the training images lie. Recent cases are blue, right of the
dashed line.</p>
<div class="figures two">
{% for words, figure, moved in figures %}
<section><h4>{{ words }}{{ " has moved" if moved }}</h4>{{ figure }}</section>
{% endfor %}
</div>
</main>
</body>
</html>
"""


def write_drift(found: Drift, logged: Sequence[LoggedCase], path: Path) -> None:
    """Write the page; what has moved comes first."""
    cases = [case for case in logged if case.model == logged[-1].model]
    figures = [
        (printable(series.words), _figure(series, found.cases - found.recent, index), shift.moved)
        for index, (series, shift) in enumerate(zip(series_of(cases), found.shifts, strict=True))
    ]
    figures.sort(key=lambda item: not item[2])
    style = resources.files("segfit.report").joinpath("style.css").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.from_string(_PAGE)
    write_text(path, page.render(style=Markup(style), sentence=printable(found.sentence), figures=figures))


def _figure(series: Series, split: int, index: int) -> Markup:
    usual = None
    if series.facts:
        fact = series.facts[max(series.facts)]
        usual = (0.0 if fact.low is None else fact.low, fact.high)
    return drift_figure(series.values, usual, split, f"drift-{index}")
