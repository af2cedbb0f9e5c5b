"""What the verbs share: their options, how a project is found, and how results are printed."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from shlex import quote
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import typer

from segfit.cli.console import console_execution, console_progress, say, table
from segfit.cli.devices import TEAM, let_cublas_repeat
from segfit.errors import InputError, nearest

if TYPE_CHECKING:
    from segfit.dataset.manifest import Dataset
    from segfit.execution.execution import Execution
    from segfit.options import DatasetOptions
    from segfit.project import Project

__all__ = [
    "AsJson",
    "Checkpoint",
    "Cluster",
    "DatasetArgument",
    "Device",
    "LabelUseName",
    "Labels",
    "Out",
    "PresetName",
    "ResampleLabels",
    "SkipIncomplete",
    "Workers",
    "dataset_facts",
    "dataset_of",
    "is_project",
    "local_copies",
    "open_project",
    "opened_executor",
    "print_json",
    "print_result",
    "print_states",
    "project_folder",
    "with_executor",
    "with_settings",
]

_Exit = TypeVar("_Exit")

PresetName = Literal["auto", "stock", "resenc-m", "resenc-l", "resenc-xl"]
"""As in `segfit.options.Preset`, which takes longer to import than the help to print."""

LabelUseName = Literal["classes", "exclusive", "objects-as-foreground", "objects-as-boundary"]
"""As in `segfit.options.LabelUse`, for the same reason."""

DatasetArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="DATASET", help="Dataset, its URL (s3://...), or the project made of it.", show_default=False
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="PROJECT", help="Project folder; default: segfit-DATASET here.")
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="auto|cpu|cuda|cuda:N|mps", help="Where networks run; default: auto.")
]
Workers = Annotated[int | None, typer.Option("--workers", metavar="N", min=1, help="Cases in work at once.")]
SkipIncomplete = Annotated[
    bool | None,
    typer.Option("--skip-incomplete/--no-skip-incomplete", help="Leave out cases with missing or unusable files."),
]
Labels = Annotated[
    LabelUseName | None,
    typer.Option(
        "--labels",
        metavar="|".join(get_args(LabelUseName)),
        help="What label values are; exclusive: classes whose masks may overlap.",
    ),
]
ResampleLabels = Annotated[
    bool | None,
    typer.Option("--resample-labels/--no-resample-labels", help="Bring labels on another grid onto their image's."),
]
Checkpoint = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="NAME", help="Of nnU-Net's models: best, final, latest or a file name."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


_SETTINGS: dict[str, Any] = {
    "time": Annotated[
        str | None,
        typer.Option(
            "--time",
            metavar="TIME",
            help="Time for the whole run: 20min, 2h, 2h30m, 1.5h, 3d; 90 is 90 s; +30m goes on with a run for so long.",
        ),
    ],
    "steps": Annotated[
        int | None,
        typer.Option("--steps", metavar="N", help="Optimiser steps per training, instead of a time."),
    ],
    "preset": Annotated[
        PresetName | None,
        typer.Option("--preset", metavar="|".join(get_args(PresetName)), help="Planning rules; default: auto."),
    ],
    "start": Annotated[
        str | None,
        typer.Option("--from", metavar="MODEL", help="Start from a model: of segfit or nnU-Net, or a file of weights."),
    ],
    "plan_from": Annotated[
        str | None,
        typer.Option("--plan-from", metavar="PROJECT|FILE", help="Take over a plan; FILE: a plans.json of nnU-Net."),
    ],
    "splits": Annotated[
        str | None,
        typer.Option(
            "--splits", metavar="balanced|nnunet|FILE", help="Folds; FILE: a splits_final.json or splits.json."
        ),
    ],
    "resample_labels": ResampleLabels,
    "labels": Labels,
    "groups": Annotated[
        Literal["names", "none"] | None,
        typer.Option("--groups", metavar="names|none", help="Groups that the names of cases say; default: if clear."),
    ],
    "rule": Annotated[
        Literal["beyond-chance", "nnunet"] | None,
        typer.Option(
            "--rule",
            metavar="beyond-chance|nnunet",
            help="How the model is chosen: what costs more must win by more than chance, or the best mean Dice.",
        ),
    ],
    "memory": Annotated[float | None, typer.Option("--memory", metavar="GB", help="Memory target of a training.")],
    "device": Device,
    "deterministic": Annotated[
        bool | None,
        typer.Option("--deterministic/--no-deterministic", help="Only kernels that repeat themselves to the bit."),
    ],
    "seed": Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of everything random.")],
    "workers": Workers,
    "skip_incomplete": SkipIncomplete,
    "settings": Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Set any option, e.g. planning.patch_size=64,96,96. Repeatable."
        ),
    ],
}
"""Options of the command line that set options of a project, by the names of `_settings_from`."""


Executor = Annotated[
    str | None,
    typer.Option(
        "--executor", metavar="pool|dask|PACKAGE:NAME", help="Who does the work on cases; default: this machine."
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster", metavar="tcp://HOST:PORT|local:N|FILE", help="Where the executor does it; FILE: a YAML file."
    ),
]


@contextmanager
def opened_executor(executor: str | None, cluster: str | None) -> Iterator[Execution]:
    """Open what --executor and --cluster say of the work on cases."""
    from segfit.execution.engines import POOL
    from segfit.execution.execution import Execution

    with Execution.by(executor or POOL, cluster, progress=console_progress()) as execution:
        yield execution


def with_executor(verb: Callable[..., _Exit]) -> Callable[..., _Exit]:
    """Give a verb the options --executor and --cluster, in the place of its parameter `execution`, which they open."""

    @wraps(verb)
    def called(executor: str | None = None, cluster: str | None = None, **arguments: Any) -> _Exit:
        with opened_executor(executor, cluster) as execution:
            return verb(**arguments, execution=execution)

    return _taking(called, {"executor": Executor, "cluster": Cluster}, "execution")


def with_settings(*names: str) -> Callable[[Callable[..., _Exit]], Callable[..., _Exit]]:
    """Give a verb the options of these names, in the place of its parameter `given`.

    The verb is handed what was set with them as ``key=value`` settings.
    """

    def decorate(verb: Callable[..., _Exit]) -> Callable[..., _Exit]:
        @wraps(verb)
        def called(**arguments: Any) -> _Exit:
            given = _settings_from(**{name: arguments.pop(name) for name in names})
            return verb(**arguments, given=given)

        return _taking(called, {name: _SETTINGS[name] for name in names}, "given")

    return decorate


def _taking(called: Callable[..., _Exit], options: Mapping[str, Any], place: str) -> Callable[..., _Exit]:
    """Return a function whose signature has parameters for these options in the place of one of its parameters."""
    signature = inspect.signature(called, eval_str=True, locals={"Execution": Any})  # which is imported later
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in options.items()
    ]
    own = signature.parameters.values()
    shown = [one for parameter in own for one in (added if parameter.name == place else [parameter])]
    called.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return called


def _settings_from(
    *,
    time: str | None = None,
    steps: int | None = None,
    preset: str | None = None,
    start: str | None = None,
    plan_from: str | None = None,
    splits: str | None = None,
    resample_labels: bool | None = None,
    labels: str | None = None,
    groups: str | None = None,
    rule: str | None = None,
    memory: float | None = None,
    device: str | None = None,
    seed: int | None = None,
    workers: int | None = None,
    skip_incomplete: bool | None = None,
    deterministic: bool | None = None,
    settings: list[str] | None = None,
) -> list[str]:
    """Return what was given on the command line as ``key=value`` settings; what was not given stays as it was.

    A time takes the place of a number of steps given earlier, and the other way round.
    """
    from segfit.options import time_setting

    if time is not None and steps is not None:
        raise InputError("a run is limited by --time or by --steps, not by both", "leave one out")
    given: list[str] = []
    if time is not None:
        given += ["training.steps=null", time_setting(time)]
    if steps is not None:
        given += [f"training.steps={steps}", "time_s=null"]
    for key, path in (("training.start_from", start), ("planning.plan_from", plan_from)):
        if path is not None:
            given.append(f"{key}={json.dumps(str(Path(path).expanduser().absolute()))}")
    if splits is not None:
        given.append(f"planning.splits={json.dumps(_method_or_file(splits))}")
    for key, switch in (
        ("dataset.resample_labels", resample_labels),
        ("dataset.skip_incomplete", skip_incomplete),
        ("training.deterministic", deterministic),
    ):
        if switch is not None:
            given.append(f"{key}={json.dumps(switch)}")
    for key, value in (
        ("preset", preset),
        ("dataset.labels", labels),
        ("memory_gb", memory),
        ("device", device),
        ("seed", seed),
        ("workers", workers),
        ("dataset.groups", groups),
        ("selection.rule", rule),
    ):
        if value is not None:
            given.append(f"{key}={value}")
    return given + (settings or [])


def _method_or_file(splits: str) -> str:
    """Return a way to split, or the absolute path of a file of folds: a project may be opened from anywhere."""
    ways = ("balanced", "nnunet")
    if splits in (*ways, "reference"):  # the name of the second in old scripts
        return splits
    path = Path(splits).expanduser().absolute()
    if path.is_file():
        return str(path)
    raise InputError(f"--splits is balanced, nnunet or a file of folds, and {splits} is none{nearest(splits, ways)}")


def open_project(
    dataset: Path | None,
    out: Path | None,
    settings: list[str],
    execution: Execution | None = None,
    *,
    make: bool = True,
) -> Project:
    """Return the project that the arguments mean, made if need be with `make`; `InputError` if they mean none."""
    from segfit.options import Options
    from segfit.project import Project

    Options().with_settings(settings)  # a wrong option is told before anything is looked at
    execution = execution or console_execution()
    folder = project_folder(dataset, out)
    if dataset is None or is_project(dataset):
        project = Project.open(folder, settings=settings, execution=execution)
    elif not make and not is_project(folder):
        command = f"segfit run {quote(str(dataset))} --out {quote(str(folder))}"
        raise InputError(f"{folder} is not a project on {dataset}", f"train first: {command}")
    else:
        project = Project.create(folder, dataset, settings=settings, execution=execution)
    if project.options.training.deterministic:
        let_cublas_repeat()
    project.team = TEAM.get()
    return project


def project_folder(dataset: Path | None, out: Path | None) -> Path:
    """Return the folder of the project that the arguments mean: `dataset` may be a project itself."""
    if dataset is None:
        if out is None:
            raise InputError("give a dataset or a project")
        return out
    if not is_project(dataset):
        return out or Path(f"segfit-{_name_of(dataset)}")
    if out is not None and os.path.realpath(out) != os.path.realpath(dataset):
        raise InputError(f"{dataset} is a project already", f"leave out --out {out}, or give the dataset instead")
    return dataset


def is_project(path: Path) -> bool:
    """Whether a folder is a project."""
    try:
        return (path.expanduser() / "project.json").is_file()
    except (OSError, RuntimeError):  # what is wrong is told when it is opened
        return False


def dataset_of(path: Path) -> tuple[Path, DatasetOptions]:
    """Return where a dataset lies and how its files are taken: `path`, or as the project there was told."""
    from segfit.options import DatasetOptions

    if not is_project(path):
        return path, DatasetOptions()
    from segfit.project.folder import ProjectFile, ProjectFolder

    file = ProjectFile.load(ProjectFolder(path.expanduser()).project)
    return file.dataset, file.options.dataset


@contextmanager
def local_copies(
    places: Sequence[Path], execution: Execution, output: Path | None = None
) -> Iterator[tuple[Path, ...]]:
    """Yield places as files and folders: those in object storage are copied for the block, into `output` if given."""
    from segfit.dataset.object_storage import fetch, url_of
    from segfit.files import partial_folder

    urls = [url_of(place) for place in places]
    if not any(urls):
        yield tuple(places)
        return
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix="segfit-")) if output is None else partial_folder(output)
    try:
        yield tuple(
            place if url is None else fetch(url, folder / str(number), execution)
            for number, (place, url) in enumerate(zip(places, urls, strict=True))
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _name_of(dataset: Path) -> str:
    try:
        return dataset.resolve().name
    except (OSError, RuntimeError):  # a link that leads back to itself; what is wrong is told when it is opened
        return dataset.name


def dataset_facts(dataset: Dataset) -> dict[str, Any]:
    """Return what is known of a dataset without reading its files."""
    stored = dataset.labels.stored_values
    return {
        "name": dataset.name,
        "layout": dataset.layout,
        "channels": list(dataset.channel_names),
        "classes": {one.name: [stored[value] for value in one.values] for one in dataset.labels.classes},
        "groups": {case.id: case.group for case in dataset.training if case.group is not None},
        "groups_from_names": dataset.groups_from_names,
        "training_cases": len(dataset.training),
        "test_cases": len(dataset.test),
        "file_ending": dataset.file_ending,
        "image_ending": dataset.image_ending,
    }


def print_json(value: Any) -> None:
    """Print a JSON value on stdout."""
    say(json.dumps(value, indent=1, ensure_ascii=False))  # what is not printable is escaped as JSON has it


def print_result(facts: Mapping[str, Any], paths: Sequence[Path], *, as_json: bool) -> None:
    """Print where results are, a line each, or all facts as JSON."""
    if as_json:
        print_json(facts)
    else:
        for path in paths:
            say(str(path))


def print_states(rows: Sequence[tuple[str, str, str]], *, as_json: bool) -> None:
    """Print what was looked at, its state, and what was found, as a table or as JSON."""
    if as_json:
        print_json([{"what": what, "state": state, "found": found} for what, state, found in rows])
    else:
        table(("", "state", "found"), rows, sys.stdout)
