"""The verbs about models and other people's formats: ``import``, ``export``, ``verify``, ``tune``, ``drift``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from segfit.cli.common import (
    AsJson,
    Checkpoint,
    Device,
    Labels,
    LabelUseName,
    ResampleLabels,
    SkipIncomplete,
    Workers,
    dataset_of,
    is_project,
    open_project,
    print_json,
    print_result,
    print_states,
)
from segfit.cli.console import console_execution, say, table
from segfit.cli.help_pages import MODELS, add_verb
from segfit.errors import InputError
from segfit.text import count, dice

if TYPE_CHECKING:
    from segfit.dataset.manifest import Dataset
    from segfit.dataset.splits import Splits
    from segfit.execution.execution import Execution

__all__ = ["add_to", "print_verified", "verify_cases"]

_DAMAGED, _MOVED = 1, 3  # exit codes


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    add_verb(app, MODELS, import_model, "import")
    add_verb(app, MODELS, export)
    add_verb(app, MODELS, verify)
    add_verb(app, MODELS, tune)
    add_verb(app, MODELS, drift)
    add_verb(app, None, export_nnunet)


def import_model(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Model of nnU-Net v2.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="MODEL", help="Folder for the model.")],
    checkpoint: Checkpoint = None,
    trainer: Annotated[
        str | None, typer.Option("--trainer", metavar="NAME", help="Read it as a model of this trainer.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a trained model of nnU-Net into one of segfit.

    PATH is a model folder (plans.json, dataset.json and fold_*), the folder of a dataset with such folders, or an
    exported zip. predict --model takes them as they are, too.
    """
    from segfit.bundle.bundle import write_bundle
    from segfit.inference.open_model import open_model

    bundle = open_model(path, checkpoint=checkpoint, trainer=trainer)
    if bundle.states is None:
        raise InputError(f"{path} is a model of segfit already", "copy it, or give a model of nnU-Net")
    manifest = write_bundle(output.absolute(), bundle.manifest, bundle.states)
    print_result({"model": str(output), "files": list(manifest.files)}, [output], as_json=as_json)


def export(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Dataset, or a project on it.", show_default=False)],
    to: Annotated[Literal["nnunet"], typer.Option("--to", metavar="nnunet", help="nnunet: raw data of nnU-Net v2.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder to make, e.g. Dataset123_Name.")
    ],
    workers: Workers = None,
    skip_incomplete: SkipIncomplete = None,
    labels: Labels = None,
    resample_labels: ResampleLabels = None,
    as_json: AsJson = False,
) -> None:
    """Write a dataset as others read it.

    For nnU-Net one file per channel, consecutive labels, dataset.json. A dataset that segfit check refuses is not
    written.
    """
    from segfit.bundle.bundle import MANIFEST

    assert to == "nnunet"
    if (path / MANIFEST).is_file():
        raise InputError(f"{path} is a model, and export writes datasets", "give a dataset or a project")
    written = _export(
        path, output, workers, skip_incomplete=skip_incomplete, resample_labels=resample_labels, labels=labels
    )
    print_result({"folder": str(written), "to": to}, [written], as_json=as_json)


def export_nnunet(
    dataset: Annotated[Path, typer.Option("--dataset", metavar="DATASET", help="Dataset of any layout.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder to make.")],
    workers: Workers = None,
    skip_incomplete: SkipIncomplete = None,
    labels: Labels = None,
    resample_labels: ResampleLabels = None,
) -> None:
    """Do as export --to nnunet does, under an older name."""
    written = _export(
        dataset, out, workers, skip_incomplete=skip_incomplete, resample_labels=resample_labels, labels=labels
    )
    say(str(written))


def _export(path: Path, folder: Path, workers: int | None, **given: bool | LabelUseName | None) -> Path:
    """Write a dataset that passes the check; what is `given` of `DatasetOptions` precedes what its project says."""
    from segfit.dataset.checks import checked_dataset, require_usable
    from segfit.nnunet.dataset_export import export_nnunet as write

    execution = console_execution(workers)
    place, asked = dataset_of(path)
    changes = {name: value for name, value in given.items() if value is not None}
    dataset, problems = checked_dataset(place, asked.model_copy(update=changes), execution=execution)
    require_usable(problems)
    assert dataset is not None
    for problem in problems:
        execution.progress.warn(problem)
    return write(dataset, folder, execution=execution)


