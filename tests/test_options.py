"""Options: every value can be set by its dotted key, and a slip gets the nearest known one."""

from __future__ import annotations

import inspect
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from segfit.errors import InputError
from segfit.files import Record
from segfit.options import ConfigurationOptions, Options, TrainingOptions, parse_seconds, time_setting


def test_settings_reach_their_place() -> None:
    options = Options().with_settings(
        [
            "preset=resenc-m",
            "training.steps=5000",
            "training.learning_rate=1e-3",
            "planning.patch_size=64,64,32",
            "planning.configurations=2d,3d_fullres",
            "planning.mirror_axes=[0, 2]",
            "inference.mirror=false",
        ]
    )
    assert options.preset == "resenc-m"
    assert options.training.steps == 5000
    assert options.training.learning_rate == 1e-3
    assert options.planning.patch_size == (64, 64, 32)
    assert options.planning.configurations == ("2d", "3d_fullres")
    assert options.planning.mirror_axes == (0, 2)
    assert options.inference.mirror is False
    assert options.seed == Options().seed  # the rest stays


def test_values_of_one_configuration() -> None:
    options = Options().with_settings(["planning.2d.patch_size=64,64", "planning.2d.resample_image.order=1"])
    assert list(options.planning.by_configuration) == ["2d"]
    assert options.planning.by_configuration["2d"].patch_size == (64, 64)
    assert options.planning.of("2d").resample_image.order == 1
    own = set(ConfigurationOptions.model_fields)
    assert options.planning.of("3d_fullres").model_dump(include=own) == ConfigurationOptions().model_dump()
    assert Options.model_validate_json(options.model_dump_json()) == options


def test_nothing_set_changes_nothing() -> None:
    assert Options().with_settings([]) == Options()
    assert Options(seed=3).with_settings(["training.steps=null"]) == Options(seed=3)


def test_a_loss_is_a_sum_of_terms_in_any_order() -> None:
    options = Options().with_settings(["training.loss=CE+dice"])
    assert options.training.loss == "dice+ce"
    assert Options().with_settings(["training.loss=Own-Things:sQ+CE"]).training.loss == "ce+Own-Things:sQ"
    asked = Options().with_settings(["training.loss=tversky+topk", "training.tversky_alpha=0.2"]).training
    assert asked.values == {"loss": "tversky+topk", "tversky_alpha": 0.2}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.loss=dice+top", "option training.loss: unknown term 'top' .*did you mean 'topk'"),
        ("training.loss=", "option training.loss: unknown term ''"),
        ("training.loss=ce+my loss:a", "option training.loss: .*"),
        ("planning.network=swin", "option planning.network: .*pattern"),
        ("augmentation.plugins=a:b,c", "option augmentation.plugins: .*pattern"),
        ("training.loss=ce+ce", "option training.loss: a term is named once"),
        ("training.loss=3", "option training.loss: .*string"),
        ("training.schedule=linear", "option training.schedule: .*'poly' or 'cosine', got 'linear'"),
        ("training.oversampling=often", "option training.oversampling: .*'fixed' or 'probabilistic', got 'often'"),
        ("training.focal_exponent=1", "focal_exponent needs the term focal in training.loss"),
        ("training.steps", "expects KEY=VALUE, got 'training.steps'"),
        ("training.stepps=5", r"unknown option 'training.stepps' \(did you mean 'training.steps'\?\)"),
        ("training=5", "unknown option 'training'"),
        ("training.steps=0", "option training.steps: .*greater than or equal to 1, got 0"),
        ("training.steps=many", "option training.steps: .*valid integer.*, got 'many'"),
        (
            "planning.nonsense=1",
            "unknown option 'planning.nonsense'.*; known under planning: .*patch_size, .*kind, .*2d",
        ),
        (
            "planning.2d.patch=1",
            r"did you mean 'planning.2d.patch_size'\?\); known under planning.2d: target_spacing_mm",
        ),
        ("planning.4d.kind=plain", "unknown option 'planning.4d.kind'"),
        ("planning.kind=vnet", "option planning.kind: .*'residual' or 'mednext', got 'vnet'"),
        ("planning.resample_image.order=7", "option planning.resample_image.order: Input should be 0, 1 or 3, got 7"),
        (
            "planning.2d.resample_label.order=3",
            "option planning.2d.resample_label.order: Input should be 0 or 1, got 3",
        ),
        ("planning.resample_image.method=cubic", "'spline', 'torch' or 'none', got 'cubic'"),
        ("planning.resample_image.force_separate=maybe", "option planning.resample_image.force_separate: .*'auto'"),
        ("preset=best", "option preset: .*'auto', 'stock'.*, got 'best'"),
    ],
)
def test_slips_are_explained(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Options().with_settings([setting])


class Holder(Record):
    options: Options


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"preset": "best"}, "preset"),
        ({"presett": "auto"}, "presett"),
        ({"time_s": float("nan")}, "time_s"),
        ({"training": 3}, "training"),
        ({"training": {"steps": 0}}, "training.steps"),
        ({"training": {"steps": 5, "stepps": 5}}, "training.stepps"),
        ({"augmentation": {"gamma_range": (2, 1)}}, "augmentation.gamma_range"),
        ({"planning": {"splits": 3}}, "planning.splits"),
        ({"planning": {"by_configuration": {"2d": {"patch_size": ["a"]}}}}, "planning.2d.patch_size"),
    ],
)
def test_python_is_told_what_the_command_line_is_told(values: dict[str, Any], key: str) -> None:
    doors: list[Callable[[], object]] = [lambda: Options(**values), lambda: Options.model_validate(values)]
    if values.get("time_s") is None:
        doors.append(lambda: Options.model_validate_json(json.dumps(values)))
    for door in doors:
        with pytest.raises(InputError, match=rf"option '?{re.escape(key)}\b") as caught:
            door()
        assert caught.value.action or "range" in key
    with pytest.raises(ValidationError) as inside:  # what holds options says itself where they are wrong
        Holder.model_validate({"options": values})
    assert inside.value.errors()[0]["loc"][0] == "options"


