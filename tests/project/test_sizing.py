"""Fitting a network into memory: what is too large is reduced until a measured step fits."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import replace
from math import inf, prod
from pathlib import Path
from typing import Any

import pytest
import torch

from segfit.dataset.phantom import make_phantom
from segfit.errors import InputError, MemoryShortageError
from segfit.progress import SILENT
from segfit.project import Project, measuring
from segfit.project.candidate import SLACK, Workload
from segfit.project.sizing import Sizer
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

    monkeypatch.setattr(measuring, "probe_step", step)
    monkeypatch.setattr(measuring, "probe_forward", lambda *_: TileCost(0.01, 0.5))
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
    assert (decision.rule, decision.bound) == ("sized_memory", "memory")
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


@pytest.mark.parametrize(("deep_cost", "features"), [(1.0, (32, 64, 128, 256, 320)), (4.0, (32, 64, 128, 128, 128))])
def test_deep_stages_are_narrowed_where_they_cost_more_than_guessed(
    deep_cost: float, features: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, ...]] = []

    def step(configuration: Configuration, *_: Any, **__: Any) -> StepCost:
        widths = configuration.network.features
        tried.append(widths)
        voxels = configuration.batch_size * prod(configuration.patch_size)
        return StepCost(1e-7 * voxels * widths[0] * (deep_cost if max(widths) > 128 else 1.0), 1.0, 0.001)

    monkeypatch.setattr(measuring, "probe_step", step)
    monkeypatch.setattr(measuring, "probe_forward", lambda *_: TileCost(0.01, 0.5))
    data = make_phantom(tmp_path / "Dataset001_Large", cases=5, shape=(64, 64, 64))
    settings = ["training.precision=fp32", "training.channels_last=false", "planning.batch_size=2"]
    project = Project.create(tmp_path / "p", data, settings=settings)
    plan, name = project.plan(), "3d_fullres"
    sizer = Sizer(
        project.fingerprint(), project.dataset.labels, project.options, torch.device("cpu"), Workload(5, 1, 0), SILENT,
        budget=1.0, shares=1,
    )  # fmt: skip
    planned = plan.configurations[name]
    seconds = 4000 * SLACK * 1e-7 * 2 * prod(planned.patch_size) * 32
    found = sizer.best(planned, plan.training[name], seconds).configuration
    assert found.network.features == features
    assert tried[-1] == features


def test_a_narrower_network_keeps_the_depth_that_its_patch_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Configuration] = []

    def step(configuration: Configuration, *_: Any, **__: Any) -> StepCost:
        tried.append(configuration)
        voxels = configuration.batch_size * prod(configuration.patch_size)
        return StepCost(1e-7 * voxels * configuration.network.features[0], 1.0, 0.001)

    monkeypatch.setattr(measuring, "probe_step", step)
    monkeypatch.setattr(measuring, "probe_forward", lambda *_: TileCost(0.0, 0.5))
    data = make_phantom(tmp_path / "Dataset001_Wide", cases=2, shape=(1, 256, 256), kind="picture")
    settings = ["training.precision=fp32", "training.channels_last=false"]
    project = Project.create(tmp_path / "p", data, settings=settings)
    plan = project.plan()
    sizer = Sizer(
        project.fingerprint(), project.dataset.labels, project.options, torch.device("cpu"), Workload(1, 0, 0), SILENT,
        budget=1.0, shares=1,
    )  # fmt: skip
    monkeypatch.setattr(sizer, "steps", lambda item, _: 1e-6 / item.step.seconds_per_step)
    found = sizer.best(plan.configurations["2d"], plan.training["2d"], 1e-6).configuration
    assert found.network.features[0] == 8  # the narrowest
    assert plan.configurations["2d"].network.num_stages > found.network.num_stages == 3
    for item in tried:  # more than one voxel is left to normalise over
        assert all(n >= 2 * divisor for n, divisor in zip(item.patch_size, item.network.divisor, strict=True))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux limits the memory of a process")
def test_a_memory_target_is_kept_in_auto(tmp_path: Path, volumes: Path) -> None:
    project = _project(tmp_path, volumes, "memory_gb=0.05")
    with pytest.raises(InputError, match=r"fits into 0\.1 GB of memory"):
        project.size()


class FakeCard:
    """A GPU of 24 GiB whose allocator keeps what is given back, as torch's does; all numbers are bytes."""

    total = 24 * 2**30

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: int = 0) -> None:
        self.others = others
        self.allocated = self.reserved = 0
        self.limit = self.total
        self.limits: list[int] = []
        self.in_use: list[int] = []  # when a limit was set
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        for name in (
            "mem_get_info", "memory_allocated", "memory_reserved", "empty_cache", "get_device_capability",
            "get_device_name", "get_device_properties", "set_per_process_memory_fraction",
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def mem_get_info(self, _: torch.device) -> tuple[int, int]:
        return self.total - self.others - self.reserved, self.total

    def memory_allocated(self, _: torch.device) -> int:
        return self.allocated

    def memory_reserved(self, _: torch.device) -> int:
        return self.reserved

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def get_device_capability(self, _: torch.device) -> tuple[int, int]:
        return 9, 0

    def get_device_name(self, _: torch.device) -> str:
        return "a GPU"

    def get_device_properties(self, _: torch.device) -> FakeCard:
        return self

    @property
    def total_memory(self) -> int:
        return self.total

    def set_per_process_memory_fraction(self, fraction: float, _: torch.device) -> None:
        self.limit = round(fraction * self.total)
        if fraction < 1:
            self.limits.append(self.limit)
            self.in_use.append(self.allocated)

    def step(self, configuration: Configuration, *_: Any, **__: Any) -> StepCost:
        """Take the bytes that a step needs, and give them back to the allocator, some with the next collection."""
        _Cycle(self, 2**10)
        needed = 4096 * configuration.batch_size * prod(configuration.patch_size)
        self.reserved = max(self.reserved, min(needed, self.limit))
        if needed > self.limit:
            raise MemoryShortageError("too large")
        return StepCost(0.01, self.reserved / 2**30, 0.001)


class _Cycle:
    """Holds memory of a card until garbage is collected."""

    def __init__(self, card: FakeCard, held: int) -> None:
        self._me = self
        card.allocated += held
        weakref.finalize(self, self._free, card, held)

    @staticmethod
    def _free(card: FakeCard, held: int) -> None:
        card.allocated -= held


def _on_a_card(tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch, card: FakeCard) -> Sizer:
    monkeypatch.setattr(measuring, "probe_step", card.step)
    monkeypatch.setattr(measuring, "probe_forward", lambda *_: TileCost(0.01, 0.5))
    project = _project(tmp_path, volumes)
    return Sizer(
        project.fingerprint(), project.dataset.labels, project.options, torch.device("cuda", 0), Workload(5, 1, 0),
        SILENT, budget=1.0, shares=1,
    )  # fmt: skip


@pytest.mark.parametrize("others", [0, 6 * 2**30])
def test_no_probe_on_a_gpu_shrinks_the_limit_of_the_next(
    others: int, tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = FakeCard(monkeypatch, others)
    sizer = _on_a_card(tmp_path, volumes, monkeypatch, card)
    project = Project.open(tmp_path / "p")
    plan = project.plan()
    large = plan.configurations["3d_fullres"].model_copy(update={"batch_size": 1, "patch_size": (192, 192, 192)})
    found = sizer.measurer.fitting(large, plan.training["3d_fullres"])
    room = 0.9 * (card.total - others)
    assert len(card.limits) > 3
    assert card.limits == pytest.approx([room] * len(card.limits), rel=1e-6)
    assert card.in_use == [0] * len(card.limits)
    assert card.limit == card.total
    assert found.memory_gb == pytest.approx(room / 2**30)
    used = 4096 * prod(found.configuration.patch_size)
    assert 0.8 * room < used <= room


@pytest.mark.parametrize(("kind", "samples"), [("cuda", 3), ("cpu", 5)])
def test_of_several_devices_each_is_measured_with_its_samples(
    kind: str, samples: int, tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = _pretend(monkeypatch, 10**9)
    project = _project(tmp_path, volumes, "planning.batch_size=5")
    sizer = Sizer(
        project.fingerprint(), project.dataset.labels, project.options, torch.device(kind), Workload(5, 1, 0), SILENT,
        budget=1.0, shares=1, processes=2,
    )  # fmt: skip
    monkeypatch.setattr(sizer.measurer, "available_gb", lambda: inf)
    monkeypatch.setattr(measuring, "memory_limited", lambda *_: nullcontext())
    planned, recipe = project.plan().configurations["3d_fullres"], project.plan().training["3d_fullres"]
    found = sizer.measurer.measure(planned, recipe)
    assert tried == [samples * prod(planned.patch_size)]
    assert found.configuration == planned


def test_what_is_in_use_on_a_gpu_is_no_room_but_counts_as_held(
    tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = FakeCard(monkeypatch)
    sizer = _on_a_card(tmp_path, volumes, monkeypatch, card)
    card.allocated, card.reserved = 4 * 2**30, 10 * 2**30  # 6 GiB are kept without use
    assert sizer.measurer.available_gb() == pytest.approx(4 + 0.9 * 20)


def test_others_are_measured_only_while_that_leaves_time_for_what_was_found(
    tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, 10**9)
    project = _project(tmp_path, volumes)
    plan = project.plan()
    sizer = Sizer(
        project.fingerprint(), project.dataset.labels, project.options, torch.device("cpu"), Workload(5, 0, 0), SILENT,
        budget=60.0, shares=1,
    )  # fmt: skip
    slow, fast = (
        sizer.measurer.measure(plan.configurations["3d_fullres"], plan.training["3d_fullres"]).model_copy(
            update={"step": StepCost(step, 1.0, 0.001)}
        )
        for step in (0.2 / SLACK, 0.05 / SLACK)  # 20 and 5 seconds for a hundred steps
    )
    assert [sizer.leaves_enough([slow], seconds, 10.0) for seconds in (31, 29, 21, 19, 1, 0)] == [
        *(True, False, False),
        *(True, True, False),  # too slow even now
    ]
    assert [sizer.leaves_enough([slow, fast], seconds, 10.0) for seconds in (16, 14, 6, 4)] == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(("fast", "chosen"), [(True, ("bf16", True)), (False, ("fp32", False))])
def test_nothing_that_is_measured_decides_on_the_arithmetic_of_what_repeats_itself(
    fast: bool, chosen: tuple[str, bool], tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, 10**9)
    hardware = measuring.measure_hardware("cpu")
    monkeypatch.setattr(measuring, "measure_hardware", lambda _: replace(hardware, fast_bf16=fast))
    asked = ["training.steps=5", "planning.base_features=4", "planning.folds=0", "training.deterministic=true"]
    plan = Project.create(tmp_path / "p", volumes, settings=asked).size()
    recipe = plan.training["3d_fullres"]
    assert (recipe.precision, recipe.channels_last) == chosen
    assert recipe.deterministic
