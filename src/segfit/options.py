"""What the user asks for: one frozen tree of options, settable by dotted keys.

An option left at None is decided by the planner. Nothing here is read from the environment.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    TypeAdapter,
    model_validator,
)

from segfit.errors import InputError, nearest
from segfit.plugins import PluginName
from segfit.settable import BY_NAME, Settable, leaves, parse_value, unknown

__all__ = [
    "CASCADE",
    "CONFIGURATION_NAMES",
    "LOGITS_NAMES",
    "LOGITS_NAME_IN_KEYS",
    "LOSS_TERMS",
    "SMALLEST_TILE_STEP",
    "AugmentationOptions",
    "ConfigurationName",
    "ConfigurationOptions",
    "DatasetOptions",
    "InferenceOptions",
    "LabelResamplingOptions",
    "LabelUse",
    "Loss",
    "ModelOptions",
    "NormalizationScheme",
    "Options",
    "PlanningOptions",
    "Preset",
    "ResamplingOptions",
    "StatisticsOptions",
    "TrainingOptions",
    "parse_seconds",
    "require_settings",
    "time_setting",
]


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] <= value[1]:
        raise ValueError("a range is a smallest and a largest value, none below zero")
    return value


LOSS_TERMS = ("dice", "tversky", "cldice", "ce", "topk", "focal")
"""What a loss may be the sum of, in the order in which it is written."""


_PLUGIN = TypeAdapter(PluginName)


def _loss(value: str) -> str:
    terms = [term if ":" in term else term.lower() for term in value.split("+")]
    own = [term for term in terms if ":" not in term]
    for term in own:
        if term not in LOSS_TERMS:
            known = f"{', '.join(LOSS_TERMS)}, and PACKAGE:NAME of a plug-in"
            raise ValueError(f"unknown term {term!r}{nearest(term, LOSS_TERMS)}; known: {known}")
    if len(set(terms)) < len(terms):
        raise ValueError("a term is named once")
    others = [_PLUGIN.validate_python(term) for term in terms if ":" in term]
    return "+".join([*sorted(own, key=LOSS_TERMS.index), *others])


Loss = Annotated[str, AfterValidator(_loss)]
"""A sum of terms, such as ``dice+ce``, of which those of plug-ins are named ``PACKAGE:NAME``."""
SMALLEST_TILE_STEP = 0.05  # share of the patch; below, a voxel of a volume is seen 8000 times
NormalizationScheme = Literal["ct", "zscore", "none", "rescale_to_0_1", "rgb_to_0_1"]
LabelUse = Literal["classes", "exclusive", "objects-as-foreground", "objects-as-boundary"]
SelectionRule = Literal["beyond-chance", "nnunet"]
Preset = Literal["auto", "stock", "resenc-m", "resenc-l", "resenc-xl"]
NetworkKind = Literal["plain", "residual", "mednext"]
LOGITS_NAMES = AliasChoices("resample_logits", "resample_scores")
"""The name of how logits are resampled, and the one that older documents have."""
LOGITS_NAME_IN_KEYS = "resample_scores"
"""In the keys and identities of results, which were given first when it was called so: they are dumped by alias."""
_Probability = Annotated[float, Field(ge=0, le=1)]
_Radius = Annotated[float, Field(ge=0, le=32)]
_Radii = Annotated[tuple[_Radius, _Radius], Field(description="in voxels"), AfterValidator(_ascending)]
_Range = Annotated[tuple[float, float], Field(description="smallest and largest value"), AfterValidator(_ascending)]
CASCADE: Final = "3d_cascade_fullres"
"""The second stage of a cascade, which sees what 3d_lowres predicted for cases that this had not been trained on."""

ConfigurationName = Literal["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"]

CONFIGURATION_NAMES: tuple[ConfigurationName, ...] = get_args(ConfigurationName)
"""The configurations that a plan may have, in its order."""


class DatasetOptions(Settable):
    """How the files of a dataset are taken."""

    skip_incomplete: bool = Field(False, description="leave out cases with missing or unusable files")
    resample_labels: bool = Field(False, description="bring labels that lie on another grid onto that of their image")
    labels: LabelUse = Field(
        "classes",
        description="what label values are: classes (exclusive: also where masks overlap much), or numbers of objects,"
        " taken as one class (objects-as-foreground) or as interior and boundary (objects-as-boundary)",
    )
    groups: Literal["names", "none"] | None = Field(
        None, description="groups of cases that their names say: names or none; unset: if clear and folds are balanced"
    )


class ResamplingOptions(Settable):
    """How one kind of volume is resampled, under the names of the plan."""

    method: Literal["spline", "torch", "none"] | None = Field(None, description="spline, torch (linear) or none")
    order: Literal[0, 1, 3] | None = Field(None, description="spline order: 0 nearest, 1 linear, 3 cubic")
    order_separate_axis: Literal[0, 1, 3] | None = Field(None, description="order along an axis resampled by itself")
    force_separate: Literal[True, False, "auto"] | None = Field(
        None, description="the coarsest axis by itself: true always, false never, auto beyond the threshold"
    )
    separate_threshold: float | None = Field(None, ge=1, description="ratio of spacings beyond which auto separates")


class LabelResamplingOptions(ResamplingOptions):
    """How label maps are resampled: by vote, and never between slices of an axis resampled by itself."""

    order: Literal[0, 1] | None = Field(None, description="0 nearest, 1 the vote of linear weights")
    order_separate_axis: Literal[0] | None = Field(None, description="order along an axis resampled by itself")


class StatisticsOptions(Settable):
    """The numbers that a ct channel is clipped and scaled by."""

    mean: float | None = None
    std: float | None = Field(None, gt=0)
    percentile_00_5: float | None = None
    percentile_99_5: float | None = None


class ConfigurationOptions(Settable):
    """Overrides of values that the planner derives for a configuration; None leaves a value to its rule."""

    target_spacing_mm: tuple[float, ...] | None = Field(None, description="target spacing, array order z,y,x")
    patch_size: tuple[int, ...] | None = Field(None, description="patch size in voxels, array order")
    batch_size: int | None = Field(None, ge=1, le=2**31, description="batch size")
    kind: NetworkKind | None = Field(None, description="plain U-Net, residual encoder, or MedNeXt")
    network: PluginName | None = Field(None, description="network of a plug-in, PACKAGE:NAME, in place of the U-Net")
    norm: Literal["instance", "batch"] | None = Field(None, description="normalisation between layers")
    base_features: int | None = Field(None, ge=2, description="features of the first network stage")
    expansion: int | None = Field(None, ge=1, le=64, description="of features within the blocks of a MedNeXt")
    features: tuple[int, ...] | None = Field(None, description="features per network stage, full resolution first")
    strides: tuple[tuple[int, ...], ...] | None = Field(None, description="strides per stage, [[1,1,1],[2,2,2],...]")
    kernels: tuple[tuple[int, ...], ...] | None = Field(None, description="kernel sizes per stage, [[1,3,3],...]")
    encoder_convs: tuple[int, ...] | None = Field(None, description="convolutions or blocks per encoder stage")
    decoder_convs: tuple[int, ...] | None = Field(None, description="convolutions per decoder level, lowest first")
    batch_dice: bool | None = Field(None, description="Dice over the whole batch instead of each sample")
    normalization: tuple[NormalizationScheme, ...] | None = Field(None, description="scheme of every channel")
    use_mask: tuple[bool, ...] | None = Field(None, description="zscore inside the non-zero mask, for every channel")
    statistics: tuple[StatisticsOptions | None, ...] | None = Field(
        None, description="mean, std, percentile_00_5 and percentile_99_5 of ct channels, one object per channel"
    )
    transpose: tuple[int, ...] | None = Field(None, description="order in which the network sees the axes")
    mirror_axes: tuple[int, ...] | None = Field(None, description="spatial axes flipped in training and prediction")
    resample_image: ResamplingOptions = ResamplingOptions()
    resample_label: LabelResamplingOptions = LabelResamplingOptions()
    resample_logits: ResamplingOptions = Field(
        ResamplingOptions(), validation_alias=LOGITS_NAMES, serialization_alias=LOGITS_NAME_IN_KEYS
    )


class PlanningOptions(ConfigurationOptions):
    """Overrides of values that the planner derives: of all configurations, or of one of them."""

    configurations: tuple[str, ...] | None = Field(None, description="configurations to train, e.g. 3d_fullres,2d")
    folds: tuple[int, ...] | None = Field(None, description="folds to train, e.g. 0,1,2,3,4")
    splits: Annotated[
        Literal["balanced", "nnunet"] | Path | None,
        BeforeValidator(lambda value: "nnunet" if value == "reference" else value),  # its old name
    ] = Field(None, description="how cases are split into folds: balanced, nnunet, or a file of folds")
    orientation: Literal["canonical", "stored"] | None = Field(None, description="axes seen by the network")
    plan_from: str | None = Field(None, description="project or plans.json whose plan is taken over")
    by_configuration: dict[ConfigurationName, ConfigurationOptions] = Field(
        {}, description="the same for one configuration, set as planning.3d_fullres.batch_size"
    )

    def of(self, name: str) -> ConfigurationOptions:
        """Return what is asked of one configuration: its own values, else those of all configurations.

        The second stage of a cascade also takes the values of 3d_fullres, which it repeats.
        """
        keys = ("3d_fullres", name) if name == CASCADE else (name,)
        own = [item for key in keys for known, item in self.by_configuration.items() if known == key]
        if not own:
            return self
        tree = self.model_dump(include=set(ConfigurationOptions.model_fields))
        for item in own:
            tree = _laid_over(tree, item.model_dump())
        return ConfigurationOptions.model_validate(tree)


def _laid_over(tree: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with every value of `own` that is not None."""
    result = dict(tree)
    for key, value in own.items():
        if isinstance(value, dict):
            result[key] = _laid_over(tree[key], value)
        elif value is not None:
            result[key] = value
    return result