def tune(
    path: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Model, or the project that has it.", show_default=False)
    ],
    dataset: Annotated[
        Path | None, typer.Option("--dataset", metavar="DATASET", help="That a model was trained on.")
    ] = None,
    splits: Annotated[
        Path | None, typer.Option("--splits", metavar="FILE", help="Its folds; default: those of nnU-Net.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure faster ways to predict; predict --speed uses those that lose nothing.

    On the validation cases of the model's folds, each predicted by the network that has not seen it. What loses more
    than 0.002 of mean Dice in any class, by the lower 95 % bound, is not used.
    """
    from segfit.bundle.bundle import with_speeds
    from segfit.selection.tuning import LOSS, tune

    model, data, folds, groups = _tuned_on(path, dataset, splits)
    found = tune(model, data, folds, groups, device=device or "auto", progress=console_execution(None).progress)
    with_speeds(model, found.speeds)
    if as_json:
        print_json({"model": str(model), **found.facts()})
        return
    rows = [
        (one.words, f"{one.time:.2f}", dice(fmean(one.dice.values())), f"{min(one.least.values(), default=0):+.4f}")
        for one in found.tried
    ]
    table(("way to predict", "time", "mean Dice", "change at least"), rows, sys.stdout, numbers=True)
    say(f"on {count(found.cases, 'case')}; ways whose change may be below -{LOSS:g} in a class are not used")
    for name, speed in found.speeds.items():
        say(f"--speed {name}: {speed.words}")


def _tuned_on(path: Path, dataset: Path | None, splits: Path | None) -> tuple[Path, Dataset, Splits, dict[str, str]]:
    """Return a model, the dataset it was trained on, its folds and the groups of cases."""
    from segfit.bundle.bundle import MANIFEST
    from segfit.dataset.splits import make_splits
    from segfit.evaluation.cohorts import groups_of

    if is_project(path):
        if dataset is not None or splits is not None:
            raise InputError("a project knows its dataset and folds", "leave out --dataset and --splits")
        project = open_project(path, None, [], make=False)
        model, data, folds = project.folder.model, project.dataset, project.splits()
    else:
        if dataset is None:
            raise InputError("to tune a model takes the dataset it was trained on", "give --dataset, or a project")
        from segfit.dataset.layouts import open_dataset

        place, asked = dataset_of(dataset)
        data = open_dataset(place, skip_incomplete=asked.skip_incomplete).taken(asked)
        model, folds = path, make_splits(splits or "nnunet", data.training, {})
    if not (model / MANIFEST).is_file():
        raise InputError(f"{model} is not a model of segfit", "turn one of nnU-Net into one with segfit import first")
    cases = {case.id: {"group": case.group or ""} for case in data.training}
    return model, data, folds, groups_of(cases, cases)


def drift(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="File of predict --log.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.html", help="Draw every number over the cases.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Say whether images or predictions have moved, from the log of predict.

    The recent half of the cases is compared with the first half and with the training images, from 10 cases on. The
    exit code is 3 if anything has moved.
    """
    from segfit.inference.drift_log import read_log
    from segfit.selection.drift import drift_of

    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{output} is to be a page", "give a name that ends in .html")
    cases, damaged = read_log(log)
    if not cases:
        raise InputError(f"{log} has no cases yet", "predict some with --log")
    found = drift_of(cases)
    if output is not None:
        from segfit.report.drift import write_drift

        write_drift(found, cases, output)
    if as_json:
        print_json(found.model_dump(mode="json") | {"damaged_lines": damaged})
    else:
        say(found.sentence)
        if found.of_other_models:
            say(f"left out: {count(found.of_other_models, 'case')} of other models", sys.stderr)
        if damaged:
            say(f"left out: {count(damaged, 'damaged line')}", sys.stderr)
    return _MOVED if found.state == "moved" else 0


def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A model or a project.", show_default=False)],
    workers: Workers = None,
    as_json: AsJson = False,
) -> int:
    """Compare stored files with their checksums.

    Of a model its files, of a project every result. The exit code is 1 if one is damaged.
    """
    from segfit.bundle.bundle import MANIFEST
    from segfit.files import require_there

    require_there(path, "model or project")
    if not is_project(path) and not (path / MANIFEST).is_file():
        raise InputError(f"{path} is neither a model nor a project", "give one of them")
    if is_project(path):
        rows = [*verify_cases(path, console_execution(workers)), *_verify_results(path)]
    else:
        rows = [_verified_model(path)]
    return print_verified(rows, as_json=as_json)


def print_verified(rows: Sequence[tuple[str, str, str]], *, as_json: bool) -> int:
    """Print what was verified; return the exit code."""
    damaged = any(state == "damaged" for _, state, _ in rows)
    print_states(rows, as_json=as_json)
    if not as_json and any(what.startswith("case ") for what, _, _ in rows):
        say("segfit preprocess makes damaged cases anew where they are needed")
    return _DAMAGED if damaged else 0


def verify_cases(project: Path, execution: Execution) -> list[tuple[str, str, str]]:
    """Read the stored cases of a project; return what, "good" or "damaged", and what was found of each damaged one."""
    from segfit.preprocessing.dataset import verify_store
    from segfit.preprocessing.store import CaseStore
    from segfit.project.folder import ProjectFolder

    store = CaseStore(ProjectFolder(project).cases)
    found = verify_store(store, execution=execution)
    total = len(store.keys())
    rows = [(f"case {case.name}", "damaged", f"{case.problem} ({case.folder})") for case in found]
    good = f"{total - len(found)} of {total} passed the checksum"
    return [*rows, ("stored cases", "damaged" if found else "good", good)]


def _verify_results(project: Path) -> list[tuple[str, str, str]]:
    from segfit.project.folder import ProjectFolder
    from segfit.project.upkeep import damage_of

    found = damage_of(ProjectFolder(project))
    rows = [(str(item.path.relative_to(project)), "damaged", item.problem) for item in found]
    return rows or [("other results", "good", "all passed the checksum")]


def _verified_model(path: Path) -> tuple[str, str, str]:
    from segfit.bundle.bundle import open_bundle

    try:
        files = open_bundle(path).manifest.files
    except InputError as error:
        return "model", "damaged", str(error)
    return "model", "good", f"{len(files)} of {len(files)} weight files passed the checksum"
