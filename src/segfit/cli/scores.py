"""The verb ``evaluate``: label files against references, by groups of cases, and two sets of them compared."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from segfit.cli.common import (
    AsJson,
    DatasetArgument,
    Labels,
    LabelUseName,
    Out,
    Workers,
    dataset_of,
    open_project,
    print_json,
    with_executor,
)
from segfit.cli.console import say, score_table, table
from segfit.errors import InputError
from segfit.text import count, dice, listing, measure_name

if TYPE_CHECKING:
    from segfit.dataset.manifest import Case, Dataset
    from segfit.evaluation.cohorts import Comparison
    from segfit.evaluation.statistics import Estimate
    from segfit.evaluation.summary import Estimates, Summary
    from segfit.execution.execution import Execution
    from segfit.labels import LabelScheme

__all__ = ["evaluate"]

_ALL = ("surface", "centreline", "objects")  # as `segfit.evaluation.measures.MeasureKind`, which imports longer


_Predictions = Annotated[
    Path | None, typer.Option("--predictions", "-p", metavar="FOLDER", help="Folder of predictions.")
]
_References = Annotated[
    Path | None, typer.Option("--references", "-r", metavar="FOLDER", help="Folder of reference labels.")
]
_Model = Annotated[Path | None, typer.Option("--model", "-m", metavar="MODEL", help="Model whose labels are meant.")]
_Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write all metrics to this .json or .csv, or a page: .html."),
]
_Form = Annotated[
    Literal["segfit", "nnunet"],
    typer.Option("--format", metavar="segfit|nnunet", help="Of FILE; nnunet: its summary.json."),
]
_Metrics = Annotated[
    str, typer.Option("--metrics", metavar="KIND,...", help="More: surface, centreline, objects or all.")
]
_Tolerance = Annotated[
    float | None, typer.Option("--tolerance", metavar="MM", help="Of surface Dice; default: 1 mm, or 2 pixels.")
]
_MatchIou = Annotated[
    float, typer.Option("--match-iou", metavar="IOU", help="Above it an object was found; default: 0.5.")
]
_By = Annotated[str, typer.Option("--by", metavar="COLUMN", help="Means for every value of a column of cases.csv too.")]
_Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option("--compare", metavar="A B", help="Two folders of predictions, or what -o wrote of them."),
]
_Observer = Annotated[
    Path | None,
    typer.Option("--observer", metavar="FOLDER", help="Labels of a second person: where the predictions stand."),
]


@with_executor
def evaluate(
    dataset: DatasetArgument = None,
    out: Out = None,
    predictions: _Predictions = None,
    references: _References = None,
    model: _Model = None,
    output: _Output = None,
    form: _Form = "segfit",
    save: Annotated[Path | None, typer.Option("--save", hidden=True)] = None,
    labels: Labels = None,
    metrics: _Metrics = "",
    tolerance: _Tolerance = None,
    match_iou: _MatchIou = 0.5,
    by: _By = "",
    compare: _Compare = None,
    observer: _Observer = None,
    images: Annotated[bool, typer.Option("--images/--no-images", help="In a page: with pictures of cases.")] = True,
    workers: Workers = None,
    *,
    execution: Execution,
    as_json: AsJson = False,
) -> None:
    """Score label files against references.

    DATASET or --model says what the labels mean, --labels what the values of the references are. Without -p and -r: the
    test predictions of the dataset's project; nothing is trained for that.
    """
    from segfit.evaluation.score_files import require_writable, write_scores

    target = output or save
    page = target is not None and target.suffix.lower() == ".html" and form == "segfit"
    if target is not None:
        require_writable(target, form, ".html")
    elif form != "segfit":
        raise InputError("--format is of the file that is written", "give -o summary.json")
    asked = _Asked(
        dataset, model, references, labels, _kinds(metrics), tolerance, match_iou, by,
        replace(execution, workers=workers),
    )  # fmt: skip
    if compare is not None:
        if predictions is not None or by or target is not None or observer is not None:
            problem = "leave out -p, --by, --observer and -o; --json tells all"
            raise InputError("--compare goes with --references alone", problem)
        _print_comparison(asked.compared(compare), as_json=as_json)
        return
    if observer is not None and references is None:
        raise InputError("--observer goes with --predictions and --references", "give both")
    if predictions is None and references is None:
        if labels is not None:
            raise InputError("--labels is for --predictions and --references", "a project knows its own: leave it out")
        summary, meaning = asked.of_project(out)
    else:
        summary, meaning = asked.summary(predictions), None
    between = None if observer is None else asked.beside(summary, observer)
    if page and target is not None:
        _write_page(summary, target, meaning or asked.meaning, between, asked.execution, images=images)
    elif target is not None:
        write_scores(summary, target, form)
    _print_json_or_tables(summary, between, as_json=as_json)


def _kinds(text: str) -> tuple[Any, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    return _ALL if names == ("all",) else names


@dataclass(frozen=True, slots=True)
class _Asked:
    """What folders of predictions are compared with, and how."""

    dataset: Path | None
    model: Path | None
    references: Path | None
    labels: LabelUseName | None
    kinds: tuple[Any, ...]
    tolerance: float | None
    match_iou: float
    by: str
    execution: Execution

    def summary(self, predictions: Path | None) -> Summary:
        """Score a folder."""
        from segfit.evaluation.evaluate import evaluate_folder

        if predictions is None or self.references is None:
            raise InputError("evaluate needs --predictions and --references, --compare of folders --references")
        meaning = self.meaning
        return evaluate_folder(
            predictions, self.references, meaning.labels, ending=meaning.ending, require_all=False,
            label_use=meaning.use, metrics=self.kinds, tolerance=self.tolerance, matched_iou=self.match_iou,
            table=meaning.table, by=self.by, execution=self.execution,
        )  # fmt: skip

    def of_project(self, out: Path | None) -> tuple[Summary, _Meaning | None]:
        """Score the test predictions of a project."""
        project = open_project(self.dataset, out, [], self.execution, make=False)
        found = project.evaluate(metrics=self.kinds, tolerance=self.tolerance, matched_iou=self.match_iou, by=self.by)
        if found is None:
            raise InputError("the dataset has no labelled test images", "give --predictions and --references")
        known = project.dataset
        return found, _Meaning(known.labels, known.file_ending, "classes", None, known)

    @property
    def meaning(self) -> _Meaning:
        """What the labels mean."""
        return _meaning(self.dataset, self.model, self.labels)

    def compared(self, paths: tuple[Path, Path]) -> Comparison:
        """Compare two sets of predictions, each a folder or the JSON file of its metrics."""
        from segfit.evaluation.summary import Summary

        first, second = (self.summary(path) if path.is_dir() else Summary.load(path) for path in paths)
        names = [path.stem for path in paths]
        if names[0] == names[1]:
            names = [str(path) for path in paths]
        return self._comparison(first, second, (names[0], names[1]))

    def beside(self, summary: Summary, observer: Path) -> Comparison:
        """Compare predictions with the labels of a second person, both against the references."""
        return self._comparison(summary, self.summary(observer), ("the model", "the second observer"))

    def _comparison(self, first: Summary, second: Summary, names: tuple[str, str]) -> Comparison:
        from segfit.dataset.layouts.table import rows_beside
        from segfit.evaluation.cohorts import compare, groups_of

        places = [place for place in (self.references, self.dataset and dataset_of(self.dataset)[0]) if place]
        rows = next((rows for place in places if (rows := rows_beside(place))), {})
        return compare(first, second, groups_of([case.case for case in first.cases], rows), names)


@dataclass(frozen=True, slots=True)
class _Meaning:
    """Labels and file ending of a dataset or a model, what label values are, and where a table of cases lies."""

    labels: LabelScheme
    ending: str
    use: LabelUseName
    table: Path | None
    dataset: Dataset | None = None

    @property
    def cases(self) -> dict[str, Case]:
        """The cases whose images are known, by id."""
        known = () if self.dataset is None else (*self.dataset.training, *self.dataset.test)
        return {case.id: case for case in known}


def _meaning(dataset: Path | None, model: Path | None, use: LabelUseName | None) -> _Meaning:
    """Return what a dataset or a model says; label values are `use`, or as was told there."""
    if model is not None:
        from segfit.inference.open_model import open_model

        manifest = open_model(model, verify=False).manifest
        return _Meaning(manifest.labels, manifest.file_ending, use or "classes", None)
    if dataset is None:
        raise InputError("give the dataset or --model, so that the labels have a meaning")
    from segfit.dataset.layouts import open_dataset

    place, asked = dataset_of(dataset)
    asked = asked.model_copy(update={"labels": use or asked.labels})
    opened = open_dataset(place, skip_incomplete=asked.skip_incomplete).taken(asked)
    return _Meaning(opened.labels, opened.file_ending, asked.labels, opened.root, opened)


def _write_page(
    summary: Summary, path: Path, meaning: _Meaning, observer: Comparison | None, execution: Execution, *, images: bool
) -> None:
    from segfit.report.evaluated import write_evaluation

    write_evaluation(
        summary, path, meaning.labels, label_use=meaning.use, cases=meaning.cases, observer=observer, images=images,
        execution=execution,
    )  # fmt: skip


def _print_json_or_tables(summary: Summary, between: Comparison | None, *, as_json: bool) -> None:
    if as_json:
        told = summary.model_dump(mode="json")
        print_json(told if between is None else told | {"observer": _facts(between)})
        return
    rows = {case.case: {name: one.dice for name, one in case.metrics.items()} for case in summary.cases}
    rows["mean"] = {name: one.dice for name, one in summary.mean.items()}
    score_table(rows, first="Dice")
    named = partial(measure_name, unit=summary.unit)
    _print_estimates("mean", summary.estimates, named)
    for one in summary.slices:
        _print_estimates(f"{summary.by} {one.value or 'not told'}", one.estimates, named, ("dice",))
    for one in summary.slices:
        if one.behind:
            say(f"{summary.by} {one.value or 'not told'} clearly falls behind in {listing(one.behind)}")
    if summary.mean_dice is not None:
        say(f"mean Dice {summary.mean_dice:.4f} over {count(len(summary.cases), 'case')}")
    if between is not None:
        say(between.sentence)


def _facts(found: Comparison) -> dict[str, Any]:
    return found.model_dump(mode="json") | {"sentence": found.sentence}


def _print_estimates(title: str, estimates: Estimates, named: Callable[[str], str], only: Sequence[str] = ()) -> None:
    """Print means with their intervals: a row per measure, a column per class."""
    if not estimates:
        return
    keys = only or list(dict.fromkeys(key for values in estimates.values() for key in values))
    one = next(iter(estimates.values()))["dice"]
    how = "too few groups for an interval" if one.low is None else f"95 % interval over {count(one.groups, 'group')}"
    say(f"\n{title}, {how}:")
    rows = [(named(key), *(_cell(values.get(key)) for values in estimates.values())) for key in keys]
    table(("", *estimates), rows, sys.stdout, numbers=True)


def _cell(found: Estimate | None) -> str:
    if found is None or found.mean is None:
        return dice(None)
    if found.low is None or found.high is None:
        return dice(found.mean)
    return f"{dice(found.mean)} ({dice(found.low)} to {dice(found.high)})"


def _print_comparison(found: Comparison, *, as_json: bool) -> None:
    if as_json:
        print_json(_facts(found))
        return
    _print_estimates(
        f"{found.first} minus {found.second}",
        {name: dict(values) for name, values in found.classes.items()},
        partial(measure_name, unit=None),
    )
    say(found.sentence)
