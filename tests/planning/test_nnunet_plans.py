from __future__ import annotations

import json
from typing import Any

import pytest

from segfit import nnunet
from segfit.errors import InputError

_STATISTICS = {
    "mean": 1.0, "median": 1.0, "std": 1.0, "min": 0.0, "max": 3.0, "percentile_00_5": 0.0, "percentile_99_5": 2.0
}  # fmt: skip
_DATASET: dict[str, Any] = {
    "name": "Dataset002_Heart",
    "modality": {"0": "MRI"},
    "labels": {"background": 0, "heart": 1},
    "numTraining": 20,
    "file_ending": ".nii.gz",
}
_FINGERPRINT: dict[str, Any] = {
    "spacings": [[3.6, 0.625, 0.625]] * 3,
    "shapes_after_crop": [[20, 320, 320]] * 3,
    "median_relative_size_after_cropping": 1.0,
    "foreground_intensity_properties_per_channel": {"0": _STATISTICS},
}


def test_content_of_a_plans_file() -> None:
    plans = nnunet.plans(_DATASET, _FINGERPRINT, "resenc-m", 16)
    assert plans["dataset_name"] == "Dataset002_Heart"
    assert plans["plans_name"] == "nnUNetResEncUNetMPlans"
    assert plans["experiment_planner_used"] == "nnUNetPlannerResEncM"
    assert plans["image_reader_writer"] == "SimpleITKIO"
    assert plans["configurations"]["2d"]["data_identifier"] == "nnUNetPlans_2d"
    assert plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_blocks_per_stage"][:4] == [
        1,
        3,
        4,
        6,
    ]
    assert json.loads(json.dumps(plans)) == plans


def test_input_is_not_shared_with_output() -> None:
    plans = nnunet.plans(_DATASET, _FINGERPRINT)
    plans["foreground_intensity_properties_per_channel"]["0"]["mean"] = 99.0
    plans["configurations"]["2d"]["resampling_fn_data_kwargs"]["order"] = 99
    assert _STATISTICS["mean"] == 1.0
    assert plans["configurations"]["3d_fullres"]["resampling_fn_data_kwargs"]["order"] == 3


@pytest.mark.parametrize(
    ("dataset", "reader"),
    [
        ({"file_ending": ".nii"}, "NibabelIO"),
        ({"file_ending": ".mha"}, "SimpleITKIO"),
        ({"file_ending": ".tif"}, "Tiff3DIO"),
        ({"file_ending": ".tif", "overwrite_image_reader_writer": "None"}, "Tiff3DIO"),
        ({"overwrite_image_reader_writer": "NibabelIOWithReorient"}, "NibabelIOWithReorient"),
    ],
)
def test_reader(dataset: dict[str, Any], reader: str) -> None:
    assert nnunet.plans(_DATASET | dataset, _FINGERPRINT)["image_reader_writer"] == reader


@pytest.mark.parametrize(
    ("dataset", "fingerprint", "message"),
    [
        ({"modality": {}}, {}, 'needs "channel_names"'),
        ({"modality": {"0": 5}}, {}, 'needs "channel_names"'),
        ({"labels": [0, 1]}, {}, 'needs "labels"'),
        ({"labels": {"background": 0}}, {}, "one class or more"),
        ({"numTraining": 0}, {}, 'needs "numTraining"'),
        ({"numTraining": "20"}, {}, 'needs "numTraining"'),
        ({"file_ending": ".xyz"}, {}, 'needs a "file_ending" among .png'),
        ({}, {"spacings": []}, 'needs "spacings"'),
        ({}, {"spacings": [[1.0, 1.0]] * 3}, 'entry 0 of the fingerprint\'s "spacings"'),
        ({}, {"spacings": [[1.0, 1.0, float("nan")]] * 3}, "three numbers above zero"),
        ({}, {"shapes_after_crop": [[20, 320, 0]] * 3}, "three numbers above zero"),
        ({}, {"shapes_after_crop": [[20, 320, 320]]}, "3 spacings and 1 shapes"),
        ({}, {"median_relative_size_after_cropping": None}, "median_relative_size_after_cropping"),
        ({}, {"foreground_intensity_properties_per_channel": {}}, "each of 1 channels"),
        ({}, {"foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}}}, "channel 0, median"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    dataset: dict[str, Any], fingerprint: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        nnunet.plans(_DATASET | dataset, _FINGERPRINT | fingerprint)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("memory_gb", [0, -1, float("nan"), "8"])
def test_bad_memory_targets_are_refused(memory_gb: Any) -> None:
    with pytest.raises(InputError, match="above zero"):
        nnunet.plans(_DATASET, _FINGERPRINT, memory_gb=memory_gb)


def test_presets_that_the_reference_does_not_have() -> None:
    with pytest.raises(InputError, match="did you mean 'resenc-l'"):
        nnunet.plans(_DATASET, _FINGERPRINT, "resenc_l")
    with pytest.raises(InputError, match="nnU-Net has stock"):
        nnunet.plans(_DATASET, _FINGERPRINT, "auto")
