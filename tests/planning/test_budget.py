from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_fakes import case, fingerprint, scheme

from segfit.feature_maps import feature_map_elements
from segfit.options import Options
from segfit.planning import budget
from segfit.planning.augmentation import augmentation_for
from segfit.planning.plan import Plan, RunSpec
from segfit.planning.planner import derive
from segfit.planning.sized_plan import with_run
from segfit.specs import Configuration, NetworkSpec, Normalization, PreprocessingSpec, TrainingSpec


def a_configuration(*, patch: tuple[int, ...] = (40, 56, 40), batch: int = 9) -> Configuration:
    axes = len(patch)
    return Configuration(
        name="3d_fullres",
        ndim=3,
        patch_size=patch,
        batch_size=batch,
        spacing_mm=(1.0,) * axes,
        median_shape=tuple(float(n) for n in patch),
        batch_dice=False,
        preprocessing=PreprocessingSpec(
            orientation="canonical",
            transpose=(0, 1, 2),
            spacing_mm=(1.0,) * axes,
            normalization=(Normalization(scheme="zscore"),),
        ),
        network=NetworkSpec(
            kind="plain",
            ndim=3,
            in_channels=1,
            num_outputs=3,
            features=(32, 64, 128, 256),
            strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
            kernels=((3, 3, 3),) * 4,
            encoder_convs=(2,) * 4,
            decoder_convs=(2,) * 3,
        ),
        memory_estimate=1,
    )


def test_candidates_grow_in_width_first_then_in_batch() -> None:
    found = budget.candidates(a_configuration(), Options())
    sizes = [(item.network.features[0], item.batch_size) for item in found]
    assert sizes == [(8, 2), (16, 2), (24, 2), (32, 2), (32, 2), (32, 4), (32, 9)]
    assert found[0].network.features == (8, 16, 32, 64)
    assert [item.network.features[-1] for item in found[3:5]] == [128, 256]  # the deep stages grow last
    assert found[-1] == a_configuration()


def test_the_smallest_batch_of_small_patches_fills_the_processor() -> None:
    found = budget.candidates(a_configuration(patch=(16, 16, 16), batch=50), Options())
    assert sorted({item.batch_size for item in found}) == [8, 12, 25, 50]


def test_what_the_user_fixed_stays() -> None:
    options = Options().with_settings(["planning.base_features=32", "planning.batch_size=9"])
    assert budget.candidates(a_configuration(), options) == (a_configuration(),)


def test_all_stages_of_a_narrow_network_are_narrow() -> None:
    wide = a_configuration()
    network = wide.network.model_copy(update={"features": (32, 64, 64, 64)})
    narrow = budget.candidates(wide.model_copy(update={"network": network}), Options())[0]
    assert narrow.network.features == (8, 16, 16, 16)


@given(st.floats(0.05, 1.0), st.tuples(*[st.integers(1, 12).map(lambda n: 8 * n)] * 3))
def test_a_shrunk_patch_is_small_enough_and_fits_the_network(share: float, patch: tuple[int, int, int]) -> None:
    before = a_configuration(patch=patch)
    after = budget.shrunk(before, share)
    if after is None:
        return
    assert prod(after.patch_size) <= share * prod(patch)
    divisors = after.network.divisor
    assert all(size % step == 0 and size >= step for size, step in zip(after.patch_size, divisors, strict=True))
    assert all(new <= old for new, old in zip(after.patch_size, patch, strict=True))


def test_the_longest_axis_shrinks_first() -> None:
    after = budget.shrunk(a_configuration(), 0.9)
    assert after is not None
    assert after.patch_size == (40, 48, 40)


def test_where_a_patch_is_at_its_smallest_the_network_loses_a_resolution() -> None:
    before = a_configuration(patch=(16, 16, 16))
    after = budget.shrunk(before, 0.9)
    assert after is not None
    assert (after.patch_size, after.network.features) == ((12, 16, 16), (32, 64, 128))
    assert after.network.divisor == (4, 4, 4)
    assert len(after.network.decoder_convs) == 2
    assert budget.shrunk(before, 0.01) is None


@given(st.tuples(*[st.floats(0.1, 10)] * 3), st.floats(1, 64))
def test_a_coarser_spacing_has_the_voxels_asked_for(spacing: tuple[float, float, float], times: float) -> None:
    after = budget.coarser(spacing, times)
    assert prod(after) == pytest.approx(times * prod(spacing))
    assert all(new >= old for new, old in zip(after, spacing, strict=True))
    changed = [new for new, old in zip(after, spacing, strict=True) if new > old * (1 + 1e-9)]
    assert max(changed, default=0) == pytest.approx(min(changed, default=0))


def test_coarse_slices_stay_as_they_are() -> None:
    assert budget.coarser((10.0, 1.5, 1.5), 4) == pytest.approx((10, 3, 3))


