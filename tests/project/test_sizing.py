"""Fitting a network into memory: what is too large is reduced until a measured step fits."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest

from segfit.errors import InputError, MemoryShortageError
from segfit.project import Project, sizing
from segfit.specs import Configuration
from segfit.training.probe import StepCost, TileCost


def _project(tmp_path: Path, data: Path, *settings: str) -> Project:
    fast = ["training.steps=5", "planning.base_features=4", "training.channels_last=false", "training.precision=fp32"]
    fast.append("planning.folds=0")
    return Project.create(tmp_path / "p", data, settings=[*fast, *settings])


def _pretend(monkeypatch: pytest.MonkeyPatch, room: int) -> list[int]:
    """Let steps fail whose batch holds more voxels than `room`; return the sizes that were tried."""
    tried: list[int] = []

    def step(configuration: Configuration, *_: Any, **__: Any) -> StepCost:
        voxels = configuration.batch_size * prod(configuration.patch_size)
        tried.append(voxels)
        if voxels > room:
            raise MemoryShortageError("too large")
        return StepCost(0.01, 1.0, 0.001)

    monkeypatch.setattr(sizing, "probe_step", step)
    monkeypatch.setattr(sizing, "probe_forward", lambda *_: TileCost(0.01, 0.5))
    return tried


def test_what_fits_stays_as_planned(tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = _pretend(monkeypatch, 10**9)
    project = _project(tmp_path, volumes)
    planned = project.plan().configurations["3d_fullres"]
    assert project.size().configurations["3d_fullres"] == planned
    assert len(tried) == 1


@pytest.mark.parametrize("share", [0.7, 0.45, 0.2])
def test_the_largest_reduction_that_fits_is_found(
    share: float, tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = _project(tmp_path, volumes, "planning.batch_size=2")
    planned = project.plan().configurations["3d_fullres"]
    room = int(share * 2 * prod(planned.patch_size))
    tried = _pretend(monkeypatch, room)
    plan = project.size()
    found = plan.configurations["3d_fullres"]
    used = 2 * prod(found.patch_size)
    assert found.network == planned.network
    assert 0.6 * room < used <= room
    assert used == max(size for size in tried if size <= room)
    decision = next(item for item in plan.decisions if item.key == "3d_fullres.patch_size")
    assert decision.bound.endswith("GB of free memory")
    assert decision.value == list(found.patch_size)
    assert any(change.startswith("3d_fullres: patch_size") for change in plan.changes)
    assert plan.training["3d_fullres"].augmentation.sample_patch != ()


def test_what_was_fixed_is_not_reduced(tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, 10)
    project = _project(tmp_path, volumes, "planning.patch_size=16,32,32", "planning.batch_size=2")
    with pytest.raises(
        InputError, match=r"not even 3d_fullres, 4 features, batch 2, patch 16x32x32 at .* mm fits into .* GB"
    ):
        project.size()
    assert not project.folder.runs.exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux limits the memory of a process")
def test_a_memory_target_is_kept_in_auto(tmp_path: Path, volumes: Path) -> None:
    project = _project(tmp_path, volumes, "memory_gb=0.05")
    with pytest.raises(InputError, match=r"fits into 0\.1 GB of memory"):
        project.size()
