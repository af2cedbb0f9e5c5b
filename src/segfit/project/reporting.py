"""From the files of a project to what its report shows."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from segfit.dataset.annotation import read_labels
from segfit.dataset.contents import FileHashes
from segfit.dataset.manifest import Case, Dataset
from segfit.device import Hardware
from segfit.errors import Problem
from segfit.evaluation.cohorts import groups_of_cases, with_estimates
from segfit.evaluation.summary import Summary
from segfit.execution.execution import Execution
from segfit.images.formats import num_voxels, read_case, read_label
from segfit.labels import LabelScheme
from segfit.options import Options
from segfit.planning.mirroring import value_names
from segfit.planning.plan import RunSpec
from segfit.project.findings import Findings
from segfit.project.folder import ProjectFolder
from segfit.project.stage_log import StageRecord
from segfit.project.trainings import Training
from segfit.report.data import Kind, Overlay, Rank, ReportData, StageUse, TrainingCurve, ranked
from segfit.report.views import View, kept_view
from segfit.training.events import read_events
from segfit.training.result import EVENTS, TrainingResult

__all__ = ["overlays_of", "report_data"]

_BYTES_PER_VOXEL = 24  # of a case that is read with its labels and its prediction

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
    records: Sequence[StageRecord],
    hardware: Hardware,
    warnings: Sequence[Problem],
    overlays: Sequence[Overlay] = (),
) -> ReportData:
    """Gather everything that is known about a project.

    Parameters
    ----------
    found : what counts of what the stages left
    records : the stage log
    overlays : pictures, as `overlays_of` makes them
    """
    plan, chosen, test = found.plan, found.selected, found.test
    validation = None if chosen is None else with_estimates(chosen.summary, groups_of_cases(dataset.training))
    test = None if test is None else with_estimates(test, groups_of_cases(dataset.test))
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
        overlays=tuple(overlays),
        resources=_resources(folder, run, found.results, records),
        environment=_environment(hardware),
        model_path=str(folder.model) if chosen is not None and folder.model.is_dir() else "",
        file_ending=dataset.file_ending,
        image_ending=dataset.image_ending,
        warnings=tuple(warnings),
    )


def overlays_of(
    folder: ProjectFolder,
    dataset: Dataset,
    found: Findings,
    hashes: FileHashes,
    execution: Execution,
    *,
    whole: bool = False,
) -> list[Overlay]:
    """Return the pictures of cases whose predictions were scored: those that tell most first, whole.

    Parameters
    ----------
    hashes : of the files of the dataset
    whole : have all of them whole, of which there may be many
    """
    wanted: list[_Picture] = []
    if found.selected is not None:
        wanted += _pictures("validation", found.selected.summary, dataset, dataset.training, found, found.validated)
    if found.test is not None and found.predicted is not None:
        folders = {case.id: found.predicted for case in dataset.test}
        wanted += _pictures("test", found.test, dataset, dataset.test, found, folders)
    work = partial(_overlay, dataset.labels, folder.cache, whole)
    contents = [(hashes.case(item.case), item) for item in wanted]
    drawn = execution.map(
        work,
        contents,
        description="drawing pictures",
        name=lambda pair: pair[1].case.id,
        size=lambda pair: num_voxels(pair[1].file) * _BYTES_PER_VOXEL,
    )
    done = {(item.kind, item.case.id): overlay for (_, item), overlay in drawn if overlay is not None}
    return [done[key] for item in wanted if (key := (item.kind, item.case.id)) in done]


@dataclass(frozen=True, slots=True)
class _Picture:
    """A case to draw."""

    kind: Kind
    rank: Rank
    dice: float | None
    case: Case
    file: Path


def _pictures(
    kind: Kind,
    summary: Summary,
    dataset: Dataset,
    cases: Sequence[Case],
    found: Findings,
    folders: Mapping[str, Path],
) -> list[_Picture]:
    """Return what is to be drawn of those cases that have labels and whose prediction is there."""
    known = {case.id: case for case in cases if case.label_files}
    chosen = [(one, rank) for one, rank in ranked(summary, found.verdict) if one.case in known and one.case in folders]
    files = {one.case: folders[one.case] / f"{one.case}{dataset.file_ending}" for one, _ in chosen}
    pictures = [_Picture(kind, rank, one.mean_dice, known[one.case], files[one.case]) for one, rank in chosen]
    return [picture for picture in pictures if picture.file.is_file()]


def _overlay(labels: LabelScheme, cache: Path, whole: bool, pair: tuple[str, _Picture]) -> Overlay | None:
    """Draw a case, which is read only if what is shown of it was not kept when it was checked."""
    content, item = pair
    view = kept_view(labels, cache, content)
    if view is None and not (item.rank or whole):
        return None  # nothing is labelled there
    predicted = labels.to_inner(read_label(item.file).array)[0]
    if view is None:
        image = read_case(item.case.images, item.case.spacing_mm)
        view = View.of_image(image, read_labels(item.case, labels, image.grid).array[0], predicted, scene=True)
    turned = view.axes.apply(predicted[None])[0]
    return Overlay.of(item.case.id, item.kind, item.rank, item.dice, view, turned, whole=whole)


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
