"""The verbs that use a model or look at results: ``predict``, ``evaluate``, ``info``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segfit.cli.common import AsJson, DatasetArgument, Out, Workers, open_project, print_json
from segfit.cli.console import console_progress, score_table, table
from segfit.cli.stages import report
from segfit.errors import InputError

if TYPE_CHECKING:
    from segfit.evaluation.summary import Summary
    from segfit.labels import LabelScheme

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (predict, evaluate, report, info):
        app.command()(verb)


def predict(
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGES", help="More images, so that -i a.nii.gz b.nii.gz works.")
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Folder of a model.")] = None,
    inputs: Annotated[
        list[Path] | None, typer.Option("--input", "-i", help="Folder of images, image files, DICOM series.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the label files.")] = None,
    out: Out = None,
    folds: Annotated[str | None, typer.Option("--folds", help="Networks to use, e.g. 0,1; by default all.")] = None,
    mirror: Annotated[bool, typer.Option("--mirror/--no-mirror", help="Average over mirrored views.")] = True,
    tile_step: Annotated[float | None, typer.Option("--tile-step", help="Step of the window as a share of it.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    ending: Annotated[str | None, typer.Option("--ending", help="File ending of the outputs.")] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Write probabilities (.npz) too.")] = False,
    previous_stage: Annotated[
        Path | None, typer.Option("--previous-stage", help="Label files of the previous stage of a cascade.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Predict again what is there already.")] = False,
    workers: Workers = None,
) -> None:
    """Segment images with a model.

    Or the test images of a project, with --out alone.

    Inputs are CASE_0000.END, CASE_0001.END, ... (one file per channel), outputs CASE.END. A DICOM series is a folder.
    """
    if model is None:
        if inputs or output or more:
            raise InputError("predict needs --model MODEL -i IMAGES -o OUTPUT, or a project with --out alone")
        project = open_project(None, out, [])
        for path in project.predict():
            sys.stdout.write(f"{path}\n")
        return
    if not inputs or output is None:
        raise InputError("predict needs the images with -i and a folder for the results with -o")
    inputs = [*inputs, *(more or [])]
    from segfit.dataset.layouts import cases_from_files, find_cases
    from segfit.inference.model import load_model
    from segfit.inference.predict_folder import predict_folder

    loaded = load_model(
        model,
        device,
        None if folds is None else [part.strip() for part in folds.split(",")],
        mirror=None if mirror else False,
        tile_step=tile_step,
    )
    channels = len(loaded.channel_names)
    for path in inputs:
        if not path.exists():
            raise InputError(f"{path} does not exist; correct the path given with -i")
    if len(inputs) == 1 and inputs[0].is_dir():
        cases = find_cases(inputs[0], loaded.image_ending, channels)
    else:
        cases = cases_from_files(inputs, channels)
    paths = predict_folder(
        loaded,
        cases,
        output,
        ending=ending,
        overwrite=overwrite,
        save_probabilities=probabilities,
        previous_stage=previous_stage,
        workers=workers or 1,
        progress=console_progress(),
    )
    for path in paths:
        sys.stdout.write(f"{path}\n")


def evaluate(
    dataset: DatasetArgument = None,
    out: Out = None,
    predictions: Annotated[Path | None, typer.Option("--predictions", "-p", help="Folder of predictions.")] = None,
    references: Annotated[Path | None, typer.Option("--references", "-r", help="Folder of reference labels.")] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Model whose labels are meant.")] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Write all scores to this JSON file.")] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Score label files against references.

    DATASET or --model says what the labels mean. With --out alone: the test predictions of a project.
    """
    summary: Summary | None
    if predictions is None and references is None:
        summary = open_project(dataset, out, []).evaluate()
        if summary is None:
            raise InputError("the dataset has no labelled test images; give --predictions and --references")
    else:
        from segfit.evaluation.summary import evaluate_folder

        if predictions is None or references is None:
            raise InputError("evaluate needs --predictions and --references")
        scheme, ending = _meaning(dataset, model)
        summary = evaluate_folder(
            predictions, references, scheme, ending=ending, require_all=False, workers=workers,
            progress=console_progress(),
        )  # fmt: skip
    if save is not None:
        summary.save(save)
    if as_json:
        print_json(summary.model_dump(mode="json"))
        return
    rows = {case.case: {name: one.dice for name, one in case.metrics.items()} for case in summary.cases}
    rows["mean"] = {name: one.dice for name, one in summary.mean.items()}
    score_table(rows, first="Dice")
    if summary.mean_dice is not None:
        sys.stdout.write(f"mean Dice {summary.mean_dice:.4f} over {len(summary.cases)} cases\n")


def _meaning(dataset: Path | None, model: Path | None) -> tuple[LabelScheme, str]:
    """Return labels and file ending of a dataset or a model."""
    if model is not None:
        from segfit.bundle.bundle import open_bundle

        manifest = open_bundle(model, verify=False).manifest
        return manifest.labels, manifest.file_ending
    if dataset is None:
        raise InputError("give the dataset folder (with dataset.json) or --model, so that the labels have a meaning")
    from segfit.dataset.layouts import open_dataset

    opened = open_dataset(dataset)
    return opened.labels, opened.file_ending


def info(
    path: Annotated[Path, typer.Argument(help="A model, a project or a dataset.")], as_json: AsJson = False
) -> None:
    """Say what a folder is."""
    from segfit.bundle.bundle import MANIFEST, card, open_bundle
    from segfit.dataset.layouts import LAYOUTS, open_dataset
    from segfit.images.formats import described

    if (path / MANIFEST).is_file():
        manifest = open_bundle(path, verify=False).manifest
        if as_json:
            print_json(manifest.model_dump(mode="json"))
        else:
            sys.stdout.write(card(manifest))
        return
    if (path / "project.json").is_file():
        facts = _project_facts(path)
    elif any(layout.recognises(path.absolute()) for layout in LAYOUTS.values()):
        dataset = open_dataset(path)
        facts = {
            "dataset": dataset.name,
            "layout": dataset.layout,
            "channels": ", ".join(dataset.channel_names),
            "structures": ", ".join(target.name for target in dataset.labels.classes),
            "training cases": str(len(dataset.training)),
            "test cases": str(len(dataset.test)),
            "file ending": dataset.file_ending,
            "images": described(dataset.image_ending),
        }
    else:
        raise InputError(f"{path} is neither a model, nor a project, nor a dataset; give one of them")
    if as_json:
        print_json(facts)
    else:
        table(("", path.name), list(facts.items()), sys.stdout)


def _project_facts(path: Path) -> dict[str, str]:
    from segfit.project.folder import ProjectFile, ProjectFolder

    folder = ProjectFolder(path)
    file = ProjectFile.load(folder.project)
    files = {
        "checked": folder.check,
        "fingerprint": folder.fingerprint,
        "plan": folder.plan,
        "selection": folder.selection,
        "model": folder.model,
        "report": folder.report,
    }
    done = {name: str(where) if where.exists() else "not yet" for name, where in files.items()}
    trained = len(list(folder.runs.glob("*/fold-*/training.json")))
    return {"dataset": str(file.dataset), "preset": file.options.preset, **done, "finished trainings": str(trained)}
