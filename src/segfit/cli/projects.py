"""The verbs about projects: ``info``, ``status``, ``stop``, ``clean`` and ``demo``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segfit.cli.common import (
    AsJson,
    DatasetArgument,
    Out,
    dataset_facts,
    is_project,
    open_project,
    print_json,
    project_folder,
)
from segfit.cli.console import say, table, wrapped
from segfit.cli.help_pages import PROJECTS, add_verb
from segfit.cli.outcome import print_outcome
from segfit.errors import InputError

if TYPE_CHECKING:
    from segfit.bundle.bundle import ModelManifest

__all__ = ["add_to"]

_DEMO_SECONDS = 150
_PROMISED_SECONDS = 300  # what the demo takes at most on a machine that does nothing else


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (info, status, stop, clean, demo):
        add_verb(app, PROJECTS, verb)


def info(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A model, a project or a dataset.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Say what a folder is."""
    from segfit.dataset.layouts import describe, open_dataset, recognised
    from segfit.files import require_there
    from segfit.inference.open_model import is_model, open_model

    if is_model(path):
        manifest = open_model(path, verify=False).manifest
        if as_json:
            print_json({"kind": "model", **manifest.model_dump(mode="json")})
        else:
            _print_model(manifest)
        return
    require_there(path, "model, project or dataset")
    if is_project(path):
        _print_status(path, as_json=as_json)
    elif recognised(path.absolute()):
        dataset = open_dataset(path)
        if as_json:
            print_json({"kind": "dataset", **dataset_facts(dataset)})
        else:
            for line in (f"dataset {dataset.name}", *describe(dataset)):
                say(wrapped(line, sys.stdout))
    else:
        raise InputError(f"{path} is neither a model, nor a project, nor a dataset", "give one of them")


def _print_model(manifest: ModelManifest) -> None:
    """Print what a model is, how good, what it costs and what it was made from; card.md has more."""
    from segfit.images.formats import described
    from segfit.text import by_axis, count, dice

    stages = manifest.stages
    passes = sum(len(one.weights) * 2 ** len(one.mirror_axes) for one in stages)
    unit = "mm" if manifest.training_images is None else manifest.training_images.unit
    facts = {
        "verdict": manifest.verdict.get("headline", ""),
        "channels": " + ".join(manifest.channel_names),
        "made from": described(manifest.input_ending, "files"),
        "training": _listed(manifest.training),
        "networks": "; ".join(
            f"{one.configuration.name}, {count(len(one.weights), 'fold')}, {one.configuration.network.kind},"
            f" {by_axis(one.configuration.patch_size)} voxels of {by_axis(one.configuration.spacing_mm)} {unit}"
            for one in stages
        ),
        "cost": f"{count(passes, 'pass', 'passes')} of a network for each window, "
        f"{sum(len(one.weights) for one in stages)} with --no-mirror",
        "afterwards": "; ".join(step.text for step in manifest.postprocessing),
        "origin": _listed(manifest.provenance),
        "use": manifest.intended_use,
        "limits": manifest.limits or "not stated",
        "licence": manifest.licence,
        "authors": manifest.authors,
        "data": manifest.data_origin,
    }
    table(("model", manifest.name), [row for row in facts.items() if row[1]], sys.stdout)
    say("")
    stored = manifest.labels.stored_values
    rows = [
        (one.name, ", ".join(str(stored[value]) for value in one.values), dice(manifest.dice.get(one.name)))
        for one in manifest.labels.classes
    ]
    table(("class", "label values", "cross-validated Dice"), rows, sys.stdout, numbers=True)


def _listed(facts: Mapping[str, Any]) -> str:
    from segfit.text import value_in_words

    return "; ".join(f"{key.replace('_', ' ')} {value_in_words(value, key)}" for key, value in facts.items())


def status(dataset: DatasetArgument = None, out: Out = None, as_json: AsJson = False) -> None:
    """Say how far a project and its tasks are."""
    _print_status(project_folder(dataset, out), as_json=as_json)