class TrainingOptions(Settable):
    """Overrides of the training recipe."""

    start_from: str | None = Field(None, description="model that the training starts from")
    steps: int | None = Field(None, ge=1, description="optimiser steps, instead of a time budget")
    loss: Loss | None = Field(None, description="sum of dice, tversky, cldice, ce, topk, focal, such as dice+topk")
    topk_share: float | None = Field(None, gt=0, le=1, description="share of the voxels, the worst, that topk looks at")
    focal_exponent: float | None = Field(None, ge=0, description="how far focal turns from voxels that are right")
    tversky_alpha: float | None = Field(None, ge=0, le=1, description="what tversky takes for false foreground")
    tversky_beta: float | None = Field(None, ge=0, le=1, description="what tversky takes for missed foreground")
    cldice_steps: int | None = Field(None, ge=1, le=50, description="voxels that cldice peels off to find centre lines")
    optimizer: Literal["sgd", "adamw", "muon"] | None = Field(None, description="optimiser")
    learning_rate: float | None = Field(None, gt=0, description="initial learning rate")
    momentum: float | None = Field(None, ge=0, lt=1, description="momentum (SGD, Muon) or beta1 (AdamW)")
    weight_decay: float | None = Field(None, ge=0, description="weight decay")
    schedule: Literal["poly", "cosine"] | None = Field(None, description="how the learning rate falls")
    poly_exponent: float | None = Field(None, gt=0, description="exponent of the falling learning rate")
    warmup_share: float | None = Field(None, ge=0, lt=1, description="share of the training with a rising rate")
    cooldown_share: float | None = Field(None, gt=0, le=1, description="share of the training with a falling rate")
    gradient_clip: float | None = Field(None, gt=0, description="largest norm of the gradient")
    deep_supervision: bool | None = Field(None, description="a loss at every decoder level but the lowest")
    weight_average: float | None = Field(None, ge=0, lt=1, description="decay of the averaged weights; 0 is off")
    validation_share: float | None = Field(None, ge=0, lt=1, description="share of the time spent on validation")
    foreground_share: float | None = Field(None, ge=0, le=1, description="share of samples forced to hold foreground")
    oversampling: Literal["fixed", "probabilistic"] | None = Field(
        None, description="that share by place in the batch, or each sample with that probability"
    )
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="arithmetic of the forward pass")
    channels_last: bool | None = Field(None, description="memory layout of the network; measured when absent")
    deterministic: bool | None = Field(None, description="only kernels that repeat themselves to the bit (on CUDA)")
    compiled: bool | None = Field(None, description="network and loss by torch.compile; measured when absent")
    cuda_graph: bool | None = Field(None, description="steps as a CUDA graph; measured when absent")
    trackers: tuple[Literal["tensorboard", "mlflow"] | PluginName, ...] = Field(
        (), description="tensorboard, mlflow, or PACKAGE:NAME of a plug-in, which follow the trainings"
    )
    checkpoint_seconds: float = Field(60.0, gt=0, description="seconds between two saved states")

    @property
    def values(self) -> dict[str, Any]:
        """What was set of the recipe, by name."""
        others = {"start_from", "steps", "checkpoint_seconds", "trackers", "compiled", "cuda_graph"}
        return self.model_dump(exclude=others, exclude_none=True)

    @model_validator(mode="after")
    def _check(self) -> TrainingOptions:
        if self.schedule == "cosine" and self.poly_exponent is not None:
            raise ValueError("poly_exponent is of the schedule poly, but schedule is cosine; set one of them")
        terms = (self.loss or "").split("+")
        for name in self.values:
            term = name.partition("_")[0]
            if term in LOSS_TERMS and term not in terms:
                raise ValueError(f"{name} needs the term {term} in training.loss; add it, or leave {name} out")
        return self


