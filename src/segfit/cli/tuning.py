"""The verb ``tune``: faster ways to predict that lose nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer

from segfit.cli.common import AsJson, Device, dataset_of, is_project, open_project, print_json
from segfit.cli.console import console_execution, say, table
from segfit.errors import InputError
from segfit.text import count, dice

if TYPE_CHECKING:
    from segfit.dataset.manifest import Dataset
    from segfit.dataset.splits import Splits

__all__ = ["tune"]


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
        problem = f"{model} is no folder with a model of segfit, where what is found is kept"
        raise InputError(problem, "unpack a zip, or turn a model of nnU-Net into one with segfit import")
    cases = {case.id: {"group": case.group or ""} for case in data.training}
    return model, data, folds, groups_of(cases, cases)
