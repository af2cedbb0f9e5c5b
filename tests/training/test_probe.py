"""Measured costs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from training_fakes import SCHEME, tiny_configuration, tiny_recipe

from segfit.errors import MemoryShortageError
from segfit.execution import memory as memory_module
from segfit.execution.memory import PeakWatch, process_bytes
from segfit.training.probe import PeakMemory, memory_limited, probe_forward, probe_step

CPU = torch.device("cpu")


def test_a_step_is_measured() -> None:
    started = time.perf_counter()
    cost = probe_step(tiny_configuration(), tiny_recipe(), SCHEME, CPU, steps=2)
    assert 0 < cost.seconds_per_step < time.perf_counter() - started
    assert 0.05 < cost.peak_memory_gb < 4


def test_a_tile_costs_less_than_a_step() -> None:
    configuration = tiny_configuration(3).model_copy(update={"patch_size": (32, 32, 32)})
    recipe = tiny_recipe(augmentation={})
    step = probe_step(configuration, recipe, SCHEME, CPU, steps=1)
    tile = probe_forward(configuration, recipe, SCHEME, CPU)
    assert 0 < tile.seconds < step.seconds_per_step
    assert tile.peak_memory_gb > 0.05


def test_memory_that_was_taken_and_given_back_counts() -> None:
    before = process_bytes() / 2**30
    with PeakMemory(CPU, 0.001) as memory:
        held = [torch.ones(64 * 2**20 // 4) for _ in range(4)]  # 256 MiB
        time.sleep(0.05)
        held.clear()
        assert 0.24 < memory.peak_gb() - before < 0.6


def test_memory_given_back_before_does_not_count() -> None:
    before = process_bytes() / 2**30
    torch.ones(256 * 2**20 // 4)
    with PeakMemory(CPU) as memory:
        assert memory.peak_gb() < before + 0.1


def test_a_new_high_is_exact_however_short(monkeypatch: pytest.MonkeyPatch) -> None:
    with PeakWatch(60.0) as watch:
        monkeypatch.setattr(memory_module, "process_peak_bytes", lambda: 2**50)
        assert watch.peak_bytes() == 2**50


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux limits the memory of a process")
def test_a_step_beyond_the_limit_fails_and_the_limit_goes() -> None:
    configuration = tiny_configuration(3).model_copy(update={"patch_size": (96, 96, 96)})
    held = process_bytes() / 2**30
    with (
        pytest.raises(MemoryShortageError, match=r"patch 96x96x96, batch \d\) does not fit into the memory of cpu"),
        memory_limited(CPU, held + 0.1),
    ):
        probe_step(configuration, tiny_recipe(augmentation={}), SCHEME, CPU, steps=1)
    assert probe_step(configuration, tiny_recipe(augmentation={}), SCHEME, CPU, steps=1).peak_memory_gb > 0