class AugmentationOptions(Settable):
    """Overrides of the augmentation: all of it, or single values under the names of the plan."""

    strength: Literal["none", "weak", "stock", "strong"] | None = Field(None, description="augmentation family")
    rotation_degrees: float | None = Field(None, ge=0, le=180, description="largest angle; the patch cut out follows")
    dummy_2d: bool | None = Field(None, description="transform volumes in their plane only")
    plugins: tuple[PluginName, ...] | None = Field(
        None, description="augmentations of plug-ins, PACKAGE:NAME, in order"
    )
    rotation_probability: _Probability | None = None
    scaling_probability: _Probability | None = None
    noise_probability: _Probability | None = None
    blur_probability: _Probability | None = None
    blur_channel_probability: _Probability | None = None
    brightness_probability: _Probability | None = None
    contrast_probability: _Probability | None = None
    low_resolution_probability: _Probability | None = None
    low_resolution_channel_probability: _Probability | None = None
    inverted_gamma_probability: _Probability | None = None
    gamma_probability: _Probability | None = None
    quarter_turn_probability: _Probability | None = None
    axis_swap_probability: _Probability | None = None
    offset_probability: _Probability | None = None
    blank_probability: _Probability | None = None
    shading_probability: _Probability | None = None
    local_gamma_probability: _Probability | None = None
    sharpening_probability: _Probability | None = None
    scaling_range: _Range | None = None
    noise_std_range: _Range | None = None
    blur_sigma_range: _Range | None = None
    brightness_range: _Range | None = None
    contrast_range: _Range | None = None
    low_resolution_range: _Range | None = None
    gamma_range: _Range | None = None
    previous_operator_probability: _Probability | None = None
    previous_operator_label_probability: _Probability | None = None
    previous_radius_range: _Radii | None = None
    previous_removal_probability: _Probability | None = None
    previous_removal_label_probability: _Probability | None = None
    previous_removed_share: _Probability | None = None

    @property
    def values(self) -> dict[str, Any]:
        """What was set, by name, without `strength`."""
        return self.model_dump(exclude={"strength"}, exclude_none=True)

    @model_validator(mode="after")
    def _check(self) -> AugmentationOptions:
        if self.strength == "none" and self.values:
            raise ValueError(f"strength none leaves nothing of {', '.join(self.values)}; leave one of them out")
        return self


