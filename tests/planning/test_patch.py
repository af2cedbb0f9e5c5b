"""Patch and batch of the reference's planners for seven made-up datasets of equal cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segfit.errors import InputError
from segfit.options import PlanningOptions
from segfit.planning.drafts import Draft, Images, drafts
from segfit.planning.patch import MemoryBudget, _unhalved_share, batch_size
from segfit.planning.presets import RULES
from segfit.planning.topology import topology
from segfit.planning.trace import Trace

_SETS = {
    "A": ((1, 1, 1), (36, 50, 35), 260, 3),
    "B": ((1, 0.767578125, 0.767578125), (432, 512, 512), 131, 3),
    "C": ((10, 1.5625, 1.5625), (9, 237, 208), 200, 4),
    "D": ((3.6, 0.625, 0.625), (20, 320, 320), 32, 3),
    "E": ((999, 1, 1), (1, 1500, 1500), 804, 2),
    "F": ((1, 1, 1), (256, 256, 256), 50, 15),
    "G": ((5, 0.8, 0.8), (40, 512, 512), 50, 15),
}
_PRESETS = ("stock", "resenc-m", "resenc-l", "resenc-xl")
_EXPECTED = """
A 2d  56,40/366     56,40/1618     56,40/4554      56,40/6711
A 3d  40,56,40/9    40,56,40/58    40,56,40/178    40,56,40/183
B 2d  512,512/12    512,512/12     512,512/35      512,512/52
B 3d  128,128,128/2 128,128,128/2  160,224,192/2   192,256,256/2
B low 128,128,128/2 128,128,128/2  160,224,192/2   192,256,256/2
C 2d  256,224/56    256,224/57     256,224/161     256,224/238
C 3d  10,256,224/7  10,256,224/5   10,256,224/17   10,256,224/29
C low -             -              -               -
D 2d  320,320/32    320,320/32     320,320/90      320,320/133
D 3d  20,320,256/2  20,256,256/2   20,320,320/5    20,320,320/8
E 2d  1280,1024/2   512,512/13     896,768/13      1024,1024/13
E 3d  -             -              -               -
F 2d  256,256/47    256,256/49     256,256/137     256,256/203
F 3d  128,128,128/2 128,128,128/2  192,192,192/2   256,224,224/2
F low 128,128,128/2 128,128,128/2  -               -
G 2d  512,512/12    512,512/12     512,512/34      512,512/51
G 3d  24,256,256/2  20,256,256/2   32,384,384/2    40,448,448/2
"""


def _drafts(
    spacing: tuple[float, ...], shape: tuple[int, ...], cases: int, budget: MemoryBudget, **planning: tuple[float, ...]
) -> dict[str, Draft]:
    images = Images(spacings=np.array([spacing], float), shapes=np.array([shape], float), num_training=cases, ndim=3)
    return drafts(images, budget, PlanningOptions.model_validate(planning), Trace())


def _of(name: str, preset: str = "stock") -> dict[str, Draft]:
    spacing, shape, cases, labels = _SETS[name]
    rules = RULES[preset]
    return _drafts(spacing, shape, cases, MemoryBudget(rules=rules, memory_gb=rules.memory_gb, heads=labels))


def _batch(this: Draft) -> tuple[int, str]:
    return batch_size(this.patch.size, this.patch.estimate, this.dataset_voxels, this.budget)


def _text(this: Draft | None) -> str:
    return "-" if this is None else f"{','.join(map(str, this.patch.size))}/{_batch(this)[0]}"


@pytest.mark.parametrize("row", _EXPECTED.strip().splitlines(), ids=lambda row: row[:5])
def test_patch_and_batch_of_the_reference(row: str) -> None:
    name, configuration, *expected = row.split()
    found = []
    for preset in _PRESETS:
        names = {"2d": "2d", "3d": "3d_fullres", "low": "3d_lowres"}
        found.append(_text(_of(name, preset).get(names[configuration])))
    assert found == expected


@pytest.mark.parametrize(
    ("preset", "spacing", "median"),
    [
        ("stock", (2.427262, 1.863114, 1.863114), (178, 211, 211)),
        ("resenc-l", (1.604706, 1.231738, 1.231738), (269, 319, 319)),
        ("resenc-xl", (1.343916, 1.031561, 1.031561), (321, 381, 381)),
    ],
)
def test_lower_resolution(preset: str, spacing: tuple[float, ...], median: tuple[int, ...]) -> None:
    low = _of("B", preset)["3d_lowres"]
    assert low.spacing_mm == pytest.approx(spacing, abs=1e-6)
    assert low.median_shape == median


def test_bounds_tell_what_was_active() -> None:
    assert _of("A")["2d"].patch.bound == "median"
    assert _batch(_of("A")["2d"])[1] == "coverage"
    full = _of("F")["3d_fullres"]
    assert full.patch.bound == "memory"
    assert _batch(full)[1] == "memory"
    assert full.patch.start == (256, 256, 256)
    large = _drafts((1, 1, 1), (500, 500, 500), 50, MemoryBudget(rules=RULES["stock"], memory_gb=1000, heads=2))
    assert large["3d_fullres"].patch.bound == "start"
    assert large["3d_fullres"].patch.size == (256, 256, 256)
    assert _batch(_of("D")["2d"])[1] == "memory"
    assert _batch(_of("E")["2d"])[1] == "memory"
    few = _drafts((1, 1, 1), (40, 40, 40), 5, MemoryBudget(rules=RULES["stock"], memory_gb=8, heads=2))
    assert _batch(few["3d_fullres"]) == (2, "least_coverage")


def test_a_fixed_patch_is_rounded_up_and_follows_the_transposition() -> None:
    budget = MemoryBudget(rules=RULES["stock"], memory_gb=8, heads=3)
    made = _drafts((1, 4, 1), (200, 40, 200), 20, budget, patch_size=(100, 20, 90))
    assert made["3d_fullres"].transpose == (1, 0, 2)
    assert made["3d_fullres"].patch.size == (20, 112, 96)
    assert made["3d_fullres"].patch.bound == "fixed"
    assert made["2d"].patch.bound == "median"


def test_an_impossible_memory_target_is_one_clear_sentence() -> None:
    rules = replace(RULES["stock"], base_features=4096, max_features_3d=4096)
    budget = MemoryBudget(rules=rules, memory_gb=1e-4, heads=3)
    with pytest.raises(InputError, match=r"does not fit into 0\.0001 GB"):
        _drafts((1, 1, 1), (64, 64, 64), 5, budget)


def test_a_target_spacing_beyond_the_image_is_refused() -> None:
    budget = MemoryBudget(rules=RULES["stock"], memory_gb=8, heads=3)
    with pytest.raises(InputError, match="finer target spacing"):
        _drafts((1, 1, 1), (40, 40, 40), 5, budget, target_spacing_mm=(1.0, 1.0, 500.0))


@settings(max_examples=40)
@given(
    st.tuples(*[st.floats(0.1, 10)] * 3),
    st.tuples(*[st.integers(1, 600)] * 3),
    st.sampled_from(sorted(RULES)),
    st.floats(1, 50),
)
def test_every_dataset_gets_patches_that_fit(
    spacing: tuple[float, ...], shape: tuple[int, ...], preset: str, memory_gb: float
) -> None:
    budget = MemoryBudget(rules=RULES[preset], memory_gb=memory_gb, heads=4)
    for this in _drafts(spacing, shape, 30, budget).values():
        size = this.patch.size
        assert _batch(this)[0] >= 2
        assert min(size) >= 1
        assert not budget.exceeded(len(size), this.patch.estimate)
        assert all(n % d == 0 for n, d in zip(size, this.patch.topology.divisor, strict=True))


_MM = st.floats(0.3, 6.0).map(lambda mm: round(mm, 3))


@settings(max_examples=60, deadline=None)
@given(
    spacing=st.tuples(_MM, _MM, _MM),
    shape=st.tuples(*[st.integers(4, 900)] * 3),
    preset=st.sampled_from(_PRESETS),
    factor=st.sampled_from([0.1, 0.5, 1, 3]),
)
def test_no_resolution_is_passed_over_that_would_have_been_taken(
    spacing: tuple[float, ...], shape: tuple[int, ...], preset: str, factor: float
) -> None:
    rules = RULES[preset]
    budget = MemoryBudget(rules=rules, memory_gb=factor * rules.memory_gb, heads=4)

    found = _drafts(spacing, shape, 40, budget)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("segfit.planning.patch._unhalved_share", lambda *_: 1.0)  # a patch is made for every resolution
        assert _drafts(spacing, shape, 40, budget) == found


def test_a_flat_image_of_one_stage_is_not_passed_over() -> None:
    """Along the finest axis a patch is too short to be halved, so that the network has one stage and a large patch."""
    share = _unhalved_share((1.0, 5.0, 5.0), (11.0, 300.0, 300.0))
    assert share == pytest.approx(1.0, rel=0.05)
    assert len(topology((1.0, 5.0, 5.0), (11, 300, 300)).strides) == 1
    assert _unhalved_share((1.0, 1.5, 1.5), (110.0, 70.0, 70.0)) == pytest.approx(0.001)
