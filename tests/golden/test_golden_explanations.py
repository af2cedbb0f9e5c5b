"""Explanations of the reference's datasets: every value told is the plan's, every promise is kept."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
from test_golden_plans import _trainable, datasets  # noqa: F401

from reference_datasets import fingerprint_of, labels_of, preset_and_memory
from segfit.device import Hardware
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.labels import LabelScheme
from segfit.options import Options
from segfit.planning.explain import words_of
from segfit.planning.plan import Decision, Plan
from segfit.planning.planner import derive
from segfit.planning.rules import TABLE
from segfit.planning.trace import as_json
from segfit.specs import AugmentationSpec, Configuration, TrainingSpec

pytestmark = pytest.mark.golden("plans.jsonl.gz")


def _value(plan: Plan, key: str) -> Any:
    """Return what the plan holds under the key of a decision."""
    name, _, rest = key.partition(".")
    item, recipe = plan.configurations[name], plan.training[name]
    recipe_json = dict(recipe)
    augmentation = as_json(dict(recipe_json.pop("augmentation")))
    supervised = recipe_json.pop("deep_supervision")
    assert augmentation.pop("exchange") is None  # the reference has none
    by_patch = ("rotation_degrees", "dummy_2d", "sample_patch", "mirror_axes", "masked_channels")
    match rest:
        case "training":
            return recipe_json
        case "training.deep_supervision":
            return supervised
        case "augmentation":
            return {leaf: augmentation[leaf] for leaf in by_patch}
        case "augmentation.intensities":
            return {leaf: value for leaf, value in augmentation.items() if leaf not in by_patch}
    tree = item.model_dump(mode="json") | item.model_dump(mode="json")["preprocessing"]
    tree["network"] = as_json(dict(item.network))
    tree["spacing_mm"] = list(item.spacing_mm)
    for part in rest.split("."):
        tree = tree[part]
    if rest.startswith("resample"):
        tree = tree | {"force_separate": "auto" if tree["force_separate"] is None else tree["force_separate"]}
    return tree


def _plans(
    datasets: list[dict[str, Any]],  # noqa: F811
) -> Any:
    for index, item in enumerate(datasets):
        fingerprint, scheme = fingerprint_of(item["dataset"], item["fingerprint"]), labels_of(item["dataset"])
        for planner in list(item["plans"])[index % 4 :: 4]:
            if not _trainable(item["plans"][planner]):
                continue
            preset, memory = preset_and_memory(planner)
            options = Options.model_validate({"preset": preset, "memory_gb": memory})
            yield derive(fingerprint, scheme, options), fingerprint, scheme, options


def _check_memory(plan: Plan, item: Decision, again: Any) -> int:
    """Replan with every memory target that a decision speaks of; returns how many promises there were."""
    name, _, leaf = item.key.partition(".")
    kept = 0
    for outcome in item.outcomes:
        if outcome.memory_gb is None:
            continue
        other = again(outcome.memory_gb)
        if item.key == "configurations":
            assert outcome.value == sorted(other.configurations)
        elif outcome.state == "absent":
            assert name not in other.configurations
        else:
            assert outcome.state == "planned"
            value = getattr(other.configurations[name], leaf)
            assert outcome.value == (list(value) if isinstance(value, tuple) else value), (item.key, outcome)
        kept += 1
    return kept


def test_every_value_told_is_the_plans(datasets: list[dict[str, Any]]) -> None:  # noqa: F811
    general = {"preset", "memory_gb", "orientation", "target_spacing_mm", "transpose", "configurations", "mirror_axes"}
    for plan, fingerprint, _, _ in _plans(datasets):
        told = {item.key: item for item in plan.decisions}
        assert len(told) == len(plan.decisions)
        for key, item in told.items():
            assert item.bound in TABLE[item.rule].bounds, key
            words = words_of(item)
            assert all((words.rule, words.bound, words.source, words.changes)), key
            assert "*" not in words.rule + words.bound, key  # every sentence is filled
            assert not item.options
            fixed = key == "memory_gb" or key.endswith((".training", ".augmentation.intensities", ".batch_dice"))
            assert item.inputs or fixed, key
            if key.partition(".")[0] in plan.configurations:
                assert item.value == _value(plan, key), key
            else:
                assert key in general or key.startswith("normalization.")
        assert told["configurations"].value == sorted(plan.configurations)
        for configuration in plan.configurations.values():
            spec = configuration.preprocessing
            assert told["orientation"].value == spec.orientation
            if fingerprint.ndim == 3:
                assert told["transpose"].value == list(spec.transpose)
            seen = [told["target_spacing_mm"].value[axis] for axis in spec.transpose]
            if configuration.name != "3d_lowres":
                assert list(configuration.spacing_mm) == seen[-configuration.ndim :]
            for channel, how in enumerate(spec.normalization):
                decision = told[f"normalization.{channel}"]
                assert decision.value == how.scheme + (" inside the non-zero mask" if how.use_mask else "")
                if how.statistics is not None:
                    assert decision.inputs["mean"] == how.statistics.mean
                    assert decision.inputs["percentile_99_5"] == how.statistics.percentile_99_5
            assert len(spec.normalization) == sum(key.startswith("normalization.") for key in told)


_TOLD_FOR_ALL = {"name", "ndim", "preprocessing", "next_stage", "network"}
"""Fields of a configuration that its name or decisions on the dataset tell, or that have decisions by part."""


def test_every_field_of_a_plan_is_explained(datasets: list[dict[str, Any]]) -> None:  # noqa: F811
    for plan, *_ in _plans(datasets):
        told = {item.key: item for item in plan.decisions}
        for name, configuration in plan.configurations.items():
            recipe = told[f"{name}.training"].value.keys() | {"augmentation", "deep_supervision"}
            assert recipe == set(TrainingSpec.model_fields)
            augmentation = told[f"{name}.augmentation"].value | told[f"{name}.augmentation.intensities"].value
            assert augmentation.keys() | {"exchange"} == set(AugmentationSpec.model_fields)
            if configuration.previous_stage is not None:
                assert {f"{name}.previous_stage", f"{name}.network.in_channels"} <= told.keys()
                continue
            for field in set(Configuration.model_fields) - _TOLD_FOR_ALL - {"previous_stage"}:
                assert f"{name}.{field}" in told
            foreign = {"ndim"} if configuration.network.kind == "mednext" else {"ndim", "expansion"}
            for field in set(type(configuration.network).model_fields) - foreign:
                assert f"{name}.network.{field}" in told
            for field in ("resample_image", "resample_label", "resample_logits"):
                assert f"{name}.{field}" in told


def test_promises_about_memory_are_kept(datasets: list[dict[str, Any]]) -> None:  # noqa: F811
    kept = 0
    for plan, fingerprint, scheme, options in _plans(datasets):
        again = _replanner(fingerprint, scheme, options)
        kept += sum(_check_memory(plan, item, again) for item in plan.decisions)
    assert kept > 1000


def test_auto_promises_what_it_does_with_that_memory(datasets: list[dict[str, Any]]) -> None:  # noqa: F811
    """More memory changes the rules of `auto`, and beyond 24 GB nothing."""
    kept = 0
    for item in datasets[::4]:
        fingerprint = fingerprint_of(item["dataset"], item["fingerprint"])
        fingerprint = fingerprint.model_copy(update={"orientation": "canonical"})
        for free in (6.0, 11.0, 30.0):
            hardware = Hardware(device="cuda:0", name="GPU", threads=8, free_memory_gb=free, fast_bf16=True)
            scheme, options = labels_of(item["dataset"]), Options()
            plan = derive(fingerprint, scheme, options, hardware)
            again = _replanner(fingerprint, scheme, options, hardware)
            kept += sum(_check_memory(plan, one, again) for one in plan.decisions)
            patch = next(one for one in plan.decisions if one.key.endswith("patch_size"))
            assert (free < 30) or "memory is capped by auto" in words_of(patch).changes
    assert kept > 200


def _replanner(
    fingerprint: Fingerprint, scheme: LabelScheme, options: Options, hardware: Hardware | None = None
) -> Any:
    known: dict[float, Plan] = {}

    def again(gb: float) -> Plan:
        if gb not in known:
            known[gb] = derive(fingerprint, scheme, options.model_copy(update={"memory_gb": gb}), hardware)
        return known[gb]

    return again


def test_promises_about_more_cases_are_kept(datasets: list[dict[str, Any]]) -> None:  # noqa: F811
    kept = 0
    for plan, fingerprint, scheme, options in _plans(datasets):
        twice = fingerprint.model_copy(update={"num_training": 2 * fingerprint.num_training})
        told = {item.key: one for item in plan.decisions for one in item.outcomes if one.cases is not None}
        other = derive(twice, scheme, options)
        for key, outcome in told.items():
            assert outcome.cases == twice.num_training
            assert outcome.value == other.configurations[key.partition(".")[0]].batch_size
            kept += 1
    assert kept > 50


def test_inputs_are_enough_to_recompute_the_value(datasets: list[dict[str, Any]]) -> None:  # noqa: F811
    """Batch and share of the patch by the rules' arithmetic from what the explanation says, nothing else."""
    for plan, _, _, _ in _plans(datasets):
        told = {item.key: item for item in plan.decisions}
        for name, configuration in plan.configurations.items():
            if configuration.previous_stage is not None:
                continue
            batch, estimate = told[f"{name}.batch_size"], told[f"{name}.memory_estimate"].inputs
            share = batch.inputs["coverage_allows"]
            room = estimate["budget_per_sample"] / configuration.memory_estimate * estimate["samples_of_the_budget"]
            assert batch.inputs["memory_allows"] == pytest.approx(room)
            assert batch.value == max(2, min(round(room), round(share)))
            if name == "3d_lowres":
                spacing = told["3d_lowres.spacing_mm"]
                grown = max(
                    low / full for low, full in zip(spacing.value, spacing.inputs["target_spacing_mm"], strict=True)
                )
                assert grown == pytest.approx(1.03 ** spacing.inputs["steps"])
                assert spacing.inputs["patch_share_of_median_image"] >= 0.25
        if "3d_fullres" in plan.configurations:
            inputs = told["configurations"].inputs
            share = prod(inputs["patch_size"]) / prod(inputs["median_shape"])
            assert inputs["patch_share_of_median_image"] == share
            assert ("3d_lowres" in plan.configurations) <= (share < 0.25)
