"""What a network sees, what it is and how it is trained: specifications, pure data.

Plans, models and nnU-Net's files hold them; nothing here decides. Axis order is array order throughout. For a 2D
configuration on 3D data the first axis is the slice axis: it is kept as it is and the network sees the other two.

Numbers are bounded, far beyond what networks have, so that a damaged or made-up file is refused where it is read and
not where it takes all memory or time. All bounds are assumptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from segfit.files import GrownRecord, Record
from segfit.labels import Exchange
from segfit.options import LOGITS_NAME_IN_KEYS, LOGITS_NAMES, Loss, NetworkKind, NormalizationScheme
from segfit.plugins import PluginName

__all__ = [
    "LARGEST_MM",
    "MOST_PATCH_VOXELS",
    "SMALLEST_MM",
    "Acceleration",
    "AugmentationSpec",
    "Configuration",
    "IntensityStatistics",
    "Millimetres",
    "NetworkSpec",
    "Normalization",
    "PreprocessingSpec",
    "ResamplingSpec",
    "TrainingSpec",
]


MOST_PATCH_VOXELS = 2**28  # in 2D a picture of 16384 x 16384
SMALLEST_MM, LARGEST_MM = 1e-9, 1e9
Millimetres = Annotated[float, Field(ge=SMALLEST_MM, le=LARGEST_MM)]  # size of a voxel
_Intensity = Annotated[float, Field(ge=-3e38, le=3e38)]  # float32
_Voxels = Annotated[int, Field(ge=1, le=MOST_PATCH_VOXELS)]  # along one axis
_Channels = Annotated[int, Field(ge=1, le=2**16)]
_Stride = Annotated[int, Field(ge=1, le=64)]
_Kernel = Annotated[int, Field(ge=1, le=63)]
_Layers = Annotated[int, Field(ge=1, le=64)]  # of one stage
_MOST_STAGES = 16


class IntensityStatistics(Record):
    """Foreground intensities of one channel, an equal-weight mixture over cases."""

    mean: _Intensity
    median: _Intensity
    std: _Intensity
    min: _Intensity
    max: _Intensity
    percentile_00_5: _Intensity
    percentile_99_5: _Intensity


class Normalization(Record):
    """How one channel is normalised."""

    scheme: NormalizationScheme
    use_mask: bool = False  # zscore only: statistics and assignment inside the non-zero mask
    statistics: IntensityStatistics | None = None  # ct only


class ResamplingSpec(Record):
    """How one kind of volume is resampled. `method` "spline" is nnU-Net's default, "torch" its alternative."""

    method: Literal["spline", "torch", "none"] = "spline"
    order: Literal[0, 1, 3] = 3
    order_separate_axis: Literal[0, 1, 3] = 0
    force_separate: bool | None = None
    separate_threshold: float = Field(3.0, ge=0, le=1e9)


class PreprocessingSpec(Record):
    """Everything that determines the preprocessed arrays; its hash identifies them.

    `spacing_mm` has one entry per image axis after transposition; None keeps the case's own spacing on that axis
    (the slice axis of a 2D configuration on 3D data).
    """

    orientation: Literal["canonical", "stored"]
    transpose: tuple[int, ...]  # axis i of the result is axis transpose[i] of the image
    spacing_mm: tuple[Millimetres | None, ...]
    normalization: tuple[Normalization, ...]
    resample_image: ResamplingSpec = ResamplingSpec(order=3)
    resample_label: ResamplingSpec = ResamplingSpec(order=1)
    resample_logits: ResamplingSpec = Field(
        ResamplingSpec(order=1), validation_alias=LOGITS_NAMES, serialization_alias=LOGITS_NAME_IN_KEYS
    )

    @property
    def image_ndim(self) -> int:
        """Spatial axes of the preprocessed arrays (a 2D configuration on 3D data has 3)."""
        return len(self.transpose)

    @model_validator(mode="after")
    def _check(self) -> PreprocessingSpec:
        if sorted(self.transpose) != list(range(len(self.transpose))) or len(self.spacing_mm) != len(self.transpose):
            raise ValueError("transpose must be a permutation with one spacing per axis")
        if len(self.transpose) not in (2, 3):
            raise ValueError("transpose must have two or three axes")
        return self

    def target_mm(self, spacing_mm: Sequence[float]) -> tuple[float, ...]:
        """Return the voxel size that a case of another one is brought to, both after transposition."""
        return tuple(own if new is None else new for own, new in zip(spacing_mm, self.spacing_mm, strict=True))


