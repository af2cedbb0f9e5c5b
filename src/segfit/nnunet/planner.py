"""The plans file that nnU-Net 2.8.1's planner would write."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from segfit.errors import InputError, nearest
from segfit.files import first_fault
from segfit.nnunet.plans_reader import READER_OF_ENDING, channel_names_of
from segfit.nnunet.plans_writer import configuration_entry
from segfit.options import CASCADE, PlanningOptions
from segfit.planning.configurations import configuration
from segfit.planning.drafts import Draft, Images, drafts
from segfit.planning.normalization import MASK_BELOW, scheme_of
from segfit.planning.patch import MemoryBudget
from segfit.planning.presets import RULES, Rules
from segfit.planning.trace import Asked, Trace
from segfit.specs import IntensityStatistics, Normalization

__all__ = ["plans"]

_SHARED_DATA = {"2d": "nnUNetPlans_2d", "3d_fullres": "nnUNetPlans_3d_fullres"}
"""Residual planners share the default planner's preprocessed data."""

_NOTHING_SET = PlanningOptions()
_LARGEST = 1e12
"""No spacing, size or count of a real dataset is larger than this, no spacing smaller than its inverse."""


def plans(
    dataset_json: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    preset: str = "stock",
    memory_gb: float | None = None,
    *,
    dataset_name: str | None = None,
) -> dict[str, Any]:
    """Return the content of the plans file that nnU-Net's planner would write.

    Parameters
    ----------
    dataset_json, fingerprint : content of ``dataset.json`` and ``dataset_fingerprint.json``
    preset : "stock" (the default planner), "resenc-m", "resenc-l" or "resenc-xl"
    memory_gb : memory target; the preset's own when absent
    dataset_name : folder name of the dataset; the `name` of ``dataset.json`` when absent

    Raises `InputError` for content that is incomplete or contradicts itself.
    """
    rules, given = _rules(preset, memory_gb), _given(dataset_json, fingerprint)
    budget = MemoryBudget(rules=rules, memory_gb=memory_gb or rules.memory_gb, heads=given.heads)
    drafted = drafts(given.images, budget, _NOTHING_SET, Trace())
    forward = list(drafted["2d"].transpose)
    medians = [np.median(values, axis=0)[forward] for values in (given.images.spacings, given.images.shapes)]
    return {
        "dataset_name": dataset_name or str(dataset_json.get("name", "Dataset")),
        "plans_name": rules.plans_name,
        "original_median_spacing_after_transp": [float(v) for v in medians[0]],
        "original_median_shape_after_transp": [round(float(v)) for v in medians[1]],
        "image_reader_writer": _reader(dataset_json, given.images.shapes),
        "transpose_forward": forward,
        "transpose_backward": [forward.index(axis) for axis in range(3)],
        "configurations": {name: _entry(name, drafted, given, rules) for name in drafted},
        "experiment_planner_used": rules.planner,
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": copy.deepcopy(dict(given.intensities)),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What nnU-Net's planner goes by, checked."""

    images: Images
    heads: int
    normalization: tuple[Normalization, ...]
    intensities: Mapping[str, Any]


def _rules(preset: str, memory_gb: float | None) -> Rules:
    if preset not in RULES:
        raise InputError(f"unknown preset {preset!r}{nearest(preset, list(RULES))}", f"nnU-Net has {', '.join(RULES)}")
    if memory_gb is not None and not (_is_number(memory_gb) and memory_gb > 0):
        raise InputError(f"the memory target must be a number of GB above zero, got {memory_gb!r}")
    return RULES[preset]


def _given(dataset_json: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> _Given:
    if not isinstance(dataset_json, Mapping) or not isinstance(fingerprint, Mapping):
        raise InputError("dataset.json and the fingerprint must be JSON objects")
    channels = channel_names_of(dataset_json)
    labels = dataset_json.get("labels")
    if not isinstance(labels, Mapping) or "background" not in labels or len(labels) < 2:
        raise InputError(f'dataset.json needs "labels" with "background" and one class or more, got {labels!r}')
    num_training = dataset_json.get("numTraining")
    if not (_is_number(num_training) and isinstance(num_training, int) and num_training >= 1):
        raise InputError(f'dataset.json needs "numTraining", the number of training cases, got {num_training!r}')
    spacings = _per_case(fingerprint, "spacings")
    shapes = _per_case(fingerprint, "shapes_after_crop")
    if len(spacings) != len(shapes):
        raise InputError(
            f"the fingerprint has {len(spacings)} spacings and {len(shapes)} shapes", "it must have one of each"
        )
    relative_size = fingerprint.get("median_relative_size_after_cropping")
    if not _is_number(relative_size):
        raise InputError(f'the fingerprint needs "median_relative_size_after_cropping", got {relative_size!r}')
    schemes = [scheme_of(name) for name in channels]
    return _Given(
        images=Images(spacings=spacings, shapes=shapes, num_training=num_training, ndim=3),
        heads=len(labels),
        normalization=tuple(
            [Normalization(scheme=it, use_mask=it == "zscore" and relative_size < MASK_BELOW) for it in schemes]
        ),
        intensities=_intensities(fingerprint, len(channels)),
    )


def _entry(name: str, drafted: Mapping[str, Draft], given: _Given, rules: Rules) -> dict[str, Any]:
    """Return one configuration as the plans file has it."""
    if name == CASCADE:
        return {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    item = configuration(
        name,
        drafted,
        given.images,
        Asked(_NOTHING_SET, Trace(), name),
        normalization=given.normalization,
        in_channels=len(given.normalization),
        num_outputs=given.heads,
    )
    shared = rules.kind == "residual" and name in _SHARED_DATA
    entry = configuration_entry(item, _SHARED_DATA[name] if shared else f"{rules.plans_name}_{name}")
    if name == "3d_lowres":
        whole = [int(n) for n in item.median_shape]
        entry |= {"median_image_size_in_voxels": whole, "next_stage": CASCADE}
    return entry


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _per_case(fingerprint: Mapping[str, Any], key: str) -> NDArray[np.float64]:
    """Return a list of three numbers per case as an array ``(cases, 3)``."""
    rows = fingerprint.get(key)
    if not isinstance(rows, list | tuple) or not rows:
        raise InputError(f'the fingerprint needs "{key}" with three numbers per case, got {rows!r}')
    for index, row in enumerate(rows):
        fine = isinstance(row, list | tuple) and len(row) == 3 and all(_is_number(v) and v >= 1 / _LARGEST for v in row)
        if not fine:
            raise InputError(
                f'entry {index} of the fingerprint\'s "{key}" must be three numbers above zero, got {row!r}'
            )
    return np.array(rows, dtype=np.float64)


def _intensities(fingerprint: Mapping[str, Any], num_channels: int) -> Mapping[str, Any]:
    key = "foreground_intensity_properties_per_channel"
    intensities = fingerprint.get(key)
    if not isinstance(intensities, Mapping) or set(intensities) != {str(c) for c in range(num_channels)}:
        got = sorted(intensities) if isinstance(intensities, Mapping) else intensities
        raise InputError(
            f'the fingerprint\'s "{key}" must have one entry for each of {num_channels} channels, got {got!r}'
        )
    for channel, values in intensities.items():
        try:
            IntensityStatistics.model_validate(values)
        except ValidationError as error:
            raise InputError(f"the fingerprint's intensities of channel {channel}, {first_fault(error)}") from None
    return intensities


def _reader(dataset_json: Mapping[str, Any], shapes: NDArray[np.float64]) -> str:
    """Return the reader nnU-Net would choose; stacks in .tif files are read by the TIFF reader."""
    asked = dataset_json.get("overwrite_image_reader_writer", "None")
    if asked != "None":
        return str(asked)
    ending = dataset_json.get("file_ending")
    if not isinstance(ending, str) or ending.lower() not in READER_OF_ENDING:
        raise InputError(f'dataset.json needs a "file_ending" among {", ".join(READER_OF_ENDING)}, got {ending!r}')
    reader = READER_OF_ENDING[ending.lower()]
    return "Tiff3DIO" if ending.lower() == ".tif" and (shapes[:, 0] > 1).any() else reader
