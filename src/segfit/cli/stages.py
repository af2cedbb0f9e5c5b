"""The verbs of the pipeline from ``check`` to ``select``, and ``run`` for all of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from segfit.cli.common import (
    AsJson,
    Cluster,
    DatasetArgument,
    Out,
    dataset_facts,
    is_project,
    local_copies,
    open_project,
    opened_executor,
    print_json,
    with_executor,
    with_settings,
)
from segfit.cli.console import problem_table, say, score_table, table, text_width, wrapped
from segfit.cli.devices import on_devices
from segfit.cli.help_pages import PIPELINE, add_verb
from segfit.cli.models import print_verified, verify_cases
from segfit.cli.outcome import print_facts, print_outcome, print_verdict
from segfit.errors import InputError, StoppedError
from segfit.text import by_axis, count, dice

if TYPE_CHECKING:
    from segfit.dataset.manifest import Dataset
    from segfit.execution.execution import Execution
    from segfit.project import Project
    from segfit.project.submission import Trainings

__all__ = ["add_to"]

_Devices = Annotated[
    int | None, typer.Option("--devices", metavar="N", min=1, help="Devices of this machine that train together.")
]
_MEASURING = ("preset", "workers", "skip_incomplete", "resample_labels", "labels", "groups", "settings")
_TRAINING = (
    "time",
    "steps",
    "preset",
    "start",
    "plan_from",
    "splits",
    "resample_labels",
    "labels",
    "groups",
    "memory",
    "device",
    "deterministic",
    "seed",
    "workers",
    "skip_incomplete",
    "settings",
)
_PLANNING = tuple(name for name in _TRAINING if name not in ("seed", "workers"))


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (run, check, fingerprint, plan, preprocess, train, select):
        add_verb(app, PIPELINE, verb)


_WholeExecutor = Annotated[
    str | None,
    typer.Option(
        "--executor",
        metavar="pool|dask|slurm|PACKAGE:NAME",
        help="Who does the work on cases, or, slurm, all of it; default: this machine.",
    ),
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what --executor slurm would submit.")]
_Wait = Annotated[bool, typer.Option("--wait", help="Stay until the cluster is done; Ctrl-C ends its tasks.")]
_Planned = Annotated[bool, typer.Option("--planned", hidden=True)]  # given by the task that plans


@with_settings(*_TRAINING[:-1], "rule", "settings")
def run(
    dataset: DatasetArgument = None,
    out: Out = None,
    *,
    given: list[str],
    devices: _Devices = None,
    executor: _WholeExecutor = None,
    cluster: Cluster = None,
    dry_run: _DryRun = False,
    wait: _Wait = False,
    planned: _Planned = False,
    as_json: AsJson = False,
) -> int:
    """Do everything, from the check to the report.

    The exit code is 3 if the run ended and its model should not be used. With --executor slurm it is submitted
    as tasks, and the command ends; segfit status says how far they are, segfit stop ends them.
    """
    ways = {"dry_run": dry_run, "wait": wait, "planned": planned, "as_json": as_json}
    project = _worked(dataset, out, given, devices, executor, cluster, lambda project: project.run(), None, **ways)
    return 0 if project is None else print_outcome(project, as_json=as_json)


def _worked(
    dataset: Path | None,
    out: Path | None,
    given: list[str],
    devices: int | None,
    executor: str | None,
    cluster: str | None,
    work: Callable[[Project], object],
    only: Trainings | None,
    **ways: bool,
) -> Project | None:
    """Return the project when the work on it is done, here or by tasks of a scheduler; None where these go on.

    `only` and `ways` as in `run_by_tasks`. Raises `InputError` for options that do not go together.
    """
    from segfit.cli.submitting import run_by_tasks
    from segfit.execution.engines import does_cases

    if executor is not None and devices is not None:
        raise InputError("--devices is for training on this machine", "give --executor or --devices, not both")
    if executor is not None and not does_cases(executor):
        return run_by_tasks(dataset, out, given, executor, cluster, only, **ways)
    if ways["dry_run"] or ways["wait"] or ways["planned"]:
        raise InputError("--dry-run and --wait are for work that is submitted", "give --executor slurm too")
    if executor is None and cluster is not None:
        raise InputError("--cluster is of an executor, and none is given", "give --executor slurm, or dask, too")
    with opened_executor(executor, cluster) as execution, on_devices(devices):
        project = open_project(dataset, out, given, execution)
        with _telling_of_states(project):
            work(project)
    return project


@contextmanager
def _telling_of_states(project: Project) -> Iterator[None]:
    """Say, where a training is stopped, how a model is made of what there is."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, StoppedError):
        if any(project.folder.runs.glob("*/*/*/state/*")):
            command = f"segfit select {quote(str(project.folder.root))} --so-far"
            say(wrapped(f"{command} makes a model of what is trained so far", sys.stderr), sys.stderr)
        raise