class NetworkSpec(GrownRecord):
    """A U-Net, plain, with a residual encoder, or a MedNeXt. Lists run from full resolution to the bottleneck.

    `decoder_convs[0]` belongs to the lowest resolution, as in nnU-Net. `strides[0]` is all ones.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"norm", "plugin", "expansion"})
    kind: NetworkKind
    norm: Literal["instance", "batch"] = "instance"
    plugin: PluginName | None = None  # builds the network, guided by this topology, in place of the U-Net
    ndim: Literal[2, 3]
    in_channels: _Channels
    num_outputs: _Channels
    features: tuple[_Channels, ...] = Field(min_length=2, max_length=_MOST_STAGES)
    strides: tuple[tuple[_Stride, ...], ...]
    kernels: tuple[tuple[_Kernel, ...], ...]
    encoder_convs: tuple[_Layers, ...]  # convolutions (plain) or blocks (others) per stage
    decoder_convs: tuple[_Layers, ...]  # convolutions, MedNeXt: blocks
    expansion: _Layers = 2  # MedNeXt: features within a block to those of its input

    @property
    def num_stages(self) -> int:
        """Resolution levels, bottleneck included."""
        return len(self.features)

    @property
    def divisor(self) -> tuple[int, ...]:
        """Input sizes must be multiples of this, per axis."""
        total = [1] * self.ndim
        for stride in self.strides:
            total = [a * b for a, b in zip(total, stride, strict=True)]
        return tuple(total)

    @model_validator(mode="after")
    def _check(self) -> NetworkSpec:
        stages = len(self.features)
        if not (len(self.strides) == len(self.kernels) == len(self.encoder_convs) == stages):
            raise ValueError("features, strides, kernels and encoder_convs must have one entry per stage")
        if len(self.decoder_convs) != stages - 1:
            raise ValueError("decoder_convs must have one entry less than there are stages")
        if any(len(v) != self.ndim for v in (*self.strides, *self.kernels)):
            raise ValueError("strides and kernels must have one entry per axis")
        if any(number != 1 for number in self.strides[0]):
            raise ValueError("the first stride must be 1 along every axis")
        if any(number % 2 == 0 for kernel in self.kernels for number in kernel):
            raise ValueError("kernels must be odd")
        return self


class Configuration(Record):
    """One way to see the data: a resolution, a patch, a network."""

    name: str
    ndim: Literal[2, 3]
    patch_size: tuple[_Voxels, ...]
    batch_size: int = Field(ge=1, le=2**31)
    spacing_mm: tuple[Millimetres, ...]  # target spacing of the axes the network sees
    median_shape: tuple[Annotated[float, Field(gt=0, le=1e12)], ...]  # median image size there, may end in .5
    batch_dice: bool
    preprocessing: PreprocessingSpec
    network: NetworkSpec
    memory_estimate: int = Field(ge=0)  # feature-map elements of the closed-form estimate
    previous_stage: str | None = None
    next_stage: str | None = None

    @property
    def image_channels(self) -> int:
        """Channels of the image; in the second stage of a cascade the network has more inputs, one per label."""
        return len(self.preprocessing.normalization)

    @model_validator(mode="after")
    def _check(self) -> Configuration:
        if not self.ndim == self.network.ndim == len(self.patch_size) == len(self.spacing_mm) == len(self.median_shape):
            raise ValueError("patch_size, spacing_mm, median_shape and the network must have one entry per axis")
        if self.preprocessing.image_ndim < self.ndim:
            raise ValueError(f"the network sees {self.ndim} axes of images with {self.preprocessing.image_ndim}")
        if any(size % divisor for size, divisor in zip(self.patch_size, self.network.divisor, strict=True)):
            raise ValueError(f"patch_size must be a multiple of the strides' {list(self.network.divisor)}")
        if prod(self.patch_size) > MOST_PATCH_VOXELS:
            raise ValueError(f"patch_size must have at most {MOST_PATCH_VOXELS} voxels")
        return self


class AugmentationSpec(GrownRecord):
    """Probabilities and ranges of the augmentation; the defaults are nnU-Net's."""

    LATER: ClassVar[frozenset[str]] = frozenset(
        {"quarter_turn_probability", "axis_swap_probability", "offset_probability", "blank_probability"}
        | {"shading_probability", "local_gamma_probability", "sharpening_probability", "plugins"}
        | {"previous_operator_probability", "previous_operator_label_probability", "previous_radius_range"}
        | {"previous_removal_probability", "previous_removal_label_probability", "previous_removed_share"}
    )
    rotation_probability: float = 0.2
    rotation_degrees: float = 30.0  # symmetric range, per axis in 3D
    scaling_probability: float = 0.2
    scaling_range: tuple[float, float] = (0.7, 1.4)
    dummy_2d: bool = False  # spatial transforms in the plane only
    sample_patch: tuple[int, ...] = ()  # enlarged patch that is cut out before the spatial transform; () = patch
    noise_probability: float = 0.1
    noise_std_range: tuple[float, float] = (0.0, 0.1)
    blur_probability: float = 0.2
    blur_channel_probability: float = 0.5
    blur_sigma_range: tuple[float, float] = (0.5, 1.0)
    brightness_probability: float = 0.15
    brightness_range: tuple[float, float] = (0.75, 1.25)
    contrast_probability: float = 0.15
    contrast_range: tuple[float, float] = (0.75, 1.25)
    low_resolution_probability: float = 0.25
    low_resolution_channel_probability: float = 0.5
    low_resolution_range: tuple[float, float] = (0.5, 1.0)
    inverted_gamma_probability: float = 0.1
    gamma_probability: float = 0.3
    gamma_range: tuple[float, float] = (0.7, 1.5)
    quarter_turn_probability: float = 0.0  # this and what follows: `segfit.augmentation.strong`
    axis_swap_probability: float = 0.0
    offset_probability: float = 0.0
    blank_probability: float = 0.0
    shading_probability: float = 0.0
    local_gamma_probability: float = 0.0
    sharpening_probability: float = 0.0
    plugins: tuple[PluginName, ...] = ()  # augmentations that follow
    mirror_axes: tuple[int, ...] = ()  # network axes, each flipped with probability 0.5
    exchange: Exchange | None = None  # labels that change places in the samples flipped along its axis
    masked_channels: tuple[int, ...] = ()  # image channels set to 0 outside the non-zero mask afterwards
    # In the second stage of a cascade, on what the first one predicted: operators with a ball, missing components.
    previous_operator_probability: float = 0.0
    previous_operator_label_probability: float = 0.0  # of each label of such a sample
    previous_radius_range: tuple[float, float] = (0.0, 0.0)  # of the ball, voxels
    previous_removal_probability: float = 0.0
    previous_removal_label_probability: float = 0.0
    previous_removed_share: float = 0.0  # of the patch; components as large as that stay


