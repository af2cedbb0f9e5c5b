from __future__ import annotations

import pytest

from segfit.device import Hardware
from segfit.options import Options
from segfit.planning.patch import MemoryBudget
from segfit.planning.presets import choose_rules, orientation_of
from segfit.planning.trace import Trace


def _gpu(free_gb: float) -> Hardware:
    return Hardware(device="cuda:0", name="a GPU", threads=8, free_memory_gb=free_gb, fast_bf16=True)


_CPU = Hardware(device="cpu", name="a CPU", threads=8, free_memory_gb=120.0, fast_bf16=True)


@pytest.mark.parametrize(
    ("hardware", "memory_gb", "rules", "target"),
    [
        (None, None, "stock", 8),
        (_CPU, None, "stock", 8),
        (_CPU, 4, "stock", 4),
        (_gpu(5.9), None, "stock", 5),
        (_gpu(7.9), None, "resenc-m", 7),
        (_gpu(15.6), None, "resenc-m", 14),
        (_gpu(23.5), None, "resenc-l", 21),
        (_gpu(139.0), None, "resenc-l", 24),
        (_gpu(139.0), 12, "resenc-m", 12),
        (_gpu(139.0), 80, "resenc-l", 24),
    ],
)
def test_auto_goes_by_the_memory_there_is(
    hardware: Hardware | None, memory_gb: float | None, rules: str, target: float
) -> None:
    trace = Trace()
    chosen, memory = choose_rules(Options(memory_gb=memory_gb), hardware, trace)
    assert (chosen.name, memory) == (rules, target)
    assert {key: item.value for key, item in trace.found.items()} == {"preset": rules, "memory_gb": target}


def test_named_presets_keep_their_own_target_whatever_the_machine() -> None:
    assert choose_rules(Options(preset="stock"), _gpu(40.0), Trace())[1] == 8
    assert choose_rules(Options(preset="resenc-xl"), _gpu(8.0), Trace())[1] == 40
    assert choose_rules(Options(preset="resenc-l", memory_gb=12), None, Trace())[1] == 12


def test_budgets_scale_linearly_with_memory() -> None:
    rules = choose_rules(Options(preset="resenc-l"), None, Trace())[0]
    assert MemoryBudget(rules=rules, memory_gb=24, heads=2).elements(3) == 2100e6
    assert MemoryBudget(rules=rules, memory_gb=12, heads=2).elements(3) == 1050e6
    assert MemoryBudget(rules=rules, memory_gb=24, heads=2).elements(2) == 380e6


def test_orientation_of_the_presets() -> None:
    assert orientation_of(Options()) == "canonical"
    assert orientation_of(Options(preset="stock")) == "stored"
    assert orientation_of(Options.model_validate({"planning": {"orientation": "stored"}})) == "stored"


def test_features_and_blocks() -> None:
    rules = choose_rules(Options(preset="resenc-m"), None, Trace())[0]
    assert rules.features(3, 7) == (32, 64, 128, 256, 320, 320, 320)
    assert rules.features(2, 7) == (32, 64, 128, 256, 512, 512, 512)
    assert rules.convs(6) == ((1, 3, 4, 6, 6, 6), (1, 1, 1, 1, 1))


def test_auto_says_that_it_takes_less_memory_than_was_asked_for() -> None:
    trace = Trace()
    choose_rules(Options(memory_gb=80), _gpu(139.0), trace)
    memory = trace.found["memory_gb"]
    assert (memory.bound, memory.inputs) == ("capped", {"there_gb": 80})
    choose_rules(Options(), _CPU, trace)
    assert trace.found["preset"].bound == "no_gpu"
    assert trace.found["memory_gb"].bound == "cpu"
