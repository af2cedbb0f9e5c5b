"""What the user asks for: one frozen tree of options, settable by dotted keys.

An option left at None is decided by the planner. Nothing here is read from the environment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from segfit.errors import InputError, nearest
from segfit.files import Record

__all__ = [
    "AugmentationOptions",
    "DatasetOptions",
    "InferenceOptions",
    "NormalizationScheme",
    "Options",
    "PlanningOptions",
    "Preset",
    "TrainingOptions",
    "parse_seconds",
]

NormalizationScheme = Literal["ct", "zscore", "none", "rescale_to_0_1", "rgb_to_0_1"]
Preset = Literal["auto", "stock", "resenc-m", "resenc-l", "resenc-xl"]


class DatasetOptions(Record):
    """How the files of a dataset are taken."""

    skip_incomplete: bool = Field(False, description="leave out cases with missing or unusable files")
    resample_labels: bool = Field(False, description="bring labels that lie on another grid onto that of their image")


class PlanningOptions(Record):
    """Overrides of values that the planner derives."""

    configurations: tuple[str, ...] | None = Field(None, description="configurations to train, e.g. 3d_fullres,2d")
    folds: tuple[int, ...] | None = Field(None, description="folds to train, e.g. 0,1,2,3,4")
    splits: Literal["balanced", "reference"] | Path | None = Field(
        None, description="how cases are split into folds: balanced, reference, or a file of folds"
    )
    target_spacing_mm: tuple[float, ...] | None = Field(None, description="target spacing, array order z,y,x")
    patch_size: tuple[int, ...] | None = Field(None, description="patch size in voxels, array order")
    batch_size: int | None = Field(None, ge=1, description="batch size")
    base_features: int | None = Field(None, ge=2, description="features of the first network stage")
    features: tuple[int, ...] | None = Field(None, description="features per network stage, full resolution first")
    strides: tuple[tuple[int, ...], ...] | None = Field(None, description="strides per stage, [[1,1,1],[2,2,2],...]")
    kernels: tuple[tuple[int, ...], ...] | None = Field(None, description="kernel sizes per stage, [[1,3,3],...]")
    encoder_convs: tuple[int, ...] | None = Field(None, description="convolutions or blocks per encoder stage")
    decoder_convs: tuple[int, ...] | None = Field(None, description="convolutions per decoder level, lowest first")
    batch_dice: bool | None = Field(None, description="Dice over the whole batch instead of each sample")
    normalization: tuple[NormalizationScheme, ...] | None = Field(None, description="scheme of every channel")
    transpose: tuple[int, ...] | None = Field(None, description="order in which the network sees the axes")
    orientation: Literal["canonical", "stored"] | None = Field(None, description="axes seen by the network")
    mirror_axes: tuple[int, ...] | None = Field(None, description="spatial axes flipped in training and prediction")


class TrainingOptions(Record):
    """Overrides of the training recipe."""

    steps: int | None = Field(None, ge=1, description="optimiser steps, instead of a time budget")
    optimizer: Literal["sgd", "adamw"] | None = Field(None, description="optimiser")
    learning_rate: float | None = Field(None, gt=0, description="initial learning rate")
    momentum: float | None = Field(None, ge=0, lt=1, description="momentum (SGD) or beta1 (AdamW)")
    weight_decay: float | None = Field(None, ge=0, description="weight decay")
    foreground_share: float | None = Field(None, ge=0, le=1, description="share of samples forced to hold foreground")
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="arithmetic of the forward pass")
    channels_last: bool | None = Field(None, description="memory layout of the network; measured when absent")
    checkpoint_seconds: float = Field(60.0, gt=0, description="seconds between two saved states")


class AugmentationOptions(Record):
    """Overrides of the augmentation."""

    strength: Literal["none", "stock"] | None = Field(None, description="augmentation family")


class InferenceOptions(Record):
    """Overrides of prediction."""

    tile_step: float = Field(0.5, gt=0, le=1, description="tile step as a share of the patch")
    mirror: bool | None = Field(None, description="test-time mirroring")


class Options(Record):
    """Everything a user can ask for."""

    preset: Preset = Field("auto", description="planning preset")
    time_s: float | None = Field(None, gt=0, description="time budget of the whole run in seconds")
    memory_gb: float | None = Field(None, gt=0, description="memory target in GB; measured when absent")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    seed: int = Field(0, ge=0, description="seed of all random streams")
    workers: int | None = Field(None, ge=1, description="parallel cases; from the CPU affinity when absent")
    dataset: DatasetOptions = DatasetOptions()
    planning: PlanningOptions = PlanningOptions()
    training: TrainingOptions = TrainingOptions()
    augmentation: AugmentationOptions = AugmentationOptions()
    inference: InferenceOptions = InferenceOptions()

    def with_settings(self, settings: Sequence[str]) -> Options:
        """Return a copy with ``key=value`` settings applied; values are JSON, words, or comma-separated lists.

        Raises `InputError` naming the nearest known key for an unknown one, and the reason for a refused value.
        """
        tree = self.model_dump()
        known, lists = self.known_keys(), {key for key, kind in _leaves(type(self), "") if "tuple" in str(kind)}
        for setting in settings:
            key, separator, text = setting.partition("=")
            if not separator:
                raise InputError(f"--set expects KEY=VALUE, got {setting!r}; for example --set training.steps=5000")
            if key not in known:
                raise InputError(f"unknown option {key!r}{nearest(key, known)}")
            node = tree
            *parents, leaf = key.split(".")
            for parent in parents:
                node = node[parent]
            value = _parse_value(text)
            node[leaf] = [value] if key in lists and value is not None and not isinstance(value, list) else value
        try:
            return Options.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
            raise InputError(f"option {key}: {first['msg']}, got {first['input']!r}") from None

    @classmethod
    def known_keys(cls) -> list[str]:
        """Return every dotted key that can be set."""
        return [key for key, _ in _leaves(cls, "")]


def _leaves(model: type[BaseModel], prefix: str) -> list[tuple[str, Any]]:
    """Return dotted key and type of every value."""
    keys: list[tuple[str, Any]] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += _leaves(kind, f"{prefix}{name}.")
        else:
            keys.append((prefix + name, kind))
    return keys


def _parse_value(text: str) -> Any:
    if "," in text and not text.startswith(("[", "{", '"')):
        return [_parse_value(part.strip()) for part in text.split(",") if part.strip()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def parse_seconds(text: str) -> float:
    """Return the seconds of ``90``, ``45s``, ``20m``, ``2h``, ``1h30m`` or ``3d``; raise `InputError` otherwise."""
    match = _TIME.fullmatch(text.strip().lower())
    if not match or not any(match.groups()):
        raise InputError(f"a time is written like 20m, 2h, 1h30m or 3d, got {text!r}")
    seconds = sum(float(v) * unit for v, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True) if v)
    if seconds <= 0:
        raise InputError(f"a time budget must be above zero, got {text!r}")
    return seconds