class Acceleration(Record):
    """How a GPU runs the steps of a training; they differ by rounding only, so it is in the identity of none."""

    compiled: bool = False  # network and loss, by `torch.compile`
    graph: bool = False  # they are one CUDA graph, forwards and backwards


class TrainingSpec(GrownRecord):
    """The training recipe of one configuration; the defaults are nnU-Net's, those of its variants where it has any."""

    LATER: ClassVar[frozenset[str]] = frozenset(
        {"loss", "topk_share", "focal_exponent", "tversky_alpha", "tversky_beta", "cldice_steps"}
        | {"schedule", "oversampling", "deterministic"}
    )
    loss: Loss = "dice+ce"
    topk_share: float = 0.1  # of all voxels of a batch
    focal_exponent: float = 2.0
    tversky_alpha: float = 0.3
    tversky_beta: float = 0.7
    cldice_steps: int = 3
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    learning_rate: float = 1e-2
    momentum: float = 0.99
    weight_decay: float = 3e-5
    schedule: Literal["poly", "cosine"] = "poly"
    poly_exponent: float = 0.9
    warmup_share: float = 0.0  # share of the budget with a linearly rising learning rate
    cooldown_share: float = 1.0  # share of the budget, its end, with a falling learning rate; constant before
    gradient_clip: float = 12.0
    foreground_share: float = 0.33
    oversampling: Literal["fixed", "probabilistic"] = "fixed"
    deep_supervision: bool = True
    weight_average: float = 0.0  # decay of the exponential moving average of the weights; 0 = off
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    deterministic: bool = False  # only kernels that give the same bits again
    validation_share: float = 0.05  # share of the time spent on validation during training
    augmentation: AugmentationSpec = AugmentationSpec()

    @property
    def falling(self) -> float | None:
        """The exponent of the falling learning rate; None for a cosine."""
        return None if self.schedule == "cosine" else self.poly_exponent