@with_settings("skip_incomplete", "resample_labels", "labels", "groups", "workers")
@with_executor
def check(
    dataset: DatasetArgument = None, out: Out = None, *, given: list[str], execution: Execution, as_json: AsJson = False
) -> int:
    """Read every file and list all problems.

    Says first what was understood. The exit code is 2 if the dataset cannot be used. Without --out nothing is written.
    """
    from segfit.dataset.checks import checked_dataset
    from segfit.dataset.layouts import describe, leave_out
    from segfit.dataset.splits import splits_problems
    from segfit.options import Options
    from segfit.planning.folds import grouped

    if dataset is None or out is not None or is_project(dataset):
        project = open_project(dataset, out, given, execution)
        problems = project.check()
        found: Dataset | None = project.dataset
    else:
        asked = Options().with_settings(given)
        execution = replace(execution, workers=asked.workers)
        with local_copies([dataset], execution) as (place,):
            found, problems = checked_dataset(place, asked.dataset, execution=execution)
        if found is not None:
            found = grouped(found, asked)
            problems += splits_problems(None, found)
    fatal = sum(problem.fatal for problem in problems)
    if as_json:
        told = [item.facts | {"fatal": item.fatal} for item in problems]
        print_json({"dataset": None if found is None else dataset_facts(found), "problems": told})
    else:
        for line in () if found is None else describe(found):
            say(wrapped(line, sys.stdout))
        if problems:
            problem_table(problems, sys.stdout)
        counts = (
            f"{count(fatal, 'error')}, {count(len(problems) - fatal, 'warning')}" if problems else "no problem found"
        )
        say(f"{counts}: the dataset {'cannot be used as it is' if fatal else 'can be used'}")
        if fatal and found is not None and not any(problem.fatal for problem in leave_out(found, problems)[1]):
            say("--skip-incomplete leaves out the cases with errors")
    return 2 if fatal else 0