@pytest.mark.parametrize(
    ("seconds", "costs", "expected"),
    [
        (budget.ENOUGH_STEPS * 1.9, [1.0, 0.1], (1, 1)),
        (budget.ENOUGH_STEPS * 3.0, [1.0, 0.1], (1, 3)),
        (budget.ENOUGH_STEPS * 5.0, [1.0, 0.1], (1, 5)),
        (budget.ENOUGH_STEPS * 5.5, [1.0, 0.1], (2, 5)),
        (budget.ENOUGH_STEPS * 5.5, [1.0, 0.1, 0.1], (2, 5)),
        (1.0, [1.0], (1, 1)),
    ],
)
def test_folds_come_before_configurations(seconds: float, costs: list[float], expected: tuple[int, int]) -> None:
    assert budget.choose_trainings(seconds, costs, 5) == expected


def test_folds_that_were_asked_for_are_trained_whatever_it_takes() -> None:
    assert budget.choose_trainings(1.0, [1.0], 5, folds=3) == (1, 3)


def test_order_of_configurations() -> None:
    names = ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"]
    assert budget.choose_configurations(names, Options()) == ("3d_fullres", "2d", "3d_lowres", "3d_cascade_fullres")
    asked = Options().with_settings(["planning.configurations=2d"])
    assert budget.choose_configurations(names, asked) == ("2d",)


def test_the_second_stage_of_a_cascade_comes_after_its_first() -> None:
    names = ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"]
    for asked, chosen in (
        ("3d_cascade_fullres", ("3d_lowres", "3d_cascade_fullres")),
        ("3d_cascade_fullres,2d,3d_lowres", ("2d", "3d_lowres", "3d_cascade_fullres")),
    ):
        options = Options().with_settings([f"planning.configurations={asked}"])
        assert budget.choose_configurations(names, options) == chosen


def test_the_short_recipe_keeps_what_was_asked_for() -> None:
    short = budget.short_recipe(TrainingSpec(), Options())
    assert (short.optimizer, short.momentum, short.learning_rate, short.cooldown_share) == ("muon", 0.95, 0.05, 0.5)
    sgd = Options().with_settings(["training.optimizer=sgd"])
    short = budget.short_recipe(TrainingSpec(), sgd)
    assert (short.optimizer, short.momentum, short.learning_rate) == ("sgd", 0.95, 0.05)
    rate = Options().with_settings(["training.learning_rate=0.02"])
    assert budget.short_recipe(TrainingSpec(learning_rate=0.02), rate).learning_rate == 0.02
    asked = Options().with_settings(["training.momentum=0.9"])
    assert budget.short_recipe(TrainingSpec(momentum=0.9), asked).momentum == 0.9


def test_the_plan_says_what_was_sized_and_why() -> None:
    planned = a_configuration()
    plan = Plan(
        dataset="d",
        preset="auto",
        stock=False,
        fingerprint_hash="",
        channel_names=("T1",),
        configurations={"3d_fullres": planned},
        training={"3d_fullres": TrainingSpec()},
    )
    narrow = budget.candidates(planned, Options())[1]
    recipe = TrainingSpec(momentum=0.95, learning_rate=0.05)
    run = RunSpec(
        configurations=("3d_fullres",),
        folds=(0,),
        seconds_per_training=600.0,
        expected_steps={"3d_fullres": 1600},
        seconds_per_step={"3d_fullres": 0.33},
    )
    result = with_run(plan, {"3d_fullres": (narrow, recipe)}, run, asked={"time_s": 900.0}, memory_gb={}, heads=3)
    assert result.run == run
    assert result.configurations["3d_fullres"] == narrow.model_copy(update={"memory_estimate": _elements(narrow, 3)})
    assert result.training["3d_fullres"] == recipe
    decisions = {item.key: item for item in result.decisions}
    width = decisions["3d_fullres.network.features"]
    assert width.value == [16, 32, 64, 128]
    assert (width.rule, width.bound) == ("sized_features", "time")
    assert width.inputs["seconds_per_step"] == 0.33
    assert decisions["3d_fullres.batch_size"].value == 2
    assert "3d_fullres.patch_size" not in decisions
    assert decisions["run"].value == {"configurations": ["3d_fullres"], "folds": [0]}
    assert result.changes == (
        "3d_fullres: features 16, 32, 64, 128 instead of 32, 64, 128, 256",
        "3d_fullres: batch_size 2 instead of 9",
        "3d_fullres: learning_rate 0.05 instead of 0.01",
        "3d_fullres: momentum 0.95 instead of 0.99",
    )
    assert Plan.model_validate_json(result.model_dump_json()) == result


def _elements(item: Configuration, heads: int) -> int:
    network = item.network
    return feature_map_elements(
        network.kind,
        item.patch_size,
        features=network.features,
        strides=network.strides,
        encoder_convs=network.encoder_convs,
        decoder_convs=network.decoder_convs,
        heads=heads,
    )


