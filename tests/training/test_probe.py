"""Measured costs."""

from __future__ import annotations

import time

import torch
from training_fakes import SCHEME, tiny_configuration, tiny_recipe

from segfit.training.probe import PeakMemory, probe_forward, probe_step

CPU = torch.device("cpu")


def test_a_step_is_measured() -> None:
    started = time.perf_counter()
    cost = probe_step(tiny_configuration(), tiny_recipe(), SCHEME, CPU, steps=2)
    assert 0 < cost.seconds_per_step < time.perf_counter() - started
    assert 0 <= cost.peak_memory_gb < 4


def test_a_tile_costs_less_than_a_step() -> None:
    configuration = tiny_configuration(3).model_copy(update={"patch_size": (32, 32, 32)})
    recipe = tiny_recipe(augmentation={})
    step = probe_step(configuration, recipe, SCHEME, CPU, steps=1)
    assert 0 < probe_forward(configuration, recipe, SCHEME, CPU) < step.seconds_per_step


def test_memory_that_was_taken_and_given_back_counts() -> None:
    memory = PeakMemory(CPU)
    torch.ones(64 * 2**20 // 4)  # 64 MiB, freed at once
    assert 0.05 < memory.growth_gb() < 0.5
    assert memory.peak_gb() > memory.growth_gb()


def test_memory_from_before_does_not_count() -> None:
    torch.ones(256 * 2**20 // 4)
    assert PeakMemory(CPU).growth_gb() < 0.1