def test_parts_of_the_options_are_doors_too() -> None:
    with pytest.raises(InputError, match="option steps: "):
        TrainingOptions(steps=0)
    with pytest.raises(InputError, match="unknown option 'presets'"):
        Options.model_validate({"presets": 3})
    for content in ("{", "3"):
        with pytest.raises(InputError, match=r"^options: "):
            Options.model_validate_json(content)


def test_options_stay_frozen_equal_and_picklable() -> None:
    options = Options(seed=3, training=TrainingOptions(steps=5), planning={"folds": (0,)})  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(options)) == options == Options.model_validate(options.model_dump())
    assert (options.training.steps, options.planning.folds) == (5, (0,))
    assert list(inspect.signature(Options).parameters) == list(Options.model_fields)
    with pytest.raises(ValidationError):
        options.seed = 4  # type: ignore[misc]


def test_known_keys_are_the_leaves() -> None:
    keys = Options.known_keys()
    assert "training.steps" in keys
    assert "seed" in keys
    assert "training" not in keys
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("1.5", 1.5),
        ("45s", 45),
        ("45 sec", 45),
        ("20m", 1200),
        ("5min", 300),
        ("5 min", 300),
        ("2h", 7200),
        ("2h30m", 9000),
        ("2h 30min", 9000),
        ("2h30min10s", 9010),
        ("1.5H", 5400),
        ("3d", 259200),
    ],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", " ", "soon", "5 weeks", "-2h", "0m", "2h h", "2h30", "1 0", "30m2h", "2:30"])
def test_no_times(text: str) -> None:
    with pytest.raises(InputError, match="a time"):
        parse_seconds(text)


def test_options_of_an_older_name_are_read_under_the_present_one() -> None:
    asked = {"resample_scores": {"order": 0}, "by_configuration": {"2d": {"resample_scores": {"order": 3}}}}
    planning = Options.model_validate({"planning": asked}).planning
    assert planning.resample_logits.order == 0
    assert planning.of("2d").resample_logits.order == 3


@pytest.mark.parametrize(
    ("time", "setting"),
    [
        ("2h", "time_s=7200.0"),
        ("+30m", "time_s=+1800.0"),
        (" + 90 ", "time_s=+90.0"),
        (60, "time_s=60"),
        (1.5, "time_s=1.5"),
    ],
)
def test_a_time_is_a_setting_and_may_be_added(time: str | float, setting: str) -> None:
    assert time_setting(time) == setting


@pytest.mark.parametrize("time", ["+", "+0s", "++30m", "+-30m", "-30m"])
def test_what_is_no_time_cannot_be_added(time: str) -> None:
    with pytest.raises(InputError):
        time_setting(time)