@with_settings(*_MEASURING)
@with_executor
def fingerprint(
    dataset: DatasetArgument = None, out: Out = None, *, given: list[str], execution: Execution, as_json: AsJson = False
) -> None:
    """Measure sizes, spacings, labels, intensities."""
    project = open_project(dataset, out, given, execution)
    result = project.fingerprint()
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    shapes, spacings = sorted(case.shape for case in result.cases), sorted(case.spacing_mm for case in result.cases)
    rows = [
        ("training cases", str(len(result.cases))),
        ("channels", ", ".join(result.channel_names)),
        ("axes", f"{result.ndim}, {result.orientation}"),
        ("median size (voxels)", by_axis(shapes[len(shapes) // 2])),
        (f"median spacing ({result.unit})", by_axis(spacings[len(spacings) // 2])),
    ]
    for name, one in zip(result.channel_names, result.intensities, strict=True):
        rows.append((f"foreground of {name}", f"mean {one.mean:.4g}, std {one.std:.4g}, median {one.median:.4g}"))
    table(("", result.dataset), rows, sys.stdout)


@with_settings(*_PLANNING)
def plan(
    dataset: DatasetArgument = None,
    out: Out = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say why every value is what it is.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure steps on this machine; size and forecast the run.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", metavar="A B", help="Compare two projects or plan files.")
    ] = None,
    *,
    given: list[str],
    as_json: AsJson = False,
) -> None:
    """Derive the pipeline; --explain gives reasons.

    Resampling, normalisation, patch, network, batch and recipe, each with its rule and what would change it.
    """
    from segfit.planning.explain import WIDEST, explain_json, forecast_rows
    from segfit.planning.explain import explain as in_words

    if compare is not None:
        _print_comparison(*compare, as_json=as_json)
        return
    project = open_project(dataset, out, given)
    result = project.size() if probe else project.plan()
    if as_json:
        print_json(explain_json(result) if explain else result.model_dump(mode="json"))
        return
    if explain:
        say(in_words(result, text_width(WIDEST)).removesuffix("\n"))
        return
    columns, *rows = result.table()
    table(columns, rows, sys.stdout)
    say(f"stock: {'yes' if result.stock else 'no'}")
    for change in result.changes:
        say(wrapped(f"  - {change}", sys.stdout, "    "))
    for warning in result.warnings:
        say(wrapped(f"warning: {warning}", sys.stdout, "  "))
    if result.run is not None:
        say("")
        table(("forecast", "time", "RAM", "device memory", "disk"), forecast_rows(result.run), sys.stdout, numbers=True)
        say("")
    say("segfit plan --explain says why")


def _print_comparison(first: Path, second: Path, *, as_json: bool) -> None:
    from segfit.planning.explain import compare
    from segfit.planning.plan import Plan

    plans = [Plan.load(path / "plan.json" if path.is_dir() else path) for path in (first, second)]
    rows = compare(*plans)
    if as_json:
        print_json({key: [a, b] for key, a, b in rows})
    elif rows:
        table(("", str(first), str(second)), rows, sys.stdout)
    else:
        say("the plans are identical")


@with_settings(*_MEASURING)
@with_executor
def preprocess(
    dataset: DatasetArgument = None,
    out: Out = None,
    *,
    given: list[str],
    execution: Execution,
    verify: Annotated[bool, typer.Option("--verify", hidden=True)] = False,  # older name of segfit verify
    as_json: AsJson = False,
) -> int:
    """Crop, normalise and resample all cases."""
    project = open_project(dataset, out, given, execution)
    if verify:
        return print_verified(verify_cases(project.folder.root, project.execution), as_json=as_json)
    stored = project.preprocess()
    if as_json:
        print_json({"folder": str(project.folder.cases), "configurations": stored})
        return 0
    for name, keys in stored.items():
        say(f"{name}: {count(len(keys), 'case')} in {project.folder.cases}")
    return 0


@with_settings(*_TRAINING)
def train(
    dataset: DatasetArgument = None,
    out: Out = None,
    folds: Annotated[
        str | None, typer.Option("--folds", metavar="K,...", help="Folds of the run to train, e.g. 0,1; default: all.")
    ] = None,
    configurations: Annotated[
        str | None,
        typer.Option("--configurations", metavar="NAME,...", help="Those of the run to train; default: all."),
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Predict their validation cases too, which select does otherwise.")
    ] = False,
    trained: Annotated[bool, typer.Option("--trained", hidden=True)] = False,  # given by tasks that wait for others
    *,
    given: list[str],
    devices: _Devices = None,
    executor: _WholeExecutor = None,
    cluster: Cluster = None,
    dry_run: _DryRun = False,
    wait: _Wait = False,
    planned: _Planned = False,
    as_json: AsJson = False,
) -> int:
    """Train what fits the time; goes on if stopped.

    With --folds and --configurations several commands part the run's trainings among them; with --executor slurm each
    training is a task, and its validation.
    """
    from segfit.project.submission import Trainings

    only = Trainings(
        _numbers(folds), None if configurations is None else tuple(map(str.strip, configurations.split(",")))
    )
    if trained:
        return _look_for_trained(open_project(dataset, out, given), only.configurations)
    ways = {"dry_run": dry_run, "wait": wait, "planned": planned, "as_json": as_json}

    def work(project: Project) -> None:
        project.train(folds=only.folds, configurations=only.configurations, validate=validate)

    project = _worked(dataset, out, given, devices, executor, cluster, work, only, **ways)
    if project is None:
        return 0
    done = [(item, result) for item in only.of(project) if (result := item.result()) is not None]
    if as_json:
        print_json([{"fold": item.fold, **result.model_dump(mode="json")} for item, result in done])
        return 0
    rows = [
        (item.name, str(item.fold), str(result.steps), f"{result.seconds:.0f}", dice(result.dice))
        for item, result in done
    ]
    table(("configuration", "fold", "steps", "seconds", "Dice of some cases"), rows, sys.stdout, numbers=True)
    return 0


def _look_for_trained(project: Project, configurations: Sequence[str] | None) -> int:
    """Return 0 if nobody is at work on trainings that a task waits for, else what has it begun again later."""
    from segfit.execution.scheduler import AGAIN_LATER
    from segfit.project.submission import awaited

    titles = awaited(project, configurations)
    for title in titles:
        say(f"{title} is at work yet: this begins again later")
    return AGAIN_LATER if titles else 0


def _numbers(folds: str | None) -> tuple[int, ...] | None:
    """Return the folds that an option names."""
    try:
        return None if folds is None else tuple(int(fold) for fold in folds.split(","))
    except ValueError:
        raise InputError(f"--folds takes numbers such as 0,1, not {folds!r}", "give the folds to train") from None


@with_settings("skip_incomplete", "resample_labels", "labels", "rule", "settings")
@with_executor
def select(
    dataset: DatasetArgument = None,
    out: Out = None,
    so_far: Annotated[
        bool, typer.Option("--so-far", help="Hand over what is trained so far: the last saved states.")
    ] = False,
    *,
    given: list[str],
    execution: Execution,
    as_json: AsJson = False,
) -> None:
    """Validate all cases, compare, choose, write the model."""
    from segfit.bundle.bundle import open_bundle

    project = open_project(dataset, out, given, execution)
    selection = project.select(complete=not so_far, so_far=so_far)
    if as_json:
        print_json(selection.model_dump(mode="json"))
        return
    rows = {" + ".join(item.members): {**item.per_class, "mean": item.mean_dice} for item in selection.candidates}
    score_table(rows, first="cross-validated Dice")
    say(wrapped(selection.reason, sys.stdout))
    for step in selection.steps:
        say(f"post-processing: {step.text}")
    say(f"model: {project.folder.model}")
    if so_far:
        print_facts(open_bundle(project.folder.model, verify=False).manifest.verdict)
    else:
        print_verdict(project.verdict())