def stop(dataset: DatasetArgument = None, out: Out = None, as_json: AsJson = False) -> None:
    """Stop all that is at work in a project.

    On any machine that sees the folder, and on a cluster, where what waits is taken from the queue. States are saved:
    the commands that are stopped end with exit code 143, and given again they go on where they were.
    """
    from segfit.cli.console import console_progress
    from segfit.project.folder import ProjectFolder
    from segfit.project.status import status_of
    from segfit.project.stop import StopFile
    from segfit.project.submitted import cancel_tasks

    folder = ProjectFolder(status_of(project_folder(dataset, out)).project)
    StopFile(folder.stop).ask()
    titles = cancel_tasks(folder, console_progress())
    if as_json:
        print_json({"cancelled": titles})
        return
    say(f"{folder.root}: what is at work stops")
    for title in titles:
        say(f"cancelled: {title}")


def _print_status(path: Path, *, as_json: bool) -> None:
    from segfit.cli.submitting import next_with_tasks, print_tasks
    from segfit.project.folder import ProjectFolder
    from segfit.project.status import status_of
    from segfit.project.submitted import tasks_of

    found = status_of(path)
    tasks = tasks_of(ProjectFolder(path))
    if as_json:
        told = [item.model_dump(mode="json") for item in tasks]
        print_json({"kind": "project", **found.model_dump(mode="json"), "tasks": told})
        return
    say(f"project {found.project}\ndataset {found.dataset}, preset {found.preset}\n")
    table(("stage", "state", "found"), found.rows(), sys.stdout)
    say("")
    if tasks:
        print_tasks(tasks)
        say("")
    if found.headline:
        say(found.headline)
    if found.model is not None:
        say(f"model {found.model}")
    say(f"next: {next_with_tasks(found.next_step, tasks, ProjectFolder(path))}")


def clean(
    dataset: DatasetArgument = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what no present result needs.

    That is what other options and other data left: plans, trainings, preprocessed cases. It is made again when it is
    asked for again.
    """
    from segfit.project.upkeep import remove, unneeded
    from segfit.text import gigabytes

    project = open_project(None, project_folder(dataset, out), [])
    items = unneeded(project)
    freed = gigabytes(sum(item.num_bytes for item in items) / 2**30)
    if not dry_run:
        remove(project, items)
    if as_json:
        told = [{"path": str(item.path), "what": item.what, "bytes": item.num_bytes} for item in items]
        print_json({"removed": not dry_run, "items": told})
        return
    root = project.folder.root
    rows = [(str(item.path.relative_to(root)), item.what, gigabytes(item.num_bytes / 2**30)) for item in items]
    if rows:
        table(("", "what", "size"), rows, sys.stdout)
    say(f"{freed} {'would be' if dry_run else 'were'} freed" if items else "nothing to remove")


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder for data and project.")] = Path(
        "segfit-demo"
    ),
    seconds: Annotated[
        int, typer.Option("--seconds", metavar="N", help="Time budget of the run.", min=30)
    ] = _DEMO_SECONDS,
    as_json: AsJson = False,
) -> int:
    """Run the pipeline on made-up data.

    Phantoms with two classes; takes less than five minutes on a CPU that is not busy.
    """
    from segfit.dataset.phantom import make_phantom
    from segfit.text import duration

    started = perf_counter()
    data = out / "Dataset000_Phantom"
    if not (data / "dataset.json").exists():
        say(f"making phantoms in {data}", sys.stderr)
        make_phantom(data, cases=20, test_cases=5)
    project = open_project(data, out / "project", [f"time_s={seconds}"])
    project.run(overrun=True)
    code = print_outcome(project, as_json=as_json)
    took = perf_counter() - started
    if took > max(_PROMISED_SECONDS, seconds):
        say(f"the demo took {duration(took)}: this machine is busy", sys.stderr)
    return code
