"""Measured costs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fakes import SCHEME, tiny_configuration, tiny_recipe

from segfit.errors import MemoryShortageError
from segfit.execution import memory as memory_module
from segfit.execution.memory import PeakWatch, process_bytes, process_peak_bytes
from segfit.inference.predictor import default_batch
from segfit.training import probe
from segfit.training.learner import Learner
from segfit.training.probe import (
    PeakMemory,
    best_threads,
    fastest_threads,
    memory_limited,
    probe_forward,
    probe_step,
)

CPU = torch.device("cpu")


class FakeClock:
    """Time passes only in training steps and networks that are told how long they take, one call after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
        self.now, self._seconds = 0.0, list(seconds)
        monkeypatch.setattr(probe, "perf_counter", lambda: self.now)

    def work(self, *_: Any, **__: Any) -> None:
        self.now += self._seconds.pop(0)


def test_a_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch, 30.0, 2.0, 9.0, 1.0)
    step = Learner.step

    def slow_step(self: Learner, *arguments: Any, **named: Any) -> Any:
        clock.work()
        return step(self, *arguments, **named)

    monkeypatch.setattr(Learner, "step", slow_step)
    cost = probe_step(tiny_configuration(), tiny_recipe(), SCHEME, CPU)
    assert cost.seconds_per_step == 2.0  # the median, but for the first, which warms up
    assert 0.5 * process_bytes() < cost.peak_memory_gb * 2**30 < 1.1 * process_peak_bytes()  # of the whole process
    learner = Learner(tiny_configuration(), tiny_recipe(), SCHEME, CPU, seed=0)
    weights = sum(tensor.nbytes for tensor in learner.network.state_dict().values())
    assert cost.state_gb == pytest.approx(2 * weights / 2**30, rel=0.01)  # with a momentum for each


def test_slow_steps_are_repeated_less(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch, 1.0, 60.0)
    monkeypatch.setattr(Learner, "step", clock.work)
    assert probe_step(tiny_configuration(), tiny_recipe(), SCHEME, CPU).seconds_per_step == 60.0


class Threads:
    """Work whose time depends on torch's number of threads: the seconds of each round, by number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: list[float]) -> None:
        self.now, self.rounds = 0.0, 0
        self._seconds = {int(name[1:]): times for name, times in seconds.items()}
        self._threads = 2
        self.used: list[int] = []
        monkeypatch.setattr(probe, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch, "get_num_threads", lambda: self._threads)
        monkeypatch.setattr(torch, "set_num_threads", self._set)

    def _set(self, number: int) -> None:
        self._threads = number

    def work(self, index: int) -> None:
        self.used.append(self._threads)
        self.now += self._seconds[self._threads][index]


def test_fewer_threads_need_a_tenth_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for fewer, best in ((0.92, 2), (0.89, 1)):
        threads = Threads(monkeypatch, n2=[9.0] + [0.1] * 7, n1=[0.1] + [0.1 * fewer] * 7)
        monkeypatch.setattr(probe, "_THREADS_LIMIT_S", 100.0)
        monkeypatch.setattr(probe, "_THREADS_S", 100.0)
        assert fastest_threads(threads.work, (2, 1, 1)) == best  # the first round does not count
        assert threads.used == [2, 1] * 8
        assert torch.get_num_threads() == 2


def test_one_slow_round_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads(monkeypatch, n2=[0.1, 0.8, *[0.1] * 6], n1=[0.1] * 8)
    assert fastest_threads(threads.work, (2, 1)) == 2
    assert len(threads.used) == 8  # no further round begins after 1.2 s


def test_threads_that_take_seconds_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads(monkeypatch, n2=[6.5], n1=[0.3])
    assert fastest_threads(threads.work, (2, 1)) == 1


def test_the_number_of_threads_is_restored_after_a_failure() -> None:
    before = torch.get_num_threads()

    def fail(_: int) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        fastest_threads(fail, (before + 1, 1))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("threads", "processors", "compared"),
    [(8, 16, (8, 7, 4)), (64, 6, (6, 5, 3)), (3, 3, (3, 2, 1)), (2, 2, (2, 1, 1))],
)
def test_the_threads_compared(
    threads: int, processors: int, compared: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(probe, "available_workers", lambda: processors)
    told: list[tuple[int, ...]] = []
    monkeypatch.setattr(probe, "fastest_threads", lambda work, numbers: (work(0), told.append(tuple(numbers)), 5)[2])
    assert best_threads(tiny_configuration(), tiny_recipe(), SCHEME, CPU) == 5
    assert told == [compared]


@pytest.mark.parametrize(("processors", "device"), [(1, "cpu"), (3, "cuda")])
def test_threads_are_not_compared_where_there_is_nothing_to_choose(
    processors: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(probe, "available_workers", lambda: processors)
    assert best_threads(tiny_configuration(), tiny_recipe(), SCHEME, torch.device(device)) == processors


def test_a_tile_is_measured_in_the_batches_of_the_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = tiny_configuration(3)
    batch = default_batch(configuration, CPU)
    clock = FakeClock(monkeypatch, 0.5, *(batch * n / 64 for n in (3, 1, 2)))
    shapes = []

    def forward(self: Any, image: torch.Tensor) -> None:
        shapes.append(tuple(image.shape))
        clock.work()

    network = type(Learner(configuration, tiny_recipe(augmentation={}), SCHEME, CPU, seed=0).network)
    monkeypatch.setattr(network, "forward", forward)
    tile = probe_forward(configuration, tiny_recipe(augmentation={}), SCHEME, CPU)
    assert tile.seconds == 2 / 64
    assert shapes == [(batch, 1, 16, 16, 16)] * 4


def test_memory_that_was_taken_and_given_back_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Semaphore(0)
    family_bytes = memory_module._family_bytes

    def look() -> int:
        found = family_bytes()
        if threading.current_thread().name == "segfit-memory":
            looked.release()
        return found

    monkeypatch.setattr(memory_module, "_family_bytes", look)
    monkeypatch.setattr(memory_module, "process_peak_bytes", lambda: 0)  # the system's own says nothing
    with PeakMemory(CPU, 0.001) as memory:
        held = [torch.ones(64 * 2**20 // 4) for _ in range(4)]  # 256 MiB
        while looked.acquire(blocking=False):
            pass
        for _ in range(2):  # the first may have begun before
            assert looked.acquire(timeout=120)
        held_gb = process_bytes() / 2**30
        held.clear()
        given_back_gb = held_gb - process_bytes() / 2**30  # what others in this process free meanwhile is in neither
        assert given_back_gb > 0.24
        assert memory.peak_gb() > held_gb - 0.01


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
        pytest.raises(MemoryShortageError, match=r"patch 96 × 96 × 96, batch \d\) does not fit into the memory of cpu"),
        memory_limited(CPU, held + 0.1),
    ):
        probe_step(configuration, tiny_recipe(augmentation={}), SCHEME, CPU, steps=1)
    assert probe_step(configuration, tiny_recipe(augmentation={}), SCHEME, CPU, steps=1).state_gb > 0