class InferenceOptions(Settable):
    """Overrides of prediction."""

    tile_step: float = Field(0.5, ge=SMALLEST_TILE_STEP, le=1, description="tile step as a share of the patch")
    mirror: bool | None = Field(None, description="test-time mirroring")


class SelectionOptions(Settable):
    """How the model is chosen among what was trained."""

    rule: SelectionRule | None = Field(
        None,
        description="beyond-chance: what costs more must win by more than chance; nnunet: the highest mean Dice wins;"
        " unset: nnunet for stock and resenc-*",
    )


class ModelOptions(Settable):
    """What people say of the model; its card names what is unstated."""

    licence: str | None = Field(None, description="under which others may use it, such as CC-BY-4.0")
    intended_use: str | None = Field(None, description="what it is for")
    limits: str | None = Field(None, description="where it is known to fail")
    authors: str | None = Field(None, description="who made it")
    data_origin: str | None = Field(None, description="where its training images come from")


class Options(Settable):
    """Everything a user can ask for. A value or name that is none of it raises `InputError`."""

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
    selection: SelectionOptions = SelectionOptions()
    model: ModelOptions = ModelOptions()

    @property
    def selection_rule(self) -> SelectionRule:
        """How the model is chosen."""
        return self.selection.rule or ("beyond-chance" if self.preset == "auto" else "nnunet")

    def with_settings(self, settings: Sequence[str]) -> Options:
        """Return a copy with ``key=value`` settings applied; values are JSON, words, or comma-separated lists.

        Raises `InputError` naming the nearest known key for an unknown one, and the reason for a refused value.
        """
        require_settings(settings)
        tree = self.model_dump()
        known = dict(leaves(type(self)))
        for setting in settings:
            key, separator, text = setting.partition("=")
            if not separator:
                raise InputError(f"--set expects KEY=VALUE, got {setting!r}", "for example --set training.steps=5000")
            if key not in known:
                raise unknown(key, list(known))
            node = tree
            *parents, leaf = key.split(".")
            if len(parents) > 1 and parents[1] in CONFIGURATION_NAMES:
                parents.insert(1, BY_NAME)
            for parent in parents:
                node = node.setdefault(parent, {})
            value = parse_value(text)
            if parents[:1] == ["model"] and not isinstance(value, str | None):
                value = text  # sentences have commas, and may be numbers
            is_list = "tuple" in str(known[key])
            node[leaf] = [value] if is_list and value is not None and not isinstance(value, list) else value
        return Options.model_validate(tree)

    @classmethod
    def known_keys(cls) -> list[str]:
        """Return every dotted key that can be set."""
        return [key for key, _ in leaves(cls)]


