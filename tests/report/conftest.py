"""A made-up but complete report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from segfit.connected_components import PostprocessingStep
from segfit.errors import warning
from segfit.evaluation.cohorts import with_estimates
from segfit.fingerprint.fingerprint import CaseFingerprint, Fingerprint
from segfit.options import Options
from segfit.planning.plan import Decision, Outcome, Plan, RunSpec, StageForecast
from segfit.project.folder import ProjectFile, ProjectFolder
from segfit.project.watch import WatchServer
from segfit.report.data import Overlay, ReportData, StageUse, TrainingCurve
from segfit.report.views import View
from segfit.selection.select import Selection
from segfit.specs import Configuration, IntensityStatistics, NetworkSpec, Normalization, PreprocessingSpec, TrainingSpec
from segfit.training.events import EventLog
from summaries import make_candidate, make_summary

NAMES = {1: "Anterior", 2: "Posterior"}


@pytest.fixture(scope="session")
def complete() -> ReportData:
    """Every part filled."""
    return make_report_data()


@pytest.fixture
def folder(tmp_path: Path, complete: ReportData) -> ProjectFolder:
    """A project whose plan has six trainings, the first of which is at a quarter."""
    folder = ProjectFolder(tmp_path / "project")
    folder.root.mkdir()
    ProjectFile(dataset=tmp_path / "Dataset", options=Options()).save(folder.project)
    assert complete.plan is not None
    complete.plan.save(folder.plan)
    log = folder.training("2d", 0, "abc") / "events.jsonl"
    log.parent.mkdir(parents=True)
    with EventLog(log, step=0) as events:
        for step in (1, 2, 3):
            events.write("step", step=step, seconds=20.0 * step, share=0.1 * step, loss=1.0 / step, learning_rate=0.01)
        events.write("validation", step=3, seconds=60.0, share=0.3, dice={"a": 0.5}, mean=0.5)
    return folder


@pytest.fixture
def server(folder: ProjectFolder) -> Iterator[WatchServer]:
    with WatchServer(folder.root) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def make_report_data() -> ReportData:
    rng = np.random.default_rng(7)
    validation = {f"hippocampus_{i:03d}": _dice(rng) for i in range(60)} | {
        "hippocampus_<017>": {"Anterior": 0.0, "Posterior": 0.412},
        "hippocampus_101": {"Anterior": 0.871, "Posterior": None},
    }
    options = Options().with_settings(["time_s=7200", "memory_gb=8", "training.optimizer=sgd"])
    return ReportData(
        dataset="Hippocampus & friends",
        options=options.model_dump(),
        fingerprint=make_fingerprint(rng),
        label_names=NAMES,
        plan=make_plan(),
        trainings=tuple(
            make_curve(rng, name, fold) for name in ("3d_fullres", "2d") for fold in (range(3) if name != "2d" else [0])
        ),
        selection=Selection(
            candidates=(
                make_candidate("2d", 0.861, {"Anterior": 0.868, "Posterior": 0.854}),
                make_candidate("3d_fullres", 0.884, {"Anterior": 0.891, "Posterior": 0.877}),
                make_candidate("2d + 3d_fullres", 0.8842, {"Anterior": 0.8912, "Posterior": 0.8772}),
            ),
            winner=("3d_fullres",),
            reason="The ensemble gains less than 0.001 Dice and costs twice the time.",
            notes=("3d_lowres was left out: no class has a Dice in any case",),
            steps=(PostprocessingStep(kind="keep_largest", values=(1,), text="keep only the largest component"),),
            dice_before_steps=0.884,
            dice_after_steps=0.886,
            folds=(0, 1, 2),
        ),
        validation=with_estimates(make_summary(validation), {}),
        folds={case: number % 3 for number, case in enumerate(validation)},
        test=with_estimates(make_summary({f"test_{i:02d}": _dice(rng) for i in range(20)}), {}),
        overlays=tuple(
            make_overlay(rng, kind, rank) for kind in ("validation", "test") for rank in ("best", "median", "worst", "")
        ),
        resources=(
            StageUse(name="measure", forecast=_forecast(20), used_s=14.2, peak_memory_gb=0.6),
            StageUse(
                name="preprocess",
                forecast=_forecast(60, memory_gb=1.3, disk_gb=0.25),
                used_s=71,
                peak_memory_gb=1.4,
                disk_gb=0.3,
            ),
            StageUse(
                name="train 3d_fullres",
                forecast=_forecast(5400, memory_gb=7.0),
                used_s=5391,
                peak_memory_gb=6.9,
                disk_gb=0.2,
            ),
            StageUse(name="train 2d", forecast=_forecast(1200), used_s=1180, peak_memory_gb=2.2, disk_gb=0.2),
            StageUse(name="select", forecast=_forecast(300), used_s=412, peak_memory_gb=2.0),
        ),
        environment={
            "machine": "Xeon Platinum 8488C, 2 threads, 30 GB memory",
            "segfit": "0.1.0",
            "torch": "2.13.0",
            "python": "3.11.7",
            "command": "segfit run Dataset004_Hippocampus --time 2h --memory-gb 8",
        },
        model_path="work/model",
        file_ending=".nii.gz",
        warnings=(warning("", "Only 3 of 5 folds were trained in the time there was."),),
    )


def _forecast(seconds: float, **amounts: float) -> StageForecast:
    return StageForecast(seconds=seconds, **amounts)


def _dice(rng: np.random.Generator) -> dict[str, float]:
    return {
        name: float(np.clip(rng.normal(mean, 0.035), 0.3, 0.97))
        for name, mean in zip(NAMES.values(), (0.89, 0.87), strict=True)
    }


def make_fingerprint(rng: np.random.Generator) -> Fingerprint:
    cases = []
    for i in range(120):
        shape = tuple(int(v) for v in rng.integers((30, 40, 28), (44, 60, 42)))
        voxels = {0: math.prod(shape) - 3000, 1: int(rng.integers(1100, 2000)), 2: int(rng.integers(900, 1700))}
        if i == 5:
            voxels[2] = 0
        cases.append(
            CaseFingerprint(
                case=f"hippocampus_{i:03d}",
                content="0" * 16,
                shape=shape,
                spacing_mm=(1.0, 1.0, 1.0),
                shape_after_crop=shape,
                relative_size_after_crop=1.0,
                label_voxels=voxels,
                label_centroids={},
            )
        )
    return Fingerprint(
        dataset="Dataset004_Hippocampus",
        ndim=3,
        orientation="canonical",
        channel_names=("MRI",),
        num_training=120,
        cases=tuple(cases),
        median_relative_size_after_crop=1.0,
        intensities=(
            IntensityStatistics(
                mean=22360.3,
                median=362.9,
                std=60656.1,
                min=0,
                max=486420.2,
                percentile_00_5=28.0,
                percentile_99_5=277682.0,
            ),
        ),
    )


def make_plan() -> Plan:
    full = make_configuration("3d_fullres", (40, 56, 40), 9, ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)))
    flat = make_configuration("2d", (56, 40), 366, ((1, 1), (2, 2), (2, 2), (2, 2)))
    return Plan(
        dataset="Dataset004_Hippocampus",
        preset="auto",
        stock=False,
        changes=("canonical orientation instead of stored axes", "3 folds instead of 5"),
        fingerprint_hash="a1b2c3d4e5f60718",
        channel_names=("MRI",),
        configurations={"3d_fullres": full, "2d": flat},
        training={"3d_fullres": TrainingSpec(), "2d": TrainingSpec()},
        run=RunSpec(
            configurations=("3d_fullres", "2d"),
            folds=(0, 1, 2),
            seconds_per_training=1800.0,
            seconds_per_step={"3d_fullres": 0.42, "2d": 0.31},
            peak_memory_gb={"3d_fullres": 6.9, "2d": 2.2},
        ),
        decisions=(
            Decision(key="orientation", value="canonical", rule="orientation_3d", bound="canonical"),
            Decision(
                key="3d_fullres.patch_size",
                value=[40, 56, 40],
                rule="patch_size_3d",
                inputs={"median_shape": [36, 50, 35], "memory_gb": 8},
                bound="median",
                outcomes=(Outcome(memory_gb=16, state="planned", value=[40, 56, 40]),),
            ),
            Decision(
                key="3d_fullres.batch_size",
                value=9,
                rule="batch_size",
                inputs={"dataset_voxels": 12_600_000, "coverage": 0.05},
                bound="coverage",
                outcomes=(Outcome(cases=240, state="planned", value=18),),
            ),
            Decision(
                key="2d.patch_size",
                value=[56, 40],
                rule="patch_size_2d",
                bound="median",
                inputs={"median_shape": [50, 35]},
            ),
        ),
        warnings=(warning("", "Left and right classes are not named: mirroring stays on for all axes."),),
    )


def make_configuration(
    name: str, patch: tuple[int, ...], batch: int, strides: tuple[tuple[int, ...], ...]
) -> Configuration:
    ndim = len(patch)
    spacing = (1.0,) * ndim
    return Configuration(
        name=name,
        ndim=ndim,
        patch_size=patch,
        batch_size=batch,
        spacing_mm=spacing,
        median_shape=(36, 50, 35)[-ndim:],
        batch_dice=ndim == 2,
        preprocessing=PreprocessingSpec(
            orientation="canonical",
            transpose=(0, 1, 2),
            spacing_mm=(1.0, 1.0, 1.0) if ndim == 3 else (None, 1.0, 1.0),
            normalization=(Normalization(scheme="zscore"),),
        ),
        network=NetworkSpec(
            kind="plain",
            ndim=ndim,
            in_channels=1,
            num_outputs=3,
            features=(32, 64, 128, 256),
            strides=strides,
            kernels=((3,) * ndim,) * 4,
            encoder_convs=(2,) * 4,
            decoder_convs=(2,) * 3,
        ),
        memory_estimate=100_000_000,
    )


def make_curve(rng: np.random.Generator, name: str, fold: int) -> TrainingCurve:
    events: list[dict[str, object]] = [{"kind": "skipped", "step": 3, "loss": None}] * (fold == 2)
    for step in range(1, 1001):
        share = step / 1000
        facts = {"step": step, "seconds": 0.4 * step, "share": share}
        loss = -0.85 + 1.6 * math.exp(-share * 12) + rng.normal(0, 0.03)
        events.append({"kind": "step", **facts, "loss": loss, "learning_rate": 0.01 * (1 - share) ** 0.9})
        if step % 25 == 0:
            top = {"Anterior": 0.9, "Posterior": 0.88}
            dice = {key: v * (1 - math.exp(-share * 9)) + rng.normal(0, 0.008) for key, v in top.items()}
            events.append({"kind": "validation", **facts, "dice": dice, "mean": 0.5})
    return TrainingCurve.from_events(name, fold, events)


def make_overlay(rng: np.random.Generator, kind: str, rank: str) -> Overlay:
    z, y, x = np.meshgrid(np.arange(36), np.arange(50), np.arange(40), indexing="ij")
    shift = {"best": 0.5, "median": 1.5, "worst": 4.0, "": 1.0}[rank]

    def body(offset: float) -> np.ndarray:
        labels = np.zeros(z.shape, np.uint8)
        labels[((z - 18) / 9) ** 2 + ((y - 32 - offset) / 10) ** 2 + ((x - 20) / 8) ** 2 < 1] = 1
        labels[((z - 17) / 7) ** 2 + ((y - 15) / 9) ** 2 + ((x - 21 - offset) / 6) ** 2 < 1] = 2
        return labels

    reference = body(0)
    image = 100 + 60 * (reference > 0) + 20 * reference + rng.normal(0, 18, reference.shape) + y
    return Overlay.of(
        case="hippocampus_<017>" if rank == "worst" else f"hippocampus_{rank or '101'}",
        kind=kind,
        rank=rank,
        dice={"best": 0.953, "median": 0.886, "worst": 0.206, "": 0.871}[rank],
        view=View.of(image[None].astype(np.float32), reference, (1.5, 1.0, 1.0), canonical=True, scene=True),
        prediction=body(shift),
    )