def _sized(plan: Plan, now: Configuration, recipe: TrainingSpec, memory_gb: float | None = None) -> Plan:
    run = RunSpec(
        configurations=(now.name,),
        folds=(0,),
        seconds_per_training=60.0,
        expected_steps={now.name: 400},
        seconds_per_step={now.name: 0.1},
    )
    sized = {now.name: (now, recipe)}
    return with_run(plan, sized, run, asked={"time_s": 90.0}, memory_gb={now.name: memory_gb}, heads=3)


def _derived(*settings: str) -> Plan:
    data = fingerprint([case((120, 160, 160), (1, 1, 1))] * 20)
    return derive(data, scheme("liver", "tumour"), Options().with_settings(["preset=stock", *settings]))


@pytest.mark.parametrize("memory_gb", [None, 2.0])
def test_what_follows_from_a_smaller_patch_and_width_is_told_anew(memory_gb: float | None) -> None:
    plan = _derived()
    before = plan.configurations["3d_fullres"]
    now = budget.shrunk(budget.candidates(before, Options())[0], 0.3)
    assert now is not None
    recipe = TrainingSpec(augmentation=augmentation_for(now.patch_size, (0, 1, 2)))
    result = _sized(plan, now, recipe, memory_gb)
    item = result.configurations["3d_fullres"]
    assert item.memory_estimate == _elements(now, 3) < before.memory_estimate / 10
    told = {one.key.removeprefix("3d_fullres."): one for one in result.decisions if one.key.startswith("3d_fullres.")}
    assert told["memory_estimate"].value == item.memory_estimate
    strides = told["network.strides"]
    assert strides.value == [list(stride) for stride in before.network.strides]
    assert strides.inputs["patch_size"] == list(now.patch_size) != list(before.patch_size)
    assert strides.inputs["planned_patch_size"] == list(before.patch_size)
    lowest = [n // d for n, d in zip(now.patch_size, now.network.divisor, strict=True)]
    assert strides.inputs["lowest_resolution_shape"] == lowest
    assert min(lowest) < 4  # what the rule asks for holds of the planned patch only
    assert strides.bound == "kept"
    geometry = told["augmentation"]
    assert geometry.inputs["patch_size"] == list(now.patch_size)
    assert geometry.value["sample_patch"] == list(recipe.augmentation.sample_patch)
    assert told["batch_size"].value == now.batch_size == before.batch_size
    assert told["batch_size"].rule == ("sized_batch" if memory_gb is None else "sized_memory")
    assert told["batch_size"].bound == ("time" if memory_gb is None else "memory")
    assert told["batch_size"].inputs.get("free_gb") == memory_gb
    assert "memory_estimate" not in told["batch_size"].inputs
    assert not any("batch_size" in change for change in result.changes)
    share = next(one for one in result.decisions if one.key == "configurations")
    assert share.inputs["patch_size_after_sizing"] == list(now.patch_size)
    assert share.inputs["patch_size"] == list(before.patch_size)
    untouched = {one.key: one for one in plan.decisions if one.key.startswith("2d.")}
    assert untouched == {one.key: one for one in result.decisions if one.key.startswith("2d.")}
    assert Plan.model_validate_json(result.model_dump_json()) == result


def test_what_fits_the_time_keeps_its_reasons() -> None:
    plan = _derived()
    now, recipe = plan.configurations["3d_fullres"], plan.training["3d_fullres"]
    result = _sized(plan, now, recipe)
    assert result.configurations == plan.configurations
    same = {item.key: item for item in plan.decisions if item.key != "3d_fullres.training"}
    assert same.items() <= {item.key: item for item in result.decisions}.items()


def test_what_was_set_is_still_told_after_sizing() -> None:
    plan = _derived("planning.batch_size=3", "training.momentum=0.9")
    now = budget.candidates(plan.configurations["3d_fullres"], Options())[0].model_copy(update={"batch_size": 3})
    result = _sized(plan, now, plan.training["3d_fullres"])
    told = {item.key: item for item in result.decisions}
    assert told["3d_fullres.batch_size"] == next(one for one in plan.decisions if one.key == "3d_fullres.batch_size")
    assert (told["3d_fullres.training"].rule, told["3d_fullres.training"].bound) == ("sized_recipe", "time")
    assert told["3d_fullres.training"].options == ("training.momentum",)
    assert told["3d_fullres.training"].by_rule == {"momentum": 0.99}
    assert told["3d_fullres.training"].value["momentum"] == 0.9


def test_the_batch_gives_way_before_the_patch() -> None:
    planned = a_configuration(patch=(64, 64, 64), batch=9)
    smaller = budget.reductions(planned, Options())
    assert [item.batch_size for item in smaller[:3]] == [4, 2, 2]
    assert [item.patch_size for item in smaller[:2]] == [planned.patch_size] * 2
    voxels = [item.batch_size * prod(item.patch_size) for item in smaller]
    assert voxels == sorted(voxels, reverse=True)
    assert all(n % d == 0 for item in smaller for n, d in zip(item.patch_size, item.network.divisor, strict=True))
    fixed = Options.model_validate({"planning": {"batch_size": 9, "patch_size": [64, 64, 64]}})
    assert budget.reductions(planned, fixed) == ()