_NUMBER = r"(\d+(?:\.\d+)?)"
_TIME = re.compile(rf"(?:{_NUMBER} ?d)? ?(?:{_NUMBER} ?h)? ?(?:{_NUMBER} ?m(?:in)?)? ?(?:{_NUMBER} ?s(?:ec)?)?")


def require_settings(settings: Any) -> None:
    """Raise `InputError` for what is no list of texts."""
    if isinstance(settings, str) or not (
        isinstance(settings, Sequence) and all(isinstance(one, str) for one in settings)
    ):
        raise InputError(f"settings are a list of KEY=VALUE texts, got {settings!r}", 'give ["training.steps=5000"]')


def time_setting(time: str | float) -> str:
    """Return the setting of the time of a run, given as in `parse_seconds` or in seconds; ``+30m`` adds to what it was.

    ``time_s=+1800`` is made the sum by the project that it is for, see `segfit.project.added_time`.
    """
    if not isinstance(time, str):
        return f"time_s={time}"
    text = time.strip()
    return f"time_s=+{parse_seconds(text[1:])}" if text.startswith("+") else f"time_s={parse_seconds(text)}"


def parse_seconds(text: str) -> float:
    """Return the seconds of a time: ``45s``, ``20min``, ``20m``, ``2h``, ``2h30m``, ``1.5h``, ``3d``.

    A bare number is seconds. Raises `InputError` otherwise, also where a number without a unit follows one with a unit.
    """
    words = text.strip().lower()
    match = _TIME.fullmatch(f"{words}s" if re.fullmatch(_NUMBER, words) else words)
    if not match or not any(match.groups()):
        raise InputError(f"a time is written like 20min, 2h, 2h30m, 1.5h or 3d (90 is 90 seconds), got {text!r}")
    seconds = sum(float(v) * unit for v, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True) if v)
    if seconds <= 0:
        raise InputError(f"a time budget must be above zero, got {text!r}")
    return seconds
