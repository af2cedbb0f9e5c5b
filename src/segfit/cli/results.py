"""The last verbs of the pipeline: ``predict`` and ``report``, and ``evaluate`` of `segfit.cli.scores`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from segfit.cli.common import (
    AsJson,
    Checkpoint,
    DatasetArgument,
    Device,
    Out,
    Workers,
    local_copies,
    open_project,
    print_json,
    print_result,
    project_folder,
    with_executor,
)
from segfit.cli.console import say
from segfit.cli.devices import let_cublas_repeat
from segfit.cli.help_pages import PIPELINE, add_verb
from segfit.cli.scores import evaluate
from segfit.errors import DatasetError, InputError, warning
from segfit.progress import KeptWarnings, Progress
from segfit.text import count

if TYPE_CHECKING:
    from segfit.dataset.manifest import Case
    from segfit.evaluation.quality import ClassQuality
    from segfit.execution.execution import Execution
    from segfit.inference.model import Model
    from segfit.labels import LabelScheme

__all__ = ["add_to"]

_VISIBLE = 64  # grey values from here on are told from black on a screen (assumption)


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (predict, evaluate, report):
        add_verb(app, PIPELINE, verb)


_Images = Annotated[
    list[Path] | None,
    typer.Argument(metavar="DATASET|IMAGES", help="Dataset or project; with --model: images."),
]
_Models = Annotated[
    list[Path] | None,
    typer.Option("--model", "-m", metavar="MODEL", help="Model of segfit or nnU-Net. Repeat to average several."),
]
_Inputs = Annotated[
    list[Path] | None, typer.Option("--input", "-i", metavar="IMAGES", help="The same as IMAGES. Repeatable.")
]
_Labels = Annotated[Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the label files.")]
_Folds = Annotated[
    str | None, typer.Option("--folds", metavar="K,...", help="Networks to use, e.g. 0,1; default: all.")
]
_TileStep = Annotated[
    float | None, typer.Option("--tile-step", metavar="SHARE", help="Step of the window as a share of it.")
]
_Mirror = Annotated[
    bool | None, typer.Option("--mirror/--no-mirror", help="Average over mirrored views; default: as the model says.")
]
_Probabilities = Annotated[bool, typer.Option("--probabilities", help="Write probabilities (.npz) too.")]
_Overlays = Annotated[
    bool, typer.Option("--overlays", help="Draw labels in colours over their images, into FOLDER/overlays.")
]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Predict again what is there already.")]
_Log = Annotated[
    Path | None, typer.Option("--log", metavar="FILE", help="Append a line per case to this drift log; see drift.")
]
_Ending = Annotated[str | None, typer.Option("--ending", metavar=".END", help="File ending of the outputs.")]
_Speed = Annotated[
    Literal["fast", "balanced", "accurate"] | None,
    typer.Option("--speed", metavar="fast|balanced|accurate", help="A way that segfit tune found to lose nothing."),
]
_Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Only kernels that repeat themselves to the bit.")
]
_Engine = Annotated[
    Literal["auto", "torch", "openvino"] | None,
    typer.Option(
        "--engine",
        metavar="auto|torch|openvino",
        help="What runs networks on a processor; auto: openvino where it is installed, faster and as exact.",
    ),
]
_Layout = Annotated[
    Literal["nnunet"] | None,
    typer.Option("--format", metavar="nnunet", help="Also write what nnU-Net's commands need beside them."),
]
_PreviousStage = Annotated[
    Path | None,
    typer.Option("--previous-stage", metavar="FOLDER", help="Label files of the previous stage of a cascade."),
]
_ProbabilityImages = Annotated[
    bool, typer.Option("--probability-images", help="Write them as images, too, into FOLDER/probabilities.")
]
_Memory = Annotated[
    float | None, typer.Option("--memory", metavar="GB", help="Memory to predict in; default: what is free.")
]


@with_executor
def predict(
    paths: _Images = None,
    out: Out = None,
    model: _Models = None,
    checkpoint: Checkpoint = None,
    inputs: _Inputs = None,
    output: _Labels = None,
    folds: _Folds = None,
    mirror: _Mirror = None,
    tile_step: _TileStep = None,
    speed: _Speed = None,
    device: Device = None,
    engine: _Engine = None,
    deterministic: _Deterministic = False,
    ending: _Ending = None,
    probabilities: _Probabilities = False,
    probability_images: _ProbabilityImages = False,
    previous_stage: _PreviousStage = None,
    overlays: _Overlays = False,
    memory: _Memory = None,
    overwrite: _Overwrite = False,
    layout: _Layout = None,
    log: _Log = None,
    workers: Workers = None,
    *,
    execution: Execution,
    as_json: AsJson = False,
) -> None:
    """Segment images with a model.

    With --model any images: folders of images, image files, DICOM series (folders). Inputs are CASE_0000.END,
    CASE_0001.END, ... (one file per channel), outputs CASE.END. Without it the test images of a dataset with the model
    of its project; nothing is trained for that.
    """
    given, kept, quality = [*(paths or []), *(inputs or [])], KeptWarnings(execution.progress), dict[str, Any]()
    execution = replace(execution, workers=workers, progress=kept)
    if not model:
        values = (inputs, output, checkpoint, folds, tile_step, speed, device, engine, ending, previous_stage, workers)
        foreign = (*values, memory, layout, log, probabilities, probability_images, overlays, overwrite, deterministic)
        if len(given) > 1 or any(foreign) or mirror is not None:
            raise InputError("predict needs --model MODEL IMAGES -o FOLDER, or a dataset or project alone")
        project = open_project(given[0] if given else None, out, [], execution, make=False)
        found, labels, remedy = project.predict(), project.dataset.labels, "the report shows some in colours"
    else:
        if not given or output is None:
            raise InputError("predict --model needs images and, with -o, a folder for the results")
        loaded = _loaded(
            model, device or "auto" if execution.is_here else "cpu", folds, checkpoint=checkpoint, mirror=mirror,
            tile_step=tile_step, speed=speed, deterministic=deterministic, engine=engine or "auto",
        )  # fmt: skip
        with local_copies(given, execution, output) as places:
            found = _predict(
                loaded, _cases(places, loaded, kept), output, ending, execution, overlays=overlays, overwrite=overwrite,
                save_probabilities=probabilities, save_probability_images=probability_images, memory_gb=memory, log=log,
                previous_stage=previous_stage, device=device or "auto", layout=layout, told=quality.__setitem__,
            )  # fmt: skip
        labels, remedy = loaded.labels, "--overlays draws them in colours too"
    if not (overlays or as_json) and _look_black(found, labels):
        say(f"label files look black in most viewers; {remedy}", sys.stderr)
    print_result(_facts(found, kept, quality), found, as_json=as_json)


def _facts(found: Sequence[Path], kept: KeptWarnings, quality: Mapping[str, Sequence[ClassQuality]]) -> dict[str, Any]:
    return {
        "predictions": [str(path) for path in found],
        "warnings": [item.facts for item in kept.warnings],
        "quality": {case: [one.model_dump() for one in classes] for case, classes in quality.items()},
    }


def _loaded(model: list[Path], device: str, folds: str | None, *, deterministic: bool, **options: Any) -> Model:
    """Load models as one; `folds` as written, `options` of `load_model`."""
    from segfit.inference.model import load_model

    if deterministic:
        let_cublas_repeat()
    numbers = None if folds is None else [part.strip() for part in folds.split(",")]
    return load_model(model, device, numbers, deterministic=deterministic, **options)


def _predict(
    model: Model,
    cases: Sequence[Case],
    output: Path,
    ending: str | None,
    execution: Execution,
    *,
    overlays: bool,
    layout: str | None,
    **options: Any,
) -> list[Path]:
    """Predict cases, and draw what was predicted, also where some could not be; `options` of `predict_folder`."""
    from segfit.images.formats import label_ending
    from segfit.inference.predict_folder import is_written, predict_folder
    from segfit.nnunet.prediction_files import complete_predictions, require_readable

    ending = ending or label_ending(model.file_ending)
    files, folder = [output / f"{case.id}{ending}" for case in cases], output / "overlays"
    if layout is not None:
        require_readable(model.manifest, ending)
    there = 0 if options["overwrite"] else sum(map(is_written, files))
    if there:  # perhaps by another model
        problem = f"{there} of {count(len(files), 'label file')} in {output} {'was' if there == 1 else 'were'} there"
        execution.progress.warn(warning("left_as_is", f"{problem} and left as is", "predict anew with --overwrite"))
    failed: DatasetError | None = None
    try:
        predict_folder(model, cases, output, ending=ending, execution=execution, **options)
    except DatasetError as error:
        failed = error
    if overlays:
        from segfit.report.pictures import draw_overlays, legend

        if draw_overlays(cases, files, folder, model.labels, execution):
            say(f"overlays are in {folder}{legend(model.labels)}", sys.stderr)
    if layout is not None:
        complete_predictions(model.manifest, [file for file in files if is_written(file)], ending)
    if failed is not None:
        raise failed
    return files


def _look_black(files: Sequence[Path], labels: LabelScheme) -> bool:
    """Return whether viewers show label files by their values, and these are small."""
    from segfit.images.formats import find_format

    return bool(files) and find_format(files[0]).same_depth and max(labels.stored_values) < _VISIBLE


def _cases(paths: Sequence[Path], model: Model, progress: Progress) -> Sequence[Case]:
    """Return the cases of a folder, or of image files and series."""
    from segfit.dataset.layouts import cases_from_files, find_cases

    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist", "correct the path of the images")
    channels = len(model.channel_names)
    if len(paths) == 1 and paths[0].is_dir():
        return find_cases(paths[0], model.image_ending, channels, progress=progress)
    return cases_from_files(paths, channels)


def report(
    dataset: DatasetArgument = None,
    out: Out = None,
    images: Annotated[bool, typer.Option("--images/--no-images", help="With pictures of cases.")] = True,
    full: Annotated[bool, typer.Option("--full", help="Each case whole, in pages beside the report.")] = False,
    methods: Annotated[
        bool, typer.Option("--methods", help="Print a paragraph on methods with references instead, for a paper.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show a running project in the browser instead, until Ctrl-C.")
    ] = False,
    port: Annotated[int, typer.Option("--port", metavar="N", help="Of --watch; default: any that is free.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write the report from what there is.

    With --watch nothing is written: curves, time left and a button that stops the run are served to this machine, at
    an address that nobody else knows.
    """
    if (watch or methods) and (full or not images or (watch and methods)):
        raise InputError("--watch and --methods write no report", "give one of them alone")
    if full and not images:
        raise InputError("--full shows all cases whole, --no-images shows none", "leave one of them out")
    if watch:
        _watch(project_folder(dataset, out), port, as_json=as_json)
        return
    project = open_project(dataset, out, [])
    if methods:
        text = project.methods()
        print_json({"methods": text}) if as_json else say(text)
        return
    path = project.report(images=images, full=full)
    print_result({"report": str(path)}, [path], as_json=as_json)


def _watch(root: Path, port: int, *, as_json: bool) -> None:
    """Serve a project until the user ends it."""
    from segfit.project.watch import WatchServer

    with WatchServer(root, port) as server:
        if as_json:
            print_json({"address": server.address})
        else:
            say(server.address)
        sys.stdout.flush()
        with suppress(KeyboardInterrupt):
            server.serve_forever()
