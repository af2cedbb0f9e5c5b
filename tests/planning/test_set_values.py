"""Every value of a plan can be set, for all configurations or for one, and the plan tells it beside the rule's."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import pytest
from planning_fakes import STATISTICS, case, fingerprint, scheme

from segfit.errors import InputError
from segfit.feature_maps import network_elements
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.options import Options
from segfit.planning.augmentation import STRENGTHS
from segfit.planning.explain import compare, explain, explain_json
from segfit.planning.plan import Decision, Plan
from segfit.planning.planner import derive
from segfit.specs import AugmentationSpec, ResamplingSpec, TrainingSpec

_LABELS = scheme("liver", "tumour")


def _large(preset: str = "stock") -> Fingerprint:
    cases = [case((432, 512, 512), (1, 0.75, 0.75))] * 131
    return fingerprint(cases, channels=("CT", "MRI"), orientation="canonical" if preset == "auto" else "stored")


def _small() -> Fingerprint:
    return fingerprint([case((36, 50, 35), (1, 1, 1))] * 20, num_training=260)


def _plan(*settings: str, data: Fingerprint | None = None, preset: str = "stock") -> Plan:
    options = Options().with_settings([f"preset={preset}", *(f"planning.{setting}" for setting in settings)])
    return derive(_large(preset) if data is None else data, _LABELS, options)


def _decision(plan: Plan, key: str) -> Decision:
    (found,) = [item for item in plan.decisions if item.key == key]
    return found


_SAMPLES = {
    "target_spacing_mm": ("2,1,1", "spacing_mm", [2, 1, 1]),
    "patch_size": ("64,96,96", "patch_size", [64, 96, 96]),
    "batch_size": ("7", "batch_size", 7),
    "kind": ("residual", "network.kind", "residual"),
    "network": ("other-nets:swin", "network.plugin", "other-nets:swin"),
    "norm": ("batch", "network.norm", "batch"),
    "base_features": ("16", "network.features", [16, 32, 64, 128, 256, 320]),
    "features": ("[8,16,24,32,40,48]", "network.features", [8, 16, 24, 32, 40, 48]),
    "strides": ("[[1,1,1],[2,2,2],[4,4,4]]", "network.strides", [[1, 1, 1], [2, 2, 2], [4, 4, 4]]),
    "kernels": ("[[1,3,3],[3,3,3],[3,3,3],[3,3,3],[3,3,3],[3,3,3]]", "network.kernels", [[1, 3, 3], *[[3, 3, 3]] * 5]),
    "encoder_convs": ("[1,1,1,1,1,1]", "network.encoder_convs", [1] * 6),
    "decoder_convs": ("[1,1,1,1,1]", "network.decoder_convs", [1] * 5),
    "batch_dice": ("false", "batch_dice", False),
    "normalization": ("zscore,none", "normalization", ["zscore", "none"]),
    "use_mask": ("false,true", "use_mask", [False, True]),
    "statistics": (
        '[{"mean":7,"percentile_99_5":240},null]',
        "statistics",
        [{"mean": 7, "std": 20, "percentile_00_5": -5, "percentile_99_5": 240}, None],
    ),
    "transpose": ("1,0,2", "transpose", [1, 0, 2]),
    "mirror_axes": ("0,2", "mirror_axes", [0, 2]),
    "resample_image.method": ("torch", "resample_image", "torch"),
    "resample_image.order": ("1", "resample_image", 1),
    "resample_image.order_separate_axis": ("1", "resample_image", 1),
    "resample_image.force_separate": ("true", "resample_image", True),
    "resample_image.separate_threshold": ("2.5", "resample_image", 2.5),
    "resample_label.method": ("torch", "resample_label", "torch"),
    "resample_label.order": ("0", "resample_label", 0),
    "resample_label.force_separate": ("false", "resample_label", False),
    "resample_label.separate_threshold": ("2.5", "resample_label", 2.5),
    "resample_logits.method": ("torch", "resample_logits", "torch"),
    "resample_logits.order": ("3", "resample_logits", 3),
    "resample_logits.order_separate_axis": ("1", "resample_logits", 1),
    "resample_logits.force_separate": ("false", "resample_logits", False),
    "resample_logits.separate_threshold": ("4", "resample_logits", 4),
}
"""By option: what is set for 3d_fullres, the decision that tells it, and the value there."""


def test_every_option_of_a_configuration_is_tried() -> None:
    prefix = "planning.3d_fullres."
    keys = {key.removeprefix(prefix) for key in Options.known_keys() if key.startswith(prefix)}
    assert set(_SAMPLES) == keys - {"resample_label.order_separate_axis", "expansion"}  # may be 0 only; of a MedNeXt


@pytest.mark.parametrize("option", _SAMPLES)
def test_a_value_of_one_configuration(option: str) -> None:
    text, key, value = _SAMPLES[option]
    plan, stock = _plan(f"3d_fullres.{option}={text}"), _plan()
    assert stock.stock
    assert not plan.stock
    (change,) = [one for one in plan.changes if f" {option} " in one]
    assert change.startswith("3d_fullres and 3d_cascade_fullres: ")
    decision = _decision(plan, f"3d_fullres.{key}")
    shown = decision.value[option.partition(".")[2]] if "resample" in option else decision.value
    assert shown == value
    assert decision.options == (f"planning.3d_fullres.{option}",)
    expected = {item.key: item.value for item in stock.decisions}.get(f"3d_fullres.{key}")
    if expected is not None:
        assert decision.by_rule == expected
    assert plan.configurations["2d"] == stock.configurations["2d"]
    assert plan.training["2d"] == stock.training["2d"]
    assert plan.configurations["3d_fullres"] != stock.configurations["3d_fullres"] or option == "mirror_axes"
    bounds = {item.key for item in plan.decisions if item.options}
    assert bounds <= {f"{name}.{key}" for name in ("3d_fullres", "3d_cascade_fullres")}
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize("option", [key for key in _SAMPLES if key not in ("features", "strides", "kernels")])
def test_a_value_of_all_configurations(option: str) -> None:
    text, key, _ = _SAMPLES[option]
    names = ("3d_lowres", "3d_fullres")
    plan = _plan(f"{option}={text}", f"configurations={','.join(names)}" if "convs" in option else "folds=null")
    assert not plan.stock
    told = {item.key: item.options for item in plan.decisions if item.options}
    own = key if "mirror" in key or key == "transpose" else f"3d_fullres.{key}"
    own = "normalization.0" if key in ("normalization", "use_mask", "statistics") else own
    assert told[own] == (f"planning.{option}",)
    assert f"3d_fullres.{key}" not in told or own == f"3d_fullres.{key}"


def test_what_is_set_as_the_rule_has_it_changes_nothing() -> None:
    plan = _plan("3d_fullres.patch_size=128,128,128", "resample_image.order=3")
    assert plan.stock
    assert plan.changes == ()
    decision = _decision(plan, "3d_fullres.patch_size")
    assert decision.options == ("planning.3d_fullres.patch_size",)
    assert (decision.rule, decision.by_rule) == ("patch_size_3d", [128, 128, 128])
    assert plan.configurations == _plan().configurations


def test_another_kind_of_network_brings_its_blocks_and_its_memory() -> None:
    plan = _plan("kind=residual")
    full, lowres = plan.configurations["3d_fullres"], plan.configurations["3d_lowres"]
    assert full.network.encoder_convs == (1, 3, 4, 6, 6, 6)
    assert full.network.decoder_convs == (1,) * 5
    medium = _plan(preset="resenc-m")
    for name, item in medium.configurations.items():  # the same calibration, another share of the dataset in a batch
        assert plan.configurations[name].patch_size == item.patch_size
        assert plan.configurations[name].memory_estimate == item.memory_estimate
    assert lowres.network.kind == "residual"
    assert plan.changes == ("kind residual set by you instead of plain",)
    back = _plan("kind=plain", preset="resenc-m")
    assert back.configurations["3d_fullres"].network == _plan().configurations["3d_fullres"].network
    only = _plan("2d.kind=residual")
    assert only.configurations["2d"].network == plan.configurations["2d"].network
    assert only.configurations["3d_fullres"] == _plan().configurations["3d_fullres"]
    assert only.changes == ("2d: kind residual set by you instead of plain",)


def test_a_mednext_is_planned_with_its_blocks_and_recipe() -> None:
    plan, auto = _plan("kind=mednext", preset="auto"), _plan(preset="auto")
    full = plan.configurations["3d_fullres"]
    stages = full.network.num_stages
    assert (full.network.kind, full.network.expansion) == ("mednext", 2)
    assert full.network.features == tuple(min(512, 32 << stage) for stage in range(stages))
    assert (full.network.encoder_convs, full.network.decoder_convs) == ((2,) * stages, (2,) * (stages - 1))
    assert full.memory_estimate == network_elements(full.network, full.patch_size, _LABELS.num_declared)
    recipe = plan.training["3d_fullres"]
    assert (recipe.optimizer, recipe.learning_rate, recipe.momentum, recipe.weight_decay) == ("adamw", 1e-3, 0.9, 3e-5)
    assert recipe.augmentation.mirror_axes == auto.training["3d_fullres"].augmentation.mirror_axes
    assert plan.changes[-1] == "kind mednext set by you instead of plain"
    assert _decision(plan, "3d_fullres.training").rule == "recipe_mednext"
    assert _decision(plan, "3d_fullres.network.encoder_convs").rule == "encoder_mednext"
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert "expansion" not in full.network.model_dump()  # as published
    own = _plan("kind=mednext", "2d.expansion=4", preset="auto").configurations
    assert (own["2d"].network.expansion, own["3d_fullres"]) == (4, full)
    assert prod(own["2d"].patch_size) * own["2d"].batch_size < prod(plan.configurations["2d"].patch_size) * 12


def test_the_users_optimiser_is_not_given_what_mednext_was_published_with() -> None:
    options = Options().with_settings(["planning.kind=mednext", "training.optimizer=sgd"])
    recipe = derive(_large("auto"), _LABELS, options).training["3d_fullres"]
    assert (recipe.optimizer, recipe.learning_rate, recipe.momentum) == ("sgd", 1e-2, 0.99)


@pytest.mark.parametrize(
    ("preset", "settings", "key"),
    [
        ("stock", ["kind=mednext"], "planning.kind"),
        ("resenc-m", ["2d.kind=mednext"], "planning.2d.kind"),
        ("auto", ["expansion=3"], "planning.expansion"),
        ("auto", ["kind=residual", "3d_fullres.expansion=3"], "planning.3d_fullres.expansion"),
    ],
)
def test_a_mednext_is_refused_where_it_fits_nothing(preset: str, settings: list[str], key: str) -> None:
    with pytest.raises(InputError, match=rf"^{key} "):
        _plan(*settings, preset=preset)


def test_strides_bring_features_kernels_and_convolutions() -> None:
    full = _plan("3d_fullres.strides=[[1,1,1],[1,2,2],[2,2,2]]").configurations["3d_fullres"]
    assert full.network.features == (32, 64, 128)
    assert full.network.kernels == ((3, 3, 3),) * 3
    assert (full.network.encoder_convs, full.network.decoder_convs) == ((2, 2, 2), (2, 2))
    residual = _plan("3d_fullres.strides=[[1,1,1],[1,2,2],[2,2,2]]", "kind=residual").configurations["3d_fullres"]
    assert residual.network.encoder_convs == (1, 3, 4)


def test_a_patch_with_strides_is_taken_as_it_is() -> None:
    strides = "3d_fullres.strides=[[1,1,1],[1,2,2],[2,2,2]]"
    plan = _plan(strides, "3d_fullres.patch_size=30,44,52")
    assert plan.configurations["3d_fullres"].patch_size == (30, 44, 52)
    with pytest.raises(InputError) as caught:
        _plan(strides, "3d_fullres.patch_size=30,44,54")
    assert str(caught.value) == (
        "planning.3d_fullres.patch_size is 30x44x54 as the network sees it, which planning.3d_fullres.strides does not "
        "divide; give multiples of 2x4x4"
    )


def test_fewer_features_leave_room_for_a_larger_batch() -> None:
    thin = _plan("3d_fullres.features=[8,16,32,64,80,80]")
    full, stock = thin.configurations["3d_fullres"], _plan().configurations["3d_fullres"]
    assert full.memory_estimate < stock.memory_estimate == 452_796_416
    assert full.batch_size == round(560e6 / full.memory_estimate * 2) == 9
    assert _decision(thin, "3d_fullres.memory_estimate").value == full.memory_estimate
    assert _decision(thin, "3d_fullres.batch_size").value == 9
    assert _decision(thin, "3d_fullres.batch_size").bound == "memory"


def test_a_spacing_of_the_lower_resolution_calls_for_one() -> None:
    plan = _plan("3d_lowres.target_spacing_mm=2,2,2", data=_small())
    assert list(plan.configurations) == ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"]
    low = plan.configurations["3d_lowres"]
    assert low.spacing_mm == (2, 2, 2)
    assert low.median_shape == (18, 25, 18)
    assert plan.changes == ("3d_lowres: target_spacing_mm 2x2x2 set by you; the rules give none",)
    assert _decision(plan, "configurations").bound == "lowres_set"
    spacing = _decision(plan, "3d_lowres.spacing_mm")
    assert (spacing.options, spacing.rule, spacing.by_rule) == (("planning.3d_lowres.target_spacing_mm",), "", None)


def test_a_spacing_of_all_is_told_once() -> None:
    told = "target_spacing_mm 2x1x1 set by you instead of 1x0.75x0.75"
    plan = _plan("target_spacing_mm=2,1,1")
    assert plan.changes == (told,)
    assert _decision(plan, "target_spacing_mm").by_rule == [1, 0.75, 0.75]
    assert _decision(plan, "3d_fullres.spacing_mm").options == ("planning.target_spacing_mm",)
    assert _decision(plan, "3d_lowres.spacing_mm").rule == "spacing_lowres"
    assert _decision(plan, "3d_lowres.spacing_mm").options == ()
    alone = _plan("target_spacing_mm=2,1,1", "configurations=3d_lowres")
    assert alone.changes == ("configurations, as asked: 3d_lowres", told)


def test_the_lower_resolution_follows_the_full_one() -> None:
    assert list(_plan("3d_fullres.patch_size=320,320,320").configurations) == ["2d", "3d_fullres"]  # sees enough
    stock = _plan().configurations["3d_lowres"]
    finer = _plan("3d_fullres.target_spacing_mm=1,0.5,0.5").configurations["3d_lowres"]
    assert finer.spacing_mm[1] / finer.spacing_mm[0] == pytest.approx(0.5, rel=0.03)  # coarsened from that spacing
    assert stock.spacing_mm[1] / stock.spacing_mm[0] == pytest.approx(0.75)
    small = _plan("3d_lowres.patch_size=64,64,64").configurations
    assert small["3d_lowres"].patch_size == (64, 64, 64)
    assert small["3d_lowres"].median_shape < stock.median_shape
    assert small["3d_fullres"].patch_size == (128, 128, 128)


def test_the_cascade_repeats_the_full_resolution_unless_it_has_its_own() -> None:
    plan = _plan("3d_fullres.batch_size=3", "3d_cascade_fullres.resample_image.order=1")
    full, cascade = plan.configurations["3d_fullres"], plan.configurations["3d_cascade_fullres"]
    assert (full.batch_size, cascade.batch_size) == (3, 3)
    assert (full.preprocessing.resample_image.order, cascade.preprocessing.resample_image.order) == (3, 1)
    batch = _decision(plan, "3d_cascade_fullres.batch_size")
    assert (batch.options, batch.by_rule) == (("planning.3d_fullres.batch_size",), 2)
    assert plan.changes == (
        "3d_fullres and 3d_cascade_fullres: batch_size 3 set by you instead of 2",
        "3d_cascade_fullres: resample_image.order 1 set by you instead of 3",
    )


def test_resampling_follows_the_method() -> None:
    spec = _plan("resample_image.method=none").configurations["3d_fullres"].preprocessing
    assert spec.resample_image == spec.resample_label == spec.resample_logits == ResamplingSpec(method="none", order=0)
    spec = _plan("resample_image.method=torch").configurations["3d_fullres"].preprocessing
    assert spec.resample_image == ResamplingSpec(method="torch", order=1)
    assert spec.resample_label == ResamplingSpec(order=1)
    spec = _plan("resample_image.force_separate=auto", "2d.resample_image.force_separate=true").configurations
    assert spec["2d"].preprocessing.resample_image.force_separate is True
    assert spec["3d_fullres"].preprocessing.resample_image.force_separate is None


def test_clipping_of_ct_can_be_set() -> None:
    plan = _plan('statistics=[{"percentile_00_5":-100,"percentile_99_5":240},null]')
    ct, mri = plan.configurations["2d"].preprocessing.normalization
    assert ct.statistics == STATISTICS.model_copy(update={"percentile_00_5": -100.0, "percentile_99_5": 240.0})
    assert mri.statistics is None


def test_no_axis_may_be_flipped() -> None:
    plan = _plan("mirror_axes=[]", "configurations=2d")
    assert plan.training["2d"].augmentation.mirror_axes == ()
    assert plan.changes[1] == "2d: mirror_axes none set by you instead of 1, 2"


def test_masks_reach_the_augmentation() -> None:
    plan = _plan("use_mask=false,true")
    assert plan.training["3d_fullres"].augmentation.masked_channels == (1,)
    assert _decision(plan, "normalization.1").value == "zscore inside the non-zero mask"
    assert _decision(plan, "normalization.1").by_rule == "zscore"


def test_orientation_is_told() -> None:
    data = _large().model_copy(update={"orientation": "canonical"})
    plan = _plan("orientation=canonical", data=data)
    assert plan.changes == ("orientation canonical set by you instead of stored",)
    assert _decision(plan, "orientation").by_rule == "stored"
    auto = _plan("orientation=stored", preset="auto", data=_large())
    assert "orientation stored set by you instead of canonical" in auto.changes


def _promised_again(*settings: str) -> None:
    """What a plan says of more memory is what planning again with it gives."""
    plan = _plan(*settings)
    plans: dict[float | None, Plan] = {gb: _at(gb, *settings) for gb in (16, 24)}
    kept = 0
    for decision in plan.decisions:
        name, _, leaf = decision.key.partition(".")
        for outcome in decision.outcomes:
            again = plans.get(outcome.memory_gb)
            if again is not None and name in again.configurations:
                value = getattr(again.configurations[name], leaf)
                assert outcome.state == "planned", decision.key
                assert outcome.value == (list(value) if isinstance(value, tuple) else value), decision.key
                kept += 1
    assert kept >= 2


def _at(gb: float, *settings: str) -> Plan:
    options = Options().with_settings(["preset=stock", f"memory_gb={gb}", *(f"planning.{one}" for one in settings)])
    return derive(_large(), _LABELS, options)


@pytest.mark.parametrize(
    "settings",
    [
        ["kind=residual"],
        ["3d_fullres.features=[8,16,32,64,80,80]"],
        ["3d_fullres.strides=[[1,1,1],[1,2,2],[4,4,4]]"],
        ["3d_lowres.transpose=2,1,0", "2d.base_features=16"],
        ["configurations=3d_fullres"],
    ],
)
def test_promises_are_kept_beside_what_was_set(settings: list[str]) -> None:
    _promised_again(*settings)


def test_more_memory_may_have_no_room_for_what_was_set() -> None:
    cases = fingerprint([case((200, 256, 256), (1, 1, 1))] * 50)
    options = Options().with_settings(["preset=stock", "memory_gb=3", "planning.configurations=3d_lowres"])
    plan = derive(cases, _LABELS, options)
    outcomes = _decision(plan, "3d_lowres.patch_size").outcomes
    assert {one.memory_gb: one.state for one in outcomes}[9] == "refused"
    more = options.model_copy(update={"memory_gb": 9.0})
    with pytest.raises(InputError, match="no configuration 3d_lowres"):
        derive(cases, _LABELS, more)


def test_a_lower_resolution_with_another_order_of_axes_is_told_in_its_own_order() -> None:
    plan = _plan("3d_lowres.transpose=2,1,0")
    spacing, shape = (_decision(plan, f"3d_lowres.{leaf}") for leaf in ("spacing_mm", "median_shape"))
    assert spacing.inputs["target_spacing_mm"] == [0.75, 0.75, 1]
    assert shape.inputs["fullres_median_shape"] == [512, 512, 432]
    grown = [low / full for low, full in zip(spacing.value, [0.75, 0.75, 1], strict=True)]
    assert max(grown) == pytest.approx(1.03 ** spacing.inputs["steps"])


def test_no_augmentation_is_told_as_set() -> None:
    plan = derive(_large(), _LABELS, Options().with_settings(["preset=stock", "augmentation.strength=none"]))
    for key in ("mirror_axes", "2d.augmentation", "2d.augmentation.intensities"):
        assert _decision(plan, key).options == ("augmentation.strength",)
    assert _decision(plan, "2d.augmentation").by_rule["mirror_axes"] == [0, 1]
    assert (_decision(plan, "mirror_axes").value, _decision(plan, "mirror_axes").by_rule) == ([], [0, 1, 2])


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("planning.mirror_axes=0,2", r"planning\.mirror_axes is 0,2, but augmentation\.strength=none flips nothing"),
        ("planning.2d.mirror_axes=1", r"planning\.2d\.mirror_axes is 1, but augmentation\.strength=none flips nothing"),
    ],
)
def test_axes_are_not_flipped_in_prediction_alone(setting: str, told: str) -> None:
    options = Options().with_settings(["preset=stock", "augmentation.strength=none"])
    with pytest.raises(InputError, match=told):
        derive(_large(), _LABELS, options.with_settings([setting]))
    key, _, _ = setting.partition("=")
    plan = derive(_large(), _LABELS, options.with_settings([f"{key}=[]"]))
    assert all(recipe.augmentation.mirror_axes == () for recipe in plan.training.values())


def test_explanation_and_comparison_tell_it() -> None:
    plan, stock = _plan("kind=residual", "2d.resample_image.order=1"), _plan()
    text = explain(plan)
    paragraph = text[text.index("network.kind = residual") :].split("\n\n")[0]
    assert "rule         set by you; the rule gives plain: the preset's network" in paragraph
    assert "bound        set by you" in paragraph
    assert "changes with the option planning.kind" in paragraph
    value = json.loads(json.dumps(explain_json(plan)))
    assert value["stock"] is False
    (found,) = [item for item in value["decisions"]["2d"] if item["key"] == "2d.resample_image"]
    assert found["value"]["order"] == 1
    assert found["by_rule"]["order"] == 3
    assert found["options"] == ["planning.2d.resample_image.order"]
    assert found["words"]["bound"] == "set by you"
    rows = {key: (a, b) for key, a, b in compare(stock, plan)}
    assert rows["3d_fullres.network.kind"] == ("plain", "residual")
    assert rows["2d.resample_image"] == (
        "method spline; order 3; order separate axis 0; force separate auto; separate threshold 3",
        "method spline; order 1; order separate axis 0; force separate auto; separate threshold 3",
    )
    assert "3d_fullres.resample_image" not in rows
    assert compare(plan, plan) == []


def test_where_the_rules_find_nothing_a_value_may_still_be_set() -> None:
    flat = fingerprint([case((48, 48), (1, 1))] * 20)
    options = Options(preset="stock", memory_gb=1e-7)
    with pytest.raises(InputError, match="does not fit"):
        derive(flat, _LABELS, options)
    plan = derive(flat, _LABELS, options.with_settings(["planning.patch_size=32,32"]))
    assert plan.changes == ("2d: patch_size 32x32 set by you; the rules give none",)
    assert "patch_exceeds_memory" in [item.code for item in plan.warnings]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["3d_fullres.features=[8,16]"],
            "planning.3d_fullres.features does not fit 3d_fullres (3D, 6 stages)",
        ),
        (["3d_fullres.patch_size=64,64"], "planning.3d_fullres.patch_size needs 3 values"),
        (["2d.patch_size=64,64,64"], "planning.2d.patch_size needs 2 values"),
        (["2d.target_spacing_mm=1,1"], "planning.2d.target_spacing_mm needs 3 values"),
        (["2d.mirror_axes=3"], "planning.2d.mirror_axes are numbered 0 to 2"),
        (
            ["base_features=16", "2d.features=[8,8,8,8,8,8,8,8]"],
            "planning.base_features is 16, but planning.2d.features",
        ),
        (
            ["resample_image.method=torch", "resample_image.order=3"],
            "planning.resample_image.order is 3, but the method",
        ),
        (["2d.resample_logits.method=none"], "2d: planning.2d.resample_logits.method cannot be none alone"),
        (["resample_image.method=none", "resample_label.method=spline"], "cannot be none alone"),
        (["use_mask=true,false"], "asks for the mask in channel 0, which is normalised as ct"),
        (["use_mask=true"], "planning.use_mask needs one value for each of 2 channels, got 1"),
        (['statistics=[null,{"mean":3}]'], "channel 1, which is normalised as zscore; only ct has statistics"),
        (['statistics=[{"percentile_00_5":900},null]'], "clips channel 0 to 900 to 150; percentile_00_5 must be below"),
        (["3d_fullres.strides=[[1,1,1]]"], "strides need two stages or more"),
        (
            ["3d_fullres.strides=[[1,1,1],[64,64,64]]", "3d_fullres.patch_size=64,64,64"],
            "planning.3d_fullres.strides leaves one voxel of the patch 64x64x64",
        ),
        (["configurations=2d", "3d_fullres.batch_size=2"], "planning.3d_fullres has values, but this plan has no"),
    ],
)
def test_contradictions_are_one_sentence(settings: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        _plan(*settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_that_is_not_there_has_no_values() -> None:
    with pytest.raises(InputError, match=r"no configuration 3d_lowres, only 2d, 3d_fullres; planning.3d_lowres.target"):
        _plan("3d_lowres.batch_size=2", data=_small())


def test_own_values_lie_over_those_of_all() -> None:
    planning: dict[str, Any] = {
        "batch_size": 4,
        "resample_image": {"order": 1, "separate_threshold": 2.0},
        "by_configuration": {"2d": {"resample_image": {"order": 0}}, "3d_fullres": {"batch_size": 5}},
    }
    asked = Options.model_validate({"planning": planning}).planning
    assert (asked.of("2d").batch_size, asked.of("3d_lowres").batch_size) == (4, 4)
    assert (asked.of("3d_fullres").batch_size, asked.of("3d_cascade_fullres").batch_size) == (5, 5)
    assert asked.of("2d").resample_image.model_dump(exclude_none=True) == {"order": 0, "separate_threshold": 2.0}


_RECIPE = {
    "training": ("poly_exponent=0.8", "warmup_share=0.1", "gradient_clip=1", "weight_average=0.99"),
    "augmentation": ("rotation_degrees=10", "gamma_probability=0.5", "scaling_range=0.8,1.2", "dummy_2d=true"),
}


def test_every_value_of_the_recipe_can_be_set() -> None:
    keys = Options.known_keys()
    # of the plan; of the normalisation; of the angle
    derived = {"mirror_axes", "exchange", "masked_channels", "sample_patch"}
    for field in set(AugmentationSpec.model_fields) - derived:
        assert f"augmentation.{field}" in keys
    for field in set(TrainingSpec.model_fields) - {"augmentation"}:
        assert f"training.{field}" in keys
    settings = [f"{group}.{setting}" for group, values in _RECIPE.items() for setting in values]
    options = Options().with_settings(["preset=stock", "training.deep_supervision=false", *settings])
    plan = derive(_large(), _LABELS, options)
    recipe = plan.training["3d_fullres"]
    assert (recipe.poly_exponent, recipe.warmup_share, recipe.gradient_clip, recipe.weight_average) == (
        0.8,
        0.1,
        1,
        0.99,
    )
    assert not recipe.deep_supervision
    augmentation = recipe.augmentation
    assert (augmentation.rotation_degrees, augmentation.gamma_probability) == (10, 0.5)
    assert (augmentation.scaling_range, augmentation.dummy_2d) == ((0.8, 1.2), True)
    assert not plan.stock
    assert "augmentation.rotation_degrees = 10" in plan.changes
    assert "training.deep_supervision = no" in plan.changes
    geometry, intensities = (_decision(plan, f"3d_fullres.augmentation{leaf}") for leaf in ("", ".intensities"))
    assert geometry.value["dummy_2d"] is True
    assert _differing(geometry) == {
        "rotation_degrees": 30.0,
        "dummy_2d": False,
        "sample_patch": list(_plan().training["3d_fullres"].augmentation.sample_patch),
    }
    assert geometry.options == ("augmentation.rotation_degrees", "augmentation.dummy_2d")
    assert intensities.value["gamma_probability"] == 0.5
    assert _differing(intensities) == {"scaling_range": [0.7, 1.4], "gamma_probability": 0.3}
    training, supervised = (_decision(plan, f"3d_fullres.training{leaf}") for leaf in ("", ".deep_supervision"))
    assert _differing(training) == {
        "poly_exponent": 0.9,
        "warmup_share": 0.0,
        "gradient_clip": 12.0,
        "weight_average": 0.0,
    }
    assert (supervised.inputs, supervised.by_rule) == ({"stages": 6}, True)
    assert supervised.options == ("training.deep_supervision",)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def _differing(decision: Decision) -> dict[str, Any]:
    return {key: value for key, value in decision.by_rule.items() if value != decision.value[key]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["augmentation.scaling_range=1.2,0.8"],
            "augmentation.scaling_range: a range is a smallest and a largest value",
        ),
        (
            ["augmentation.strength=none", "augmentation.gamma_probability=1"],
            "strength none leaves nothing of gamma_prob",
        ),
        (["augmentation.gamma_probability=2"], "option augmentation.gamma_probability: Input should be less than"),
    ],
)
def test_recipes_that_contradict_themselves(settings: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Options().with_settings(settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("strength", ["weak", "strong"])
def test_strengths_of_augmentation(strength: str) -> None:
    usual = _plan().training["3d_fullres"].augmentation
    settings = ["preset=stock", f"augmentation.strength={strength}", "augmentation.gamma_probability=0.7"]
    plan = derive(_large(), _LABELS, Options().with_settings(settings))
    found = plan.training["3d_fullres"].augmentation
    assert found == usual.model_copy(update=STRENGTHS[strength] | {"gamma_probability": 0.7})
    assert (found.sample_patch, found.mirror_axes) == (usual.sample_patch, usual.mirror_axes)
    assert _decision(plan, "3d_fullres.augmentation.intensities").options == (
        "augmentation.strength",
        "augmentation.gamma_probability",
    )
    assert _decision(plan, "3d_fullres.augmentation").options == ()
    assert f"augmentation.strength = {strength}" in plan.changes
    assert not plan.stock
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_deep_supervision_needs_three_stages() -> None:
    with pytest.raises(InputError, match=r"training.deep_supervision does not fit 2d \(2 stages\)"):
        derive(
            fingerprint([case((12, 12, 12), (1, 1, 1))] * 20),
            _LABELS,
            Options().with_settings(["preset=stock", "training.deep_supervision=true"]),
        )
