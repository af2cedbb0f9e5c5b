"""The verbs about models and other people's formats: ``import``, ``export``, ``verify``, ``tune``, ``drift``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
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
    local_copies,
    print_json,
    print_result,
    print_states,
    with_settings,
)
from segfit.cli.console import console_execution, console_progress, say
from segfit.cli.help_pages import MODELS, add_verb
from segfit.cli.tuning import tune
from segfit.errors import InputError, nearest
from segfit.text import count

if TYPE_CHECKING:
    from segfit.bundle.bundle import Bundle
    from segfit.execution.execution import Execution
    from segfit.images.image import Image

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


@with_settings("settings")
def import_model(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Model of nnU-Net v2.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="MODEL", help="Folder for the model.")],
    checkpoint: Checkpoint = None,
    trainer: Annotated[
        str | None, typer.Option("--trainer", metavar="NAME", help="Read it as a model of this trainer.")
    ] = None,
    *,
    given: list[str],
    as_json: AsJson = False,
) -> None:
    """Turn a trained model of nnU-Net into one of segfit.

    PATH is a model folder (plans.json, dataset.json and fold_*), the folder of a dataset with such folders, or an
    exported zip. predict --model takes them as they are, too. --set model.licence=... states what its card says.
    """
    from segfit.bundle.bundle import write_bundle
    from segfit.inference.carried_case import add_test_case
    from segfit.inference.open_model import open_model

    stated = _stated(given)
    bundle = open_model(path, checkpoint=checkpoint, trainer=trainer)
    if bundle.states is None:
        raise InputError(f"{path} is a model of segfit already", "copy it, or give a model of nnU-Net")
    manifest = write_bundle(output.absolute(), bundle.manifest.model_copy(update=stated), bundle.states)
    add_test_case(output.absolute(), manifest, progress=console_progress())
    print_result({"model": str(output), "files": list(manifest.files)}, [output], as_json=as_json)


@with_settings("settings")
def export(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Model, dataset or project.", show_default=False)],
    to: Annotated[
        Literal["nnunet", "zip", "onnx", "bioimageio"],
        typer.Option(
            "--to",
            metavar="nnunet|zip|onnx|bioimageio",
            help="As nnU-Net v2 has it; a model as one file; to run without torch; for bioimage.io.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="Folder to make, e.g. Dataset123_Name, or zip.")
    ],
    include_case: Annotated[
        str | None, typer.Option("--include-case", metavar="ID", help="Case of the project that goes into the zip.")
    ] = None,
    workers: Workers = None,
    skip_incomplete: SkipIncomplete = None,
    labels: Labels = None,
    resample_labels: ResampleLabels = None,
    *,
    given: list[str],
    as_json: AsJson = False,
) -> None:
    """Write a model or a dataset as others read it.

    For nnU-Net a dataset (of a project, too) has one file per channel, consecutive labels, dataset.json; one that
    segfit check refuses is not written. A model becomes a model folder of nnU-Net, several configurations the folder of
    a dataset in nnUNet_results. As ONNX: its networks, JSON with all that is around them, and predict.py, which needs
    neither segfit nor torch. All but the first take a model, or the project that has it; --set model.licence=... and
    the like state what the card says.
    """
    from segfit.inference.open_model import is_model

    asked = {"skip_incomplete": skip_incomplete, "resample_labels": resample_labels, "labels": labels}
    stated = _stated(given)
    if (to != "zip" and include_case is not None) or (to in ("nnunet", "onnx") and stated):
        raise InputError("--include-case and --set are for the zip of a model", "give --to zip, or leave them out")
    foreign = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value is not None]
    if foreign and (to != "nnunet" or is_model(path)):
        raise InputError(f"{foreign[0]} is for datasets, and {path} is taken as a model", "leave it out")
    if to == "nnunet" and not is_model(path):
        written = [_export(path, output, workers, **asked)]
    else:
        written = _export_model(path, to, output, stated, include_case)
    place = output.expanduser().absolute()
    print_result({"folder": str(place), "to": to}, written, as_json=as_json)


def _export_model(path: Path, to: str, output: Path, stated: Mapping[str, str], include_case: str | None) -> list[Path]:
    """Write the model of a folder or a project as others read it; return what was written."""
    from segfit.inference.bioimageio import export_bioimageio
    from segfit.inference.carried_case import write_packed
    from segfit.inference.onnx_export import export_onnx
    from segfit.inference.open_model import open_model
    from segfit.nnunet.model_export import export_nnunet_model

    if to == "zip" and output.suffix.lower() != ".zip":
        raise InputError(f"{output} does not end in .zip", "name a file, such as model.zip")
    bundle = open_model(path)
    if to == "nnunet":
        return export_nnunet_model(bundle, output, progress=console_progress())
    if to == "onnx":
        export_onnx(bundle, output.absolute())
    elif to == "bioimageio":
        told = replace(bundle, manifest=bundle.manifest.model_copy(update=stated))
        export_bioimageio(told, output.absolute())
    else:
        image = None if include_case is None else _image_of(path, include_case, bundle)
        write_packed(bundle, output.absolute(), stated, image)
    return [output]


def _stated(given: list[str]) -> dict[str, str]:
    """Return what --set says of a model; `InputError` for settings of anything else."""
    from segfit.options import Options

    for setting in given:
        if not setting.startswith("model."):
            raise InputError(f"{setting} does not say what a model is", "set model.licence, model.limits and the like")
    return Options().with_settings(given).model.model_dump(exclude_none=True)


def _image_of(path: Path, case: str, bundle: Bundle) -> Image:
    """Return the image of a case of a project."""
    from segfit.dataset.layouts import open_dataset
    from segfit.inference.carried_case import image_of

    if not is_project(path):
        raise InputError(f"{path} is no project, and --include-case takes a case of one", "give the project")
    dataset = open_dataset(dataset_of(path)[0])
    cases = {one.id: one for one in (*dataset.training, *dataset.test)}
    if case not in cases:
        raise InputError(f"{dataset.name} has no case {case}{nearest(case, list(cases))}", "give one of its cases")
    return image_of(bundle, cases[case])


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
    with local_copies([place], execution) as (found,):
        dataset, problems = checked_dataset(found, asked.model_copy(update=changes), execution=execution)
        require_usable(problems)
        assert dataset is not None
        for problem in problems:
            execution.progress.warn(problem)
        return write(dataset, folder, execution=execution)


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
    device: Device = None,
    as_json: AsJson = False,
) -> int:
    """Compare stored files with their checksums.

    Of a model its files, of a project every result. A model predicts its test case too, which has to come out as where
    the model was made. The exit code is 1 if anything is damaged or different.
    """
    from segfit.bundle.bundle import MANIFEST
    from segfit.bundle.files import BundleFiles
    from segfit.bundle.hub import fetched, is_address
    from segfit.files import require_there

    if is_address(path):
        path = fetched(str(path))
    require_there(path, "model or project")
    if is_project(path):
        rows = [*verify_cases(path, console_execution(workers)), *_verify_results(path)]
    elif BundleFiles.of(path, MANIFEST) is None:
        raise InputError(f"{path} is neither a model nor a project", "give one of them")
    else:
        rows = _verified_model(path, device or "auto")
    return print_verified(rows, as_json=as_json)


def print_verified(rows: Sequence[tuple[str, str, str]], *, as_json: bool) -> int:
    """Print what was verified; return the exit code."""
    damaged = any(state in ("damaged", "different") for _, state, _ in rows)
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


def _verified_model(path: Path, device: str) -> list[tuple[str, str, str]]:
    from segfit.bundle.bundle import open_bundle

    try:
        bundle = open_bundle(path)
    except InputError as error:
        return [("model", "damaged", str(error))]
    files = len(bundle.manifest.files)
    row = ("model", "good", f"{files} of {files} weight files passed the checksum")
    if bundle.manifest.test_case is None:
        return [row, ("test case", "missing", "it has none: whether it predicts as where it was made is not known")]
    from segfit.inference.carried_case import ENOUGH, agreement

    try:
        share, voxels = agreement(bundle, device, progress=console_progress())
    except InputError as error:
        return [row, ("test case", "damaged", str(error))]
    found = f"{share:.2%} of {voxels} labels are as where it was made"
    return [row, ("test case", "good" if share >= ENOUGH else "different", found)]
