"""Measured costs."""

from __future__ import annotations

import time

import torch
from training_fakes import SCHEME, tiny_configuration, tiny_recipe

from segfit.execution.memory import process_bytes
from segfit.training.probe import PeakMemory, probe_forward, probe_step

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
    assert 0 < probe_forward(configuration, recipe, SCHEME, CPU) < step.seconds_per_step


def test_memory_that_was_taken_and_given_back_counts() -> None:
    before, memory = process_bytes() / 2**30, PeakMemory(CPU)
    torch.ones(64 * 2**20 // 4)  # 64 MiB, freed at once
    assert 0.05 < memory.peak_gb() - before < 0.5


def test_memory_given_back_before_does_not_count() -> None:
    before = process_bytes() / 2**30
    torch.ones(256 * 2**20 // 4)
    assert PeakMemory(CPU).peak_gb() < before + 0.1
