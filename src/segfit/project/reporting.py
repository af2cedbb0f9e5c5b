"""From the files of a project to what its report shows."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from segfit.dataset.annotation import read_labels
from segfit.dataset.contents import FileHashes
from segfit.dataset.manifest import Case, Dataset
from segfit.device import Hardware
from segfit.errors import Problem
from segfit.evaluation.summary import Summary
from segfit.images.formats import read_case, read_label
from segfit.labels import LabelScheme
from segfit.options import Options
from segfit.planning.mirroring import value_names
from segfit.planning.plan import RunSpec
from segfit.project.findings import Findings
from segfit.project.folder import ProjectFolder
from segfit.project.stage_log import StageRecord
from segfit.project.trainings import Training
from segfit.report.data import (
    Overlay,
    ReportData,
    StageUse,
    TrainingCurve,
    choose_examples,
)
from segfit.report.views import View, kept_view
from segfit.training.events import read_events
from segfit.training.result import EVENTS, TrainingResult

__all__ = ["report_data"]

_STAGES = (
    "check",
    "fingerprint",
    "plan",
    "size",
    "race",
    "preprocess",
    "train",
    "validate",
    "select",
    "predict",
    "evaluate",
    "report",
)


def report_data(
    folder: ProjectFolder,
    dataset: Dataset,
    options: Options,
    found: Findings,
    *,
    hashes: FileHashes,
    records: Sequence[StageRecord],
    hardware: Hardware,
    warnings: Sequence[Problem],
) -> ReportData:
    """Gather everything that is known about a project.

    Parameters
    ----------
    found : what counts of what the stages left
    hashes : of the files of the dataset
    records : the stage log
    """
    plan, chosen, test = found.plan, found.selected, found.test
    validation = None if chosen is None else chosen.summary
    predicted = {} if found.predicted is None else {case.id: found.predicted for case in dataset.test}
    view = partial(_view, dataset.labels, folder.cache, hashes)
    overlays = (
        *_overlays(dataset, "validation", validation, dataset.training, found.validated, view),
        *_overlays(dataset, "test", test, dataset.test, predicted, view),
    )
    run = plan.run if plan is not None else None
    return ReportData(
        dataset=dataset.name,
        verdict=found.verdict,
        options=options.model_dump(mode="json"),
        fingerprint=found.fingerprint,
        label_names=value_names(dataset.labels),
        plan=plan,
        trainings=_curves(found.trainings),
        selection=None if chosen is None else chosen.selection,
        validation=validation,
        folds={case: number for number, fold in enumerate(found.folds) for case in fold.validation},
        test=test,
        overlays=overlays,
        resources=_resources(folder, run, found.results, records),
        environment=_environment(hardware),
        model_path=str(folder.model) if chosen is not None and folder.model.is_dir() else "",
        file_ending=dataset.file_ending,
        image_ending=dataset.image_ending,
        warnings=tuple(warnings),
    )


def _overlays(
    dataset: Dataset,
    kind: Literal["validation", "test"],
    summary: Summary | None,
    known: Sequence[Case],
    folders: Mapping[str, Path],
    view: Callable[[Case, NDArray[Any]], View],
) -> list[Overlay]:
    labels, cases = dataset.labels, {case.id: case for case in known}
    found = []
    for rank, one in choose_examples(summary).items() if summary else ():
        case, prediction = cases.get(one.case), folders[one.case] / f"{one.case}{dataset.file_ending}"
        if case is None or not case.label_files or not prediction.is_file():
            continue
        predicted = labels.to_inner(read_label(prediction).array)
        seen = view(case, predicted[0])
        found.append(
            Overlay(
                case=one.case,
                kind=kind,
                rank=rank,
                dice=one.mean_dice,
                view=seen,
                prediction=seen.axes.apply(predicted)[0],
            )
        )
    return found


def _view(labels: LabelScheme, cache: Path, hashes: FileHashes, case: Case, predicted: NDArray[Any]) -> View:
    """Return what is shown of a case, which is read only if that was not kept when it was checked."""
    view = kept_view(labels, cache, hashes.case(case))
    if view is None:
        image = read_case(case.images, case.spacing_mm)
        view = View.of_image(image, read_labels(case, labels, image.grid).array[0], predicted)
    return view


def _curves(trainings: Sequence[Training]) -> tuple[TrainingCurve, ...]:
    return tuple(
        TrainingCurve.from_events(item.name, item.fold, events)
        for item in trainings
        if (events := read_events(item.folder / EVENTS))
    )


def _resources(
    folder: ProjectFolder, run: RunSpec | None, trained: Sequence[TrainingResult], records: Sequence[StageRecord]
) -> tuple[StageUse, ...]:
    """Return one row per stage: what it took since it was decided what is trained, or before that the last time.

    Training counts over all interruptions, as its results say.
    """
    decided = max((record.started for record in records if record.stage == "size"), default=0.0)
    forecast = run.forecast if run is not None else {}
    disk = {"preprocess": folder.cases, "train": folder.runs, "predict": folder.predictions}
    found = []
    for stage in _STAGES:
        own = [record for record in records if record.stage == stage]
        if not own:
            continue
        used = sum(record.seconds for record in own if record.started >= decided) or own[-1].seconds
        memory = max(record.peak_memory_gb for record in own)
        if stage == "train":
            used = max(used, sum(result.seconds for result in trained))
        if stage == "size" and stage in forecast:  # its probes count their peaks for themselves
            memory = max(memory, forecast[stage].memory_gb or 0.0)
        on_device = [result.peak_memory_gb for result in trained if stage == "train" and result.device != "cpu"]
        found.append(
            StageUse(
                name=stage,
                forecast=forecast.get(stage),
                used_s=used,
                peak_memory_gb=memory,
                device_memory_gb=max(on_device, default=None),
                disk_gb=_size_gb(disk[stage]) if stage in disk else None,
            )
        )
    return tuple(found)


def _size_gb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30


def _environment(hardware: Hardware) -> dict[str, str]:
    return {
        "machine": f"{hardware.name}, {hardware.threads} threads, {hardware.free_memory_gb:.0f} GB free",
        "device": hardware.device,
        "segfit": metadata.version("segfit"),
        "torch": metadata.version("torch"),
        "numpy": metadata.version("numpy"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
